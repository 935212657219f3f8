"""Figures of a server model on the server's metrics endpoint, for models without an engine.

Invariant: a figure only costs a call into the server when it changed.
"""

import threading
from collections.abc import Mapping
from typing import Any


class Counters:
    """Counters by name, labelled with the model's name. Safe to share between threads."""

    def __init__(self, pb_utils: Any, model: str, described: Mapping[str, str]) -> None:
        """`described`: name -> what it counts. Created once for each loaded model."""
        kind = pb_utils.MetricFamily.COUNTER
        # The server forgets a metric whose family object is collected.
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=kind) for name, text in described.items()
        }
        self._metrics = {name: family.Metric(labels={"model": model}) for name, family in self._families.items()}
        self._seen = dict.fromkeys(described, 0)
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Count more."""
        if count:
            with self._lock:
                self._seen[name] += count
                self._metrics[name].increment(count)

    def show(self, totals: Mapping[str, int]) -> None:
        """Bring counters to totals that were counted elsewhere."""
        with self._lock:
            for name, total in totals.items():
                if total > self._seen[name]:
                    self._metrics[name].increment(total - self._seen[name])
                    self._seen[name] = total

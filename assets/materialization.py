"""What every asset reports (time, whether it was there already, digest, figures, preview, plot) and every check.

Invariant: nothing large goes to the event log: a preview has at most 8 rows, a plot at most 50 KB.
"""

import base64
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

STAGES = logging.getLogger("gr.stages")
PREVIEW_ROWS = 8
MAX_PLOT_BYTES = 50_000
MAX_FAULTS = 5
# Instead of the name of a run in MLflow.
UNTRACKED = "MLflow did not take it: the log says why, and the same again logs it later"


class Stage:
    """One asset's execution; logs its start and its end on `gr.stages`, with the record attribute `stage`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.monotonic()
        STAGES.info("event=started stage=%s", name, extra={"stage": {"name": name, "event": "started"}})

    def finish(
        self,
        *,
        digest: str,
        reused: bool,
        figures: Mapping[str, int | float | str],
        preview: str = "",
        plot: bytes | None = None,
    ) -> dg.MaterializeResult:
        """Return the materialisation with all its metadata."""
        seconds = time.monotonic() - self.started
        fields = {
            "name": self.name,
            "event": "finished",
            "seconds": seconds,
            "reused": reused,
            "figures": dict(figures),
        }
        STAGES.info(
            "event=finished stage=%s seconds=%.1f reused=%s %s",
            self.name,
            seconds,
            reused,
            dict(figures),
            extra={"stage": fields},
        )
        metadata: dict[str, Any] = {**figures, "digest": digest, "reused": reused, "seconds": round(seconds, 2)}
        if preview:
            metadata["preview"] = dg.MetadataValue.md(preview)
        if plot is not None:
            metadata["plot"] = dg.MetadataValue.md(picture(plot))
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(digest))


def verdict(
    name: str,
    faults: Sequence[str],
    passed: str,
    *,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    metadata: Mapping[str, Any] | None = None,
) -> dg.AssetCheckResult:
    """Return the result of a check (name: asset and check), failed if there are faults; a failed one is logged.

    On `gr.stages` a failure is the event `check_failed`, or `check_warned` where the severity is WARN: blocks nothing.
    """
    said = "; ".join(faults[:MAX_FAULTS])
    if faults:
        warns = severity is dg.AssetCheckSeverity.WARN
        fields = {"name": name, "event": "check_warned" if warns else "check_failed", "reason": said}
        level = logging.WARNING if warns else logging.ERROR
        STAGES.log(level, "event=%s check=%s reason=%s", fields["event"], name, said, extra={"stage": fields})
    return dg.AssetCheckResult(
        passed=not faults,
        check_name=name.split()[-1],
        severity=severity,
        description=said or passed,
        metadata=metadata,
    )


def picture(png: bytes) -> str:
    """Return a PNG as a Markdown image that needs no file. Raises RuntimeError above 50 KB."""
    if len(png) > MAX_PLOT_BYTES:
        raise RuntimeError(f"a plot takes {len(png)} bytes, at most {MAX_PLOT_BYTES} may go to the event log")
    return f"![plot](data:image/png;base64,{base64.b64encode(png).decode()})"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def preview_of(arrow: Any) -> str:
    """Return the first rows of a pyarrow Table as a Markdown table."""
    head = arrow.slice(0, PREVIEW_ROWS).to_pylist()
    return table(arrow.column_names, [list(row.values()) for row in head])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return (text if len(text) <= 60 else text[:57] + "...").replace("|", "\\|")

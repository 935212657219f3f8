"""What `gr metrics` and `gr alerts` do: figures at an address for Prometheus, and what was wrong lately in words.

Invariant: the address is on loopback; somebody else's monitoring comes through a proxy.
"""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from gr_platform.commands import services
from gr_platform.commands.dagster_figures import DagsterFigures
from gr_platform.lifecycle import alerts, platform_figures
from gr_platform.lifecycle.platform_metrics import Part, PlatformCollector

# The first reading loads Dagster, MLflow and the code location.
FIRST_S = 60.0


def registry_of(home: Path, dagster_home: Path) -> tuple[CollectorRegistry, PlatformCollector]:
    """Return the registry of a state folder's figures, and what gathers them."""
    parts = [Part(name="dagster", read=DagsterFigures(dagster_home).read), *platform_figures.parts(home)]
    collector, registry = PlatformCollector(parts), CollectorRegistry()
    registry.register(collector)
    return registry, collector


def serve_metrics(home: Path, dagster_home: Path, port: int) -> Iterator[str]:
    """Serve the figures until Ctrl-C or SIGTERM and yield the address. Raises UserError if the port is taken."""
    services.require_free(port, services.PLATFORM_METRICS)
    registry, collector = registry_of(home, dagster_home)
    collector.gather(FIRST_S, one_by_one=True)
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    server, thread = start_http_server(port, addr=services.HOST, registry=registry)
    yield f"metrics  http://{services.HOST}:{port}/metrics"
    yield "Ctrl-C stops it"
    try:
        end.wait()
    except KeyboardInterrupt:
        yield "stopped"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def alerts_report(home: Path, limit: int) -> Iterator[str]:
    """Yield the last alerts, oldest first, then how many there were."""
    found = alerts.read(home, limit)
    for alert in found:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(alert.at_ms / 1000))
        if alert.kind == alerts.HOOK:
            yield f"{moment}  ! alert hook failed: {alert.text}"
            continue
        yield f"{moment}  {alert.kind}  {alert.subject}" + (f"  (run {alert.run})" if alert.run else "")
        yield from (f"{'':21}{line}" for line in alert.text.splitlines())
    if not found:
        yield "no alert was sent yet"
        return
    yield f"times are UTC; {found[-1].num_alerts} alerts so far, {found[-1].num_failed_hooks} calls of a hook failed"

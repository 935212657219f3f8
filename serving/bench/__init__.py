"""`gr bench serving`: what serving costs, measured on a model server of its own.

Invariant: nothing is imported here before it is asked for, because the load generator starts as a module of this
package and must not wait for torch.
"""

from typing import Any


def run(num_threads: int) -> list[dict[str, Any]]:
    """Return the rows of all parts: speed of the engine, load, perf_analyzer, swaps (about 8 minutes).

    Raises UserError if a server or a tool does not do its part.
    """
    from gr_platform import settings
    from serving.bench import speed, wire

    # A folder without the tool is said before minutes have gone by.
    settings.perf_analyzer()
    return [*speed.run(num_threads), *wire.rows(num_threads), *traffic(num_threads)]


def traffic(num_threads: int) -> list[dict[str, Any]]:
    """Return the rows that need visitors: the model of the speed table, users of up to 256 events."""
    from serving.bench import load, models, perf, swap
    from serving.bench.stage import stage

    with stage(models.speed_table(max_events=256), num_threads=num_threads) as ready:
        rows, saturation = load.rows(ready)
        return [*rows, *perf.rows(ready, saturation), *swap.rows(ready, saturation)]

"""What `gr clean` says: each thing that goes, how large and how old, and what that frees.

Invariant: what is printed is what `retention.clean` deleted, or would.
"""

from collections.abc import Iterator
from pathlib import Path

from gr_platform.commands.messages import spelt_out

_DAY_S = 86_400


def report(home: Path, dataset: str | None, *, dry_run: bool) -> Iterator[str]:
    """Yield the lines of `gr clean`. Raises UserError as `retention.clean` does, or without a data set."""
    from gr_platform.events.landing import active_dataset, load_declaration
    from gr_platform.lifecycle import options, retention

    ds = dataset or active_dataset(home)
    load_declaration(home, ds)
    keep = options.read(home).retention
    found = retention.clean(home, ds, dry_run=dry_run)
    for each in found.doomed:
        yield f"{'would delete' if dry_run else 'deleted'}  {each.what}  {size(each.num_bytes)}, {age(each.age_s)} old"
    for sentence in found.left_alone:
        yield f"left alone  {spelt_out(sentence)}"
    kept = f"{found.num_kept} results of {ds} stay: current, served, named by an alias, read by one of these"
    yield f"{kept}, or younger than {keep.keep_days:g} days"
    if found.doomed:
        yield f"{'would free' if dry_run else 'freed'} {size(found.num_bytes)}"
    else:
        yield "nothing to delete"


def size(num_bytes: float) -> str:
    """Return bytes in their largest whole unit: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def age(seconds: float) -> str:
    """Return an age in days, or in hours below two."""
    seconds = max(seconds, 0.0)
    return f"{seconds / 3600:.0f} hours" if seconds < 2 * _DAY_S else f"{seconds / _DAY_S:.0f} days"

"""What `gr fetch` says: the list of data sets, the terms before a download, and what to run after it.

Invariant: the terms of use are shown before the first byte is asked for.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from gr_platform import storage
from gr_platform.commands.messages import pasteable
from gr_platform.events.fetch import SOURCES, fetch, shown_bytes, source_of


def report(name: str | None, out: Path) -> Iterator[str]:
    """Yield the lines of `gr fetch`; the data set is downloaded between them. Raises UserError as `fetch` does."""
    if name is None:
        for each, source in SOURCES.items():
            yield f"{each:<14} {shown_bytes(source.download_bytes):>7}  {source.title}"
        yield "next: gr fetch NAME"
        return
    yield f"{name}: {source_of(name).title}; terms of use: {source_of(name).terms}"
    log_file = fetch(name, out)
    yield f"{log_file.name}: {shown_bytes(log_file.stat().st_size)}, sha256 {storage.file_sha256(log_file)}"
    yield f"next: gr import {shlex.quote(pasteable(log_file))} --declaration {name}"

"""What `gr import` says: how a log was understood, or with --dry-run what an import would read and quarantine.

Invariant: what comes from a log is shown as text, never as markup; nothing is computed here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.events.feature_import import WantedFeatures, import_features
from gr_platform.events.features import describe
from gr_platform.events.landing import active_dataset, folder_dataset, import_file, import_folder, preview_file
from gr_platform.events.ledger import LandedFile
from gr_platform.events.preview import Preview
from gr_platform.events.quality import RULES
from gr_platform.events.readers import log_files
from gr_platform.events.request import Wanted

SHOWN_COLUMNS = 30
SHOWN_CHARS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One call of `gr import`: a log or a folder of logs, and what was named (the fields of `Wanted`).

    kind: log, or the kind of side information that the file holds.
    """

    source: Path
    home: Path
    dry_run: bool
    named: dict[str, Any]
    kind: str = "log"

    @staticmethod
    def of(home: Path, options: Mapping[str, Any]) -> "Import":
        """Return the call that options of these names make; others are left out."""
        own = {name: options[name] for name in ("source", "dry_run", "kind")}
        return Import(home=home, named={each.name: options[each.name] for each in fields(Wanted)}, **own)


def report(asked: Import) -> Iterator[str]:
    """Yield the lines of `gr import`; the work is done between them. Raises UserError as the import does."""
    if asked.kind != "log":
        yield from _features(asked)
        return
    if asked.dry_run:
        named, paths = asked.named, [asked.source]
        if asked.source.is_dir():
            named = named | {"dataset": folder_dataset(asked.source, home=asked.home, **named)}
            paths = log_files(asked.source)
        for path in paths:
            yield from _previewed(preview_file(path, home=asked.home, **named))
        yield "nothing was written; import it by the same command without --dry-run"
        return
    if asked.source.is_dir():
        landed = import_folder(asked.source, home=asked.home, **asked.named)
    else:
        landed = [import_file(asked.source, home=asked.home, **asked.named)]
    for file in landed:
        state = "was imported before" if file.reused else "imported"
        where = f"data set {file.dataset}, date {file.ingest_date}"
        yield f"{file.entry.source_name} {state}: {file.num_rows:,} rows in {where}"
    yield from _understood(landed[-1])
    yield "next: gr materialize"


def _features(asked: Import) -> Iterator[str]:
    """Yield the lines of an import of side information. Raises UserError as it does, or for an option of logs alone."""
    own = {"item-features": "item_column", "user-features": "user_column"}.get(asked.kind, "")
    taken = {"dataset", "format", "time_column", "time_unit", own}
    foreign = [name for name, value in asked.named.items() if name not in taken and value not in (None, "auto")]
    if foreign:
        raise UserError(f"--{foreign[0].replace('_', '-')} is an option of logs; --as {asked.kind} does not take it")
    wanted = WantedFeatures(
        kind=asked.kind,
        dataset=asked.named.get("dataset") or settings.dataset() or active_dataset(asked.home),
        format=asked.named.get("format", "auto"),
        id_column=asked.named.get(own),
        time_column=asked.named.get("time_column"),
        time_unit=asked.named.get("time_unit", "auto"),
    )
    found = import_features(asked.source, wanted, home=asked.home, dry_run=asked.dry_run)
    entry = found.entry
    state = "was imported before" if found.reused else "would be imported" if asked.dry_run else "imported"
    yield f"{entry.source_name} {state}: {entry.num_rows:,} rows of {entry.kind} in data set {found.dataset}"
    yield f"  {'id':<12} {entry.id_column}"
    untimed = "none: the properties hold at all times"
    yield f"  {'time':<12} {untimed if entry.time_column is None else f'{entry.time_column} ({entry.time_unit})'}"
    yield f"  {'properties':<12} {', '.join(entry.properties)}"
    if entry.num_repeated:
        yield f"  {'repeated':<12} {entry.num_repeated:,} (rows with a later one of their id: the last one counts)"
    yield f"  {'quarantined':<12} {describe(entry.kind, entry.quarantined) or 'none'}"


def _understood(file: LandedFile) -> Iterator[str]:
    yield f"understood as (options and landing/{file.dataset}/dataset.toml in the state folder override it):"
    for name, value in file.guesses.items():
        yield f"  {name:<12} {value}"


def _previewed(found: Preview) -> Iterator[str]:
    entry = found.file.entry
    yield f"{entry.source_name}: {entry.num_rows:,} rows, {entry.num_bytes / 1e6:,.1f} MB, {entry.format}"
    shown = list(found.source_columns.items())[:SHOWN_COLUMNS]
    more = len(found.source_columns) - len(shown)
    yield f"columns: {', '.join(f'{name} {kind}' for name, kind in shown)}" + (f" and {more} more" if more else "")
    yield from _understood(found.file)
    yield f"declaration, written as landing/{found.file.dataset}/dataset.toml:"
    yield from (f"  {line}" for line in found.file.declaration.to_toml().splitlines())
    yield "first events:"
    yield from _table(found.events)
    num_broken = sum(broken.num_rows for broken in found.broken.values())
    yield f"quarantined: {num_broken:,} of {entry.num_rows:,} rows; the first of each rule as found:"
    for rule, broken in found.broken.items():
        yield f"{rule}: {broken.num_rows:,} rows ({RULES[rule][1]})"
        yield from _table(broken.examples)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield rows as aligned columns, one line a row."""
    names = list(rows[0]) if rows else []
    texts = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[place]) for line in texts) for place in range(len(names))]
    for line in texts if rows else []:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def _cell(value: Any) -> str:
    text = "-" if value is None else repr(str(value))[1:-1]  # control characters must not reach a terminal
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."

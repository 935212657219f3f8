"""The ledger of landed files: what was imported into which data set, when, and how its columns are to be read.

Invariant: an entry (`<first 16 digits of the source's sha256>.json`) is written after the file it describes, which
is named by its own content and never changes, so what is listed is complete whenever a process dies.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events import catalogue
from gr_platform.events.declaration import Declaration, check_name

DECLARATION = "dataset.toml"
LEDGER_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the ledger. sequence counts a data set's files from 0 in the order they were first landed.

    sha256, num_bytes: of the file as it came; landed_sha256: of its landed copy, the same for Parquet. columns:
    canonical name -> column; types: every column of the landed copy -> DuckDB type. ratings: the action is
    `rate_<value>`. num_forgotten: rows whose cells `gr forget` emptied.
    """

    source_name: str
    sha256: str
    landed_sha256: str
    num_bytes: int
    num_rows: int
    ingest_date: str
    sequence: int
    landed_at_ms: int
    format: str
    columns: dict[str, str]
    types: dict[str, str]
    ratings: bool
    time_unit: str
    actions: list[str]
    guesses: dict[str, str]
    num_forgotten: int = 0
    state: Literal["landed"] = "landed"
    schema_version: int = LEDGER_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class LandedFile:
    """A landed log. path: its Parquet, with the log's own columns (`columns.landed_query` gives them their meaning).

    reused: the same file with the same meaning was there already. guesses: canonical name -> what was taken for it.
    """

    dataset: str
    path: Path
    sha256: str
    num_rows: int
    ingest_date: str
    reused: bool
    declaration: Declaration
    guesses: dict[str, str]
    entry: Entry


def landed_files(home: Path, ds: str) -> list[LandedFile]:
    """Return the landed files of a data set in the order they came in. Raises UserError if there are none."""
    declaration = load_declaration(home, ds)
    folder = home / "landing" / ds
    return [landed_file(folder, entry, declaration, reused=True) for entry in ledger_entries(folder)]


def load_declaration(home: Path, ds: str) -> Declaration:
    """Return the declaration of an imported data set. Raises UserError if there is no such data set."""
    path = home / "landing" / check_name(ds) / DECLARATION
    if not path.is_file():
        known = sorted(found.parent.name for found in (home / "landing").glob(f"*/{DECLARATION}"))
        raise UserError(
            f"there is no data set {ds!r} (imported: {', '.join(known) or 'none'}); run gr import FILE first"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{DECLARATION} of {ds} is not UTF-8 text; mend it or import the data again") from None
    return Declaration.from_toml(text)


def active_dataset(home: Path) -> str:
    """Return the name of the data set imported last. Raises UserError if nothing was imported."""
    path = home / "landing" / "active"
    if not path.is_file():
        raise UserError("nothing was imported yet; run gr import FILE, or gr demo for simulated data")
    try:
        return check_name(path.read_text(encoding="utf-8").strip())
    except ValueError:
        raise UserError(
            "$GR_HOME/landing/active does not name a data set; name one with --dataset, or import a log again"
        ) from None


def titles(home: Path, ds: str) -> dict[int | str, str]:
    """Return item id (int or str, as declared) -> title, {} where the data set has no catalogue."""
    declaration = load_declaration(home, ds)
    texts = catalogue.load_titles(home / "landing" / ds)
    if declaration.item_id_type == "string":
        return {item: title for item, title in texts.items()}  # noqa: C416 - dict() would keep the narrower key type
    return {int(item): title for item, title in texts.items() if item.lstrip("-").isdecimal()}


def publish(
    home: Path,
    folder: Path,
    built: Path,
    entry: Entry,
    declaration: Declaration,
    texts: dict[str, str],
    *,
    activate: bool = True,
) -> None:
    """Move a landed file into place; its ledger entry comes after everything it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    built.replace(folder / _landed_name(entry))
    if texts:
        catalogue.write_titles(folder, texts)
    storage.write_text(folder / DECLARATION, declaration.to_toml())
    storage.write_text(folder / _entry_name(entry), json.dumps(asdict(entry), indent=1, sort_keys=True) + "\n")
    if activate:
        storage.write_text(home / "landing" / "active", declaration.name + "\n")
    named = {_landed_name(each) for each in ledger_entries(folder)}
    for path in folder.glob("*.parquet"):
        if path.name not in named and path.name != catalogue.FILE:
            path.unlink()


def remove(file: LandedFile) -> None:
    """Delete a landed file, its ledger entry first; the caller is alone in the landing folder."""
    folder = file.path.parent
    (folder / _entry_name(file.entry)).unlink(missing_ok=True)
    # Equal bytes that came under two names are one file.
    if all(_landed_name(each) != file.path.name for each in ledger_entries(folder)):
        file.path.unlink(missing_ok=True)


def is_intact(file: LandedFile) -> bool:
    """Return whether the landed copy is there, byte for byte."""
    return file.path.is_file() and storage.file_sha256(file.path) == file.entry.landed_sha256


def ledger_entries(folder: Path) -> list[Entry]:
    """Return the ledger of a data set's landing folder in order, [] if there is none."""
    entries = []
    for path in folder.glob("*.json"):
        damaged = UserError(
            f"$GR_HOME/landing/{folder.name}/{path.name} is damaged; delete it and import its log again"
        )
        try:
            fields = storage.read_object(path)
        except ValueError:
            raise damaged from None
        if "schema_version" in fields and fields["schema_version"] != LEDGER_VERSION:
            raise UserError(
                f"data set {folder.name} was landed by another release (schema version {fields.get('schema_version')}, "
                f"this one reads {LEDGER_VERSION}); import its files again under another --dataset"
            )
        try:
            entries.append(Entry(**fields))
        except TypeError:
            raise damaged from None
    return sorted(entries, key=lambda entry: entry.sequence)


def landed_file(folder: Path, entry: Entry, declaration: Declaration, *, reused: bool) -> LandedFile:
    """Return the landed file that a ledger entry describes."""
    return LandedFile(
        dataset=folder.name,
        path=folder / _landed_name(entry),
        sha256=entry.sha256,
        num_rows=entry.num_rows,
        ingest_date=entry.ingest_date,
        reused=reused,
        declaration=declaration,
        guesses=entry.guesses,
        entry=entry,
    )


def _entry_name(entry: Entry) -> str:
    return f"{entry.sha256[:16]}.json"


def _landed_name(entry: Entry) -> str:
    return f"{entry.landed_sha256[:16]}.parquet"

"""`gr forget`: one person's events leave the landed logs, everything made from them, and what the server keeps.

Invariant: a landed row keeps its number and loses every cell, so the verdicts on all other rows stay as they were and
the erased ones are counted in quarantine. A run that was killed is finished by running it again. What is written about
it is a keyed hash, which tells whether a known id was forgotten, not who was.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

import hashlib
import json
import secrets
import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events import features
from gr_platform.events.columns import id_sql
from gr_platform.events.database import connect, literal, parquet_of, quoted
from gr_platform.events.declaration import IdType
from gr_platform.events.forget_served import erase_served
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import LandedFile, landed_files, load_declaration
from gr_platform.events.ledger import publish

RECORD = "forgotten"
_STAGING = ".forgetting-"
LANDING_WAIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What was erased: rows, the names of the landed files and of the server's stores; date of the record."""

    dataset: str
    num_rows: int
    files: list[str]
    date: str


def forget(home: Path, ds: str, user_id: str) -> Forgotten:
    """Return what was erased of a user: landed cells, events, sequences, tables that name users, the server's rows.

    Models, bundles and registered versions that learned from the events are not touched. Raises UserError if the data
    set has no such user and never had, or another program works on the state folder.
    """
    declaration = load_declaration(home, ds)
    if declaration.user_id_type == "int64" and str(_integer(user_id)) != user_id:
        raise UserError(f"user {user_id!r} is not an integer, but the users of {ds} are")
    with storage.exclusive(home, "stages"), storage.exclusive(home, "landing", wait_s=LANDING_WAIT_S):
        record = _Record(home / "landing" / ds)
        erased = {
            file.entry.source_name: count for file in landed_files(home, ds) if (count := _erase(home, file, user_id))
        }
        for name, count in _erase_features(home, ds, user_id).items():
            erased[name] = erased.get(name, 0) + count
        erased |= erase_served(home, ds, user_id, declaration.user_id_type)
        known = record.date_of(user_id)
        if not erased and known is None:
            raise UserError(f"data set {ds} has no events of user {user_id}, and forgot none; nothing was changed")
        date = datetime.now(UTC).date().isoformat()
        if erased:
            record.add(user_id, date, sum(erased.values()))
        _make_again(home, ds)
    return Forgotten(
        dataset=ds, num_rows=sum(erased.values()), files=sorted(erased), date=date if erased else str(known)
    )


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _erase(home: Path, file: LandedFile, user_id: str) -> int:
    """Empty every cell of the user's rows in a landed file; return their number."""
    entry = file.entry
    column = entry.columns["user_id"]
    with tempfile.TemporaryDirectory(dir=home, prefix=_STAGING) as name:
        built = Path(name) / "landed.parquet"
        theirs = _is_theirs(column, entry.types[column], file.declaration.user_id_type, user_id)
        if count := _write_emptied(home, file.path, theirs, built):
            changed = replace(
                entry, landed_sha256=storage.file_sha256(built), num_forgotten=entry.num_forgotten + count
            )
            publish(home, home / "landing" / file.dataset, built, changed, file.declaration, {}, activate=False)
    return count


def _erase_features(home: Path, ds: str, user_id: str) -> dict[str, int]:
    """Empty every cell of the user's rows in landed slow series of users; return file -> their number."""
    erased = {}
    for file in features.feature_files(home, ds, "user-features"):
        entry = file.entry
        with tempfile.TemporaryDirectory(dir=home, prefix=_STAGING) as name:
            built = Path(name) / "landed.parquet"
            theirs = _is_theirs(entry.id_column, entry.types[entry.id_column], file.id_type, user_id)
            if count := _write_emptied(home, file.path, theirs, built):
                changed = replace(
                    entry, landed_sha256=storage.file_sha256(built), num_forgotten=entry.num_forgotten + count
                )
                features.publish(file.path.parent, built, changed)
                erased[entry.source_name] = count
    return erased


def _is_theirs(column: str, source_type: str, id_type: IdType, user_id: str) -> str:
    """Return SQL for whether a row is the user's."""
    wanted = user_id if id_type == "int64" else literal(user_id)
    return f"coalesce({id_sql(quoted(column), source_type, id_type)} = {wanted}, false)"


def _write_emptied(home: Path, path: Path, theirs: str, built: Path) -> int:
    """Write a landed file with the cells of some rows emptied, if there are any; return their number."""
    landed = parquet_of([path])
    with connect(home) as connection:
        count = int(connection.sql(f"SELECT count(*) FROM {landed} WHERE {theirs}").fetchall()[0][0])
        if count:
            emptied = ", ".join(
                f"CASE WHEN {theirs} THEN NULL ELSE {quoted(each)} END AS {quoted(each)}"
                for each in pq.read_schema(path).names
            )
            connection.execute(
                f"COPY (SELECT {emptied} FROM {landed}) TO {literal(str(built))} (FORMAT parquet, COMPRESSION zstd)"
            )
    return count


def _make_again(home: Path, ds: str) -> None:
    """Make events and sequences again, as far as there were any, and delete what held the old ones."""
    from gr_platform.sequences.sequentialize import sequentialize
    from gr_platform.sequences.user_series import build_user_series
    from gr_platform.sequences.vocabulary import build_vocabulary

    if (home / "events" / ds).is_dir():
        ingest(home, ds)
    parent = home / "sequences" / ds
    if (parent / "sequences.current").is_file():
        build_vocabulary(home, ds)
        made = sequentialize(home, ds)
        kept = {made.folder.name, *made.manifest.facts["segments"]}
        for folder in (*parent.glob("sequences-*"), *parent.glob("segment-*")):
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder)
    if (parent / "user-features.current").is_file():
        series = build_user_series(home, ds)
        for folder in parent.glob("user-features-*"):
            if folder != series.folder:
                shutil.rmtree(folder)
    # An evaluation lists the users it asked about.
    for folder in (home / "runs" / ds).glob("evaluation-*"):
        shutil.rmtree(folder)


class _Record:
    """The list of who was forgotten, in the landing folder of a data set."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        try:
            self.fields: dict[str, Any] = storage.read_object(self.path)
        except FileNotFoundError:
            self.fields = {"schema_version": 1, "key": secrets.token_hex(16), "forgotten": []}
        except ValueError:
            raise UserError(f"{RECORD} of data set {folder.name} is damaged; restore it from a backup") from None

    def _hash(self, user_id: str) -> str:
        return hashlib.blake2b(user_id.encode(), key=bytes.fromhex(self.fields["key"]), digest_size=16).hexdigest()

    def date_of(self, user_id: str) -> str | None:
        """Return when a user was forgotten last, None if never."""
        hashed = self._hash(user_id)
        return max((line["date"] for line in self.fields["forgotten"] if line["user"] == hashed), default=None)

    def add(self, user_id: str, date: str, num_rows: int) -> None:
        """Append a line to the record."""
        self.fields["forgotten"].append({"user": self._hash(user_id), "date": date, "num_rows": num_rows})
        storage.write_text(self.path, json.dumps(self.fields, indent=1, sort_keys=True) + "\n")

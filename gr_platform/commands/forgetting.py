"""What `gr forget` and `gr withdraw` ask and say.

Invariant: nothing is erased before the person at the terminal agreed, or said so beforehand with --yes.
"""

from collections.abc import Iterator
from pathlib import Path

import typer

from gr_platform.errors import UserError
from gr_platform.events.forget import forget
from gr_platform.events.landing import active_dataset, load_declaration
from gr_platform.events.withdraw import landed_on, withdraw
from gr_platform.lifecycle import inbox


def report(home: Path, dataset: str | None, user: str, *, sure: bool) -> Iterator[str]:
    """Yield the lines of `gr forget` after it was agreed to. Raises UserError as `forget` does, or if it was not."""
    ds = dataset or active_dataset(home)
    load_declaration(home, ds)
    question = f"Erase every event of user {user} from data set {ds}? This cannot be undone."
    if not sure and not typer.confirm(question):
        raise UserError("nothing was erased; --yes agrees beforehand")
    done = forget(home, ds, user)
    if done.files:
        yield f"user {user} of {ds}: {done.num_rows:,} rows erased in {', '.join(done.files)}; recorded on {done.date}"
    else:
        yield f"user {user} of {ds} was forgotten on {done.date}; what was made from the events is in order"
    if originals := inbox.delete_taken(home, ds):
        yield f"{originals:,} landed file(s) that still lay in the inbox's {inbox.TAKEN}/ deleted"
    yield "models and bundles made before have learned from these events: gr materialize trains them again"
    yield "the files that were imported, wait in the inbox or were refused are yours: erase the person there too"


def withdrawal(home: Path, dataset: str | None, date: str, *, sure: bool) -> Iterator[str]:
    """Yield the lines of `gr withdraw` once it was agreed to. Raises UserError as `withdraw` does, or if it was not."""
    ds = dataset or active_dataset(home)
    found = landed_on(home, ds, date)
    question = f"Withdraw {found.num_rows:,} rows of {date} ({', '.join(found.files)}) from data set {ds}?"
    if not sure and not typer.confirm(question):
        raise UserError("nothing was withdrawn; --yes agrees beforehand")
    done = withdraw(home, ds, date)
    yield f"{done.num_rows:,} rows of {date} withdrawn from {ds}: {', '.join(done.files)}"
    yield f"next: gr retrain, or first a mended file: gr import FILE --dataset {ds} --ingest-date {date}"

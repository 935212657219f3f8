"""What `gr forget` asks and says.

Invariant: nothing is erased before the person at the terminal agreed, or said so beforehand with --yes.
"""

from collections.abc import Iterator
from pathlib import Path

import typer

from gr_platform.errors import UserError
from gr_platform.events.forget import forget
from gr_platform.events.landing import active_dataset, load_declaration
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

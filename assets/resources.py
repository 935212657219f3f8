"""Where a run works and on what: the state folder, the data set, the recipe.

Invariant: an empty field means the default of the process that runs the asset, so the same definitions serve a
test, the command line and the UI. A run keeps to one data set and is alone in its state folder, whoever started it;
only one that changes nothing but what has a lock of its own may pass it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg
from pydantic import PrivateAttr

from assets import runs
from gr_platform import run_log, settings, storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import migration

# One run at a time of those with an asset in it, which `Platform` makes sure of; the queue keeps the others waiting.
PIPELINE = "pipeline"


class StateFolder(dg.ConfigurableResource):
    """The state folder (default: GR_HOME) and the data set (default: GR_DATASET, else the one imported last)."""

    home: str = ""
    dataset: str = ""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> "Iterator[StateFolder]":
        """Tag the run and send what libraries log meanwhile to the state folder, one that this release reads."""
        migration.require_readable(self.folder())
        runs.mark(context)
        with run_log.under(context.run_id or ""), run_log.written(self.folder()):
            yield self

    def folder(self) -> Path:
        """Return the absolute state folder."""
        return Path(self.home) if self.home else settings.home()

    def dataset_name(self) -> str:
        """Return the data set's name. Raises UserError if none was imported yet."""
        from gr_platform.events.landing import active_dataset

        return self.dataset or settings.dataset() or active_dataset(self.folder())


class Platform(StateFolder):
    """The state folder and the data set of a run that changes them.

    alone: hold the state folder for the run; False for `deploying`, whose every step has a lock. wait_s: for another
    program that holds it, a training in a terminal for one.
    """

    alone: bool = True
    wait_s: float = 0.0
    _context: dg.InitResourceContext | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> "Iterator[Platform]":
        """Hold the state folder for the run, with the data set settled: a later import must not switch it half-way."""
        home = self.folder()
        with ExitStack() as held:
            held.enter_context(super().yield_for_execution(context))
            if self.alone:
                held.enter_context(self._place(context))
            settled = Platform(home=str(home), dataset=self.dataset_name(), alone=self.alone, wait_s=self.wait_s)
            settled._context = context
            settled.record(dataset=settled.dataset, landed=runs.landed(home, settled.dataset))
            yield settled

    @contextmanager
    def _place(self, context: dg.InitResourceContext) -> Iterator[None]:
        with ExitStack() as held:
            try:
                held.enter_context(storage.exclusive(self.folder(), "stages"))
            except UserError:
                if not self.wait_s:
                    raise
                if context.log:
                    context.log.info(f"another program works in the state folder; waiting up to {self.wait_s:.0f} s")
                held.enter_context(storage.exclusive(self.folder(), "stages", wait_s=self.wait_s))
            yield

    def record(self, **facts: str) -> None:
        """Tag the run with `gr/<name>`; outside a run nothing happens."""
        if self._context is not None:
            runs.record(self._context, facts)


class Training(dg.Config):
    """What to train: a recipe's name or TOML file, or `auto` for the one that suits the data set."""

    recipe: str = "auto"

    def recipe_for(self, ds: str) -> str:
        """Return the configured recipe, for `auto` the one that was made for the data set, else `small`."""
        from gr_platform.models.recipes import settled

        return settled(self.recipe, ds)

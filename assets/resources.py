"""Where a run works and on what: the state folder, the data set, the recipe.

Invariant: an empty field means the default of the process that runs the asset, so the same definitions serve a
test, the command line and the UI. A run keeps to one data set and is alone in its state folder, whoever started it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from gr_platform import settings, storage


class Platform(dg.ConfigurableResource):
    """The state folder (default: GR_HOME) and the data set (default: GR_DATASET, else the one imported last)."""

    home: str = ""
    dataset: str = ""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> "Iterator[Platform]":
        """Hold the state folder for the run, with the data set settled: a later import must not switch it half-way."""
        with storage.exclusive(self.folder(), "stages"):
            yield Platform(home=str(self.folder()), dataset=self.dataset_name())

    def folder(self) -> Path:
        """Return the absolute state folder."""
        return Path(self.home) if self.home else settings.home()

    def dataset_name(self) -> str:
        """Return the data set's name. Raises UserError if none was imported yet."""
        from gr_platform.events.landing import active_dataset

        return self.dataset or settings.dataset() or active_dataset(self.folder())


class Training(dg.Config):
    """What to train: a recipe's name or TOML file, or `auto` for the one that suits the data set."""

    recipe: str = "auto"

    def recipe_for(self, ds: str) -> str:
        """Return the configured recipe, for `auto` the one that was made for the data set, else `small`."""
        from gr_platform.models.recipes import settled

        return settled(self.recipe, ds)

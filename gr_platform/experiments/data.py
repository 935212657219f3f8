"""The data sets that experiments run on: imported logs, the simulated log and the drifting stream.

Invariant: a data set that is there is never changed; what is missing is imported from the folder the caller names, or
made where it is synthetic.
"""

from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.experiments import drifting_stream
from gr_platform.models.config import Recipe
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.featured import FeaturedDataset, with_features

# Data set -> its file under the folder of real data, as docs/data.md lays them out.
FILES = {
    "ml-1m": "ml-1m/ratings.parquet",
    "retailrocket": "retailrocket/events.parquet",
    "amazon-sports": "amazon-sports/interactions.parquet",
}
SMOKE, SMOKE_EVENTS, SMOKE_SEED = "smoke", 6_000, 7
STREAMS = {
    "drifting": drifting_stream.Stream(),
    "drifting-smoke": drifting_stream.Stream(num_records=400, length=16, num_items=200, num_categories=10),
}
IMPORT_WAIT_S = 900.0


def digest(home: Path, name: str) -> str | None:
    """Return the digest of a data set's sequences without reading them, "" for no data set, None if it is not there."""
    if not name:
        return ""
    if name in STREAMS:
        return drifting_stream.digest(STREAMS[name])
    try:
        return storage.read_manifest(storage.current(home / "sequences" / name, "sequences")).digest
    except UserError:
        return None


def prepare(home: Path, name: str, folder: Path | None) -> str:
    """Return the digest of a data set, imported from `folder` (or simulated) up to sequences if it is not there.

    Raises UserError if it is neither there nor in the folder.
    """
    found = digest(home, name)
    if found is not None:
        return found
    with storage.exclusive(home, "stages", wait_s=IMPORT_WAIT_S):
        found = digest(home, name)
        return _imported(home, name, _source(home, name, folder)) if found is None else found


def load(home: Path, name: str, recipe: Recipe | None) -> SequenceDataset:
    """Return the sequences of a data set that `prepare` was called for, with what the recipe reads beside them.

    Raises UserError for side information that was not imported.
    """
    if name in STREAMS:
        return drifting_stream.load(home / "experiments", STREAMS[name])
    dataset = SequenceDataset.current(home, name)
    return dataset if recipe is None else with_features(home, name, dataset, recipe.model)


def features_digest(home: Path, name: str, recipe: Recipe | None) -> str:
    """Return the digest of the side information that the recipe reads, "" where it reads none. Raises as `load`."""
    if recipe is None or not (recipe.model.item_features or recipe.model.user_features):
        return ""
    dataset = load(home, name, recipe)
    return dataset.features_digest if isinstance(dataset, FeaturedDataset) else ""


def _source(home: Path, name: str, folder: Path | None) -> Path:
    if name == SMOKE:
        from gr_platform.events.simulator import simulate

        made = storage.ensure(
            home / "simulated",
            "events",
            {"num_events": SMOKE_EVENTS, "seed": SMOKE_SEED, "simulator": 2},
            lambda out: simulate(out / "events.parquet", num_events=SMOKE_EVENTS, seed=SMOKE_SEED),
        )
        return made.folder / "events.parquet"
    if folder is None or not (folder / FILES[name]).is_file():
        raise UserError(
            f"data set {name} is not imported{'' if folder is None else f' and {folder.name} holds no {FILES[name]}'}; "
            f"name the folder that holds {FILES[name]} with --data FOLDER, or run gr import FILE --declaration {name} "
            "and gr materialize --select events --select item_vocabulary --select sequences"
        )
    return folder / FILES[name]


def _imported(home: Path, name: str, source: Path) -> str:
    from gr_platform.events.ingest import ingest
    from gr_platform.events.landing import import_file
    from gr_platform.sequences.sequentialize import sequentialize
    from gr_platform.sequences.vocabulary import build_vocabulary

    if name == SMOKE:
        import_file(source, home=home, dataset=name)
    else:
        import_file(source, home=home, declaration=name)
    ingest(home, name)
    build_vocabulary(home, name)
    return sequentialize(home, name).manifest.digest

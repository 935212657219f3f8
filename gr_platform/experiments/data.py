"""The data sets that experiments run on: imported logs, the simulated log and the drifting stream.

Invariant: the sequences of a data set that is there are never changed; what is missing, side information that a recipe
reads included, is imported from the folder the caller names, or made where it is synthetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """Side information of a data set: its file under the folder of real data, its kind, the properties it gives."""

    file: str
    kind: str
    properties: tuple[str, ...]


SIDE_FILES = {
    "ml-1m": (
        SideFile(file="ml-1m/movies.dat", kind="item-features", properties=("genres", "year")),
        SideFile(file="ml-1m/users.dat", kind="user-features", properties=("gender", "age", "occupation")),
    ),
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


def prepare(home: Path, name: str, folder: Path | None, recipe: Recipe | None = None) -> str:
    """Return the digest of a data set, imported from `folder` (or simulated) up to sequences if it is not there.

    Side information comes with it where it lies in the folder; to a data set that is there, what `recipe` reads of it
    and nobody imported is added. Raises UserError if the data set is neither there nor in the folder.
    """
    found = digest(home, name)
    if found is not None and not (folder and _lacking(home, name, recipe)):
        return found
    with storage.exclusive(home, "stages", wait_s=IMPORT_WAIT_S):
        found = digest(home, name)
        if found is None:
            found = _imported(home, name, _source(home, name, folder))
            _import_side(home, name, folder, SIDE_FILES.get(name, ()))
        else:
            _import_side(home, name, folder, _lacking(home, name, recipe))
        return found


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


def _lacking(home: Path, name: str, recipe: Recipe | None) -> list[SideFile]:
    """Return the files of side information with a property that the recipe reads and the data set does not have."""
    if recipe is None or name not in SIDE_FILES:
        return []
    from gr_platform.events.features import FOLDER, entries_of

    read = {"item-features": recipe.model.item_features, "user-features": recipe.model.user_features}
    landed = home / "landing" / name / FOLDER
    known = {kind: {each for entry in entries_of(landed, kind) for each in entry.properties} for kind in read}
    return [each for each in SIDE_FILES[name] if set(read[each.kind]) & set(each.properties) - known[each.kind]]


def _import_side(home: Path, name: str, folder: Path | None, wanted: Iterable[SideFile]) -> None:
    """Import those files of side information that lie in the folder."""
    from gr_platform.events.feature_import import WantedFeatures, import_features

    for each in wanted:
        if folder is not None and (folder / each.file).is_file():
            import_features(folder / each.file, WantedFeatures(kind=each.kind, dataset=name), home=home)


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

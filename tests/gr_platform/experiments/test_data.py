"""Experiments find the side information of a data set where its ratings lie, and a recipe can read it."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform.errors import UserError
from gr_platform.events.feature_import import WantedFeatures, import_features
from gr_platform.events.features import feature_files
from gr_platform.experiments import data
from gr_platform.experiments.experiment import Cell
from gr_platform.experiments.run import cell_key
from gr_platform.models.config import Recipe
from gr_platform.models.recipes import tiny
from gr_platform.sequences.featured import FeaturedDataset


def reading(**names: tuple[str, ...]) -> Recipe:
    """A recipe that reads features of these names."""
    recipe = tiny("retrieval")
    return replace(recipe, model=replace(recipe.model, **names))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which files of the form of MovieLens-1M lie."""
    rows = [(user, 100 + (user + i) % 9, 1 + i % 5, 1_433_221_332 + i) for user in range(1, 13) for i in range(6)]
    names = ("user_id", "movie_id", "rating", "timestamp")
    (tmp_path / "public/ml-1m").mkdir(parents=True)
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    pq.write_table(table, tmp_path / "public" / data.FILES["ml-1m"])
    movies = "".join(f"{100 + i}::Movie ({1990 + i})::{'War' if i % 2 else 'Drama|War'}\n" for i in range(9))
    (tmp_path / "public/ml-1m/movies.dat").write_text(movies)
    (tmp_path / "public/ml-1m/users.dat").write_text("".join(f"{u}::F::18::{u}::1000{u}\n" for u in range(1, 13)))
    return tmp_path / "public"


def kinds(home: Path) -> list[str]:
    """The kinds of side information that landed, with the names of their files."""
    found = [feature_files(home, "ml-1m", kind) for kind in ("item-features", "user-features")]
    return [file.entry.source_name for files in found for file in files]


def test_a_data_set_comes_with_its_side_information_and_a_recipe_reads_it(tmp_path: Path, folder: Path) -> None:
    home, recipe = tmp_path / "home", reading(item_features=("genres", "year"), user_features=("gender",))
    digest = data.prepare(home, "ml-1m", folder, recipe)
    assert kinds(home) == ["movies.dat", "users.dat"]
    dataset = data.load(home, "ml-1m", recipe)
    assert isinstance(dataset, FeaturedDataset)
    assert dataset.item_features is not None
    assert set(dataset.item_features.codes["genres"].values) == {"War", "Drama|War"}
    assert dataset.digest == digest
    assert cell_key(home, Cell(name="a", label="a", dataset="ml-1m", recipe=recipe)) is not None


def test_a_data_set_that_was_there_gets_what_a_recipe_lacks_and_keeps_its_digest(tmp_path: Path, folder: Path) -> None:
    home, recipe = tmp_path / "home", reading(item_features=("genres",))
    for name in ("movies.dat", "users.dat"):
        (folder / "ml-1m" / name).rename(tmp_path / name)
    digest = data.prepare(home, "ml-1m", folder, recipe)
    assert kinds(home) == []
    with pytest.raises(UserError, match="data set ml-1m has no item-features"):
        data.load(home, "ml-1m", recipe)
    for name in ("movies.dat", "users.dat"):
        (tmp_path / name).rename(folder / "ml-1m" / name)
    assert data.prepare(home, "ml-1m", folder, tiny("retrieval")) == digest
    assert data.prepare(home, "ml-1m", None, recipe) == digest
    assert kinds(home) == []
    assert data.prepare(home, "ml-1m", folder, recipe) == digest
    assert kinds(home) == ["movies.dat"]
    found = data.features_digest(home, "ml-1m", recipe)
    assert data.prepare(home, "ml-1m", folder, reading(user_features=("age",))) == digest
    assert kinds(home) == ["movies.dat", "users.dat"]
    assert data.features_digest(home, "ml-1m", recipe) == found


def test_ones_own_side_information_is_not_added_to_for_a_name_that_no_file_has(tmp_path: Path, folder: Path) -> None:
    home, own = tmp_path / "home", tmp_path / "own.csv"
    for name in ("movies.dat", "users.dat"):
        (folder / "ml-1m" / name).rename(tmp_path / name)
    data.prepare(home, "ml-1m", folder)
    own.write_text("movie_id,genres\n100,Mine\n")
    import_features(own, WantedFeatures(kind="item-features", dataset="ml-1m"), home=home)
    for name in ("movies.dat", "users.dat"):
        (tmp_path / name).rename(folder / "ml-1m" / name)
    data.prepare(home, "ml-1m", folder, reading(item_features=("genres", "colour")))
    assert kinds(home) == ["own.csv"]
    data.prepare(home, "ml-1m", folder, reading(item_features=("genres", "year")))
    assert kinds(home) == ["own.csv", "movies.dat"]

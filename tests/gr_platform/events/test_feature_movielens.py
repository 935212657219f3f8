"""MovieLens' own files of movies and users are read as properties that always held."""

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform.errors import UserError
from gr_platform.events.database import connect
from gr_platform.events.feature_import import WantedFeatures, import_features
from gr_platform.events.features import all_rows, feature_files
from gr_platform.events.landing import import_file

START_S = 1_433_221_332
MOVIES = [
    '100::Am\xe9lie "la" (2001)::Comedy|Romance',
    "101::M, or (a.k.a. Eine Stadt) (1931)::Crime",
    "102::Nameless::Drama",
]
GENRES = [(100, "Comedy|Romance", "2001"), (101, "Crime", "1931"), (102, "Drama", None)]


@pytest.fixture
def folder(home, tmp_path):
    """A folder in which the ratings of a data set ml-1m, imported already, lie."""
    rated = [(u, 100 + i, 1 + (u + i) % 5, START_S + i) for u in range(1, 13) for i in range(3)]
    (tmp_path / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rated))
    import_file(tmp_path / "ratings.dat", home=home, declaration="ml-1m")
    return tmp_path


def landed(home, path, kind, ds="ml-1m", **options):
    """Import a file; return its properties, sorted, and the rows of (id, *properties) that are read of it."""
    entry = import_features(path, WantedFeatures(kind=kind, dataset=ds, **options), home=home).entry
    assert entry.time_column is None
    rows, _ = all_rows([file for file in feature_files(home, ds, kind) if file.entry.sha256 == entry.sha256])
    names = sorted(entry.properties)
    with connect(home) as connection:
        columns = ", ".join(["id", *(f"p_{name}" for name in names)])
        return names, connection.sql(f"SELECT {columns} FROM ({rows}) ORDER BY id").fetchall()  # noqa: S608


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movies_have_genres_and_the_year_of_their_title(home, folder, encoding):
    text = "\n".join(MOVIES) + "\n"
    (folder / "movies.dat").write_bytes(text.encode(encoding))
    assert landed(home, folder / "movies.dat", "item-features") == (["genres", "year"], GENRES)
    (folder / "movies.dat.gz").write_bytes(gzip.compress(text.encode(encoding)))
    assert landed(home, folder / "movies.dat.gz", "item-features", format="movielens")[1] == GENRES


def test_movies_of_newer_releases_are_the_same_with_a_header(home, folder):
    lines = ["movieId,title,genres", '100,"Heat, The (1995)",Action|Crime', "101,Nameless,(no genres listed)"]
    (folder / "movies.csv").write_text(
        "\n".join([*lines, "102,Series (2006\u20132009) ,Drama"]) + "\n", encoding="utf-8"
    )
    read = [(100, "Action|Crime", "1995"), (101, None, None), (102, "Drama", "2006")]
    assert landed(home, folder / "movies.csv", "item-features") == (["genres", "year"], read)
    # A file that the user calls a plain table is one.
    assert landed(home, folder / "movies.csv", "item-features", format="csv")[0] == ["genres", "title"]
    named = landed(home, folder / "movies.csv", "item-features", id_column="movieId")
    assert named == (["genres", "year"], read)


def test_movies_go_to_a_data_set_that_nobody_declared(home, folder):
    (folder / "ratings.csv").write_text((folder / "ratings.dat").read_text().replace("::", ","))
    names = ("user_id", "movie_id", "rating", "timestamp")
    rows = [map(int, line.split(",")) for line in (folder / "ratings.csv").read_text().split()]
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), folder / "r.parquet")
    import_file(folder / "r.parquet", home=home, dataset="mine")
    (folder / "movies.csv").write_text("movieId,title,genres\n100,A (1995),War\n")
    assert landed(home, folder / "movies.csv", "item-features", ds="mine")[1] == [(100, "War", "1995")]


def test_users_have_gender_age_and_occupation_and_no_zip_code(home, folder):
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    read = [(1, "1", "F", "10"), (2, "56", "M", "16")]
    assert landed(home, folder / "users.dat", "user-features") == (["age", "gender", "occupation"], read)
    (file,) = feature_files(home, "ml-1m", "user-features")
    assert "48067" not in str(pq.read_table(file.path).to_pydict())


def test_a_file_of_the_other_kind_says_what_it_is(home, folder):
    (folder / "movies.dat").write_bytes(MOVIES[0].encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n")
    said = r"movies.dat does not look like MovieLens' users.dat \(user_id::gender::.*3 field\(s\); it has those of mov"
    with pytest.raises(UserError, match=said):
        landed(home, folder / "movies.dat", "user-features")
    with pytest.raises(UserError, match=r"it has those of users.dat, which comes with --as user-features"):
        landed(home, folder / "users.dat", "item-features")
    with pytest.raises(UserError, match=r"it has those of users.dat, which comes with --as user-features"):
        import_file(folder / "users.dat", home=home, declaration="ml-1m")
    (folder / "tags.dat").write_text("1::2\n")
    with pytest.raises(UserError, match=r"its first line has 2 field.*give the right --format"):
        landed(home, folder / "tags.dat", "item-features")
    (folder / "movies.dat").write_text("100::A (1995)::War\n101::B (1996)\n")
    with pytest.raises(UserError, match=r"movies.dat cannot be read"):
        landed(home, folder / "movies.dat", "item-features")
    assert feature_files(home, "ml-1m", "item-features") == []

"""MovieLens' own files of movies and users as properties: genres and year; gender, age and occupation.

Invariant: a file is taken for MovieLens' by its format or its columns alone, and what is no property of a kind of item
or user is left out: titles (the catalogue has them) and zip codes are nearly unique.
"""
# ruff: noqa: S608 - every name is written here

from dataclasses import replace

from gr_platform.events.database import quoted
from gr_platform.events.readers import Source

# Columns of the ids, which need no flag.
ID_COLUMNS = ("movie_id", "movieId", "user_id", "userId")
_MOVIES = {"movieid", "title", "genres"}
_NO_GENRES = "(no genres listed)"
# The last parentheses of a title, such as (1995) or (2006-2009): a series counts from its first year.
_YEAR = r"\((\d{4})[^()]*\)\s*$"


def of_movies_or_users(source: Source, kind: str, format: str) -> Source:
    """Return MovieLens' movies.dat, users.dat or movies.csv as ids and properties, any other file as it is.

    kind: item-features or user-features; format: as the user named it, a plain csv stays one.
    """
    if not source.is_text or format not in ("auto", "movielens"):
        return source
    names = {name.lower().replace("_", ""): name for name in source.columns}
    if kind == "item-features" and set(names) == _MOVIES:
        title, genres = quoted(names["title"]), quoted(names["genres"])
        properties = {
            "genres": f"nullif({genres}, '{_NO_GENRES}')",
            "year": f"regexp_extract({title}, '{_YEAR}', 1)",
        }
        return _selected(source, names["movieid"], properties)
    if kind == "user-features" and source.format == "movielens" and {"userid", "zipcode"} <= set(names):
        properties = {name: quoted(name) for name in source.columns if name not in (names["userid"], names["zipcode"])}
        return _selected(source, names["userid"], properties)
    return source


def _selected(source: Source, id_column: str, properties: dict[str, str]) -> Source:
    """Return a source with an id and properties, name -> SQL, in the order of its lines."""
    selected = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in properties.items())
    return replace(
        source,
        format="movielens",
        relation=f"(SELECT {quoted(id_column)}, {selected} FROM {source.relation})",
        columns=dict.fromkeys((id_column, *properties), "VARCHAR"),
    )

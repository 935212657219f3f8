"""A declared data set reads alike from its published format and from our Parquet copy."""
# ruff: noqa: S608 - the queries are made by `judged_query`

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.events import shipped
from gr_platform.events.database import connect
from gr_platform.events.declaration import Declaration
from gr_platform.events.landing import import_file, landed_files, load_declaration, titles
from gr_platform.events.quality import judged_query

DATA = settings.test_data()
EVENT = "user_id, item_id, action, value, event_ts"
START_S = 1_433_221_332


def judged(landed, columns=f"{EVENT}, rule"):
    with connect(landed.path.parent) as connection:
        query = f"SELECT {columns} FROM ({judged_query(landed)}) ORDER BY source_row"
        return connection.sql(query).fetchall()


def quarantined(landed):
    with connect(landed.path.parent) as connection:
        query = f"SELECT rule, count(*) FROM ({judged_query(landed)}) WHERE rule IS NOT NULL GROUP BY rule"
        return dict(connection.sql(query).fetchall())


def declared(tmp_path, text):
    path = tmp_path / "given.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


SHOP = """
name = "shop"
actions = ["view", "buy"]
positives = ["view", "buy"]
time_unit = "s"
context = ["device", "order"]
[columns]
user_id = ["customer", "user_id"]
item_id = "item_id"
action = "action"
event_ts = "timestamp"
"""


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_declaration_holds_together_and_is_complete(name):
    declaration = shipped.read(name)
    assert (declaration.name, declaration.strict) == (name, True)
    assert {"user_id", "item_id", "event_ts"} <= set(declaration.columns)
    assert Declaration.from_toml(declaration.to_toml()) == declaration


def test_movielens_as_published_and_as_parquet(home, tmp_path):
    rated = [(u, 100 + i, 1 + (u + i) % 5, START_S + i) for u in range(1, 13) for i in range(3)]
    (tmp_path / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rated))
    (tmp_path / "movies.dat").write_bytes(b"100::Am\xe9lie (2001)::Comedy\n")
    names = ["user_id", "movie_id", "rating", "timestamp"]
    pq.write_table(pa.table(dict(zip(names, zip(*rated, strict=True), strict=True))), tmp_path / "ratings.parquet")
    lines = "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in rated)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + lines)
    found = []
    for file, name in (("ratings.dat", "ml-1m"), ("ratings.parquet", "ml-1m"), ("ratings.csv", "ml-20m")):
        landed = import_file(tmp_path / file, home=home / file, declaration=name)
        assert landed.declaration == shipped.read(name) == load_declaration(home / file, name)
        found.append(judged(landed))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == (1, 100, "rate_2", 2.0, START_S * 1000, None)
    assert titles(home / "ratings.dat", "ml-1m") == {100: "Am\u00e9lie (2001)"}


def test_retailrocket_as_published_and_as_parquet(home, tmp_path):
    words = {"view": "view", "addtocart": "cart", "transaction": "buy"}
    rows = [(START_S + i, i % 12, list(words)[i % 3], 355_908 + i % 7) for i in range(48)]
    lines = [
        f"{t * 1000},{user},{action},{item},{'4000' if action == 'transaction' else ''}"
        for t, user, action, item in rows
    ]
    (tmp_path / "events.csv").write_text("\n".join(["timestamp,visitorid,event,itemid,transactionid", *lines]) + "\n")
    times, users, actions, items = zip(*rows, strict=True)
    copy = {"user_id": users, "item_id": items, "action": [words[a] for a in actions], "timestamp": times}
    pq.write_table(pa.table(copy), tmp_path / "events.parquet")
    published = import_file(tmp_path / "events.csv", home=home, declaration="retailrocket")
    copied = import_file(tmp_path / "events.parquet", home=home, declaration="retailrocket")
    assert (published.entry.time_unit, copied.entry.time_unit) == ("ms", "s")
    assert published.declaration.actions == ("view", "cart", "buy")
    assert judged(published) == judged(copied)
    assert quarantined(copied) == {}


def test_amazon_ratings_without_a_header_line(home, tmp_path):
    rows = [(f"A{i % 12}X", f"00{i % 7}", 1 + i % 5, START_S + i) for i in range(36)]
    (tmp_path / "ratings_Books.csv").write_text("".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in rows))
    reviews = [{"reviewerID": u, "asin": i, "overall": float(r), "unixReviewTime": t} for u, i, r, t in rows]
    (tmp_path / "reviews.json").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    plain = import_file(tmp_path / "ratings_Books.csv", home=home, declaration="amazon-books")
    assert judged(plain)[0] == ("A0X", "000", "rate_1", 1.0, START_S * 1000, None)
    assert plain.num_rows == 36
    as_json = import_file(tmp_path / "reviews.json", home=home, declaration="amazon-books")
    assert judged(plain) == judged(as_json)
    sports = import_file(tmp_path / "ratings_Books.csv", home=home, declaration="amazon-sports")
    assert {row[2] for row in judged(sports)} == {"interaction"}
    (tmp_path / "few.csv").write_text("a,b,1\n")
    with pytest.raises(UserError, match=r"first line of few.csv has 3 field.*header has 4"):
        import_file(tmp_path / "few.csv", home=home, declaration="amazon-books")


def test_a_declaration_of_ones_own_carries_context_and_quarantines_what_it_does_not_know(home, tmp_path, rows):
    path = tmp_path / "log.parquet"
    table = [r | {"customer": r["user_id"], "Device": f"d{i}", "order": i, "event_id": 1} for i, r in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist([*table, table[0] | {"action": "share"}]), path)
    landed = import_file(path, home=home, declaration=declared(tmp_path, SHOP))
    assert landed.dataset == "shop"
    assert landed.entry.columns["user_id"] == "customer"
    assert quarantined(landed) == {"unknown_action": 1}
    assert judged(landed, 'event_id, device, "order"')[:2] == [(None, "d0", "0"), (None, "d1", "1")]
    assert import_file(path, home=home, declaration=declared(tmp_path, SHOP)).reused
    without = import_file(path, home=home, dataset="other", event_id_column="none")
    assert without.declaration.actions[-1] == "share"


def test_a_file_without_a_context_column_has_none_of_it(home, tmp_path, rows, write_csv):
    landed = import_file(write_csv(rows), home=home, declaration=declared(tmp_path, SHOP))
    assert set(judged(landed, 'device, "order"')) == {(None, None)}


def test_declaring_again_may_append_actions_but_never_moves_one(home, tmp_path, rows, write_csv):
    import_file(write_csv(rows), home=home, declaration=declared(tmp_path, SHOP))
    later = write_csv([r | {"action": "share"} for r in rows], "later.csv")
    swapped = SHOP.replace('["view", "buy"]', '["buy", "view"]', 1)
    with pytest.raises(UserError, match=r"has view, buy already; append actions at the end"):
        import_file(later, home=home, declaration=declared(tmp_path, swapped))
    with pytest.raises(UserError, match="item_id_type = string, but data set shop has int64"):
        import_file(later, home=home, declaration=declared(tmp_path, 'item_id_type = "string"' + SHOP))
    more = SHOP.replace('["view", "buy"]', '["view", "buy", "share"]', 1)
    landed = import_file(later, home=home, declaration=declared(tmp_path, more))
    assert load_declaration(home, "shop").actions == ("view", "buy", "share")
    assert quarantined(landed) == {}
    assert len(landed_files(home, "shop")) == 2


def test_a_declared_column_that_is_missing_is_not_guessed(home, tmp_path, rows, write_csv):
    path = write_csv([{"uid": r["user_id"], **r} | {"user_id": ""} for r in rows])
    given = declared(tmp_path, SHOP.replace('["customer", "user_id"]', '["customer"]'))
    with pytest.raises(UserError, match=r"none of the columns that shop declares for user_id \(customer\)"):
        import_file(path, home=home, declaration=given)
    assert import_file(path, home=home, declaration=given, user_column="uid").entry.columns["user_id"] == "uid"


def test_an_unknown_or_unreadable_declaration_is_one_sentence(home, tmp_path, rows, write_csv):
    path = write_csv(rows)
    with pytest.raises(UserError, match=r"there is no declaration 'shoe'; .* one of amazon-books, .*, retailrocket"):
        import_file(path, home=home, declaration="shoe")
    with pytest.raises(UserError, match=r"given\.toml is not valid TOML"):
        import_file(path, home=home, declaration=declared(tmp_path, "name ="))
    with pytest.raises(UserError, match="unit s would fit"):
        import_file(path, home=home, declaration=declared(tmp_path, SHOP.replace('unit = "s"', 'unit = "ms"')))


@pytest.mark.skipif(DATA is None, reason="needs the real data sets: set GR_TEST_DATA")
@pytest.mark.parametrize(
    ("file", "name", "num_rows", "broken", "num_users", "num_items", "actions"),
    [
        (
            "ml-1m/ratings.parquet",
            "ml-1m",
            1_000_209,
            {"null_time": 279},
            6_040,
            3_706,
            {"rate_1": 56_174, "rate_2": 107_557, "rate_3": 261_197, "rate_4": 348_971, "rate_5": 226_310},
        ),
        (
            "retailrocket/events.parquet",
            "retailrocket",
            97_381,
            {},
            2_174,
            29_905,  # of the benchmark's 30,113; the rest is in its held-out purchases, which have no time
            {"view": 75_374, "cart": 12_456, "buy": 9_551},
        ),
        (
            "amazon-sports/interactions.parquet",
            "amazon-sports",
            296_337,
            {},
            35_598,
            18_357,
            {"interaction": 296_337},
        ),
    ],
)
def test_real_data_has_its_published_figures(home, file, name, num_rows, broken, num_users, num_items, actions):
    assert DATA is not None
    landed = import_file(DATA / file, home=home, declaration=name)
    assert (landed.dataset, landed.num_rows) == (name, num_rows)
    assert landed.path.read_bytes() == (DATA / file).read_bytes()
    assert quarantined(landed) == broken
    with connect(home) as connection:
        query = judged_query(landed)
        counted = connection.sql(f"SELECT count(DISTINCT user_id), count(DISTINCT item_id) FROM ({query})").fetchall()
        assert counted == [(num_users, num_items)]
        mix = connection.sql(f"SELECT action, count(*) FROM ({query}) GROUP BY action").fetchall()
        assert dict(mix) == actions

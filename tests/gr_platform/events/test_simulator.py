import time
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_platform.errors import UserError
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file, titles
from gr_platform.events.simulator import END_MS, simulate


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "simulated.parquet"
    return path, simulate(path, num_events=60_000), pq.read_table(path)


def views_of(table):
    """Return each user's viewed items in order of time."""
    sequences = defaultdict(list)
    for user, item, action in zip(*(table[n].to_pylist() for n in ("user_id", "item_id", "action")), strict=True):
        if action == "view":
            sequences[user].append(item)
    return list(sequences.values())


def test_the_log_is_a_function_of_its_seed(tmp_path):
    tables = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        simulate(tmp_path / f"{name}.parquet", num_events=5_000, seed=seed)
        tables.append(pq.read_table(tmp_path / f"{name}.parquet"))
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_shape_order_and_reactions(log):
    _, facts, table = log
    assert facts["num_rows"] == table.num_rows
    assert 0.9 * 60_000 < table.num_rows < 1.1 * 60_000
    times = table["event_ts"].to_numpy()
    assert (np.diff(times) >= 0).all()
    assert times[-1] < END_MS < time.time() * 1000
    lengths = sorted(len(views) for views in views_of(table))
    assert lengths[0] >= 5
    assert lengths[-1] > 150
    assert all(len(views) == len(set(views)) for views in views_of(table))
    keys = list(zip(*(table[n].to_pylist() for n in ("user_id", "item_id", "event_ts")), strict=True))
    actions = table["action"].to_pylist()
    viewed = {key for key, action in zip(keys, actions, strict=True) if action == "view"}
    assert set(keys) == viewed
    counts = Counter(actions)
    assert 0.1 < counts["like"] / counts["view"] < 0.4
    assert 0.03 < counts["purchase"] / counts["view"] < 0.15


def test_the_vocabulary_grows_all_the_time(log):
    _, _, table = log
    items = table["item_id"].to_numpy()
    quarters = [set(part) for part in np.array_split(items, 4)]
    seen: set[int] = set()
    for quarter in quarters:
        assert len(quarter - seen) > 10
        seen |= quarter


def test_order_tells_the_next_item_and_popularity_does_not(log):
    """A count of first-order transitions finds the last item several times as often as popularity does."""
    _, _, table = log
    sequences = views_of(table)
    popular: Counter[int] = Counter()
    follows: dict[int, Counter[int]] = defaultdict(Counter)
    for items in sequences:
        popular.update(items[:-1])
        for before, after in pairwise(items[:-1]):
            follows[before][after] += 1
    ranked = [item for item, _ in popular.most_common()]
    hits: Counter[str] = Counter()
    for *history, target in sequences:
        seen = set(history)
        top = [item for item in ranked if item not in seen][:10]
        likely = [item for item, _ in follows[history[-1]].most_common(60) if item not in seen][:10]
        hits["popularity"] += target in top
        hits["transitions"] += target in likely
    assert hits["transitions"] > 0.25 * len(sequences)
    assert hits["transitions"] > 4 * hits["popularity"]


def test_a_users_taste_tells_its_reactions(log):
    """Likes of a user in a topic so far predict the next like there: what a ranking model has to learn."""
    path, _, table = log
    catalogue = pq.read_table(path.with_suffix(".catalogue.parquet"))
    topic = {i: t.split(",")[0] for i, t in zip(*(catalogue[n].to_pylist() for n in ("item_id", "title")), strict=True)}
    log_rows = list(zip(*(table[n].to_pylist() for n in ("user_id", "item_id", "action")), strict=True))
    liked = {(user, item) for user, item, action in log_rows if action == "like"}
    past: dict[tuple[int, str], list[bool]] = defaultdict(list)
    rates: dict[bool, list[bool]] = {True: [], False: []}
    for user, item, action in log_rows:
        if action != "view":
            continue
        history = past[user, topic[item]]
        if len(history) >= 3:
            rates[sum(history) * 2 > len(history)].append((user, item) in liked)
        history.append((user, item) in liked)
    assert np.mean(rates[True]) > 2 * np.mean(rates[False])


def test_it_imports_as_the_simulated_data_set_with_titles(log, home):
    path, facts, _ = log
    landed = import_file(path, home=home)
    assert landed.dataset == "simulated"
    declaration = landed.declaration
    assert declaration.actions == ("view", "like", "purchase")
    assert declaration.tasks == {"like": ("like",), "purchase": ("purchase",)}
    assert declaration.exclude_seen == "all"
    assert titles(home, "simulated")[1001].startswith("Topic ")
    result = ingest(home, "simulated")
    assert (result.rows_kept, result.duplicates, result.quarantined) == (facts["num_rows"], 0, {})


def test_too_small_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 2000"):
        simulate(tmp_path / "x.parquet", num_events=10)

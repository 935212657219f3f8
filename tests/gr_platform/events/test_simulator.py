import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gr_platform import cli
from gr_platform.errors import UserError
from gr_platform.events import simulator
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file, import_folder
from gr_platform.events.ledger import titles
from gr_platform.events.simulator import END_MS, METADATA_KEY, simulate, target, world


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


@pytest.fixture
def small_steps(monkeypatch):
    """Blocks, spans and parts so small that a small log has many of each."""
    monkeypatch.setattr(simulator, "BLOCK_USERS", 50)
    monkeypatch.setattr(simulator, "SPAN_EVENTS", 3_000)
    monkeypatch.setattr(simulator, "PART_EVENTS", 10_000)


def test_the_log_is_a_function_of_its_seed(tmp_path, small_steps):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        simulate(tmp_path / name, num_events=20_000, seed=seed)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert sorted(files[0]) == ["part-00000.catalogue.parquet", "part-00000.parquet", "part-00001.parquet"]
    assert files[0] == files[1]
    assert all(files[0][name] != files[2][name] for name in files[0])


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
    for *history, following in sequences:
        seen = set(history)
        top = [item for item in ranked if item not in seen][:10]
        likely = [item for item, _ in follows[history[-1]].most_common(60) if item not in seen][:10]
        hits["popularity"] += following in top
        hits["transitions"] += following in likely
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


def test_its_folder_imports_part_after_part_with_titles_once(tmp_path, home, small_steps):
    facts = simulate(tmp_path / "log", num_events=20_000)
    landed = import_folder(tmp_path / "log", home=home)
    assert [file.dataset for file in landed] == ["simulated"] * 2
    assert sum(file.num_rows for file in landed) == facts["num_rows"]
    assert len(titles(home, "simulated")) == len(pq.read_table(tmp_path / "log" / "part-00000.catalogue.parquet"))


def test_too_small_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 2000"):
        simulate(tmp_path / "x.parquet", num_events=10)


def test_parts_are_spans_of_time_of_the_same_log_as_one_file(tmp_path, small_steps):
    facts = simulate(tmp_path / "log", num_events=50_000)
    parts = [pq.read_table(tmp_path / "log" / name) for name in facts["files"]]
    assert [len(part) for part in parts] == pytest.approx([10_000] * 5, rel=0.25)
    whole = pa.concat_tables(parts)
    assert (np.diff(whole["event_ts"].to_numpy()) >= 0).all()
    views = whole.filter(pa.compute.equal(whole["action"], "view"))
    assert len(views.group_by(["user_id", "item_id"]).aggregate([])) == len(views) == facts["num_views"]
    users = [set(part["user_id"].to_pylist()) for part in parts]
    assert len(users[3] & users[4]) > 0.3 * len(users[4])
    assert len(set().union(*users)) == facts["num_users"] > 10 * simulator.BLOCK_USERS
    one = simulate(tmp_path / "log.parquet", num_events=50_000)
    assert pq.read_table(tmp_path / "log.parquet").equals(whole)
    assert one == facts | {"files": ["log.parquet"]}
    titled = pq.read_table(tmp_path / "log" / "part-00000.catalogue.parquet")
    assert titled.equals(pq.read_table(tmp_path / "log.catalogue.parquet"))
    assert set(whole["item_id"].to_pylist()) <= set(titled["item_id"].to_pylist())


def test_the_number_of_spans_does_not_show_in_the_log(tmp_path, monkeypatch):
    tables = []
    for span in (2_000, 7_000, 1_000_000):
        monkeypatch.setattr(simulator, "SPAN_EVENTS", span)
        simulate(tmp_path / "log.parquet", num_events=20_000)
        tables.append(pq.read_table(tmp_path / "log.parquet"))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_memory_does_not_grow_with_the_log(tmp_path, small_steps):
    peaks = []
    for num_events in (15_000, 15_000, 60_000):  # the first run pays for what stays loaded
        tracemalloc.start()
        simulate(tmp_path / "log", num_events=num_events)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]


def test_with_more_topics_than_genres_the_order_still_tells_the_next_item(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "MAX_GENRES", 10)
    simulate(tmp_path / "log.parquet", num_events=60_000)
    sequences = views_of(pq.read_table(tmp_path / "log.parquet"))
    assert all(len(items) == len(set(items)) for items in sequences)
    topic = {i: t.split(",")[0] for i, t in _titles(tmp_path / "log.catalogue.parquet")}
    assert len(set(topic.values())) > 20
    assert max(len({topic[item] for item in items}) for items in sequences) > 10, "detours lead everywhere"
    same = [topic[before] == topic[after] for items in sequences for before, after in pairwise(items)]
    assert 0.5 < np.mean(same) < 0.75


def _titles(path):
    return zip(*(pq.read_table(path)[name].to_pylist() for name in ("item_id", "title")), strict=True)


def test_an_earlier_log_is_replaced_and_nothing_else_is(tmp_path, small_steps):
    folder, file = tmp_path / "log", tmp_path / "shop.parquet"
    simulate(folder, num_events=20_000)
    simulate(folder, num_events=4_000)
    assert sorted(path.name for path in folder.iterdir()) == ["part-00000.catalogue.parquet", "part-00000.parquet"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"folder log holds other files \(notes.txt\)"):
        simulate(folder, num_events=4_000)
    assert (folder / "notes.txt").read_text() == "mine"
    pq.write_table(pa.table({"user": [1]}), file)
    with pytest.raises(UserError, match=r"shop.parquet exists and is no simulated log"):
        simulate(file, num_events=4_000)
    (tmp_path / "parts").mkdir()
    file.rename(tmp_path / "parts" / "part-00000.parquet")
    with pytest.raises(UserError, match=r"parts holds other files \(part-00000.parquet\)"):
        simulate(tmp_path / "parts", num_events=4_000)
    with pytest.raises(UserError, match=r"notes.txt is a file, so x cannot be written in it"):
        simulate(folder / "notes.txt" / "x", num_events=4_000)
    with pytest.raises(UserError, match=r"notes.txt is a file; name one that ends in .parquet"):
        simulate(folder / "notes.txt", num_events=4_000)
    assert {path.name for path in tmp_path.iterdir()} == {"log", "parts"}


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(target.shutil, "disk_usage", lambda _: usage._replace(free=1_500_000_000))
    with pytest.raises(UserError, match=r"needs about 2.0 GB while it is made, the disk of log has 1.5 GB free"):
        simulate(tmp_path / "log", num_events=100_000_000)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_needed_is_not_understated(tmp_path, monkeypatch):
    sizes = []

    def publish(work, made, out):
        sizes.append(sum(path.stat().st_size for path in work.rglob("*") if path.is_file()))

    monkeypatch.setattr(target, "publish", publish)
    facts = simulate(tmp_path / "log", num_events=200_000)
    assert sizes[0] < simulator.BYTES_AN_EVENT * facts["num_rows"]


@pytest.mark.parametrize("name", ["log", "log.parquet"])
def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch, name):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulator, "_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / name, num_events=4_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["log", "log.parquet"])
def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_clears_it(tmp_path, name):
    code = (
        "import os, sys; from pathlib import Path; from gr_platform.events import simulator\n"
        "simulator.target.publish = lambda *_: os.kill(os.getpid(), 9)\n"
        "simulator.simulate(Path(sys.argv[1]), num_events=4_000)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=os.environ, timeout=60)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [f".building-{name}"]
    simulate(tmp_path / name, num_events=4_000)
    assert not (tmp_path / f".building-{name}").exists()
    assert (tmp_path / name).exists()


def test_two_programs_do_not_write_one_log(tmp_path):
    with target.workplace(tmp_path / "log") as work:
        with pytest.raises(UserError, match="another program is writing log"):
            simulate(tmp_path / "log", num_events=4_000)
        assert work.is_dir()


def test_the_command_takes_numbers_with_underscores(tmp_path):
    path = tmp_path / "log.parquet"
    done = CliRunner().invoke(cli.app, ["simulate", "--events", "5_000", "--out", str(path), "--seed", "3"])
    assert done.exit_code == 0, done.output
    assert f"next: gr import {path}" in done.output
    assert 0.9 * 5_000 < pq.read_metadata(path).num_rows < 1.1 * 5_000
    assert METADATA_KEY in pq.read_schema(path).metadata

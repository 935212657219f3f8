"""Visitors ask with what they did before, as the stream has it, and with nothing of later."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform.replay.visitors import PROBED, Lived, StreamVisitors, Window, read

ACTIONS = ("view", "like")
WINDOWS = {"ranking": Window(max_events=4, chunk=2), "retrieval": Window(max_events=8, chunk=2)}
HOUR = 3_600_000
NUM_HISTORY, NUM_DAY = 60, 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five users take turns; each third event is also liked. A day has 20 events, the history 60."""
    rows = []
    for number in range(NUM_HISTORY + 2 * NUM_DAY):
        user, item, at = f"u{number % 5}", number % 17, HOUR * number
        rows.append((user, item, "view", at))
        if number % 3 == 0:
            rows.append((user, item, "like", at))
    table = pa.table(dict(zip(("user_id", "item_id", "action", "event_ts"), zip(*rows, strict=True), strict=True)))
    folder = tmp_path_factory.mktemp("files")
    paths = []
    times = table["event_ts"].to_numpy()
    edges = [HOUR * (NUM_HISTORY + NUM_DAY * number) for number in range(3)]
    for number, part in enumerate((times < edges[0], (times >= edges[0]) & (times < edges[1]), times >= edges[1])):
        paths.append(folder / f"{number}.parquet")
        pq.write_table(table.filter(pa.array(part)), paths[-1])
    return paths, edges


def visitors(files, *, probe_share: float = 0.0, seed: int = 1) -> StreamVisitors:
    paths, edges = files
    return StreamVisitors(read(paths, ACTIONS), edges, WINDOWS, probe_share=probe_share, seed=seed)


def number_of(visit: Lived) -> int:
    return visit.request_time // HOUR


def test_rows_of_one_moment_are_one_exposure_with_all_its_actions(files):
    found = read(files[0], ACTIONS)
    assert len(found.times) == NUM_HISTORY + 2 * NUM_DAY
    assert found.actions.tolist() == [3 if number % 3 == 0 else 1 for number in range(len(found.times))]


def test_a_history_is_all_that_the_user_did_before_and_grows_by_each_event(files):
    people = visitors(files)
    for number in range(NUM_HISTORY, NUM_HISTORY + NUM_DAY):
        visit = people.visit()
        assert (number_of(visit), visit.day, visit.probe, visit.target) == (number, 1, -1, number % 17)
        own = [each for each in range(number) if each % 5 == number % 5]
        assert visit.history.offset == len(own) - 8
        assert visit.history.items.tolist() == [each % 17 for each in own[-8:]]
        assert visit.history.times.tolist() == [HOUR * each for each in own[-8:]]
        assert visit.history.times[-1] < visit.request_time
        if visit.kind == "score":
            assert visit.candidates[0] == visit.target
            assert len(visit.candidates) == 50
        else:
            assert len(visit.candidates) == 0
    assert number_of(people.visit()) == NUM_HISTORY, "after the day's last event comes its first one again"


def test_the_next_day_begins_when_it_is_told(files):
    people = visitors(files)
    people.visit()
    people.live(2)
    visit = people.visit()
    assert (number_of(visit), visit.day) == (NUM_HISTORY + NUM_DAY, 2)


def test_the_same_seed_gives_the_same_visits(files):
    def told(seed: int) -> list[tuple]:
        people = visitors(files, probe_share=0.3, seed=seed)
        return [(v.kind, v.request_time, v.probe, v.candidates.tolist()) for v in (people.visit() for _ in range(40))]

    assert told(1) == told(1) != told(2)


def test_probes_ask_the_same_on_every_day(files):
    people = visitors(files, probe_share=1.0)
    before = people.probes
    assert [probe.kind for probe in before[:3]] == list(PROBED)
    people.live(2)
    for visit in (people.visit() for _ in range(30)):
        same = before[visit.probe]
        assert visit.history.items.tolist() == same.history.items.tolist()
        assert visit.candidates.tolist() == same.candidates.tolist()
        assert (visit.kind, visit.request_time) == (same.kind, same.request_time)
        assert number_of(visit) < NUM_HISTORY


def test_what_a_cache_can_hold_is_what_the_models_see(files):
    people = visitors(files)
    visit = next(v for v in (people.visit() for _ in range(99)) if v.kind == "recommend")
    num = visit.history.offset + len(visit.history.items)
    ranking, retrieval = (WINDOWS[kind].visible(num) for kind in ("ranking", "retrieval"))
    assert 2 <= ranking <= 4
    assert visit.cacheable == 2 * ranking + 1 + retrieval


def test_text_ids_are_kept(tmp_path):
    table = pa.table({"user_id": [1, 1, 1], "item_id": ["a", "b", "c"], "action": ["view"] * 3, "event_ts": [1, 2, 3]})
    pq.write_table(table, tmp_path / "log.parquet")
    people = StreamVisitors(read([tmp_path / "log.parquet"], ACTIONS), [2, 4], WINDOWS, probe_share=0.0, seed=1)
    people.visit()
    assert people.visit().history.items.tolist() == ["a", "b"]
    assert np.asarray(people.visit().history.items).dtype == object

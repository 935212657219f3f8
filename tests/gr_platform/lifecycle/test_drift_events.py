"""What counts as drift of a day of events: planted days against ordinary ones, simulated and by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.events.declaration import Declaration
from gr_platform.events.ingest import CleanEvents
from gr_platform.events.judgements import psi
from gr_platform.events.simulator import simulate
from gr_platform.lifecycle.drift_events import DayDrift, day_drift
from gr_platform.lifecycle.options import Drift

DAY_MS = 86_400_000
START_DAY = 20_000  # 2024-10-04
BOUNDS = Drift()
MIX = st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any)


def of(counts: list[int]) -> dict[str, int]:
    return {f"bin {at}": count for at, count in enumerate(counts)}


@given(MIX, st.integers(1, 10_000), st.integers(1, 10_000))
def test_psi_of_one_mix_is_zero_whatever_the_sizes(mix: list[int], times: int, other: int) -> None:
    assert psi(of([times * n for n in mix]), of([other * n for n in mix])) == pytest.approx(0.0, abs=1e-12)


@given(MIX, MIX)
def test_psi_is_symmetric_finite_and_never_negative(one: list[int], two: list[int]) -> None:
    there, back = psi(of(one), of(two)), psi(of(two), of(one))
    assert there == pytest.approx(back, abs=1e-12)
    assert -1e-12 <= there < 50


@given(MIX, MIX, st.floats(0, 1), st.floats(0, 1))
def test_psi_grows_with_the_distance_of_the_mixes(one: list[int], two: list[int], a: float, b: float) -> None:
    size = max(len(one), len(two))
    p, q = (np.array(mix + [0] * (size - len(mix))) / sum(mix) for mix in (one, two))
    near, far = (psi(of(list(1e4 * p)), of(list(1e4 * (p + t * (q - p))))) for t in sorted((a, b)))
    assert near <= far + 1e-9


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(100, 5_000))
def test_psi_of_two_samples_of_one_mix_is_what_chance_gives(seed: int, num_bins: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    mix = rng.dirichlet(np.ones(num_bins))
    found = psi(of(rng.multinomial(7 * size, mix).tolist()), of(rng.multinomial(size, mix).tolist()))
    chance = (num_bins - 1) * (1 / size + 1 / (7 * size))
    # Beyond five standard deviations of a chi square of so many degrees of freedom.
    assert found < chance * (1 + 8 / np.sqrt(num_bins - 1)) + 0.01


Log = Callable[..., CleanEvents]


@pytest.fixture
def events_of(tmp_path: Path) -> Log:
    def write(log: pa.Table) -> CleanEvents:
        file = tmp_path / "events.parquet"
        pq.write_table(log, file)
        declaration = Declaration(name="log", actions=("view", "buy"), positives=("view",))
        return CleanEvents(home=tmp_path, declaration=declaration, partitions={}, files=[file], digest="d")

    return write


def made(num_a_day: list[int], *, items: int = 400, seed: int = 0, buys: float = 0.1) -> pa.Table:
    """Return days of events of 200 users: items by a power law, of which new ones come every day."""
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(len(num_a_day)), num_a_day)
    ranks = np.minimum(rng.zipf(1.3, len(day)), items) - 1
    item = np.where(rng.random(len(day)) < 0.05, 10_000 + 50 * day + rng.integers(0, 50, len(day)), ranks)
    return pa.table(
        {
            "user_id": rng.integers(0, 200, len(day)),
            "item_id": item,
            "action": np.where(rng.random(len(day)) < buys, "buy", "view"),
            "event_ts": (START_DAY + day) * DAY_MS + rng.integers(0, DAY_MS, len(day)),
        }
    )


def changed(log: pa.Table, column: str, change: Callable[[np.ndarray], np.ndarray], *, day: int) -> pa.Table:
    """Return a log in which `change` was done to a column on one day."""
    values = log[column].to_numpy(zero_copy_only=False).copy()
    there = log["event_ts"].to_numpy() // DAY_MS == START_DAY + day
    values[there] = change(values[there])
    return log.set_column(log.schema.get_field_index(column), column, pa.array(values))


def one_item(share: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda items: np.where(np.arange(len(items)) < share * len(items), 77, items)


def alarms(found: DayDrift) -> set[str]:
    measured = {
        "item": (found.item_psi, BOUNDS.max_item_drift),
        "action": (found.action_psi, BOUNDS.max_action_drift),
        "share": (found.top_share, BOUNDS.max_item_share),
    }
    return {name for name, (value, bound) in measured.items() if value is not None and value > bound}


@pytest.mark.parametrize("as_text", [False, True])
def test_an_ordinary_day_drifts_in_nothing_whatever_the_type_of_ids(events_of: Log, as_text: bool) -> None:
    log = made([800] * 9)
    if as_text:
        names = pa.array([f"it'em {item}" for item in log["item_id"].to_pylist()])
        log = log.set_column(1, "item_id", names)
    found = day_drift(events_of(log), BOUNDS)
    assert alarms(found) == set()
    assert (found.day, found.num_events, found.num_reference, found.num_days) == ("2024-10-12", 800, 5600, 7)
    assert found.item_psi is not None
    assert 0 <= found.item_psi < 0.1
    assert found.top_item == ("it'em 0" if as_text else "0")
    assert found.top_share == pytest.approx(found.top_share_before, abs=0.06)
    assert sum(share for _, _, share in found.actions) == pytest.approx(1)


def test_ten_times_the_events_are_no_drift_and_a_day_like_the_others_after_it_is_none(events_of: Log) -> None:
    for volumes in ([500] * 8 + [5_000], [500] * 7 + [5_000, 500], [5_000] * 8 + [500]):
        assert alarms(day_drift(events_of(made(volumes)), BOUNDS)) == set(), volumes


def test_a_day_of_other_items_drifts(events_of: Log) -> None:
    log = made([800] * 9)
    turned = day_drift(events_of(changed(log, "item_id", lambda items: 399 - items % 400, day=8)), BOUNDS)
    assert alarms(turned) == {"item"} | ({"share"} if (turned.top_share or 0) > 0.3 else set())
    half_new = changed(log, "item_id", lambda items: np.where(items % 2 == 1, items + 50_000, items), day=8)
    assert "item" in alarms(day_drift(events_of(half_new), BOUNDS))


def test_a_day_of_other_actions_drifts_in_its_actions_alone(events_of: Log) -> None:
    log = changed(made([800] * 9), "action", lambda a: np.where(np.arange(len(a)) % 2 == 0, "buy", "view"), day=8)
    found = day_drift(events_of(log), BOUNDS)
    assert alarms(found) == {"action"}
    assert [name for name, _, _ in found.actions] == ["view", "buy"]


def test_a_poisoned_day_is_one_of_one_item(events_of: Log) -> None:
    found = day_drift(events_of(changed(made([800] * 9, items=4000), "item_id", one_item(0.8), day=8)), BOUNDS)
    assert "share" in alarms(found)
    assert (found.top_item, found.top_share) == ("77", pytest.approx(0.8, abs=0.01))


def test_a_poisoned_day_is_no_reference_for_the_days_after_it(events_of: Log) -> None:
    poisoned = changed(made([800] * 9), "item_id", one_item(0.8), day=7)
    found = day_drift(events_of(poisoned), Drift(max_item_share=0.5))
    assert (found.left_out, found.num_days) == (1, 6)
    assert "item" not in alarms(found)


def test_days_without_events_between_are_passed_over(events_of: Log) -> None:
    found = day_drift(events_of(made([800, 800, 0, 0, 800, 0, 800])), BOUNDS)
    assert (found.day, found.num_days) == ("2024-10-10", 3)
    assert alarms(found) == set()


def test_a_day_of_few_events_says_nothing_and_the_one_before_it_is_judged(events_of: Log) -> None:
    found = day_drift(events_of(made([800] * 8 + [99])), BOUNDS)
    assert (found.day, found.num_events) == ("2024-10-11", 800)
    assert found.newest_ms is not None
    assert found.newest_ms < (START_DAY + 8) * DAY_MS
    nothing = day_drift(events_of(made([50, 50])), BOUNDS)
    assert (nothing.day, nothing.item_psi, nothing.top_share) == ("", None, None)
    assert nothing.newest_ms is not None
    alone = day_drift(events_of(made([800])), BOUNDS)
    assert (alone.item_psi, alone.action_psi, alone.num_reference) == (None, None, 0)
    assert alone.top_share is not None, "one item's share needs nothing to be compared with"


def test_a_day_of_one_person_is_that_persons_taste_and_not_judged(events_of: Log) -> None:
    log = changed(made([800] * 9), "user_id", lambda users: np.where(np.arange(len(users)) < 790, 5, users), day=8)
    found = day_drift(events_of(log), BOUNDS)
    assert found.num_people == pytest.approx(1.0, abs=0.1)
    assert (found.item_psi, found.action_psi) == (None, None)


def test_thirty_ordinary_days_of_a_stream_whose_items_come_and_go_raise_no_alarm(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    simulate(path, num_events=100_000, seed=3)
    log = pq.read_table(path)
    days = log["event_ts"].to_numpy() // DAY_MS
    raised = []
    for newest in range(days.max() - 29, days.max() + 1):
        file = tmp_path / "until.parquet"
        pq.write_table(log.filter(pa.array((days <= newest) & (days >= newest - 8))), file)
        declaration = Declaration(name="log", actions=("view", "like", "purchase"), positives=("view",))
        events = CleanEvents(home=tmp_path, declaration=declaration, partitions={}, files=[file], digest="d")
        found = day_drift(events, BOUNDS)
        assert found.item_psi is not None
        raised += [(found.day, name) for name in alarms(found)]
    assert raised == []

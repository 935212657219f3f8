from collections import Counter
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr_platform import settings as platform_settings
from gr_platform.evaluation.protocols import split_targets
from gr_platform.sequences.k_core import k_core
from gr_platform.sequences.splits import describe_targets, train_ends

DATA = platform_settings.test_data()
FIRST_ITEM = 5


def brute_force(log, k):
    pairs = [(user, item) for user, items in enumerate(log) for item in items]
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        kept = [(user, item) for user, item in pairs if users[user] >= k and items[item] >= k]
        if kept == pairs:
            return set(users), set(items)
        pairs = kept


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=8), st.integers(1, 4), st.data())
def test_the_core_equals_removing_one_by_one(make_dataset, log, k, data):
    ends = np.array([data.draw(st.integers(0, len(items))) for items in log], np.int64)
    dataset = make_dataset([[(item, 1, i) for i, item in enumerate(items)] for items in log], 6)
    core = k_core(dataset, ends, k)
    users, items = brute_force([items[:end] for items, end in zip(log, ends, strict=True)], k)
    assert set(np.flatnonzero(core.users).tolist()) == users
    assert set((np.flatnonzero(core.items) - FIRST_ITEM).tolist()) == items


def test_a_core_filters_targets_and_touches_nothing_else(make_dataset):
    # training parts [0, 1], [0, 1], [2, 3]: the 2-core is users 0 and 1 with items 0 and 1
    walks = [(0, 1, 2, 1), (0, 1, 0, 2), (2, 3, 0, 0)]
    dataset = make_dataset([[(item, 1, i) for i, item in enumerate(walk)] for walk in walks], 5)
    assert split_targets(dataset, "test", positives_only=True).rows.tolist() == [0, 1, 2]
    assert split_targets(dataset, "test", positives_only=True, k_core=2).rows.tolist() == [0]
    core = k_core(dataset, train_ends(dataset.lengths), 2)
    assert describe_targets(dataset, core)["test"]["outside_core"] == 2
    assert "outside_core" not in describe_targets(dataset)["test"]
    assert core.items.shape == (dataset.vocabulary.num_rows,)
    assert dataset.num_exposures == 12
    with pytest.raises(ValueError, match="k is 0"):
        k_core(dataset, dataset.lengths, 0)


@pytest.mark.skipif(DATA is None, reason="needs the real data sets: set GR_TEST_DATA")
def test_amazon_sports_is_the_five_core_it_is_published_as(make_dataset):
    """35,598 users, 18,357 items, 296,337 reviews: all inside at k = 5, and not at k = 6."""
    assert DATA is not None
    log = pq.read_table(DATA / "amazon-sports" / "interactions.parquet").sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )
    items = np.unique(log["item_id"].to_numpy(), return_inverse=True)
    rows = zip(log["user_id"].to_pylist(), items[1].tolist(), log["timestamp"].to_pylist(), strict=True)
    users = [[(item, 1, 1000 * time) for _, item, time in group] for _, group in groupby(rows, key=lambda row: row[0])]
    dataset = make_dataset(users, len(items[0]))
    core = k_core(dataset, dataset.lengths, 5)
    assert (core.users.sum(), core.items.sum(), dataset.num_exposures) == (35_598, 18_357, 296_337)
    assert dataset.num_users == 35_598
    assert k_core(dataset, dataset.lengths, 6).users.sum() < dataset.num_users

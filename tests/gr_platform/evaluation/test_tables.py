import numpy as np
import pytest

from gr_platform.evaluation.protocols import Judged, rank_by_popularity, ranking_facts, retrieval_facts
from gr_platform.evaluation.tables import DAY_MS, judged_table, metrics_of_table, ranked_table, tasks_of
from gr_platform.sequences.splits import by_time

CUT = 3 * DAY_MS


@pytest.fixture
def dataset(make_dataset):
    def walk(*events):
        return [(item, 1, int(day * DAY_MS)) for item, day in events]

    users = [walk((0, 1), (1, 2), (2, 3), (0, 4.5)), walk((0, 0)), walk((0, 2.5), (3, 5)), walk((1, 7))]
    return make_dataset(users, 4, exclude_seen="all")


def test_a_ranked_table_says_what_was_known_at_the_request(dataset):
    table = ranked_table(rank_by_popularity(dataset, by_time(dataset, CUT, targets="all")), dataset)
    assert table["user_id"].to_pylist() == [1, 1, 3, 4]
    assert (table["item"].to_numpy() - 5).tolist() == [2, 0, 3, 1]
    assert table["known"].to_pylist() == [2, 2, 1, 0]
    # from the first exposure to the request; who has no history is not known at all
    assert table["age_days"].to_pylist() == [2, 3.5, 2.5, 0]
    assert table["unreachable"].to_pylist() == [False, True, False, False]
    # 2 and 3 were never seen before the cut; 1 was, once
    assert table["tied"].to_pylist() == [True, False, True, False]


def test_figures_computed_from_tables_are_those_of_what_they_were_made_of(dataset):
    held = by_time(dataset, CUT, targets="all")
    ranked = rank_by_popularity(dataset, held)
    assert metrics_of_table(ranked_table(ranked, dataset)) == retrieval_facts(ranked)
    labels = np.array([[True, False], [False, False], [True, True], [False, True]])
    logits = np.array([[0.5, 1.0], [0.25, -1.0], [2.0, 0.0], [-3.0, 1.0]], np.float32)
    judged = Judged(targets=held.targets, items=ranked.items, labels=labels, logits=logits)
    table = judged_table(judged, ["like", "buy"], dataset)
    assert tasks_of(table) == ["like", "buy"]
    facts = metrics_of_table(table)
    assert facts == ranking_facts(judged, ["like", "buy"])
    # user 1's two targets are the only ones of one user: the liked one scores higher
    assert facts["like"]["gauc"] == 1
    assert facts["buy"]["gauc"] is None

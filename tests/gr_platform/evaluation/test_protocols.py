from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gr_platform.evaluation import protocols, ranks
from gr_platform.evaluation.popularity import train_counts
from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny
from gr_platform.training.batches import request_batch

VIEW, LIKE = 1, 2


def walk(*items, mask=VIEW):
    return [(item, mask, 1000 * step) for step, item in enumerate(items)]


def scored_by(table):
    """A stand-in for a retrieval model: one-hot user vectors make the scores the rows of `table`."""
    served = iter(range(len(table)))
    return SimpleNamespace(
        config=tiny("retrieval").model,
        num_rows=len(table[0]),
        eval=lambda: None,
        user_vectors=lambda batch: torch.eye(len(table))[[next(served) for _ in range(len(batch))]],
        item_vectors=lambda: torch.tensor(table, dtype=torch.float32).T,
    )


@pytest.fixture(autouse=True)
def _one_width(monkeypatch):
    monkeypatch.setattr(ranks, "BLOCK_USERS", 2)


def test_rank_is_one_plus_items_scored_higher(make_dataset):
    dataset = make_dataset([walk(0, 1, 2), walk(3, 0, 1), walk(1, 2, 3)], 4)
    table = np.zeros((3, 9))
    table[:, 5:] = [[4, 3, 2, 1], [1, 9, 2, 3], [4, 3, 2, 1]]
    ranked = protocols.rank_by_model(scored_by(table), dataset, "test")
    assert ranked.ranks.tolist() == [3, 1, 4]
    assert ranked.num_ties == 0
    assert ranked.scores.tolist() == pytest.approx([2 / 0.05, 9 / 0.05, 1 / 0.05])


def test_ties_count_against_the_model_so_a_constant_one_ranks_last(make_dataset):
    dataset = make_dataset([walk(0, 1, 2), walk(3, 0, 1)], 4)
    ranked = protocols.rank_by_model(scored_by(np.ones((2, 9))), dataset, "test")
    assert ranked.ranks.tolist() == [4, 4]
    assert ranked.num_ties == 2


def test_padding_buckets_and_inactive_items_never_compete(make_dataset):
    dataset = make_dataset([walk(0, 1, 2)], 4, inactive=[3])
    table = np.full((1, 9), 100.0)
    table[0, 5:] = [1, 2, 5, 100]
    assert protocols.rank_by_model(scored_by(table), dataset, "test").ranks.tolist() == [1]


def test_seen_items_compete_only_where_the_declaration_keeps_them(make_dataset):
    users, table = [walk(0, 1, 2)], np.zeros((1, 9))
    table[0, 5:] = [9, 8, 7, 10]
    filtered = make_dataset(users, 4, exclude_seen="all")
    assert protocols.rank_by_model(scored_by(table), make_dataset(users, 4), "test").ranks.tolist() == [4]
    assert protocols.rank_by_model(scored_by(table), filtered, "test").ranks.tolist() == [2]
    # at validation the test item is in the future: it still competes
    assert protocols.rank_by_model(scored_by(table), filtered, "validation").ranks.tolist() == [2]


def test_a_target_that_cannot_be_returned_ranks_behind_every_item(make_dataset):
    table = np.zeros((2, 9))
    table[:, 5:] = [9, 1, 1, 1]
    dataset = make_dataset([walk(0, 1, 0), walk(1, 2, 0)], 4, exclude_seen="all")
    ranked = protocols.rank_by_model(scored_by(table), dataset, "test")
    assert ranked.ranks.tolist() == [5, 1]
    assert ranked.num_unreachable == 1


def test_only_positive_targets_of_users_with_three_exposures_are_asked_for(make_dataset):
    users = [walk(0, 1, 2), walk(0, 1), walk(0, 1, 2, mask=LIKE), walk(3)]
    dataset = make_dataset(users, 4, positives=("like",))
    ranked = protocols.rank_by_popularity(dataset, "test")
    assert dataset.user_ids[ranked.targets.rows].tolist() == [3]
    assert protocols.split_targets(dataset, "test", positives_only=False).rows.tolist() == [0, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_raise(make_dataset, bad):
    table = np.zeros((1, 9))
    table[0, 7] = bad
    with pytest.raises(ranks.NonFiniteScores):
        protocols.rank_by_model(scored_by(table), make_dataset([walk(0, 1, 2)], 4), "test")


def test_popularity_counts_the_training_part_alone_and_ranks_by_it(make_dataset):
    users = [walk(0, 0, 1, 2, 3), walk(0, 1, 3, 2), walk(2, 2), walk(3, 1, 0)]
    dataset = make_dataset(users, 5)
    # training parts: [0, 0, 1], [0, 1], [2, 2] (too short to hold anything out), [3]
    assert train_counts(dataset)[5:].tolist() == [3, 2, 2, 1, 0]
    ranked = protocols.rank_by_popularity(dataset, "test")
    # targets 3 (behind 0, 1, 2), 2 (behind 0, tied with 1), 0 (first)
    assert ranked.ranks.tolist() == [4, 3, 1]
    assert ranked.num_ties == 1
    assert protocols.retrieval_facts(ranked)["num_users"] == 3


def test_blocks_change_no_rank(cycle_dataset, monkeypatch):
    torch.manual_seed(0)
    model = build_model(tiny("retrieval").model, num_rows=25, num_actions=2, tasks=["like"])
    found = protocols.rank_by_model(model, cycle_dataset, "test").ranks
    monkeypatch.setattr(ranks, "BLOCK_USERS", 64)
    monkeypatch.setattr(protocols, "FORWARD_USERS", 7)
    assert protocols.rank_by_model(model, cycle_dataset, "test").ranks.tolist() == found.tolist()


def test_evaluation_asks_at_the_targets_time_with_the_history_before_it(make_dataset):
    dataset = make_dataset([walk(*range(90))], 90)
    config = tiny("retrieval").model
    seen = []
    stand_in = scored_by(np.zeros((1, 95)))
    stand_in.user_vectors = lambda batch: (seen.append(batch), torch.zeros(1, 1))[1]
    stand_in.item_vectors = lambda: torch.zeros(95, 1)
    for chunk in (None, 1):
        protocols.rank_by_model(stand_in, dataset, "test", chunk=chunk)
    served, sliding = seen
    # 89 events before the target, 40 visible at most: the start moves in steps of 8 or of 1
    assert config.max_events == 40
    assert config.chunk == 8
    assert (served.items - 5).tolist() == list(range(56, 89))
    assert (sliding.items - 5).tolist() == list(range(49, 89))
    assert served.request_times.tolist() == [89_000]


def test_appending_the_target_event_gives_the_candidates_score(make_dataset):
    rng = np.random.default_rng(3)
    lengths = [3, 9, 41, 42, 49, 60]
    users = [[(int(rng.integers(30)), int(rng.integers(1, 4)), 5000 * i) for i in range(n)] for n in lengths]
    dataset = make_dataset(users, 30)
    torch.manual_seed(1)
    model = build_model(tiny("ranking").model, num_rows=35, num_actions=2, tasks=["like"])
    judged = protocols.judge_by_model(model, dataset, "test")
    for user in range(len(users)):
        batch = request_batch(dataset, judged.targets.rows[[user]], judged.targets.positions[[user]], model.config)
        expected = model.score(batch, torch.tensor([[judged.items[user]]]))[0, 0]
        torch.testing.assert_close(torch.sigmoid(torch.tensor(judged.logits[user])), expected, rtol=1e-5, atol=1e-6)


def test_ranking_labels_are_the_tasks_bit_of_every_targets_action(make_dataset):
    users = [walk(0, 1, 2, mask=mask) for mask in (VIEW, LIKE, VIEW | LIKE, VIEW)]
    dataset = make_dataset(users, 4)
    torch.manual_seed(1)
    model = build_model(tiny("ranking").model, num_rows=9, num_actions=2, tasks=["like"])
    judged = protocols.judge_by_model(model, dataset, "test")
    assert judged.labels[:, 0].tolist() == [False, True, True, False]
    facts = protocols.evaluate_ranking(model, dataset, "test")["like"]
    assert facts["auc"] == pytest.approx(roc_auc_score(judged.labels[:, 0], judged.logits[:, 0]))
    assert facts["base_rate"] == 0.5


def test_a_sample_of_users_is_the_same_every_time(cycle_dataset):
    first = protocols.split_targets(cycle_dataset, "test", positives_only=True, max_users=10)
    again = protocols.split_targets(cycle_dataset, "test", positives_only=True, max_users=10)
    assert len(first) == 10
    assert first.rows.tolist() == again.rows.tolist() == sorted(set(first.rows.tolist()))

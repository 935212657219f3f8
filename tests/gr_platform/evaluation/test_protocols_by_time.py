from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gr_platform.evaluation import protocols
from gr_platform.evaluation.popularity import train_counts
from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny
from gr_platform.sequences.splits import by_time, check_no_leak, leave_one_out
from gr_platform.training.batches import request_batch

NUM_ITEMS, NUM_ROWS = 100, 105
CUT = 1000


def random_users(*, planted=False):
    """400 users of random items: nothing but the target itself tells the target. `planted` copies it before itself."""
    rng = np.random.default_rng(11)
    users = []
    for _ in range(400):
        user = [(int(item), 1, int(300 * step)) for step, item in enumerate(rng.integers(NUM_ITEMS, size=6))]
        users.append([*user[:-2], user[-1], *user[-1:]] if planted else user)
    return users


def last_item_oracle():
    """A stand-in for a retrieval model that returns the last item of the history it is given."""

    def user_vectors(batch):
        last = batch.items[batch.offsets[1:] - 1]
        return torch.nn.functional.one_hot(last, NUM_ROWS).float()

    config = tiny("retrieval").model
    return SimpleNamespace(
        config=config,
        num_rows=NUM_ROWS,
        eval=lambda: None,
        user_vectors=user_vectors,
        item_vectors=lambda: torch.eye(NUM_ROWS),
    )


def hit_rate(dataset, split):
    return protocols.evaluate_retrieval(last_item_oracle(), dataset, split)["hr_at_10"]


def test_who_looks_at_the_history_for_the_target_scores_by_chance_unless_it_leaks(make_dataset):
    dataset = make_dataset(random_users(), NUM_ITEMS)
    for held in (leave_one_out(dataset, "test"), leave_one_out(dataset, "validation"), by_time(dataset, CUT)):
        assert hit_rate(dataset, held) < 0.04
        leaking = replace(held, targets=replace(held.targets, known=held.targets.positions + 1))
        assert hit_rate(dataset, leaking) == 1
        assert any("part of their own history" in problem for problem in check_no_leak(dataset, holdout=leaking))


def test_a_target_copied_before_itself_is_found_by_the_oracle_and_by_the_check(make_dataset):
    dataset = make_dataset(random_users(planted=True), NUM_ITEMS)
    assert hit_rate(dataset, "test") == 1
    assert "400 exposures stand twice, so a target may be part of its own history" in check_no_leak(dataset)


def walk(*events):
    return [(item, 0b11 if item % 2 else 0b01, time) for item, time in events]


@pytest.fixture
def dataset(make_dataset):
    users = [walk((0, 1), (1, 2), (2, 1000), (3, 1001), (1, 1002)), walk((0, 999), (0, 1000)), walk((3, 1500))]
    return make_dataset(users, 5)


def test_popularity_by_time_counts_what_is_before_the_cut_alone(dataset):
    held = by_time(dataset, CUT)
    assert train_counts(dataset, held.ends)[5:].tolist() == [2, 1, 0, 0, 0]
    # targets 2 (behind 0 and 1, tied with 3 and 4), 0 (first), 3 (as 2)
    assert protocols.rank_by_popularity(dataset, held).ranks.tolist() == [5, 1, 5]


def test_cooccurrence_by_time_asks_with_what_was_known_at_the_cut(make_dataset):
    """Item 1 followed 0 before the cut. The second target, 3, comes after a 2 that nobody knew of then."""
    users = [walk((0, 1), (1, 2)), walk((2, 3), (3, 4)), walk((0, 5), (2, 1000), (3, 1001))]
    ranked = protocols.rank_by_cooccurrence(make_dataset(users, 4), by_time(make_dataset(users, 4), CUT, targets="all"))
    # 1 comes first, then 0 for its two exposures; 2 and 3 are tied at one each
    assert ranked.ranks.tolist() == [4, 4]


def test_every_target_of_a_window_is_asked_at_its_time_with_what_was_known_at_the_cut(dataset):
    seen = []
    stand_in = last_item_oracle()
    stand_in.user_vectors = lambda batch: (seen.append(batch), torch.zeros(len(batch), NUM_ROWS))[1]
    stand_in.item_vectors = lambda: torch.zeros(10, NUM_ROWS)
    protocols.rank_by_model(stand_in, dataset, by_time(dataset, CUT, targets="all"))
    assert seen[0].request_times.tolist() == [1000, 1001, 1002, 1000, 1500]
    assert np.diff(seen[0].offsets).tolist() == [2, 2, 2, 1, 0]
    assert (seen[0].items - 5).tolist() == [0, 1] * 3 + [0]


def test_seen_items_are_those_before_the_cut(make_dataset):
    dataset = make_dataset([walk((0, 1), (2, 1000), (2, 1001), (0, 1002))], 5, exclude_seen="all")
    ranked = protocols.rank_by_popularity(dataset, by_time(dataset, CUT, targets="all"))
    assert ranked.num_unreachable == 1
    assert ranked.ranks.tolist() == [4, 4, 6]


def test_real_models_judge_by_time_and_users_without_history(dataset):
    torch.manual_seed(0)
    held = by_time(dataset, CUT, targets="all")
    retrieval = build_model(tiny("retrieval").model, num_rows=10, num_actions=2, tasks=["like"])
    facts = protocols.evaluate_retrieval(retrieval, dataset, held)
    assert (facts["num_targets"], facts["num_users"]) == (5, 3)
    ranking = build_model(tiny("ranking").model, num_rows=10, num_actions=2, tasks=["like"])
    judged = protocols.judge_by_model(ranking, dataset, held)
    assert judged.labels[:, 0].tolist() == [False, True, True, False, True]
    # Only the first user has targets of both labels, three of them.
    of_first = roc_auc_score(judged.labels[:3, 0], judged.logits[:3, 0])
    assert protocols.ranking_facts(judged, ["like"])["like"]["gauc"] == pytest.approx(of_first)
    for index in (0, 4):
        asked = held.targets[index : index + 1]
        batch = request_batch(dataset, asked.rows, asked.positions, ranking.config)
        expected = torch.logit(ranking.score(batch, torch.tensor([[judged.items[index]]]))[0, 0])
        assert judged.logits[index, 0] == pytest.approx(float(expected), abs=1e-5)


def test_leave_one_out_asks_what_training_asks(cycle_dataset):
    """The batch of a known beginning and a target equals the one that training reads at that position."""
    config, targets = tiny("ranking").model, leave_one_out(cycle_dataset, "test").targets
    for with_target in (False, True):
        ours = protocols._batch(cycle_dataset, targets, config, with_target=with_target)
        theirs = request_batch(cycle_dataset, targets.rows, targets.positions, config, with_target=with_target)
        for name in ("items", "actions", "times", "offsets", "request_times"):
            assert torch.equal(torch.as_tensor(getattr(ours, name)), torch.as_tensor(getattr(theirs, name)))


def test_all_targets_of_a_long_user_see_the_same_window_of_the_history(make_dataset):
    dataset = make_dataset([walk(*((step % 5, step) for step in range(90)))], 5)
    held, config = by_time(dataset, 50, targets="all"), tiny("retrieval").model
    asked = protocols._batch(dataset, held.targets, config)
    # 50 events are known, 40 visible at most: the start moves in steps of 8
    assert (config.max_events, config.chunk) == (40, 8)
    assert np.diff(asked.offsets).tolist() == [34] * 40
    assert asked.times[:34].tolist() == list(range(16, 50))
    assert asked.request_times.tolist() == list(range(50, 90))

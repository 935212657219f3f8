"""DLRM: no row knows its own action or anything later; its features are what a loop over events makes of them."""

import numpy as np
import pytest
import torch

from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.config import ModelConfig
from gr_platform.models.dlrm import DLRM, same_item_counts, sums_before, user_begins

NUM_ROWS, FIRST_ITEM, NUM_ACTIONS = 40, 5, 3
TASK_MASKS = [1, 2]


def make_model(*, seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"embedding_dim": 8, "num_layers": 1, "num_heads": 1, "qk_dim": 8, "v_dim": 8, "max_events": 40}
    config = ModelConfig(kind="ranking", encoder="dlrm", absolute_position=False, **(shape | changes))
    return build_model(config, num_rows=NUM_ROWS, num_actions=NUM_ACTIONS, tasks=["like", "buy"])


def make_users(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(FIRST_ITEM, FIRST_ITEM + 6, n),
            rng.integers(0, 2**NUM_ACTIONS, n),
            10**12 + np.cumsum(rng.integers(0, 10**7, n)),
        )
        for n in lengths
    ]


def make_batch(users):
    return EventBatch.of(users, [10**13] * len(users))


@pytest.fixture(scope="module")
def model():
    return make_model().double().eval()


@torch.no_grad()
def test_a_row_knows_neither_its_own_action_nor_anything_later(model):
    users = make_users((30, 20))
    items, actions, times = (part.copy() for part in users[0])
    items[13:], actions[12:], times[13:] = FIRST_ITEM, actions[12:] ^ 7, times[13:] + 12345
    before, after = (model.logits(make_batch([user, users[1]])) for user in (users[0], (items, actions, times)))
    torch.testing.assert_close(before[:13], after[:13], rtol=0, atol=1e-12)
    torch.testing.assert_close(before[30:], after[30:], rtol=0, atol=1e-12)
    assert bool(((before[13:30] - after[13:30]).abs().amax(1) > 1e-6).all())


@torch.no_grad()
def test_scores_do_not_depend_on_batch_mates(model):
    users = make_users((9, 0, 31, 1))
    alone = torch.cat([model.logits(make_batch([user])) for user in users])
    torch.testing.assert_close(model.logits(make_batch(users)), alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_candidate_scores_as_an_event_does(model):
    items, actions, times = make_users((12,))[0]
    asked = EventBatch.of([(items[:-1], actions[:-1], times[:-1])], [int(times[-1])])
    score = model.score(asked, torch.tensor([[items[-1], FIRST_ITEM]]))[0, 0]
    torch.testing.assert_close(score, model.logits(make_batch([(items, actions, times)]))[-1].sigmoid())


def test_running_sums_are_those_of_a_loop_over_events():
    users = make_users((15, 0, 8))
    batch = make_batch(users)
    begin = user_begins(batch.offsets)
    bits = (batch.actions[:, None] // 2 ** torch.arange(NUM_ACTIONS)) % 2
    before, same = sums_before(bits, begin), same_item_counts(batch.items, bits, begin)
    row = 0
    for items, actions, _ in users:
        did = (actions[:, None] >> np.arange(NUM_ACTIONS)) & 1
        for i in range(len(items)):
            assert before[row].tolist() == did[:i].sum(0).tolist()
            assert same[row].tolist() == did[:i][items[:i] == items[i]].sum(0).tolist()
            row += 1


def test_dlrm_learns_that_users_like_what_they_liked_before():
    rng = np.random.default_rng(0)
    users = []
    for _ in range(24):
        liked = rng.permutation(np.arange(FIRST_ITEM, FIRST_ITEM + 12))[:6]
        items = rng.integers(FIRST_ITEM, FIRST_ITEM + 12, 40)
        users.append((items, np.isin(items, liked) * 3, 10**12 + 60_000 * np.arange(40)))
    batch, model = make_batch(users), make_model(dropout=0.0)
    assert isinstance(model, DLRM)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss, num_events = model.loss(batch, task_masks=TASK_MASKS)
        (loss / num_events).backward()
        optimizer.step()
    # Three events in ten are the first of their item, and these are toss-ups: 0.3 ln 2 = 0.2 cannot be known.
    assert float(loss.detach()) / num_events < 0.3

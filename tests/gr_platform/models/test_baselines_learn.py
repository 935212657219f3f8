"""Every retrieval baseline learns a few users by heart: next item in a cycle, within a few hundred small steps."""

import numpy as np
import pytest
import torch

from gr_platform.errors import UserError
from gr_platform.models.baselines import baseline
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny

NUM_ITEMS, FIRST_ITEM = 20, 5
NUM_ROWS = FIRST_ITEM + NUM_ITEMS
MINUTE = 60_000


def make_model(name, seed=0):
    recipe = baseline(tiny("retrieval"), name)
    torch.manual_seed(seed)
    return build_model(recipe.model, num_rows=NUM_ROWS, num_actions=2, tasks=[])


def walks(num_users=12):
    """Return users who walk round a circle of items, each from a place and for a time of its own."""
    users = []
    for user in range(num_users):
        items = FIRST_ITEM + (user * 7 + np.arange(6 + user % 5)) % NUM_ITEMS
        users.append((items, np.ones_like(items), 10**12 + MINUTE * np.arange(len(items))))
    return EventBatch.of(users, [int(times[-1]) for _, _, times in users])


def train(model, batch, num_steps):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss, num_targets = model.loss(batch, negatives=None, positive_mask=1)
        (loss / num_targets).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", ["transformer", "sasrec", "gru4rec", "bert4rec", "hstu_softmax", "hstu_no_rab"])
def test_a_baseline_learns_a_cycle_by_heart(name):
    batch = walks()
    # A bidirectional model meets two or three targets of a user in a step where the others meet all.
    model = train(make_model(name), batch, 500 if name == "bert4rec" else 150)
    histories = [tuple(part[:-1] for part in user) for user in batch.histories]
    with torch.no_grad():
        users = model.user_vectors(EventBatch.of(histories, batch.request_times.numpy()))
        scores = users @ model.item_vectors()[FIRST_ITEM:].T
    assert torch.equal(scores.argmax(1) + FIRST_ITEM, batch.items[batch.offsets[1:] - 1])


def test_bert4rec_never_shows_a_hidden_item_or_action():
    model, batch = make_model("bert4rec").double().eval(), walks()
    hidden = torch.zeros(len(batch.items), dtype=torch.bool)
    hidden[[4, 30]] = True
    other = walks()
    other.items[hidden] = FIRST_ITEM + 3
    other.actions[hidden] = 2
    with torch.no_grad():
        torch.testing.assert_close(model._hidden_rows(batch, hidden), model._hidden_rows(other, hidden))


def test_bert4rec_draws_what_it_hides_from_the_global_generator():
    model, batch = make_model("bert4rec").eval(), walks()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model.loss(batch, negatives=None, positive_mask=1)[0].detach())
    assert losses[0] == losses[1] != losses[2]


def test_bert4rec_has_positive_targets_alone_and_always_the_last_event():
    model, batch = make_model("bert4rec").eval(), walks()
    batch.actions[:] = 2
    assert model.loss(batch, negatives=None, positive_mask=1)[1] == 0
    batch.actions[batch.offsets[1:] - 1] = 3
    assert model.loss(batch, negatives=None, positive_mask=1)[1] == len(batch)


def test_bert4rec_takes_shared_negatives_and_refuses_those_of_each_target():
    model, batch = make_model("bert4rec").eval(), walks()
    loss, num_targets = model.loss(batch, negatives=torch.arange(FIRST_ITEM, NUM_ROWS), positive_mask=1)
    assert 0 < float(loss.detach()) < np.inf
    assert num_targets >= len(batch)
    with pytest.raises(UserError, match="'all' or 'shared'"):
        model.loss(batch, negatives=torch.full((9, 4), FIRST_ITEM), positive_mask=1)


def test_bert4rec_answers_a_full_window_and_an_empty_history():
    model = make_model("bert4rec").eval()
    length = model.config.max_events
    full = (np.full(length, FIRST_ITEM), np.ones(length, np.int64), np.arange(length))
    nothing = (np.zeros(0, np.int64),) * 3
    with torch.no_grad():
        vectors = model.user_vectors(EventBatch.of([full, nothing], [length, 5]))
    torch.testing.assert_close(torch.linalg.vector_norm(vectors, dim=1), torch.ones(2))

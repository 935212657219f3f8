"""A matching start: from the first step a layer tells an item that the user met before from all others."""

from dataclasses import replace

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny
from gr_platform.training.optim import Optimizer

NUM_ITEMS, FIRST_ITEM = 2_000, 5
MINUTE = 60_000


def model_of(*, matching):
    base = tiny("ranking").model
    torch.manual_seed(3)
    model = build_model(
        replace(base, embedding_dim=64, num_heads=2, qk_dim=32, v_dim=32, dropout=0.0),
        num_rows=FIRST_ITEM + NUM_ITEMS,
        num_actions=2,
        tasks=["again"],
    )
    if matching:
        model.encoder.start_matching()
    return model


def users(seed, num_users=64, length=10):
    """Return users with random items, a third of them met before, which is what their second action says."""
    random = np.random.default_rng(seed)
    histories = []
    for _ in range(num_users):
        items = random.integers(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS, length)
        for place in np.flatnonzero(random.random(length - 1) < 1 / 3) + 1:
            items[place] = items[random.integers(place)]
        met = np.array([item in items[:place] for place, item in enumerate(items)])
        histories.append((items, np.where(met, 3, 1), 10**12 + MINUTE * np.arange(length)))
    return EventBatch.of(histories, [int(times[-1]) for _, _, times in histories])


def auc_of_strangers(model, num_steps=60):
    """Return how well the model tells repeated items of users and items that it was not trained on."""
    optimizer = Optimizer(model, tiny("ranking").with_training(table_optimizer="frozen", learning_rate=0.01).training)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss, num_events = model.loss(users(step), task_masks=[2])
        loss.backward()
        optimizer.step(num_events)
    asked = users(10_000)
    with torch.no_grad():
        logits = model.eval().logits(asked)[:, 0]
    return roc_auc_score((asked.actions & 2) != 0, logits)


def test_an_item_met_before_is_learned_soon_and_for_all_items():
    matching, independent = (auc_of_strangers(model_of(matching=start)) for start in (True, False))
    assert matching > 0.95
    assert independent < 0.7


def test_keys_start_as_queries_and_values_as_gates():
    for layer in model_of(matching=True).encoder.layers:
        u, v, q, k = layer._project(torch.randn(7, layer.uvqk.shape[0]), None)
        torch.testing.assert_close(q, k)
        torch.testing.assert_close(u, v.flatten(1))

"""Training through the kernels is training through plain PyTorch: the same losses, step for step."""

import pytest
import torch

from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny
from gr_platform.training.batches import training_batch, training_reader
from gr_platform.training.objectives import objective_of
from gr_platform.training.optim import Optimizer
from gr_platform.training.phases import training_users

NUM_STEPS = 50


def loss_curve(dataset, recipe, backend):
    """Return the loss of every step; the dropout masks are functions of seeds that torch's generator draws."""
    torch.manual_seed(0)
    vocabulary, declaration = dataset.vocabulary, dataset.declaration
    model = build_model(
        recipe.model,
        num_rows=vocabulary.num_rows,
        num_actions=len(declaration.actions),
        tasks=list(declaration.tasks),
    ).train()
    model.encoder.backend = backend
    assert {layer.backend for layer in model.encoder.layers} == {backend}
    optimizer, objective = Optimizer(model, recipe.training), objective_of(dataset, recipe)
    reader = training_reader(dataset, *training_users(dataset), recipe)
    losses = []
    while len(losses) < NUM_STEPS:
        for batch in reader.read(len(losses)):
            total, count = objective.loss(model, training_batch(batch), len(losses))
            optimizer.zero_grad()
            total.backward()
            optimizer.step(count)
            losses.append(float(total.detach()) / count)
    return torch.tensor(losses[:NUM_STEPS], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "negatives"), [("retrieval", "shared"), ("retrieval", "per_token"), ("ranking", None)]
)
def test_the_kernels_and_plain_pytorch_give_one_loss_curve(cycle_dataset, kind, negatives):
    recipe = tiny(kind).with_training(batch_size=16, **({"negatives": negatives} if negatives else {}))
    assert recipe.model.dropout > 0
    expected, got = (loss_curve(cycle_dataset, recipe, backend) for backend in ("reference", "cpu"))
    assert expected[-5:].mean() < expected[:5].mean()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)

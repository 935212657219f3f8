"""How weights move: AdamW, its learning rate from step to step, clipping, and the running mean of the weights.

Invariant: a step is a function of the weights, the gradients and `state()` alone, so a run resumed from its state goes
on bit for bit. Embeddings, norms and biases never decay.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gr_platform.models.config import TrainingConfig
from gr_platform.models.embeddings import EmbeddingTable
from kernels import RowwiseAdamW

ADAM_BETAS = (0.9, 0.98)
# The running mean forgets its start: its decay in step t is at most (1 + t) / (AVERAGE_START + t).
AVERAGE_START = 10
STEPS, AVERAGE = "num_steps", "average"


def learning_rate(training: TrainingConfig, step: int, share: float) -> float:
    """Return the learning rate of step number `step` from 0, at which `share` of the epochs there may be has passed.

    It rises linearly over warmup_steps, and is the base rate times 1 (constant), 1 - share (linear) or half a wave
    from 1 to 0 (cosine).
    """
    shapes = {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}
    rise = min(1.0, (step + 1) / training.warmup_steps) if training.warmup_steps else 1.0
    return training.learning_rate * rise * shapes[training.schedule]


def item_tables(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the model's embedding tables of items."""
    return [module.weight for module in model.modules() if isinstance(module, EmbeddingTable)]


def decaying(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that decay: the matrices that are no part of an embedding."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    embedding = getattr(model, "embedding", None)
    spared = {id(parameter) for parameter in [*tables, *(embedding.parameters() if embedding is not None else ())]}
    return [parameter for parameter in model.parameters() if parameter.dim() >= 2 and id(parameter) not in spared]


class Optimizer:
    """The optimiser of a run, over the weights of `model` that require gradients, on the device where they are now.

    Frozen item tables require none from now on.
    """

    def __init__(self, model: nn.Module, training: TrainingConfig) -> None:
        self.training, self.num_steps = training, 0
        if training.table_optimizer == "frozen":
            for table in item_tables(model):
                table.requires_grad_(False)
        self.named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        decay = {id(weight) for weight in decaying(model)}
        rowwise = {id(weight) for weight in item_tables(model)} if training.table_optimizer == "rowwise" else set()
        by_element = [weight for weight in self.named.values() if id(weight) not in rowwise]
        groups = [
            {"params": [weight for weight in by_element if id(weight) in decay], "weight_decay": training.weight_decay},
            {"params": [weight for weight in by_element if id(weight) not in decay], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([group for group in groups if group["params"]], betas=ADAM_BETAS, fused=True)
        ]
        if tables := [weight for weight in self.named.values() if id(weight) in rowwise]:
            self.parts.append(RowwiseAdamW(tables, betas=ADAM_BETAS, weight_decay=0.0))
        self.average = (
            {name: weight.detach().clone() for name, weight in self.named.items()} if training.average else {}
        )

    @property
    def weights(self) -> list[Tensor]:
        """The weights that move, in the model's order."""
        return list(self.named.values())

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in self.named.values():
            weight.grad = None

    @torch.no_grad()
    def step(self, num_targets: int = 1, share: float = 0.0) -> None:
        """Move the weights by the gradients of a sum over `num_targets` targets; share: see `learning_rate`.

        A step without targets is counted, but moves nothing.
        """
        self.num_steps += 1
        if not num_targets:
            return
        gradients = [weight.grad for weight in self.named.values() if weight.grad is not None]
        if num_targets != 1:
            torch._foreach_div_(gradients, float(num_targets))
        if self.training.clip_norm:
            nn.utils.clip_grad_norm_(self.weights, self.training.clip_norm)
        rate = learning_rate(self.training, self.num_steps - 1, share)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        if self.average:
            decay = min(self.training.average, (1 + self.num_steps) / (AVERAGE_START + self.num_steps))
            torch._foreach_lerp_(list(self.average.values()), self.weights, 1.0 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the running mean of its weights, where there is one, inside a `with`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumption needs beside the weights, under `<name of the weight>.<slot>`."""
        state = {STEPS: torch.tensor(self.num_steps)} | {
            f"{name}.{AVERAGE}": weight for name, weight in self.average.items()
        }
        for part in self.parts:
            for name, weight in self.named.items():
                if weight in part.state:
                    state |= {f"{name}.{slot}": torch.as_tensor(value) for slot, value in part.state[weight].items()}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises KeyError if that was of other weights."""
        state = dict(state)
        self.num_steps = int(state.pop(STEPS))
        part_of = {id(weight): part for part in self.parts for group in part.param_groups for weight in group["params"]}
        for key, value in state.items():
            name, slot = key.rsplit(".", 1)
            weight = self.named[name]
            if slot == AVERAGE:
                self.average[name].copy_(value)
                continue
            # Rowwise AdamW counts its steps as a Python integer, AdamW as a tensor beside the weight: it is fused.
            counts = slot == "step" and not value.is_floating_point()
            part_of[id(weight)].state[weight][slot] = int(value) if counts else value.to(weight.device)

    def _swap(self) -> None:
        for name, mean in self.average.items():
            self.named[name].data, self.average[name] = mean, self.named[name].data

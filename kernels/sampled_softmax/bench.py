"""Time of the softmax losses on this machine, forward and backward, against gathering every token's negatives.

Invariant: both sides normalise users and the whole table once, mask accidental hits, and are compared with the
reference, loss and gradients, before they are timed.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.sampled_softmax.op import full_softmax, sampled_softmax

# One ML-1M step: batch 128, sequences of at most 200, the authors' hyper-parameters.
NUM_TOKENS, NUM_ITEMS, WIDTH, NUM_NEGATIVES, TEMPERATURE = 13_900, 3_706, 50, 128, 0.05
REPEATS = 9
ROW = (
    "sampled softmax forward + backward, 13.9 k tokens, 3,706 items, d 50, 128 negatives: "
    "gather of [tokens, 128, d] / ours"
)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _gather(users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Return the losses through the [T, M, d] tensor of drawn vectors, by autograd."""
    positive = (users * F.embedding(targets, items)).sum(-1, keepdim=True)
    negative = torch.einsum("td,tmd->tm", users, F.embedding(negatives, items))
    negative = negative.masked_fill(negatives == targets[:, None], float("-inf"))
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="none")


def _ours(users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    return sampled_softmax(users, items, targets, negatives, TEMPERATURE, backend="cpu")


def _full(users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    return full_softmax(users, items, targets, TEMPERATURE, backend="cpu")


def _truth(users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    return sampled_softmax(users, items, targets, negatives, TEMPERATURE, backend="reference")


def _step(loss: Loss, leaves: list[Tensor], targets: Tensor, negatives: Tensor) -> list[Tensor]:
    """Return the mean loss and its gradients by the raw users and items."""
    users, items = (F.normalize(leaf, dim=1, eps=1e-6) for leaf in leaves)
    mean = loss(users, items, targets, negatives).mean()
    return [mean.detach(), *torch.autograd.grad(mean, leaves)]


def _best_ms(loss: Loss, leaves: list[Tensor], targets: Tensor, negatives: Tensor) -> float:
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        _step(loss, leaves, targets, negatives)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * min(seconds)


def gather_over_ours(num_threads: int) -> list[dict[str, Any]]:
    """Return rows {name, value, unit, against, target}: the ratio of this run, then the milliseconds behind it.

    Raises RuntimeError if a side disagrees with the reference: its time would mean nothing.
    """
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, WIDTH, generator=generator).requires_grad_() for n in (NUM_TOKENS, NUM_ITEMS)]
    targets = torch.randint(0, NUM_ITEMS, (NUM_TOKENS,), generator=generator)
    negatives = torch.randint(0, NUM_ITEMS, (NUM_TOKENS, NUM_NEGATIVES), generator=generator)
    expected = _step(_truth, leaves, targets, negatives)
    variants: dict[str, Loss] = {"gather of [tokens, 128, d]": _gather, "ours": _ours}
    for name, loss in variants.items():
        for got, want in zip(_step(loss, leaves, targets, negatives), expected, strict=True):
            if not torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max())):
                raise RuntimeError(f"{name} disagrees with the reference; its time would mean nothing")
    best = {name: _best_ms(loss, leaves, targets, negatives) for name, loss in variants.items()}
    ratio = best["gather of [tokens, 128, d]"] / best["ours"]
    best["full softmax over 3,706 items, ours"] = _best_ms(_full, leaves, targets, negatives)
    rows = [{"name": ROW, "value": ratio, "unit": "x", "against": "same run", "target": 3.0}]
    for name, value in best.items():
        row = {"name": f"sampled softmax, {name}", "value": value, "unit": "ms", "against": None, "target": None}
        rows.append(row | ({"name": name} if name.startswith("full") else {}))
    return rows

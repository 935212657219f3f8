"""What training and inference compute, counted from shapes alone: FLOPs, PFLOP/s-days, share of the machine.

Invariant: a multiply-add is two FLOPs, and only products that the mathematics needs count: an encoder's projections,
attention over the pairs of tokens that see each other, the logits of the loss. Lookups, norms, biases and dropout do
not, nor does what an implementation computes to throw away or computes again, so a share of the peak is useful work.
A backward pass is two forward passes: one for each factor of a product.

Legend: L tokens of the batch, P pairs of tokens that see each other, R rows that are asked for, d embedding_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gr_platform.models.config import ModelConfig
from gr_platform.models.transformer import swiglu_dim

PER_MULTIPLY_ADD = 2
# A training step is a forward pass and a backward pass of twice its products.
PER_STEP = 3
PFLOPS_DAY = 1e15 * 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an encoder is asked: L tokens of several users, P causal pairs of them, rows [R, d] of R tokens.

    full_pairs: pairs where every token of a user sees every other, of encoders that look both ways. What follows the
    last layer's attention is needed for the asked rows alone.
    """

    num_tokens: int
    num_pairs: int
    full_pairs: int
    num_rows: int


def step_flops(
    config: ModelConfig, lengths: np.ndarray, *, num_targets: int, num_outputs: int, num_actions: int = 0
) -> float:
    """Return the FLOPs of one training step on users of `lengths` tokens, int64 [B]: encoder, loss, both ways.

    lengths: `np.diff(batch.layout(kind).offsets)`. num_outputs: logits of each target: negatives + 1 or the whole
    catalogue (retrieval), tasks (ranking). num_actions: those of the data set, which size a DLRM.
    """
    if config.encoder == "dlrm":
        return PER_STEP * dlrm_flops(config, num_targets, num_outputs=num_outputs, num_actions=num_actions)
    work = work_of(lengths, num_targets)
    return PER_STEP * (encoder_flops(config, work) + _output_flops(config, num_targets, num_outputs))


def inference_flops(config: ModelConfig, lengths: np.ndarray, *, num_candidates: int, num_tasks: int = 0) -> float:
    """Return the FLOPs of answering users of `lengths` tokens, int64 [B], nothing cached, each with so many candidates.

    Retrieval: one row a user against `num_candidates` item vectors. Ranking: the candidates follow the history, and
    each sees it and itself (M-FALCON), so a microbatch costs what its candidates cost apart.
    """
    history = work_of(lengths, len(lengths))
    if config.kind == "retrieval":
        return encoder_flops(config, history) + _output_flops(config, len(lengths), num_candidates)
    num_asked = len(lengths) * num_candidates
    seen = num_candidates * int((lengths + 1).sum())
    work = Work(
        num_tokens=history.num_tokens + num_asked,
        num_pairs=history.num_pairs + seen,
        full_pairs=history.full_pairs + seen,
        num_rows=num_asked,
    )
    return encoder_flops(config, work) + _output_flops(config, num_asked, num_tasks)


def encoder_flops(config: ModelConfig, work: Work) -> float:
    """Return the FLOPs of an encoder's forward pass. Raises KeyError for an encoder that has no count."""
    return float(PER_MULTIPLY_ADD * ENCODER_PRODUCTS[config.encoder](config, work))


def work_of(lengths: np.ndarray, num_rows: int) -> Work:
    """Return what whole sequences of so many tokens, int64 [B], ask of a causal encoder."""
    lengths = lengths.astype(np.int64, copy=False)
    squares = int(lengths @ lengths)
    num_tokens = int(lengths.sum())
    return Work(
        num_tokens=num_tokens, num_pairs=(squares + num_tokens) // 2, full_pairs=squares, num_rows=int(num_rows)
    )


def _output_flops(config: ModelConfig, num_rows: int, num_outputs: int) -> float:
    """Return the FLOPs after the encoder: logits against items (retrieval), the heads' two layers (ranking)."""
    d = config.embedding_dim
    hidden = d if config.kind == "ranking" else 0
    return float(PER_MULTIPLY_ADD * num_rows * d * (hidden + num_outputs))


def dlrm_flops(config: ModelConfig, num_rows: int, *, num_outputs: int, num_actions: int) -> float:
    """Return the FLOPs of a DLRM's forward pass for so many impressions: bottom MLP, crosses, top MLP."""
    d, width = config.embedding_dim, config.ffn_dim or 4 * config.embedding_dim
    num_vectors, num_numbers = 3 + num_actions, 2 + 2 * num_actions
    bottom = num_numbers * width + width * d
    crosses = num_vectors**2 * d
    top = (d + num_vectors * (num_vectors - 1) // 2) * width + width * (width // 2) + (width // 2) * num_outputs
    return float(PER_MULTIPLY_ADD * num_rows * (bottom + crosses + top))


def _attention(config: ModelConfig, num_pairs: int) -> int:
    """Return the multiply-adds of q k^T and A v over so many pairs, one layer."""
    return num_pairs * config.num_heads * (config.qk_dim + config.v_dim)


def _after_attention(config: ModelConfig, work: Work) -> int:
    """Return how many rows all layers together form after their attention."""
    return (config.num_layers - 1) * work.num_tokens + work.num_rows


def _hstu(config: ModelConfig, work: Work) -> int:
    """Return the multiply-adds of layers of uvqk, attention and output projection."""
    d, heads = config.embedding_dim, config.num_heads
    uvqk = work.num_tokens * d * 2 * heads * (config.qk_dim + config.v_dim)
    layer = uvqk + _attention(config, work.num_pairs)
    return config.num_layers * layer + _after_attention(config, work) * heads * config.v_dim * d


def _softmax_stack(config: ModelConfig, work: Work, *, num_pairs: int, ffn_weights: int) -> int:
    """Return the multiply-adds of layers of qkv, attention, output projection and a feed-forward of so many weights."""
    d, heads = config.embedding_dim, config.num_heads
    qkv = work.num_tokens * d * heads * (2 * config.qk_dim + config.v_dim)
    layer = qkv + _attention(config, num_pairs)
    return config.num_layers * layer + _after_attention(config, work) * (heads * config.v_dim * d + ffn_weights)


def _transformer(config: ModelConfig, work: Work) -> int:
    d = config.embedding_dim
    ffn_weights = 3 * d * (config.ffn_dim or swiglu_dim(d))
    return _softmax_stack(config, work, num_pairs=work.num_pairs, ffn_weights=ffn_weights)


def _sasrec(config: ModelConfig, work: Work) -> int:
    d = config.embedding_dim
    return _softmax_stack(config, work, num_pairs=work.num_pairs, ffn_weights=2 * d * (config.ffn_dim or d))


def _bert4rec(config: ModelConfig, work: Work) -> int:
    d = config.embedding_dim
    return _softmax_stack(config, work, num_pairs=work.full_pairs, ffn_weights=2 * d * (config.ffn_dim or 4 * d))


def _gru4rec(config: ModelConfig, work: Work) -> int:
    """Return the multiply-adds of three gates, each of input and state, in every layer, and of the last projection."""
    square = config.embedding_dim**2
    return config.num_layers * work.num_tokens * 6 * square + work.num_rows * square


ENCODER_PRODUCTS: dict[str, Callable[[ModelConfig, Work], int]] = {
    "hstu": _hstu,
    "hstu_softmax": _hstu,
    "transformer": _transformer,
    "sasrec": _sasrec,
    "bert4rec": _bert4rec,
    "gru4rec": _gru4rec,
}


def run_facts(train_flops: float, seconds: float, peak_gflops: float | None) -> dict[str, float]:
    """Return the compute of a whole run as facts: train_flops, pflops_days, mm_peak_gflops, flops_utilisation.

    seconds: what the counted steps took, validation apart. flops_utilisation: their FLOPs a second over the peak; the
    last two are left out where the peak is not known.
    """
    facts = {"train_flops": train_flops, "pflops_days": train_flops / PFLOPS_DAY}
    if peak_gflops is None:
        return facts
    return facts | {
        "mm_peak_gflops": peak_gflops,
        "flops_utilisation": train_flops / max(seconds, 1e-9) / (1e9 * peak_gflops),
    }

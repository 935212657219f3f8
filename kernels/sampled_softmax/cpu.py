"""Softmax losses on a CPU: gathered dot products inside torch's sparse kernels, or one product a tile.

Invariant: the largest thing ever made is [T, M + 1] (a token's own negatives, or at most MAX_KEPT shared ones) or a
tile; gathered vectors exist in registers alone.

A token's own negatives: `sampled_addmm` computes the logits that are asked for and no others, `embedding_bag` sums
weighted rows. At 13.9 k tokens, 3,706 items, d 50, 128 negatives (2 threads, AVX-512) they take 5 and 2 ms where the
product of all tokens with the whole table takes 27, and they do not grow with the table: that product is taken only
where the table has fewer rows than a token has logits.

Legend: as in reference.py; pairs are (token, item) of the [T, M + 1] logits, the target's first.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# A tile of logits, 4 MB in fp32, stays in the third level cache; narrower tiles make the products slow.
TILE_LOGITS, TILE_ITEMS = 1 << 20, 4096
# Shared negatives whose [T, M + 1] slopes are kept, which spares the backward a product and an exponential.
MAX_KEPT = 1024
# Pairs whose transposition is sorted at a time: bounds what the backward allocates beside its result.
CHUNK_PAIRS = 1 << 22
# Ids of smaller tables are sorted as int16, which is faster: 4 % of an ML-1M step.
SHORT_IDS = 1 << 15


def check_ids(argument: str, ids: Tensor, first: int, num_rows: int) -> None:
    """Raise ValueError unless every id lies in first..num_rows-1."""
    if ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < first or high >= num_rows:
            raise ValueError(f"{argument} is {low} to {high}, must be row numbers in {first}..{num_rows - 1}")


def _pairs(targets: Tensor, negatives: Tensor, num_rows: int) -> Tensor:
    """Return the ids [T, M + 1] in the narrowest type that sparse kernels take: sorting is twice as fast in int32."""
    fits = max(num_rows, len(targets) * (negatives.shape[1] + 1)) < 2**31
    return torch.cat([targets[:, None], negatives], dim=1).to(torch.int32 if fits else torch.int64)


def _pair_logits(users: Tensor, items: Tensor, pairs: Tensor) -> Tensor:
    """Return users[t] . items[pairs[t, m]], [T, M + 1]."""
    num_tokens, width = pairs.shape
    if width > len(items):
        # The whole product is the smaller one, and torch takes no more pairs than a matrix has places.
        return (users @ items.T).gather(1, pairs.long())
    row_starts = torch.arange(0, num_tokens * width + 1, width, dtype=pairs.dtype)
    with warnings.catch_warnings():
        # Once a process torch says that sparse CSR is in beta.
        warnings.simplefilter("ignore", UserWarning)
        # Rows with unsorted and repeated columns are no matrix, but the kernel takes pair after pair.
        wanted = torch.sparse_csr_tensor(
            row_starts,
            pairs.view(-1),
            users.new_zeros(pairs.numel()),
            size=(num_tokens, len(items)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(wanted, users, items.T, beta=0.0).values().view(num_tokens, width)


def own_forward(
    users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the losses [T] and d loss / d logit [T, M + 1], which the backward needs; negatives [T, M]."""
    if not len(users):
        return users.new_empty(0), users.new_empty(0, negatives.shape[1] + 1)
    pairs = _pairs(targets, negatives, len(items))
    logits = _pair_logits(users / temperature, items, pairs)
    logits[:, 1:].masked_fill_(pairs[:, 1:] == pairs[:, :1], float("-inf"))
    return _losses_and_slopes(logits)


def _losses_and_slopes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [T] of logits [T, M + 1], the target's first, and d loss / d logit."""
    log_share = torch.log_softmax(logits, dim=1)
    losses = log_share[:, 0].neg()
    slopes = log_share.exp_()
    slopes[:, 0] -= 1
    return losses, slopes


def own_backward(
    grad: Tensor, users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, slopes: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of users and items."""
    d_users, d_items = torch.empty_like(users), torch.zeros_like(items)
    width = negatives.shape[1] + 1
    rows = torch.arange(len(items) + 1)
    for tokens in _spans(len(users), max(1, CHUNK_PAIRS // width)):
        pairs = _pairs(targets[tokens], negatives[tokens], len(items))
        weights = slopes[tokens] * (grad[tokens] / temperature)[:, None]
        d_users[tokens] = F.embedding_bag(pairs, items, per_sample_weights=weights, mode="sum")
        # The same sum with items as bags: sorted by item, a bag is the users of its pairs.
        keys = pairs.view(-1).to(torch.int16) if len(items) < SHORT_IDS else pairs.view(-1)
        by_item, order = torch.sort(keys, stable=True)
        starts = torch.searchsorted(by_item, rows.to(by_item.dtype))
        owners = torch.arange(len(pairs))[:, None].expand(-1, width).reshape(-1)
        # index_select runs on all threads, indexing by a tensor takes five times as long.
        d_items += F.embedding_bag(
            owners.index_select(0, order),
            users[tokens],
            starts,
            per_sample_weights=weights.view(-1).index_select(0, order),
            mode="sum",
            include_last_offset=True,
        )
    return d_users, d_items


def _spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _hits(targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens and columns, sorted by token, at which a shared negative is the token's target."""
    by_id, order = torch.sort(negatives, stable=True)
    first = torch.searchsorted(by_id, targets)
    counts = torch.searchsorted(by_id, targets, right=True) - first
    tokens = torch.repeat_interleave(torch.arange(len(targets)), counts)
    nth = torch.arange(len(tokens)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return tokens, order[first[tokens] + nth]


def _tiles(
    users: Tensor, candidates: Tensor, targets: Tensor, negatives: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (tokens, columns, logits of them); hits are -inf. The tile is written over by the next one."""
    hit_tokens, hit_columns = _hits(targets, negatives)
    widest = max(1, min(TILE_ITEMS, len(candidates)))
    num_tokens = max(1, min(TILE_LOGITS // widest, len(users)))
    room = users.new_empty(num_tokens, widest)
    starts = torch.arange(0, len(users) + num_tokens, num_tokens)
    for columns in _spans(len(candidates), TILE_ITEMS):
        inside = (hit_columns >= columns.start) & (hit_columns < columns.stop)
        at_token, at_column = hit_tokens[inside], hit_columns[inside] - columns.start
        bounds = torch.searchsorted(at_token, starts).tolist()
        for index, tokens in enumerate(_spans(len(users), num_tokens)):
            tile = room[: tokens.stop - tokens.start, : columns.stop - columns.start]
            torch.mm(users[tokens], candidates[columns].T, out=tile)
            hits = slice(bounds[index], bounds[index + 1])
            tile[at_token[hits] - tokens.start, at_column[hits]] = float("-inf")
            yield tokens, columns, tile


def keeps_slopes(negatives: Tensor) -> bool:
    """Return whether the forward keeps [T, M + 1] slopes for the backward, else [T] log-sum-exps."""
    return negatives.dim() == 2 or len(negatives) <= MAX_KEPT


def shared_forward(
    users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the losses [T] and slopes or the log-sum-exp of all logits; negatives [M] are shared by all tokens."""
    scaled, candidates = users / temperature, items[negatives]
    positive = (scaled * items[targets]).sum(1)
    if keeps_slopes(negatives):
        logits = users.new_empty(len(users), len(negatives) + 1)
        logits[:, 0] = positive
        torch.mm(scaled, candidates.T, out=logits[:, 1:])
        at_token, at_column = _hits(targets, negatives)
        logits[at_token, at_column + 1] = float("-inf")
        return _losses_and_slopes(logits)
    lse = positive.clone()
    for tokens, _, tile in _tiles(scaled, candidates, targets, negatives):
        lse[tokens] = torch.logaddexp(lse[tokens], tile.logsumexp(dim=1))
    return lse - positive, lse


def shared_backward(
    grad: Tensor, users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, kept: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of users and items; logits that were not kept are computed again, tile by tile."""
    scaled, candidates, wanted = users / temperature, items[negatives], items[targets]
    slope = (grad / temperature)[:, None]
    weighted = users * slope
    if keeps_slopes(negatives):
        excess, share = kept[:, :1], kept[:, 1:]
        d_users, d_candidates = torch.addmm(wanted * excess, share, candidates), share.T @ weighted
    else:
        excess = (scaled * wanted).sum(1).sub_(kept).expm1_()[:, None]
        d_users, d_candidates = wanted * excess, torch.zeros_like(candidates)
        for tokens, columns, tile in _tiles(scaled, candidates, targets, negatives):
            share = tile.sub_(kept[tokens, None]).exp_()
            d_users[tokens].addmm_(share, candidates[columns])
            d_candidates[columns].addmm_(share.T, weighted[tokens])
    d_items = torch.zeros_like(items)
    d_items.index_add_(0, negatives, d_candidates)
    d_items.index_add_(0, targets, weighted * excess)
    return d_users.mul_(slope), d_items

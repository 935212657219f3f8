"""Training batches straight from the memory map: planned for an epoch, read ahead by one thread, resumable anywhere.

Invariant: which users form which batch, and what is kept of them, is a function of the data set, the settings, the seed
and the epoch alone: the same with and without reading ahead, after a resumption, and on however many ranks look at it.

Legend: U users, B users of a batch, L exposures of a batch.
"""

import hashlib
import heapq
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.models.config import StochasticLength, Windows
from gr_platform.prefetch import prefetched
from gr_platform.sequences.dataset import Jagged, SequenceDataset
from gr_platform.sequences.subsequence import earlier_by, kept_exposures, kept_lengths
from gr_platform.training.seeds import generator

READ_AHEAD = 4
# Users of an epoch's last step at least: fewer join the step before, so that up to as many ranks can share every step.
LEAST_LAST_STEP = 8
# A quarter of an octave: users of a bucket differ by at most 19 % in length.
BUCKETS = np.unique((2.0 ** (np.arange(4 * 40) / 4)).astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderConfig:
    """How an epoch is cut into batches: steps of a number of users, or at most so many tokens of users of like length.

    seed: of the order and of Stochastic Length. batch_size: users of a step of all ranks; parts: batches in which each
    rank reads its share of one. max_tokens: tokens of a batch, or one user who has more; a user has
    1 + tokens_per_event * exposures. max_length: the longest span there may be, the N_c of stochastic_length
    (subsequence.py). windows: whether spans are read as they are given, or each as far ahead of its place as an epoch
    draws. num_ranks: processes that share an epoch.
    """

    seed: int
    batch_size: int | None = None
    parts: int = 1
    max_tokens: int | None = None
    tokens_per_event: int = 1
    max_length: int
    windows: Windows = "last"
    stochastic_length: StochasticLength = field(default_factory=StochasticLength)
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.max_tokens is None):
            raise ValueError("ReaderConfig takes either batch_size or max_tokens")
        for name in ("batch_size", "parts", "max_tokens", "tokens_per_event", "max_length", "num_ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"ReaderConfig.{name} is {value}, must be 1 or more")
        if self.batch_size is not None and self.batch_size < self.parts * self.num_ranks:
            raise ValueError(
                f"ReaderConfig.batch_size is {self.batch_size}, must be at least parts * num_ranks = "
                f"{self.parts * self.num_ranks}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """User rows int64 [B] and of each the exposures of its span that are kept.

    targets: what each token answers, aligned with `events`: a user's start token the first exposure of the span, every
    kept exposure but the last the one that followed it, dropped or not. Without thinning they are the events.
    """

    rows: np.ndarray
    events: Jagged
    targets: Jagged


@dataclass(frozen=True, slots=True)
class Plan:
    """An epoch's batches of all ranks: users order[begins[i]:ends[i]] form batch i. Rank r takes every w-th from r."""

    order: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Reader:
    """Batches of the spans starts..stops-1 of user rows, int64 [U] each, for one rank of `config.num_ranks`.

    All ranks get the same number of batches, none of them empty, and together every user once. With batch_size the
    users of a step are the same however many share it (up to LEAST_LAST_STEP ranks). With max_tokens, where the number
    does not come out even, the batches of most users are halved until it does, or, where there are hardly more users
    than batches, some are joined. Raises UserError for fewer users than ranks.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        rows: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        config: ReaderConfig,
        *,
        rank: int = 0,
    ) -> None:
        if not 0 <= rank < config.num_ranks:
            raise ValueError(f"rank is {rank}, must be between 0 and num_ranks - 1 = {config.num_ranks - 1}")
        if len(rows) < config.num_ranks:
            raise UserError(
                f"{len(rows)} users cannot be shared by {config.num_ranks} processes, which need one each at least; "
                "start fewer processes"
            )
        self.dataset, self.config, self.rank = dataset, config, rank
        self.rows, self.starts, self.stops = (np.ascontiguousarray(x, np.int64) for x in (rows, starts, stops))
        longest = int((self.stops - self.starts).max(initial=0))
        if longest > config.max_length:
            raise ValueError(f"a span has {longest} exposures, more than max_length = {config.max_length}")
        spans = hashlib.blake2b(digest_size=16)
        for each in (self.rows, self.starts, self.stops):
            spans.update(each.data)
        self.digest = storage.digest_of(
            {"sequences": dataset.digest, "spans": spans.hexdigest(), "config": asdict(config)}
        )

    def cursor(self, epoch: int, batch: int = 0) -> dict[str, Any]:
        """Return the place before batch number `batch` of an epoch as a JSON-able value; all ranks share it."""
        return {"epoch": epoch, "batch": batch, "plan": self.digest}

    def position(self, cursor: dict[str, Any]) -> tuple[int, int]:
        """Return the epoch and batch of a cursor. Raises UserError if it belongs to other sequences or settings."""
        if cursor.get("plan") != self.digest:
            raise UserError(
                "the place to resume from belongs to other sequences, users or batch settings than the ones given; "
                "train with those again, or delete the checkpoint to start anew"
            )
        return cursor["epoch"], cursor["batch"]

    def num_batches(self, epoch: int) -> int:
        """Return how many batches this rank, like every other, gets in an epoch."""
        return len(self.plan(epoch).begins) // self.config.num_ranks

    def plan(self, epoch: int) -> Plan:
        """Return the batches of all ranks in an epoch, as places in this reader's rows."""
        config, num_users = self.config, len(self.rows)
        order = generator(config.seed, "shuffle", epoch).permutation(np.arange(num_users))
        if config.batch_size is not None:
            cuts = _step_cuts(num_users, config.batch_size, config.parts, config.num_ranks)
            return Plan(order, cuts[:-1], cuts[1:])
        tokens = 1 + config.tokens_per_event * self._kept(order, epoch)
        by_length = np.argsort(np.searchsorted(BUCKETS, tokens, side="right"), kind="stable")
        order = order[by_length]
        begins, ends = _even(_budget_cuts(tokens[by_length], config.max_tokens or 0), config.num_ranks)
        # A step's batches are neighbours in length, so that no rank waits for another; steps come in any order.
        steps = generator(config.seed, "steps", epoch).permutation(len(begins) // config.num_ranks)
        batches = (steps[:, None] * config.num_ranks + np.arange(config.num_ranks)).ravel()
        return Plan(order, begins[batches], ends[batches])

    def read(self, epoch: int, batch: int = 0, *, read_ahead: int = READ_AHEAD) -> Generator[Batch, None, None]:
        """Yield this rank's batches of an epoch from number `batch` on, at most `read_ahead` of them formed early.

        They are formed by one thread, none where read_ahead is 0. An error while forming one is raised where it is
        due; closing the iterator, which leaving its loop does, ends the thread.
        """
        plan = self.plan(epoch)
        mine = range(batch * self.config.num_ranks + self.rank, len(plan.begins), self.config.num_ranks)
        chosen = (plan.order[plan.begins[index] : plan.ends[index]] for index in mine)
        formed = (self.form(users, epoch) for users in chosen)
        yield from prefetched(formed, read_ahead) if read_ahead else formed

    def form(self, users: np.ndarray, epoch: int) -> Batch:
        """Return the batch of users, given as places in this reader's rows, as the epoch sees them."""
        rows, starts, stops = self.rows[users], self.starts[users], self.stops[users]
        if self.config.windows == "random":
            earlier = earlier_by(starts, rows, seed=self.config.seed, epoch=epoch)
            starts, stops = starts - earlier, stops - earlier
        span = self.dataset.gather(rows, starts, stops)
        kept = self._kept(users, epoch)
        if (kept == span.lengths).all():
            return Batch(rows=rows, events=span, targets=span)
        choice, seed = self.config.stochastic_length.choice, self.config.seed
        places = kept_exposures(span.offsets, span.times, kept, rows, choice=choice, seed=seed, epoch=epoch)
        return thinned(rows, span, kept, places)

    def _kept(self, users: np.ndarray, epoch: int) -> np.ndarray:
        """Return how many exposures of users' spans an epoch keeps, int64 [B]."""
        config = self.config
        return kept_lengths(
            self.stops[users] - self.starts[users],
            self.rows[users],
            max_length=config.max_length,
            alpha=config.stochastic_length.alpha,
            seed=config.seed,
            epoch=epoch,
        )


def thinned(rows: np.ndarray, span: Jagged, kept: np.ndarray, places: np.ndarray) -> Batch:
    """Return the batch of `places` of a span, ascending, `kept` of each user: both int64."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    answered = np.empty_like(places)
    answered[1:] = places[:-1] + 1
    some = kept > 0
    answered[offsets[:-1][some]] = span.offsets[:-1][some]
    return Batch(rows=rows, events=_taken(span, offsets, places), targets=_taken(span, offsets, answered))


def _taken(span: Jagged, offsets: np.ndarray, places: np.ndarray) -> Jagged:
    items, actions, times = (np.take(values, places) for values in (span.items, span.actions, span.times))
    context = {name: np.take(values, places) for name, values in span.context.items()}
    return Jagged(offsets, items, actions, times, context=context)


def _step_cuts(num_users: int, batch_size: int, parts: int, num_ranks: int) -> np.ndarray:
    """Return where to cut users into batches: steps first, then each step into `parts` batches a rank, as equal as can
    be; a step of fewer users has fewer batches, as many for each rank."""
    steps = np.arange(0, num_users, batch_size)
    if len(steps) > 1 and num_users - steps[-1] < max(LEAST_LAST_STEP, num_ranks):
        steps = steps[:-1]
    cuts = []
    for begin, end in pairwise([*steps.tolist(), num_users]):
        pieces = num_ranks * max(1, min(parts, (end - begin) // num_ranks))
        cuts.append(begin + np.arange(pieces) * (end - begin) // pieces)
    return np.concatenate([*cuts, [num_users]])


def _budget_cuts(tokens: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return where to cut users of `tokens` so that no part has more than max_tokens, unless it is one user."""
    total = np.cumsum(tokens)
    cuts = [0]
    while cuts[-1] < len(tokens):
        before = int(total[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(total, before + max_tokens, side="right"))))
    return np.array(cuts)


def _even(cuts: np.ndarray, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return begins and ends of the parts between cuts, those of most users halved until num_ranks divides them.

    Where there are too few users for that, so that nearly every part is one user, the first ones are joined in pairs.
    """
    lacking = -(len(cuts) - 1) % num_ranks
    if len(cuts) - 1 + lacking > cuts[-1]:
        excess = (len(cuts) - 1) % num_ranks
        cuts, lacking = np.delete(cuts, np.arange(1, 2 * excess, 2)), 0
    if not lacking:
        return cuts[:-1], cuts[1:]
    largest = [(int(begin - end), int(begin), int(end)) for begin, end in pairwise(cuts)]
    heapq.heapify(largest)
    for _ in range(lacking):
        _, begin, end = heapq.heappop(largest)
        middle = (begin + end) // 2
        for half in ((begin, middle), (middle, end)):
            heapq.heappush(largest, (half[0] - half[1], *half))
    parts = np.array(sorted((begin, end) for _, begin, end in largest))
    return parts[:, 0], parts[:, 1]

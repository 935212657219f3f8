"""A toy model whose every row hashes all tokens up to it: one stale or foreign K/V row shows as another score."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from gr_platform.bundle.compute import PAGE_TOKENS, Ask, Piece
from gr_platform.models.config import Kind, ModelConfig
from serving.engine.engine import Engine, Limits
from serving.engine.microbatches import Microbatches
from serving.engine.ranker import Ranker
from serving.engine.requests import History
from serving.engine.retriever import Retriever

MODULUS = 8_388_593  # a prime below 2**23: states are exact in float32
ACTIONS = ("view", "like", "buy")
FIRST_ITEM = 5
NUM_ITEMS = 40


@dataclass
class ToyCompute:
    """Row k is a hash of tokens 0..k; what pages hold beside a user's own tokens never matters, and may be anything."""

    num_pages: int = 64
    salt: int = 1
    encoded_tokens: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    broken: bool = False

    def __post_init__(self) -> None:
        self.states = np.full((self.num_pages, PAGE_TOKENS), -1, np.int64)
        self.times = np.full((self.num_pages, PAGE_TOKENS), -1, np.int64)

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        if self.broken:
            raise RuntimeError("/secret/path")
        rows = [np.zeros((0, 2), np.float32)]
        for piece in pieces:
            tokens = piece.tokens
            self.encoded_tokens.append(len(tokens))
            state = int(self._past(piece.pages, piece.past)[0][-1]) if piece.past else self.salt
            states = []
            fields = (tokens.kinds, tokens.items, tokens.actions, tokens.times, tokens.query_times)
            for row in zip(*(f.tolist() for f in fields), strict=True):
                state = hash((state, *row)) % MODULUS
                states.append(state)
            self.states.reshape(-1)[piece.slots()] = states[: piece.keep]
            self.times.reshape(-1)[piece.slots()] = tokens.times[: piece.keep]
            if piece.wants_row:
                rows.append(np.array([[np.sin(state), np.cos(state)]], np.float32))
        return np.concatenate(rows)

    def score(self, asks: Sequence[Ask]) -> list[np.ndarray]:
        self.scored.append(sum(len(ask.candidates) for ask in asks))
        return [self._score(ask) for ask in asks]

    def _score(self, ask: Ask) -> np.ndarray:
        # The whole past goes in, so a hole or a swapped page shows even if the last row is right.
        history = hash(tuple(part.tobytes() for part in self._past(ask.pages, ask.past)))
        values = [[hash((history, int(c), ask.request_time, t)) % MODULUS for t in range(2)] for c in ask.candidates]
        return np.array(values, np.float32).reshape(len(ask.candidates), 2) / MODULUS

    def _past(self, pages: np.ndarray, num_tokens: int) -> list[np.ndarray]:
        return [pool[pages].reshape(-1)[:num_tokens] for pool in (self.states, self.times)]


class ToyVocabulary:
    """Raw id = 100 + dense index; the last item is inactive."""

    first_item = FIRST_ITEM
    num_rows = FIRST_ITEM + NUM_ITEMS

    def __init__(self) -> None:
        self.active = np.arange(self.num_rows) >= FIRST_ITEM
        self.active[-1] = False

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        index = ids - 100
        known = (index >= FIRST_ITEM) & (index < self.num_rows)
        return np.where(known, index, 1 + ids % (FIRST_ITEM - 1))

    def ids(self, indices: np.ndarray) -> np.ndarray:
        return indices + 100


def toy_bundle(kind: Kind, *, digest: str = "model", salt: int = 1, exclude_seen: str = "none") -> SimpleNamespace:
    """A bundle around the toy: max_events 12, chunk 4."""
    vectors = np.random.default_rng(3).normal(size=(FIRST_ITEM + NUM_ITEMS, 2)).astype(np.float32)
    return SimpleNamespace(
        kind=kind,
        digest=digest,
        config=ModelConfig(
            kind=kind, embedding_dim=2, num_layers=2, num_heads=1, qk_dim=2, v_dim=1, max_events=12, chunk=4
        ),
        declaration=SimpleNamespace(actions=list(ACTIONS), exclude_seen=exclude_seen),
        tasks=("like", "buy"),
        vocabulary=ToyVocabulary(),
        item_vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        compute=lambda num_pages, **options: ToyCompute(num_pages, salt=salt),
    )


def toy_engine(kind: Kind, *, cache_bytes: int = 1 << 20, limits: Limits | None = None, **options: object) -> Engine:
    """An engine of the toy with microbatches of 8."""
    model = (Ranker if kind == "ranking" else Retriever)(toy_bundle(kind, **options), cache_bytes=cache_bytes)
    model.microbatches = Microbatches.fixed(8)
    return Engine(model, limits)


def history(events: list[tuple[int, int, int]], *, offset: int = 0) -> History:
    """Events (raw item, action mask, time) as a History."""
    columns = np.array(events, np.int64).reshape(len(events), 3)
    return History(items=columns[:, 0], actions=columns[:, 1], times=columns[:, 2], offset=offset)


def some_history(num_events: int, *, seed: int = 0, offset: int = 0) -> History:
    """A random valid history; a longer one with the same seed begins with the shorter one."""
    rng = np.random.default_rng(seed)
    rows = rng.integers((100 + FIRST_ITEM, 0, 0), (100 + FIRST_ITEM + NUM_ITEMS, 8, 50), size=(200, 3))
    events = [(int(i), int(a), int(t)) for i, a, t in zip(rows[:, 0], rows[:, 1], rows[:, 2].cumsum(), strict=True)]
    return history(events[:num_events], offset=offset)

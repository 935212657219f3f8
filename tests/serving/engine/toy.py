"""A toy model whose every row hashes all tokens up to it: one stale or foreign K/V row shows as another score."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from gr_platform.bundle.compute import KV
from gr_platform.models.config import Kind, ModelConfig
from gr_platform.models.tokens import Tokens
from serving.engine.requests import History

MODULUS = 8_388_593  # a prime below 2**23: states are exact in float32
ACTIONS = ("view", "like", "buy")
FIRST_ITEM = 5
NUM_ITEMS = 40


@dataclass
class ToyCompute:
    """Two layers, one head; row k of layer l is a hash of tokens 0..k."""

    salt: int = 1
    encoded_tokens: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)

    def empty(self) -> KV:
        return KV(
            times=np.zeros(0, np.int64), k=np.zeros((2, 0, 1, 2), np.float32), v=np.zeros((2, 0, 1, 1), np.float32)
        )

    def encode(self, tokens: Tokens, past: KV) -> tuple[np.ndarray, KV]:
        self.encoded_tokens.append(len(tokens))
        state = int(past.v[0, -1, 0, 0]) if len(past) else self.salt
        states = []
        fields = (tokens.kinds, tokens.items, tokens.actions, tokens.times, tokens.query_times)
        for row in zip(*(f.tolist() for f in fields), strict=True):
            state = hash((state, *row)) % MODULUS
            states.append(state)
        column = np.array(states, np.float32)
        new = KV(
            times=tokens.times.copy(),
            k=np.repeat(column[None, :, None, None], 2, axis=0).repeat(2, axis=3),
            v=np.repeat(column[None, :, None, None], 2, axis=0),
        )
        rows = np.stack([np.sin(column), np.cos(column)], axis=1)
        return rows, new

    def score(self, candidates: np.ndarray, request_time: int, past: KV) -> np.ndarray:
        self.scored.append(len(candidates))
        # The whole past goes in, so a hole or a swapped page shows even if the last row is right.
        history = hash((past.v[0, :, 0, 0].tobytes(), past.k[1, :, 0, 1].tobytes(), past.times.tobytes()))
        values = [[hash((history, int(c), request_time, task)) % MODULUS for task in range(2)] for c in candidates]
        return np.array(values, np.float32).reshape(len(candidates), 2) / MODULUS


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
    """A bundle around the toy: max_events 12, chunk 4, microbatches of 8."""
    compute = ToyCompute(salt=salt)
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
        microbatch_size=8,
        item_vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        compute=lambda num_threads: compute,
        toy=compute,
    )


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

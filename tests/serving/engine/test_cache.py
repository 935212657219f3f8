"""The cache against an oracle that always recomputes, and its bookkeeping."""

import numpy as np
import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gr_platform.models.tokens import Tokens, ranking_tokens
from serving.engine.cache import ENTRY_OVERHEAD_BYTES, PAGE_TOKENS, KVCache
from tests.serving.engine.toy import ToyCompute

ROW_BYTES = 8 + 2 * (2 + 1) * 4
PAGE_BYTES = PAGE_TOKENS * ROW_BYTES + ENTRY_OVERHEAD_BYTES


def tokens_of(num_events: int, *, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    items, actions, steps = rng.integers(1, 30, size=(200, 3)).T
    return ranking_tokens(items[:num_events], actions[:num_events], steps.cumsum()[:num_events], 10_000)


def filled(cache: KVCache, tokens: Tokens) -> None:
    compute = ToyCompute()
    cache.insert(tokens, compute.encode(tokens, compute.empty())[1])


def num_cached(cache: KVCache, tokens: Tokens) -> int:
    found = cache.lookup(tokens)
    return 0 if found is None else len(found)


@pytest.mark.parametrize("num_events", [1, 7, 8, 20, 40])
def test_what_was_inserted_is_found_whole_and_equal(num_events: int) -> None:
    cache, compute, tokens = KVCache("m", 1 << 20), ToyCompute(), tokens_of(num_events)
    _, expected = compute.encode(tokens, compute.empty())
    cache.insert(tokens, expected)
    found = cache.lookup(tokens)
    assert found is not None
    assert np.array_equal(found.times, expected.times)
    assert np.array_equal(found.k, expected.k)
    assert np.array_equal(found.v, expected.v)
    cache.check_integrity()


def test_an_appended_history_finds_all_that_was_there() -> None:
    cache = KVCache("m", 1 << 20)
    for num_events in range(1, 60):
        before = num_cached(cache, tokens_of(num_events))
        assert before == (0 if num_events == 1 else 2 * num_events - 1)
        filled(cache, tokens_of(num_events))
        cache.check_integrity()
    # Superseded tails are dropped, so appending leaves one entry a page.
    assert cache.counters.num_entries == -(-len(tokens_of(59)) // PAGE_TOKENS)


@pytest.mark.parametrize("field", ["kinds", "items", "actions", "times", "query_times"])
def test_a_row_is_missed_when_any_field_before_it_differs(field: str) -> None:
    cache, tokens = KVCache("m", 1 << 20), tokens_of(30)
    filled(cache, tokens)
    fields = {name: getattr(tokens, name).copy() for name in ("kinds", "items", "actions", "times", "query_times")}
    fields[field][20] += 1
    assert num_cached(cache, Tokens(**fields)) == PAGE_TOKENS


def test_another_model_never_shares() -> None:
    one, other, tokens = KVCache("m", 1 << 20), KVCache("n", 1 << 20), tokens_of(30)
    filled(one, tokens)
    other._entries.update(one._entries)
    assert other.lookup(tokens) is None


def test_equal_prefixes_share_pages() -> None:
    cache, whole = KVCache("m", 1 << 20), tokens_of(24)
    filled(cache, whole)
    size = cache.counters.size_bytes
    fields = {name: getattr(whole, name).copy() for name in ("kinds", "items", "actions", "times", "query_times")}
    fields["items"][40] += 1
    filled(cache, Tokens(**fields))
    tail = len(whole) % PAGE_TOKENS or PAGE_TOKENS
    assert cache.counters.size_bytes == size + ENTRY_OVERHEAD_BYTES + tail * ROW_BYTES + (
        PAGE_BYTES if len(whole) - tail > 40 else 0
    )
    cache.check_integrity()


def test_the_least_recently_used_history_goes_first_and_leaf_first() -> None:
    cache = KVCache("m", 4 * PAGE_BYTES)
    old, new = tokens_of(16, seed=1).slice(0, 32), tokens_of(16, seed=2).slice(0, 32)
    filled(cache, old)
    filled(cache, new)
    assert num_cached(cache, old) == 32
    filled(cache, tokens_of(8, seed=3).slice(0, 16))
    assert num_cached(cache, new) == 16
    assert num_cached(cache, old) == 32
    assert cache.counters.evictions == 1
    cache.check_integrity()


def test_a_history_larger_than_the_bound_keeps_what_fits_and_never_exceeds_it() -> None:
    cache = KVCache("m", 2 * PAGE_BYTES)
    filled(cache, tokens_of(60))
    assert cache.counters.size_bytes <= 2 * PAGE_BYTES
    assert num_cached(cache, tokens_of(60)) == 2 * PAGE_TOKENS
    nothing = KVCache("m", 10)
    filled(nothing, tokens_of(60))
    assert nothing.counters.num_entries == 0


def test_what_is_returned_cannot_change_what_is_kept() -> None:
    cache, compute, tokens = KVCache("m", 1 << 20), ToyCompute(), tokens_of(5)
    _, kv = compute.encode(tokens, compute.empty())
    cache.insert(tokens, kv)
    kv.v[:] = -1
    found = cache.lookup(tokens)
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found.v[0, 0] = 7
    assert (found.v != -1).all()


class CacheAgainstOracle(RuleBasedStateMachine):
    """Histories grow, are cut, edited and asked again in any order, in a cache of five pages."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache("m", 5 * PAGE_BYTES)
        self.compute = ToyCompute()
        self.histories: dict[int, list[tuple[int, int, int]]] = {user: [] for user in range(4)}

    users = strategies.integers(0, 3)

    @rule(user=users, num_events=strategies.integers(1, 24), item=strategies.integers(1, 3))
    def append(self, user: int, num_events: int, item: int) -> None:
        events = self.histories[user]
        events.extend((item, 1, len(events) + i) for i in range(num_events))
        del events[80:]

    @rule(user=users, share=strategies.floats(0, 1))
    def edit(self, user: int, share: float) -> None:
        if events := self.histories[user]:
            at = int(share * (len(events) - 1))
            events[at] = (events[at][0] % 3 + 1, 2, events[at][2])

    @rule(user=users, share=strategies.floats(0, 1))
    def cut(self, user: int, share: float) -> None:
        del self.histories[user][int(share * len(self.histories[user])) :]

    @rule(user=users)
    def ask(self, user: int) -> None:
        columns = np.array(self.histories[user], np.int64).reshape(-1, 3).T
        tokens = ranking_tokens(columns[0], columns[1], columns[2], 99)
        past = self.cache.lookup(tokens) or self.compute.empty()
        _, new = self.compute.encode(tokens.slice(len(past), len(tokens)), past)
        _, expected = self.compute.encode(tokens, self.compute.empty())
        values = np.concatenate([past.v, new.v], axis=1)
        assert np.array_equal(values, expected.v)
        assert np.array_equal(np.concatenate([past.times, new.times]), expected.times)
        self.cache.insert(tokens, expected)

    @invariant()
    def integrity(self) -> None:
        self.cache.check_integrity()


TestCacheAgainstOracle = CacheAgainstOracle.TestCase
TestCacheAgainstOracle.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

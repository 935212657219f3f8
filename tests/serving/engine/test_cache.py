"""The cache's bookkeeping: what is found, what is not, who goes first, and whose page is whose."""

import numpy as np
import pytest

from gr_platform.bundle.compute import PAGE_TOKENS, pages_for
from gr_platform.models.tokens import Tokens, ranking_tokens
from serving.engine.cache import ENTRY_OVERHEAD_BYTES, KVCache, Lease, _canonical_rows

PAGE_BYTES = 100
ENTRY_BYTES = PAGE_BYTES + ENTRY_OVERHEAD_BYTES
FIELDS = ("kinds", "items", "actions", "times", "query_times")


def new_cache(num_pages: int = 200, *, digest: str = "m", most_tokens: int = 130) -> KVCache:
    return KVCache(digest, num_pages * ENTRY_BYTES, PAGE_BYTES, most_tokens)


def tokens_of(num_events: int, *, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    items, actions, steps = rng.integers(1, 30, size=(200, 3)).T
    return ranking_tokens(items[:num_events], actions[:num_events], steps.cumsum()[:num_events], 10_000)


def changed(tokens: Tokens, name: str, place: int) -> Tokens:
    fields = {field: getattr(tokens, field).copy() for field in FIELDS}
    fields[name][place] += 1
    return Tokens(**fields)


def acquired(cache: KVCache, tokens: Tokens) -> Lease:
    lease = cache.acquire(tokens)
    assert lease is not None
    assert len(lease.pages) == pages_for(len(tokens))
    return lease


def found(cache: KVCache, tokens: Tokens) -> int:
    return sum(entry.num_tokens for entry in cache._path(_canonical_rows(tokens)))


def keep(cache: KVCache, tokens: Tokens) -> int:
    """Run a request's whole life and return how many tokens were found."""
    lease = acquired(cache, tokens)
    if lease.num_cached < len(tokens):
        cache.commit(lease)
    cache.check_integrity()
    cache.release(lease)
    cache.check_integrity()
    return lease.num_cached


@pytest.mark.parametrize("num_events", [1, 7, 8, 20, 40])
def test_what_was_kept_is_found_whole_in_the_same_pages(num_events: int) -> None:
    cache, tokens = new_cache(), tokens_of(num_events)
    first = acquired(cache, tokens)
    cache.commit(first)
    cache.release(first)
    again = acquired(cache, tokens)
    assert again.num_cached == len(tokens)
    assert again.pages.tolist() == first.pages.tolist()


def test_an_appended_history_goes_on_in_its_last_page() -> None:
    cache = new_cache()
    for num_events in range(1, 60):
        assert keep(cache, tokens_of(num_events)) == (0 if num_events == 1 else 2 * num_events - 1)
    assert cache.counters.num_entries == pages_for(len(tokens_of(59)))
    assert cache.counters.delta_tokens == 58 * 2
    assert cache.counters.prefill_tokens == 3 + 58 * 2


@pytest.mark.parametrize("field", FIELDS)
def test_a_row_is_missed_when_any_field_before_it_differs(field: str) -> None:
    cache, tokens = new_cache(), tokens_of(30)
    keep(cache, tokens)
    assert keep(cache, changed(tokens, field, 20)) == PAGE_TOKENS


def test_another_model_never_shares() -> None:
    one, other, tokens = new_cache(), new_cache(digest="n"), tokens_of(30)
    keep(one, tokens)
    other._entries.update(one._entries)
    assert other._path(b"".join(entry.key for entry in one._entries.values())) == []
    assert acquired(other, tokens).num_cached == 0


def test_equal_prefixes_share_pages() -> None:
    cache, whole = new_cache(), tokens_of(24)
    keep(cache, whole)
    keep(cache, changed(whole, "items", 40))
    assert cache.counters.num_entries == pages_for(len(whole)) + pages_for(len(whole)) - 40 // PAGE_TOKENS


def test_what_was_not_committed_is_not_found_and_its_pages_are_free_again() -> None:
    cache, tokens = new_cache(), tokens_of(30)
    lease = acquired(cache, tokens)
    assert acquired(cache, tokens).num_cached == 0
    cache.release(lease)
    cache.check_integrity()
    scratch = cache.acquire(tokens, shared=False)
    assert scratch is not None
    cache.release(scratch)
    assert keep(cache, tokens) == 0


def test_two_requests_at_once_with_one_history_keep_one_copy() -> None:
    cache, tokens = new_cache(), tokens_of(30)
    first, second = acquired(cache, tokens), acquired(cache, tokens_of(40))
    cache.commit(first)
    cache.commit(second)
    cache.check_integrity()
    cache.release(first)
    cache.release(second)
    cache.check_integrity()
    # The longer one goes on from the other's full pages.
    assert keep(cache, tokens_of(40)) == len(tokens_of(40))
    assert cache.counters.num_entries == pages_for(len(tokens_of(40))) + 1


def test_a_tail_that_is_read_does_not_grow_and_one_that_grows_is_nobody_elses() -> None:
    cache = new_cache()
    keep(cache, tokens_of(10))
    reader, writer = acquired(cache, tokens_of(10)), acquired(cache, tokens_of(12))
    assert (reader.num_cached, writer.num_cached) == (21, 16)
    assert reader.pages[-1] != writer.pages[-1]
    cache.release(reader)
    cache.release(writer)
    first, second = acquired(cache, tokens_of(12)), acquired(cache, tokens_of(13))
    assert (first.num_cached, second.num_cached) == (21, 16)
    assert first.pages[-1] != second.pages[-1]
    cache.check_integrity()


def test_the_least_recently_used_history_goes_first_and_leaf_first() -> None:
    cache = new_cache(4, most_tokens=32)
    old, new = tokens_of(16, seed=1).slice(0, 32), tokens_of(16, seed=2).slice(0, 32)
    keep(cache, old)
    keep(cache, new)
    keep(cache, old)
    keep(cache, tokens_of(8, seed=3).slice(0, 16))
    assert cache.counters.evictions == 1
    assert [found(cache, tokens) for tokens in (new, old)] == [16, 32]


def test_leased_pages_are_not_evicted_and_a_request_without_room_waits() -> None:
    cache = new_cache(4, most_tokens=32)
    keep(cache, tokens_of(16, seed=1).slice(0, 32))
    reader = acquired(cache, tokens_of(16, seed=1).slice(0, 32))
    writer = acquired(cache, tokens_of(16, seed=2).slice(0, 32))
    entries = cache.counters.num_entries
    assert cache.acquire(tokens_of(16, seed=3).slice(0, 32)) is None
    assert (cache.counters.num_entries, cache.counters.evictions) == (entries, 0)
    cache.check_integrity()
    assert set(reader.pages.tolist()).isdisjoint(writer.pages.tolist())
    cache.release(writer)
    assert cache.acquire(tokens_of(16, seed=3).slice(0, 32)) is not None


@pytest.mark.parametrize("num_pages", [0, 1, 2])
def test_a_cache_smaller_than_one_history_serves_it_and_keeps_within_its_bound(num_pages: int) -> None:
    cache = new_cache(num_pages)
    for _ in range(2):
        keep(cache, tokens_of(60))
        assert cache.counters.num_entries <= num_pages
        assert cache.counters.size_bytes <= num_pages * ENTRY_BYTES
    assert keep(cache, tokens_of(60)) == num_pages * PAGE_TOKENS


def test_integrity_sees_a_lost_and_a_doubled_page() -> None:
    for harm in (lambda cache: cache._free.pop(), lambda cache: cache._free.append(cache._free[0])):
        cache = new_cache()
        keep(cache, tokens_of(20))
        harm(cache)
        with pytest.raises(RuntimeError, match="lost, or held twice"):
            cache.check_integrity()

"""The K/V cache across requests: pages of tokens, found by what they were computed from.

Invariant: a key covers everything that the page's rows depend on (model, all tokens before, its own tokens with their
query times), so a hit is exact whoever asks and an edited history or another model misses by construction. Losing an
entry loses time, never correctness.

A path is the chain of full pages of a history plus at most one partial page, the tail. Not thread-safe: one owner.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from gr_platform.bundle.compute import KV, concat_kv
from gr_platform.models.tokens import Tokens

PAGE_TOKENS = 16
_ROW_BYTES = 5 * 8
_KEY_BYTES = 20
# Python objects around a page: what an entry costs beyond its arrays.
ENTRY_OVERHEAD_BYTES = 1024


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    key: bytes
    parent: bytes
    kv: KV
    num_children: int = 0

    @property
    def size_bytes(self) -> int:
        return self.kv.size_bytes + ENTRY_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCounters:
    """Totals since the start: tokens found, tokens not found, entries dropped for room; and what is held now."""

    hit_tokens: int
    prefill_tokens: int
    evictions: int
    num_entries: int
    size_bytes: int


class KVCache:
    """K/V pages of one model under a bound in bytes, least recently used leaves dropped first."""

    def __init__(self, model_digest: str, max_bytes: int) -> None:
        """`model_digest` covers everything in the model that changes a row; `max_bytes` may be 0: nothing is kept."""
        self._root = hashlib.blake2b(model_digest.encode(), digest_size=_KEY_BYTES, person=b"gr-root").digest()
        # Oldest first. Parents stand after their children, so the first entry is always a leaf.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._hit_tokens = 0
        self._prefill_tokens = 0
        self._evictions = 0

    @property
    def counters(self) -> CacheCounters:
        """The totals as of now."""
        return CacheCounters(
            hit_tokens=self._hit_tokens,
            prefill_tokens=self._prefill_tokens,
            evictions=self._evictions,
            num_entries=len(self._entries),
            size_bytes=self._size_bytes,
        )

    def lookup(self, tokens: Tokens) -> KV | None:
        """Return the K/V of the longest cached prefix of `tokens` (read-only), or None if nothing of it is cached."""
        path = self._path(_canonical_rows(tokens))
        self._touch(path)
        num_cached = sum(len(entry.kv) for entry in path)
        self._hit_tokens += num_cached
        self._prefill_tokens += len(tokens) - num_cached
        return concat_kv([entry.kv for entry in path]) if path else None

    def insert(self, tokens: Tokens, kv: KV) -> None:
        """Keep copies of the pages of `kv` (the K/V of all of `tokens`) that are not there yet, as far as they fit."""
        if len(tokens) != len(kv):
            raise RuntimeError(f"insert got {len(tokens)} tokens and the K/V of {len(kv)}")
        rows = _canonical_rows(tokens)
        path = [entry for entry in self._path(rows) if len(entry.kv) == PAGE_TOKENS]
        self._touch(path)
        parent = path[-1].key if path else self._root
        self._drop_superseded_tail(parent, rows[len(path) * PAGE_TOKENS * _ROW_BYTES :])
        on_path = {entry.key for entry in path}
        for start in range(len(path) * PAGE_TOKENS, len(tokens), PAGE_TOKENS):
            stop = min(start + PAGE_TOKENS, len(tokens))
            key = _key(parent, rows[start * _ROW_BYTES : stop * _ROW_BYTES])
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(key=key, parent=parent, kv=_frozen_copy(kv.slice(start, stop)))
                if not self._make_room(entry.size_bytes, on_path):
                    break
                self._add(entry)
            path.append(entry)
            on_path.add(key)
            parent = key
        self._touch(path)

    def check_integrity(self) -> None:
        """Raise RuntimeError if the bookkeeping contradicts itself."""
        children: dict[bytes, int] = {}
        later = set(self._entries)
        for key, entry in self._entries.items():
            later.discard(key)
            if entry.key != key or not 0 < len(entry.kv) <= PAGE_TOKENS:
                raise RuntimeError("a cache entry is filed under a foreign key or has a wrong length")
            if entry.parent != self._root and entry.parent not in later:
                raise RuntimeError("a cache entry's parent is gone or would be evicted before it")
            children[entry.parent] = children.get(entry.parent, 0) + 1
        if any(entry.num_children != children.get(key, 0) for key, entry in self._entries.items()):
            raise RuntimeError("a cache entry counts its children wrongly")
        if any(entry.num_children and len(entry.kv) < PAGE_TOKENS for entry in self._entries.values()):
            raise RuntimeError("a partial cache page has children")
        if self._size_bytes != sum(entry.size_bytes for entry in self._entries.values()):
            raise RuntimeError("the cache's size differs from the sum of its entries")
        if self._size_bytes > self._max_bytes:
            raise RuntimeError(f"the cache holds {self._size_bytes} bytes, its bound is {self._max_bytes}")

    def _path(self, rows: bytes) -> list[_Entry]:
        """Return the cached entries of the longest prefix: full pages along the chain, then the longest tail."""
        path: list[_Entry] = []
        parent = self._root
        page_bytes = PAGE_TOKENS * _ROW_BYTES
        for start in range(0, len(rows) - page_bytes + 1, page_bytes):
            entry = self._entries.get(_key(parent, rows[start : start + page_bytes]))
            if entry is None:
                break
            path.append(entry)
            parent = entry.key
        rest = rows[len(path) * page_bytes :][: page_bytes - _ROW_BYTES]
        for stop in range(len(rest), 0, -_ROW_BYTES):
            if (tail := self._entries.get(_key(parent, rest[:stop]))) is not None:
                path.append(tail)
                break
        return path

    def _touch(self, path: list[_Entry]) -> None:
        """Make a path the most recently used, parents after children: eviction then takes leaves first."""
        for entry in reversed(path):
            self._entries.move_to_end(entry.key)

    def _drop_superseded_tail(self, parent: bytes, rest: bytes) -> None:
        """Drop the tails under `parent` that the rows about to be inserted begin with: they would only take room."""
        longest = min(len(rest), PAGE_TOKENS * _ROW_BYTES)
        for stop in range(_ROW_BYTES, longest, _ROW_BYTES):
            if (tail := self._entries.get(_key(parent, rest[:stop]))) is not None:
                self._remove(tail)

    def _make_room(self, num_bytes: int, keep: set[bytes]) -> bool:
        """Evict until `num_bytes` fit; return False if only entries of `keep` are left and they still do not."""
        while self._size_bytes + num_bytes > self._max_bytes:
            oldest = next(iter(self._entries.values()), None)
            if oldest is None or oldest.key in keep:
                return False
            self._remove(oldest)
            self._evictions += 1
        return True

    def _add(self, entry: _Entry) -> None:
        self._entries[entry.key] = entry
        self._size_bytes += entry.size_bytes
        if (parent := self._entries.get(entry.parent)) is not None:
            parent.num_children += 1

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._size_bytes -= entry.size_bytes
        if (parent := self._entries.get(entry.parent)) is not None:
            parent.num_children -= 1


def _canonical_rows(tokens: Tokens) -> bytes:
    """Return every field that a row depends on as little-endian int64, token by token."""
    fields = (tokens.kinds, tokens.items, tokens.actions, tokens.times, tokens.query_times)
    return np.stack(fields, axis=1).astype("<i8", copy=False).tobytes()


def _key(parent: bytes, rows: bytes) -> bytes:
    # The parent has a fixed length, so (parent, rows) is unambiguous; a tail is shorter than a page.
    return hashlib.blake2b(parent + rows, digest_size=_KEY_BYTES, person=b"gr-page").digest()


def _frozen_copy(kv: KV) -> KV:
    """Return a contiguous read-only copy: it outlives the request's arrays and nobody can change it."""
    copy = KV(times=kv.times.copy(), k=kv.k.copy(), v=kv.v.copy())
    for array in (copy.times, copy.k, copy.v):
        array.setflags(write=False)
    return copy

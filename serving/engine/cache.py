"""Which page holds whose tokens: the K/V cache across requests, found by what rows were computed from.

Invariant: a key covers everything that the page's rows depend on (model, all tokens before, its own tokens with their
query times), so a hit is exact whoever asks, and an edited history or another model misses by construction. Losing an
entry loses time, never correctness. Every page is free, filed or leased, and exactly one of these.

A path is the chain of full pages of a history plus at most one partial page, the tail. Rows lie with `Compute`: here
are numbers of pages alone. Not thread-safe: one owner.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from gr_platform.bundle.compute import PAGE_TOKENS, pages_for
from gr_platform.models.tokens import Tokens

_ROW_BYTES = 5 * 8
_PAGE_ROWS_BYTES = PAGE_TOKENS * _ROW_BYTES
_KEY_BYTES = 20
# Python objects around a page: what an entry costs beyond its rows.
ENTRY_OVERHEAD_BYTES = 512


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    page: int
    key: bytes
    parent: bytes
    num_tokens: int
    num_children: int = 0
    num_leases: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """Pages for all tokens of a history, pinned until `release`; the first `num_cached` tokens lie in them already.

    pages: int32, in order. What is written beyond `num_cached` becomes findable with `commit`.
    """

    pages: np.ndarray
    num_cached: int
    rows: bytes
    entries: list[_Entry] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    @property
    def first_key(self) -> bytes:
        """The key of the first filed page, b"" if there is none: it stays as a history of more than a page grows."""
        return self.entries[0].key if self.entries else b""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCounters:
    """Totals since the start: tokens found, tokens not found, of these the ones after a found prefix, entries dropped
    for room; and what is held now, leased pages included."""

    hit_tokens: int = 0
    prefill_tokens: int = 0
    delta_tokens: int = 0
    evictions: int = 0
    num_entries: int = 0
    size_bytes: int = 0


class KVCache:
    """The pages of one model's `Compute`: filed ones are bounded in bytes, least recently used leaves dropped first."""

    def __init__(self, model_digest: str, max_bytes: int, page_bytes: int, most_tokens: int) -> None:
        """`model_digest` covers everything in the model that changes a row; most_tokens: of one history.

        max_bytes may be 0: nothing is kept then, and there are pages for one history at a time all the same.
        """
        self._root = hashlib.blake2b(model_digest.encode(), digest_size=_KEY_BYTES, person=b"gr-root").digest()
        self._page_bytes = page_bytes + ENTRY_OVERHEAD_BYTES
        self._max_entries = max_bytes // self._page_bytes
        self.num_pages = max(self._max_entries, pages_for(most_tokens))
        self._free = list(range(self.num_pages - 1, -1, -1))
        # Oldest first. Parents stand after their children, so the first entry without a lease is always a leaf.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._leases: dict[int, Lease] = {}
        # Filed entries with a lease: the others can be evicted, leaves first, all of them.
        self._num_pinned = 0
        self._hit_tokens = self._prefill_tokens = self._delta_tokens = self._evictions = 0

    @property
    def counters(self) -> CacheCounters:
        """The totals as of now."""
        return CacheCounters(
            hit_tokens=self._hit_tokens,
            prefill_tokens=self._prefill_tokens,
            delta_tokens=self._delta_tokens,
            evictions=self._evictions,
            num_entries=len(self._entries),
            size_bytes=(self.num_pages - len(self._free)) * self._page_bytes,
        )

    def acquire(self, tokens: Tokens, *, shared: bool = True) -> Lease | None:
        """Return pages for all of `tokens`, the longest cached prefix among them; None while there is no room.

        A tail that is found and goes on is taken out: its page grows in place, and nobody else may go on from it.
        Without `shared` nothing is looked up, and nothing will be found later.
        """
        rows = _canonical_rows(tokens) if shared else b""
        path = self._path(rows)
        goes_on = bool(path) and sum(entry.num_tokens for entry in path) < len(tokens)
        grows = goes_on and path[-1].num_tokens < PAGE_TOKENS
        if grows and path[-1].num_leases:
            # Someone reads it: this history goes on from the page before.
            path, grows = path[:-1], False
        self._pin(path)
        num_new = pages_for(len(tokens)) - len(path)
        if not self._reserve(num_new):
            self._unpin(path)
            return None
        lease = Lease(pages=np.zeros(0, np.int32), num_cached=sum(e.num_tokens for e in path), rows=rows, entries=path)
        if grows:
            tail = path.pop()
            self._unpin([tail])
            self._drop(tail)
            lease.own.append(tail.page)
        lease.own += [self._free.pop() for _ in range(num_new)]
        lease.pages = np.array([*(entry.page for entry in path), *lease.own], np.int32)
        self._leases[id(lease)] = lease
        self._hit_tokens += lease.num_cached
        self._prefill_tokens += len(tokens) - lease.num_cached
        self._delta_tokens += len(tokens) - lease.num_cached if lease.num_cached else 0
        return lease

    def commit(self, lease: Lease) -> None:
        """File the lease's own pages, all of whose tokens are written now, so that others find them."""
        start = len(lease.entries) * _PAGE_ROWS_BYTES
        own, lease.own = lease.own, []
        for page in own:
            rows = lease.rows[start : start + _PAGE_ROWS_BYTES]
            start += len(rows)
            parent = lease.entries[-1].key if lease.entries else self._root
            key = _key(parent, rows)
            if (entry := self._entries.get(key)) is None:
                entry = _Entry(page=page, key=key, parent=parent, num_tokens=len(rows) // _ROW_BYTES)
                self._file(entry)
            else:
                # A batch mate with the same history was first: this copy serves its request and goes.
                lease.own.append(page)
            lease.entries.append(entry)
            self._pin([entry])
        self._touch(lease.entries)

    def release(self, lease: Lease) -> None:
        """Give the lease back: its pages may be dropped from now on, those never committed are free."""
        del self._leases[id(lease)]
        self._unpin(lease.entries)
        self._free += lease.own
        while len(self._entries) > self._max_entries and self._evict():
            pass

    def check_integrity(self) -> None:
        """Raise RuntimeError if the bookkeeping contradicts itself."""
        children: dict[bytes, int] = {}
        later = set(self._entries)
        for key, entry in self._entries.items():
            later.discard(key)
            if entry.key != key or not 0 < entry.num_tokens <= PAGE_TOKENS:
                raise RuntimeError("a cache entry is filed under a foreign key or has a wrong length")
            if entry.parent != self._root and entry.parent not in later:
                raise RuntimeError("a cache entry's parent is gone or would be evicted before it")
            children[entry.parent] = children.get(entry.parent, 0) + 1
        if any(entry.num_children != children.get(key, 0) for key, entry in self._entries.items()):
            raise RuntimeError("a cache entry counts its children wrongly")
        if any(entry.num_children and entry.num_tokens < PAGE_TOKENS for entry in self._entries.values()):
            raise RuntimeError("a partial cache page has children")
        leases = [entry for lease in self._leases.values() for entry in lease.entries]
        if any(entry.num_leases != leases.count(entry) for entry in {*self._entries.values(), *leases}):
            raise RuntimeError("a cache entry counts its leases wrongly")
        if self._num_pinned != sum(entry.num_leases > 0 for entry in self._entries.values()):
            raise RuntimeError("the cache counts its pinned entries wrongly")
        owned = [page for lease in self._leases.values() for page in lease.own]
        if sorted([*self._free, *owned, *(e.page for e in self._entries.values())]) != list(range(self.num_pages)):
            raise RuntimeError("a cache page is lost, or held twice")
        if not leases and len(self._entries) > self._max_entries:
            raise RuntimeError(f"the cache holds {len(self._entries)} pages, its bound is {self._max_entries}")

    def _path(self, rows: bytes) -> list[_Entry]:
        """Return the cached entries of the longest prefix: full pages along the chain, then the longest tail."""
        path: list[_Entry] = []
        parent = self._root
        for start in range(0, len(rows) - _PAGE_ROWS_BYTES + 1, _PAGE_ROWS_BYTES):
            entry = self._entries.get(_key(parent, rows[start : start + _PAGE_ROWS_BYTES]))
            if entry is None:
                break
            path.append(entry)
            parent = entry.key
        rest = rows[len(path) * _PAGE_ROWS_BYTES :][: _PAGE_ROWS_BYTES - _ROW_BYTES]
        for stop in range(len(rest), 0, -_ROW_BYTES):
            if (tail := self._entries.get(_key(parent, rest[:stop]))) is not None:
                path.append(tail)
                break
        return path

    def _touch(self, path: list[_Entry]) -> None:
        """Make a path the most recently used, parents after children: eviction then takes leaves first."""
        for entry in reversed(path):
            self._entries.move_to_end(entry.key)

    def _reserve(self, num_pages: int) -> bool:
        """Evict until `num_pages` are free; return False, having dropped nothing, if others hold too many."""
        if len(self._free) + len(self._entries) - self._num_pinned < num_pages:
            return False
        while len(self._free) < num_pages:
            self._evict()
        return True

    def _evict(self) -> bool:
        for entry in self._entries.values():
            if not entry.num_leases:
                self._drop(entry)
                self._free.append(entry.page)
                self._evictions += 1
                return True
        return False

    def _file(self, entry: _Entry) -> None:
        self._entries[entry.key] = entry
        if (parent := self._entries.get(entry.parent)) is not None:
            parent.num_children += 1

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        if (parent := self._entries.get(entry.parent)) is not None:
            parent.num_children -= 1

    def _pin(self, path: list[_Entry]) -> None:
        self._touch(path)
        for entry in path:
            self._num_pinned += entry.num_leases == 0
            entry.num_leases += 1

    def _unpin(self, path: list[_Entry]) -> None:
        for entry in path:
            entry.num_leases -= 1
            self._num_pinned -= entry.num_leases == 0


def _canonical_rows(tokens: Tokens) -> bytes:
    """Return every field that a row depends on as little-endian int64, token by token."""
    fields = (tokens.kinds, tokens.items, tokens.actions, tokens.times, tokens.query_times)
    return np.stack(fields, axis=1).astype("<i8", copy=False).tobytes()


def _key(parent: bytes, rows: bytes) -> bytes:
    # The parent has a fixed length, so (parent, rows) is unambiguous; a tail is shorter than a page.
    return hashlib.blake2b(parent + rows, digest_size=_KEY_BYTES, person=b"gr-page").digest()

"""Texts become codes: the values of a context column, of a property of items or of a slow series of a user.

Invariant: append-only. A code, once given, means the same text in every later table of its name. 0 is missing; values
follow from 1 in the order in which they were first seen. Reading a table needs numpy and pyarrow alone.
"""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform.errors import UserError

MISSING = 0
# Codes are rows of an embedding table, and all values are held in memory while codes are looked up.
MAX_VALUES = 1 << 20


class Codes:
    """The values of one name, immutable. values: object (str) [num_values], aligned with code - 1; counts int64."""

    def __init__(self, table: pa.Table) -> None:
        self.values: np.ndarray = table["value"].combine_chunks().to_numpy(zero_copy_only=False)
        self.counts: np.ndarray = table["count"].to_numpy()

    @staticmethod
    def load(path: Path) -> "Codes":
        """Return the codes of a Parquet file (value, count). Raises UserError if it is unreadable."""
        try:
            return Codes(pq.read_table(path))
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise UserError(
                f"{path.name} cannot be read as a table of codes ({type(error).__name__}); make it again"
            ) from None

    @property
    def num_values(self) -> int:
        """Number of known values; codes are 0..num_values."""
        return len(self.values)

    @cached_property
    def digest(self) -> str:
        """Hex BLAKE2b-160 over the values in order: what a code means."""
        return self.digest_of_first(self.num_values)

    def digest_of_first(self, num_values: int) -> str:
        """Return the digest of the codes as they were when there were `num_values`."""
        state = hashlib.blake2b(digest_size=20)
        for value in self.values[:num_values]:
            data = value.encode()
            state.update(len(data).to_bytes(8, "little") + data)
        return state.hexdigest()

    def lookup(self, texts: pa.Array) -> np.ndarray:
        """Return the codes of texts (strings, or a dictionary of them), int64 [len]: 0 for NULL and unknown ones."""
        coded = texts if pa.types.is_dictionary(texts.type) else texts.dictionary_encode()
        known = np.array([self._code_of.get(text, MISSING) for text in coded.dictionary.to_pylist()] + [MISSING])
        places = pc.fill_null(coded.indices, len(known) - 1).to_numpy() if coded.null_count else coded.indices
        return np.asarray(known[np.asarray(places)].astype(np.int64))

    def texts(self, codes: np.ndarray) -> list[str | None]:
        """Return the texts of codes, None for 0."""
        return [self.values[code - 1] if code else None for code in np.asarray(codes).tolist()]

    @cached_property
    def _code_of(self) -> dict[str | None, int]:
        return {value: 1 + place for place, value in enumerate(self.values)}


def appended(seen: pa.Table, base: Codes | None, name: str) -> pa.Table:
    """Return `seen` (value, count; in order of appearance) behind all values of `base`, which keep their codes.

    Raises UserError for more than MAX_VALUES values: such a column is no category.
    """
    seen = seen.select(["value", "count"]).combine_chunks()
    if base is not None and base.num_values:
        kept = pa.array(base.values, pa.string())
        values = seen["value"].combine_chunks()
        counts = pc.fill_null(seen["count"].combine_chunks().take(pc.index_in(kept, values)), 0)
        old = pa.table({"value": kept, "count": counts}, schema=seen.schema)
        fresh = seen.filter(pc.invert(pc.is_in(values, kept)))
        seen = pa.concat_tables([old, fresh]).combine_chunks()
    if len(seen) > MAX_VALUES:
        raise UserError(
            f"column {name!r} holds {len(seen):,} different values, at most {MAX_VALUES:,} are kept apart: it is no "
            "category; leave it out"
        )
    return seen

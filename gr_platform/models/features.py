"""What a model knows of side information: integers that are saved with its weights, so a bundle holds them too.

Invariant: code 0 (missing) and codes that came up after training mean nothing and add nothing to any vector. What is
known of an item at a time is its newest row that is not later.

Legend: R rows of side information of items, F item features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gr_platform.errors import UserError
from gr_platform.models.config import ModelConfig

# A cell may say several things, such as Action|Comedy: its vector is the sum of theirs.
SEPARATOR = "|"
MAX_WORDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureTables:
    """words: feature (`keys_of`) -> `words_of` its values. Rows of items ascend by item and time: those of item i are
    item_starts[i]..item_starts[i + 1] - 1 of item_times int64 [R] ms and item_codes int64 [R, F]."""

    words: Mapping[str, Tensor]
    item_starts: Tensor
    item_times: Tensor
    item_codes: Tensor

    @staticmethod
    def of_state(config: ModelConfig, state: Mapping[str, Tensor]) -> "FeatureTables | None":
        """Return the tables of a saved model, None for one without features. Raises KeyError if they are not there."""
        if not any(keys_of(config)):
            return None
        items, besides = keys_of(config)
        words = {key: state[f"embedding.items.features.{key}.words"] for key in items}
        words |= {key: state[f"embedding.features.{key}.words"] for key in besides}
        if not items:
            return FeatureTables.without_items(words)
        starts, times, codes = (state[f"embedding.items.{name}"] for name in ("starts", "times", "codes"))
        return FeatureTables(words=words, item_starts=starts, item_times=times, item_codes=codes)

    @staticmethod
    def without_items(words: Mapping[str, Tensor]) -> "FeatureTables":
        """Return the tables of features of users and contexts alone."""
        none = torch.zeros(0, dtype=torch.int64)
        return FeatureTables(words=words, item_starts=none, item_times=none, item_codes=none)


def keys_of(config: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names by which a model keeps its item features, and those of contexts and users."""
    besides = [context_key(name) for name in config.context_features]
    besides += [user_key(name) for name in config.user_features]
    return tuple(item_key(name) for name in config.item_features), tuple(besides)


def item_key(name: str) -> str:
    """Return the key of a property of items."""
    return f"item_{name}"


def context_key(name: str) -> str:
    """Return the key of a context column."""
    return f"context_{name}"


def user_key(name: str) -> str:
    """Return the key of a slow series of users."""
    return f"user_{name}"


def require_known(what: str, wanted: Sequence[str], known: Sequence[str], ds: str) -> None:
    """Raise UserError for a feature that a data set does not have. what: for people, such as `item feature`."""
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(
            f"the recipe names {what} {unknown[0]!r}, which data set {ds} does not have; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )


def words_of(values: Iterable[str], name: str) -> Tensor:
    """Return what each code says, int64 [num_values + 1, width]: numbers from 1 of the parts between `|`, 0 behind
    them and for code 0. Numbers follow the order of appearance, so more values change none of them.

    Raises UserError for a value of more than MAX_WORDS parts.
    """
    number_of: dict[str, int] = {}
    rows = []
    for value in values:
        parts = dict.fromkeys(part for part in map(str.strip, value.split(SEPARATOR)) if part)
        rows.append([number_of.setdefault(part, len(number_of) + 1) for part in parts])
    width = max(map(len, rows), default=1)
    if width > MAX_WORDS:
        raise UserError(f"a value of feature {name!r} has {width} parts, at most {MAX_WORDS} are read; leave it out")
    table = np.zeros((len(rows) + 1, max(1, width)), np.int64)
    for code, row in enumerate(rows, 1):
        table[code, : len(row)] = row
    return torch.from_numpy(table)

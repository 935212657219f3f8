"""Sequences together with the side information that a model names.

Invariant: what a data set lacks is said when it is opened for a model, before anything is trained. What was known of
items later than a moment is no part of the tables made as of it.
"""

from pathlib import Path

import numpy as np
import torch

from gr_platform import storage
from gr_platform.models.config import ModelConfig
from gr_platform.models.features import FeatureTables, context_key, item_key, keys_of, require_known, user_key, words_of
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.features import ItemFeatures, build_item_features
from gr_platform.sequences.user_series import UserSeries, build_user_series


class FeaturedDataset(SequenceDataset):
    """A data set with the properties of its items and the slow series that a model names, None where it names none.

    features_digest: of the side information, "" for none. max_feature_tokens: of a user, as the model has it.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        config: ModelConfig,
        *,
        item_features: ItemFeatures | None = None,
        user_series: UserSeries | None = None,
        features_digest: str = "",
    ) -> None:
        """Take over what `dataset` has read. Raises UserError if the side information lacks a name of `config`."""
        vars(self).update(vars(dataset))
        name = dataset.declaration.name
        require_known("context feature", config.context_features, list(dataset.codes), name)
        require_known("item feature", config.item_features, list(item_features.codes) if item_features else [], name)
        require_known("user feature", config.user_features, user_series.names if user_series else [], name)
        self.item_features = item_features if config.item_features else None
        self.user_series = only(user_series, config.user_features) if user_series and config.user_features else None
        self.features_digest, self.max_feature_tokens = features_digest, config.max_feature_tokens

    def feature_tables(self, config: ModelConfig, as_of: int) -> FeatureTables | None:
        """Return what a model knows of its features, of items up to a time in ms; None if it reads none."""
        if not any(keys_of(config)):
            return None
        codes: dict[str, Codes] = {context_key(name): self.codes[name] for name in config.context_features}
        if self.user_series is not None:
            codes |= {user_key(name): self.user_series.codes[name] for name in config.user_features}
        words = {key: words_of(each.values, key) for key, each in codes.items()}
        if self.item_features is None:
            return FeatureTables.without_items(words)
        return _with_items(words, self.item_features, config, as_of, self.vocabulary.num_rows)


def with_features(home: Path, ds: str, dataset: SequenceDataset, config: ModelConfig) -> SequenceDataset:
    """Return the data set with what `config` names of its side information, itself where that is nothing.

    Raises UserError for a feature that was not imported or declared.
    """
    if not any(keys_of(config)):
        return dataset
    items = users = None
    digests = {}
    if config.item_features:
        result = build_item_features(home, ds)
        items, digests["items"] = ItemFeatures.open(result.folder), result.manifest.digest
    if config.user_features:
        digests["users"] = build_user_series(home, ds).manifest.digest
        users = UserSeries.current(home, ds, dataset)
    digest = storage.digest_of(digests) if digests else ""
    return FeaturedDataset(dataset, config, item_features=items, user_series=users, features_digest=digest)


def only(series: UserSeries, names: tuple[str, ...]) -> UserSeries:
    """Return the series of these names alone, in their order."""
    kind_of = np.zeros(1 + len(series.names), np.int64)
    for kind, name in enumerate(names, 1):
        kind_of[1 + series.names.index(name)] = kind
    kept = np.flatnonzero(kind_of[series.kinds])
    owner = np.repeat(np.arange(len(series.offsets) - 1), np.diff(series.offsets))[kept]
    kinds, times = kind_of[series.kinds[kept]], series.times[kept]
    order = np.lexsort((kinds, times, owner))
    offsets = np.searchsorted(owner, np.arange(len(series.offsets)))
    codes = {name: series.codes[name] for name in names}
    return UserSeries(offsets, kinds[order], series.values[kept][order], times[order], codes)


def _with_items(
    words: dict[str, torch.Tensor], features: ItemFeatures, config: ModelConfig, as_of: int, num_rows: int
) -> FeatureTables:
    """Return tables with the rows of items up to a time, but not those that say what the one before them said."""
    # Side information follows the current vocabulary, which may have grown since the sequences were made.
    seen = (features.times <= as_of) & (features.items < num_rows)
    codes = np.stack([features.columns[name][seen] for name in config.item_features], 1)
    items, times = features.items[seen], features.times[seen]
    fresh = np.ones(len(items), bool)
    fresh[1:] = (items[1:] != items[:-1]) | (codes[1:] != codes[:-1]).any(1)
    items = items[fresh]
    return FeatureTables(
        words=words | {item_key(name): words_of(features.codes[name].values, name) for name in config.item_features},
        item_starts=torch.from_numpy(np.searchsorted(items, np.arange(num_rows + 1))),
        item_times=torch.from_numpy(times[fresh]),
        item_codes=torch.from_numpy(codes[fresh]),
    )

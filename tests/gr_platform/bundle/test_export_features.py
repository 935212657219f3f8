"""A bundle of a model with item features says what the model said; features that no request carries are refused."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from gr_platform import storage
from gr_platform.bundle import export, golden
from gr_platform.bundle.load import load
from gr_platform.bundle.verify import parity
from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.models.build import build_model
from gr_platform.models.features import FeatureTables, words_of
from gr_platform.models.recipes import tiny
from gr_platform.sequences.vocabulary import NUM_OOV

NUM_ITEMS, YEAR_MS = 50, 365 * 86_400_000
NUM_ROWS = 1 + NUM_OOV + NUM_ITEMS


def tables():
    """Properties of most items that change some times within the years of the golden requests."""
    rng = np.random.default_rng(0)
    items = np.sort(rng.integers(1 + NUM_OOV, NUM_ROWS, 200))
    times = golden.FIRST_TIME_MS + rng.integers(-YEAR_MS, 3 * YEAR_MS, 200)
    times = times[np.lexsort((times, items))]
    return FeatureTables(
        words={
            "item_genres": words_of(["Action|Comedy", "Comedy", "War"], "genres"),
            "context_device": words_of([], ""),
        },
        item_starts=torch.from_numpy(np.searchsorted(items, np.arange(NUM_ROWS + 1))),
        item_times=torch.from_numpy(times),
        item_codes=torch.from_numpy(rng.integers(0, 4, (200, 1))),
    )


def written(folder, kind, **names):
    ids, ones = pa.array(np.arange(NUM_ITEMS)), pa.array(np.ones(NUM_ITEMS, np.int64))
    columns = {"item_id": ids, "count": ones, "first_ts": ones, "last_ts": ones}
    source = folder.parent
    pq.write_table(pa.table(columns | {"active": pa.array([True] * NUM_ITEMS)}), source / "vocabulary.parquet")
    declaration = Declaration(name="made", actions=("view", "like"), positives=("view",), tasks={"like": ("like",)})
    torch.manual_seed(0)
    config = replace(tiny(kind).model, num_layers=1, **names)
    model = build_model(config, num_rows=NUM_ROWS, num_actions=2, tasks=["like"], features=tables())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    save_file(model.state_dict(), source / "model.safetensors")
    folder.mkdir()
    facts = export.write_bundle(
        folder,
        model=model,
        weights=source / "model.safetensors",
        vocabulary=source / "vocabulary.parquet",
        num_rows=NUM_ROWS,
        declaration=declaration.to_json(),
        recipe="tiny",
        metrics={},
    )
    storage.write_manifest(folder, kind=kind, spec={}, facts=facts)
    return model


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_item_features_are_served_as_the_model_has_them(tmp_path, kind):
    model = written(tmp_path / "bundle", kind, item_features=("genres",))
    bundle = load(tmp_path / "bundle")
    assert bundle.config == model.config
    result = parity(bundle)
    assert result.ok, result
    # The golden scores depend on the features, so parity has seen them.
    with torch.no_grad():
        model.embedding.items.features["item_genres"].weight.zero_()
    request, expected = golden.load(tmp_path / "bundle" / "golden.safetensors")[-1]
    assert np.abs(export.expected_scores(model, request) - expected).max() > 100 * result.max_abs_error


def test_features_that_no_request_carries_are_refused(tmp_path):
    with pytest.raises(UserError, match="the model reads device, which requests to the server do not carry"):
        written(tmp_path / "bundle", "ranking", context_features=("device",))

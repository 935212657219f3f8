"""Features in a model: they change scores, what is not known adds nothing, nothing later than a token is seen."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.models.batch import Entries, EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.config import Recipe
from gr_platform.models.embeddings import FeaturedTable, FeatureVectors
from gr_platform.models.features import FeatureTables, words_of
from gr_platform.models.recipes import tiny
from gr_platform.models.tokens import ranking_tokens, retrieval_tokens
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.features import ItemFeatures
from tests.gr_platform.paging import NUM_PAGES, encode_in_pieces, score

KINDS = ["retrieval", "ranking"]
NUM_ROWS, START_MS = 40, 10**12
NAMES = {"item_features": ("genres", "brand"), "context_features": ("device",), "user_features": ("city",)}


def item_tables(seed=0, rows=120):
    """Rows of side information of random items at random times, all known."""
    rng = np.random.default_rng(seed)
    items = np.sort(rng.integers(5, NUM_ROWS, rows))
    times = START_MS + np.concatenate(
        [np.sort(rng.integers(0, 10**7, n)) for n in np.unique(items, return_counts=True)[1]]
    )
    codes = rng.integers(0, 5, (rows, 2))
    words = {
        "item_genres": words_of(["Action|Comedy", "Comedy", "Drama|Action|War", "War"], "genres"),
        "item_brand": words_of(["a", "b", "c", "d"], "brand"),
        "context_device": words_of(["web", "app"], "device"),
        "user_city": words_of(["Rome", "Oslo", "Bern"], "city"),
    }
    return FeatureTables(
        words=words,
        item_starts=torch.from_numpy(np.searchsorted(items, np.arange(NUM_ROWS + 1))),
        item_times=torch.from_numpy(times),
        item_codes=torch.from_numpy(codes),
    )


def make_model(kind, *, dtype=torch.float32, names=NAMES, **changes):
    torch.manual_seed(0)
    config = replace(tiny(kind).model, **names, **changes)
    model = build_model(config, num_rows=NUM_ROWS, num_actions=3, tasks=["a", "b"], features=item_tables())
    for parameter in model.parameters():
        parameter.data.mul_(5.0)
    return model.to(dtype).eval()


def make_batch(*, device=1, city=2, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [6, 0, 9]
    times = START_MS + np.concatenate([np.sort(rng.integers(0, 10**7, n)) for n in lengths])
    events = (rng.integers(5, NUM_ROWS, 15), rng.integers(1, 8, 15), times)
    places = np.array([0, 9])
    entries = Entries(
        names=("city",), places=places, series=np.zeros(2, np.int64), codes=np.full(2, city), times=times[places] - 5
    )
    context = {"device": np.full(15, device)}
    requests = [int(times[5]) + 7, START_MS, int(times[14]) + 7]
    return EventBatch.of_arrays(np.cumsum([0, *lengths]), events, requests, context=context, entries=entries)


def scores(model, batch):
    with torch.no_grad():
        return model.logits(batch) if model.config.kind == "ranking" else model.user_vectors(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_each_feature_changes_scores_and_unknown_codes_change_as_little_as_missing_ones(kind):
    model = make_model(kind)
    known = scores(model, make_batch())
    for other in ({"device": 2}, {"city": 1}):
        assert not torch.allclose(scores(model, make_batch(**other)), known)
    missing = scores(model, make_batch(device=0, city=0))
    assert torch.equal(scores(model, make_batch(device=3, city=4)), missing)
    assert torch.equal(scores(model, make_batch(device=10**6, city=10**9)), missing)
    with torch.no_grad():
        for feature in model.embedding.items.features.values():
            feature.weight[1:] += 1.0
    assert not torch.allclose(scores(model, make_batch()), known)


def test_a_value_is_the_sum_of_its_parts_and_code_0_is_nothing():
    words = words_of(["Action|Comedy", "Comedy", " War | Action |", "|"], "genres")
    assert words.tolist() == [[0, 0], [1, 2], [2, 0], [3, 1], [0, 0]]
    vectors = FeatureVectors(words, 6, std=1.0)
    one = vectors.weight
    expected = torch.stack([0 * one[0], one[1] + one[2], one[2], one[3] + one[1], 0 * one[0], 0 * one[0]])
    torch.testing.assert_close(vectors(torch.tensor([0, 1, 2, 3, 4, 5])), expected)
    more = words_of(["Action|Comedy", "Comedy", " War | Action |", "|", "Sport|War"], "genres")
    assert torch.equal(more[: len(words)], words)
    assert words_of(["a", "b"], "brand").tolist() == [[0], [1], [2]]
    with pytest.raises(UserError, match="a value of feature 'tags' has 65 parts, at most 64 are read"):
        words_of(["|".join(map(str, range(65)))], "tags")


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12), st.integers(0, 3)), max_size=30),
    asked=st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 14)), min_size=1, max_size=20),
)
def test_an_item_is_what_was_known_of_it_at_the_time_and_never_later(rows, asked):
    rows = sorted(rows, key=lambda row: row[:2])
    items, times, codes = (np.array([row[place] for row in rows], np.int64) for place in range(3))
    tables = FeatureTables(
        words={"item_x": words_of(["a", "b", "c"], "x")},
        item_starts=torch.from_numpy(np.searchsorted(items, np.arange(7))),
        item_times=torch.from_numpy(times),
        item_codes=torch.from_numpy(codes[:, None]),
    )
    table = FeaturedTable(6, 4, 1, tables, ("item_x",))
    ids, at = (torch.tensor([each[place] for each in asked]) for place in range(2))
    source = ItemFeatures(
        items, times, {"x": codes}, {"x": Codes(pa.table({"value": ["a", "b", "c"], "count": [1, 1, 1]}))}
    )
    for found, when in ((table.lookup(ids, at), at.numpy()), (table.lookup(ids), np.full(len(ids), 10**9))):
        known = torch.from_numpy(source.at(ids.numpy(), when)["x"])
        own = torch.nn.functional.embedding(ids, table.weight, padding_idx=0)
        torch.testing.assert_close(found, own + table.features["item_x"](known))
    torch.testing.assert_close(table.all_rows(), table.lookup(torch.arange(6)))
    assert table.all_rows()[0].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_property_that_changes_later_changes_no_token_before(kind):
    tables, batch = item_tables(), make_batch()
    later = replace(
        tables, item_codes=torch.where(tables.item_times[:, None] > int(batch.times[5]), 1, tables.item_codes)
    )
    found = []
    for each in (tables, later):
        torch.manual_seed(0)
        config = replace(tiny(kind).model, **NAMES)
        model = build_model(config, num_rows=NUM_ROWS, num_actions=3, tasks=["a", "b"], features=each).eval()
        tokens = batch.tokens(kind)
        with torch.no_grad():
            vectors = model.embedding(
                tokens.kinds, tokens.items, tokens.actions, tokens.positions, tokens.jagged.times, tokens.codes
            )
        found.append(vectors[tokens.jagged.times <= batch.times[5]])
    assert (tables.item_codes != later.item_codes).any()
    assert torch.equal(*found)


@settings(deadline=None, max_examples=15)
@given(length=st.integers(0, 20), seed=st.integers(0, 3), kind=st.sampled_from(KINDS), data=st.data())
def test_with_item_features_a_full_forward_equals_prefill_delta_and_score(length, seed, kind, data):
    model = make_model(kind, dtype=torch.float64, names={"item_features": NAMES["item_features"]})
    rng = np.random.default_rng(seed)
    times = START_MS + np.sort(rng.integers(0, 10**7, length + 1))
    history, at = (rng.integers(5, NUM_ROWS, length), rng.integers(1, 8, length), times[:-1]), int(times[-1])
    tokens = (ranking_tokens if kind == "ranking" else retrieval_tokens)(*history, at)
    compute, batch = TorchCompute(model, NUM_PAGES), EventBatch.of([history], [at])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)))
    rows, pages = encode_in_pieces(compute, tokens, cuts, keeps_last=kind == "ranking")
    candidates = rng.integers(0, NUM_ROWS, 5)
    if kind == "ranking":
        expected = model.score(batch, torch.from_numpy(candidates)[None])[0].numpy()
        found = score(compute, candidates, at, len(tokens), pages)
    else:
        expected = model.user_vectors(batch)[0].detach().numpy()
        found = rows[0] / np.linalg.norm(rows[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_brings_its_tables_along(kind):
    model = make_model(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tables = FeatureTables.of_state(model.config, state)
    again = build_model(model.config, num_rows=NUM_ROWS, num_actions=3, tasks=["a", "b"], features=tables).eval()
    again.load_state_dict(state)
    assert torch.equal(scores(again, make_batch()), scores(model, make_batch()))
    assert FeatureTables.of_state(tiny(kind).model, {}) is None
    with pytest.raises(KeyError):
        FeatureTables.of_state(model.config, {})


def test_a_model_says_what_it_is_not_given():
    config = replace(tiny("retrieval").model, **NAMES)
    with pytest.raises(
        ValueError, match="must hold what the model reads: item_genres, item_brand, context_device, user"
    ):
        build_model(config, num_rows=NUM_ROWS, num_actions=3, tasks=[])
    with pytest.raises(ValueError, match="codes lacks context_device, user_city"):
        make_model("retrieval").user_vectors(EventBatch.of([], []))
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="times is None"):
        make_model("retrieval").embedding(one, one, one, one)


def test_a_recipe_keeps_its_features_and_their_tokens_have_room():
    recipe = tiny("ranking")
    featured = replace(recipe, model=replace(recipe.model, **NAMES, max_feature_tokens=3))
    assert Recipe.from_json(featured.to_json()) == featured
    lists = featured.to_json()
    lists["model"] |= {name: list(lists["model"][name]) for name in NAMES}
    assert Recipe.from_json(lists) == featured
    assert featured.model.max_seq_len == recipe.model.max_seq_len + 3
    with pytest.raises(ValueError, match=r"item_features is \('x', 'x'\), must not name a feature twice"):
        replace(recipe.model, item_features=("x", "x"))
    with pytest.raises(ValueError, match="max_feature_tokens is 1, must be at least the number of user_features, 2"):
        replace(recipe.model, user_features=("x", "y"), max_feature_tokens=1)

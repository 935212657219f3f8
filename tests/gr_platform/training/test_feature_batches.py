"""Batches with side information: aligned with the events that are kept, bounded, and worth reading."""

from copy import copy
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.evaluation.protocols import evaluate_retrieval
from gr_platform.models.build import build_model
from gr_platform.models.config import StochasticLength
from gr_platform.models.recipes import tiny
from gr_platform.models.tokens import FEATURE
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.dataset import Jagged, SequenceDataset
from gr_platform.sequences.featured import FeaturedDataset
from gr_platform.sequences.features import ItemFeatures
from gr_platform.sequences.user_series import UserSeries
from gr_platform.training.batches import entries_of, request_batch, training_batch, training_reader
from gr_platform.training.load import load_model
from gr_platform.training.loop import train
from gr_platform.training.objectives import VALIDATION_USERS
from gr_platform.training.warm_start import copy_weights

NUM_HINTS, NUM_USERS, NUM_EVENTS = 6, 96, 10
HINTS = {"item_features": ("hint",), "context_features": ("hint",), "user_features": ("hint",)}


def codes(num_values):
    texts = [f"value {each}" for each in range(num_values)]
    return {"hint": Codes(pa.table({"value": texts, "count": [1] * num_values}))}


@pytest.fixture(scope="module")
def hinted(make_dataset):
    """Users of random items; the hint known at an event names the next item, in each of the three kinds of features.

    The property of the item has another row for every event, the user's series another value ahead of it.
    """
    rng = np.random.default_rng(0)
    items = rng.integers(0, NUM_HINTS, (NUM_USERS, NUM_EVENTS))
    times = 10**12 + 1000 * np.arange(NUM_USERS * NUM_EVENTS).reshape(NUM_USERS, NUM_EVENTS)
    hints = np.concatenate([items[:, 1:], rng.integers(0, NUM_HINTS, (NUM_USERS, 1))], 1) + 1
    plain = make_dataset(
        [
            [(int(item), 1 + 2 * int(item % 2), int(at)) for item, at in zip(*user, strict=True)]
            for user in zip(items, times, strict=True)
        ],
        NUM_HINTS,
    )
    as_lists = pa.large_list(pa.int64())
    segment = pa.table(
        {"user_id": plain.ids_of(np.arange(NUM_USERS)), "context_hint": pa.array(hints.tolist(), as_lists)}
        | {
            name: pa.array(
                [getattr(plain.gather(np.array([user]), [0], [NUM_EVENTS]), name) for user in range(NUM_USERS)],
                as_lists,
            )
            for name in ("items", "actions", "times")
        }
    )
    dataset = SequenceDataset([segment], plain.declaration, plain.vocabulary, "hinted", codes(NUM_HINTS))
    dense = items.ravel() + plain.vocabulary.first_item
    order = np.lexsort((times.ravel(), dense))
    rows = ItemFeatures(dense[order], times.ravel()[order], {"hint": hints.ravel()[order]}, codes(NUM_HINTS))
    one = np.ones(NUM_USERS * NUM_EVENTS, np.int64)
    series = UserSeries(NUM_EVENTS * np.arange(NUM_USERS + 1), one, hints.ravel(), times.ravel() - 1, codes(NUM_HINTS))
    return dataset, rows, series


def opened(hinted, config):
    dataset, rows, series = hinted
    return FeaturedDataset(dataset, config, item_features=rows, user_series=series)


def config_of(*kinds, **changes):
    names = {kind: HINTS[kind] for kind in kinds}
    model = replace(tiny("retrieval").model, num_layers=1, dropout=0.0, max_events=12, **names, **changes)
    return replace(tiny("retrieval"), model=model)


def loss_of_a_new_model(hinted, recipe, *, steps):
    """Return the full softmax's mean loss on users that were not trained on."""
    dataset = opened(hinted, recipe.model)
    torch.manual_seed(3)
    tables = dataset.feature_tables(recipe.model, 2 * 10**12)
    model = build_model(recipe.model, num_rows=dataset.vocabulary.num_rows, num_actions=2, tasks=[], features=tables)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    users = np.arange(NUM_USERS)
    trained, held_out = (
        training_reader(dataset, part, np.full(len(part), NUM_EVENTS), recipe) for part in (users[:64], users[64:])
    )
    for step in range(steps):
        batch = training_batch(trained.form(np.arange(64), step), dataset)
        loss, count = model.loss(batch, negatives=None, positive_mask=0b11)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    with torch.no_grad():
        batch = training_batch(held_out.form(np.arange(32), 0), dataset)
        loss, count = model.eval().loss(batch, negatives=None, positive_mask=0b11)
    return float(loss / count)


@pytest.mark.parametrize("kind", HINTS)
def test_what_only_a_feature_tells_is_learned_with_it_and_not_without(hinted, kind):
    with_it = loss_of_a_new_model(hinted, config_of(kind), steps=60)
    without = loss_of_a_new_model(hinted, config_of(), steps=60)
    assert without > 0.9 * np.log(NUM_HINTS)
    # The first event of ten has none before it, and nothing tells it.
    assert with_it < 0.5 * np.log(NUM_HINTS)


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_thinning_keeps_features_with_the_events_they_belong_to(hinted, kind):
    names = replace(tiny(kind).model, max_events=12, **HINTS)
    recipe = replace(tiny(kind), model=names).with_training(
        stochastic_length=StochasticLength(alpha=1.2, choice="uniform")
    )
    dataset = opened(hinted, recipe.model)
    reader = training_reader(dataset, np.arange(20), np.full(20, NUM_EVENTS), recipe)
    batch = training_batch(reader.form(np.arange(20), 0), dataset)
    assert len(batch.items) < 20 * NUM_EVENTS
    _, rows, series = hinted
    at_times = dict(zip((series.times + 1).tolist(), series.values.tolist(), strict=True))
    hint = [at_times[at] for at in batch.times.tolist()]
    assert batch.context["hint"].tolist() == hint
    assert rows.at(batch.items.numpy(), batch.times.numpy())["hint"].tolist() == hint
    # Every kept event changes the series, and of the changes ahead of it the last one counts.
    assert batch.entries.places.tolist() == list(range(len(hint)))
    assert batch.entries.codes.tolist() == hint
    tokens = batch.tokens(kind)
    is_entry = tokens.kinds == FEATURE
    assert tokens.codes["user_hint"][is_entry].tolist() == hint
    assert tokens.codes["context_hint"][torch.nonzero(is_entry)[:, 0] + 1].tolist() == hint
    assert (tokens.jagged.times[is_entry] < tokens.jagged.times[torch.nonzero(is_entry)[:, 0] + 1]).all()


def test_a_request_knows_the_features_of_what_is_known_and_of_the_exposure_asked_about(hinted):
    dataset = opened(hinted, config_of(*HINTS).model)
    rows, positions, known = np.array([3, 5]), np.array([7, 9]), np.array([4, 0])
    config = config_of(*HINTS, chunk=1).model
    whole = dataset.gather(rows, np.zeros(2, np.int64), np.full(2, NUM_EVENTS))
    for with_target, wanted in ((False, [0, 1, 2, 3]), (True, [0, 1, 2, 3, 7, 19])):
        batch = request_batch(dataset, rows, positions, config, known=known, with_target=with_target)
        assert batch.items.tolist() == whole.items[wanted].tolist()
        assert batch.context["hint"].tolist() == whole.context["hint"][wanted].tolist()
        assert batch.entries.codes.tolist() == whole.context["hint"][wanted].tolist()
        assert batch.request_times.tolist() == whole.times[[7, 19]].tolist()
        assert batch.offsets.tolist() == [0, 4 + with_target, 4 + 2 * with_target]


entries = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 2), st.integers(1, 9)), max_size=7)


@settings(max_examples=150, deadline=None)
@given(
    spans=st.lists(st.lists(st.integers(0, 6), max_size=4).map(sorted), min_size=1, max_size=4),
    users=st.lists(entries.map(lambda each: sorted(each, key=lambda e: e[:2])), min_size=4, max_size=4),
    max_entries=st.integers(2, 5),
)
def test_entries_are_what_a_reference_finds_user_by_user(spans, users, max_entries):
    flat = [entry for user in users for entry in user]
    times, kinds, values = (np.array([entry[place] for entry in flat], np.int64) for place in range(3))
    names = codes(9) | {"plan": codes(9)["hint"]}
    series = UserSeries(np.cumsum([0, *map(len, users)]), kinds, values, times, names)
    event_times = np.array([at for span in spans for at in span], np.int64)
    block = Jagged(np.cumsum([0, *map(len, spans)]), event_times, event_times, event_times)
    expected, event = [], 0
    for user, span in enumerate(spans):
        mine, before = [], -1
        for at in span:
            # What changed since the event before, of each series the last value.
            latest = {kind: (when, kind, code) for when, kind, code in users[user] if before < when <= at}
            mine += [(event, *latest[kind][1:], latest[kind][0]) for kind in latest]
            before, event = at, event + 1
        mine.sort(key=lambda entry: (entry[0], entry[3], entry[1]))
        last = {entry[1]: entry for entry in mine}.values()
        changes = [entry for entry in mine if entry not in last]
        dropped = changes[: max(0, len(mine) - max_entries)]
        expected += [entry for entry in mine if entry not in dropped]
    found = entries_of(series, np.arange(len(spans)), block, max_entries)
    fields = (found.places, found.series + 1, found.codes, found.times)
    assert list(zip(*(field.tolist() for field in fields), strict=True)) == expected


def test_more_entries_than_there_is_room_for_leave_those_that_hold(hinted):
    recipe = config_of("user_features", max_feature_tokens=3)
    dataset = opened(hinted, recipe.model)
    reader = training_reader(dataset, np.arange(4), np.full(4, NUM_EVENTS), recipe)
    batch = training_batch(reader.form(np.arange(4), 0), dataset)
    assert np.bincount(batch.entries.places // NUM_EVENTS).tolist() == [3] * 4
    assert (batch.entries.places % NUM_EVENTS >= NUM_EVENTS - 3).all()
    lengths = torch.diff(batch.tokens("retrieval").jagged.seq_offsets)
    assert lengths.max() <= recipe.model.max_seq_len


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_a_trained_model_comes_back_with_its_features(hinted, kind, tmp_path):
    recipe = replace(tiny(kind), model=replace(tiny(kind).model, num_layers=1, max_events=12, **HINTS))
    dataset = opened(hinted, recipe.model)
    facts = train(dataset, recipe.with_training(max_epochs=1), tmp_path / "run", progress=False)
    model = load_model(tmp_path / "run")
    assert model.config == recipe.model
    if kind == "retrieval":
        found = evaluate_retrieval(model, dataset, "validation", max_users=VALIDATION_USERS)
        assert found["ndcg_at_10"] == facts["best"]["ndcg_at_10"]
    last = int(dataset.item_features.times.max())
    assert 0 < len(model.embedding.items.times) < len(dataset.item_features.times)
    assert int(model.embedding.items.times.max()) < last


def test_a_warm_start_lets_a_feature_have_more_values(hinted, tmp_path):
    recipe = config_of(*HINTS).with_training(max_epochs=1)
    dataset = opened(hinted, recipe.model)
    train(dataset, recipe, tmp_path / "older", progress=False)
    older = load_model(tmp_path / "older")

    def fresh(texts):
        plain, rows, series = (copy(each) for each in hinted)
        values = {"hint": Codes(pa.table({"value": texts, "count": [1] * len(texts)}))}
        plain.codes, series.codes = values, values
        rows = ItemFeatures(rows.items, rows.times, rows.columns, values)
        grown = opened((plain, rows, series), recipe.model)
        torch.manual_seed(5)
        tables = grown.feature_tables(recipe.model, 2 * 10**12)
        return build_model(recipe.model, num_rows=grown.vocabulary.num_rows, num_actions=2, tasks=[], features=tables)

    known = [f"value {each}" for each in range(NUM_HINTS)]
    model = fresh([*known, "value 2|new"])
    assert copy_weights(model, tmp_path / "older", dataset) == 0
    for name, weight in older.named_parameters():
        if ".features." in name:
            found = dict(model.named_parameters())[name]
            assert len(found) == len(weight) + 1, name
            assert torch.equal(found[: len(weight)], weight), name
    with pytest.raises(UserError, match="_hint has other values now"):
        copy_weights(fresh([f"{text}|more" for text in known]), tmp_path / "older", dataset)

"""Batches of an epoch: who is in them, and that resuming, reading ahead and sharing among ranks change none."""

import json
import threading
from contextlib import closing
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.models.config import StochasticLength
from gr_platform.sequences.dataset import Jagged, SequenceDataset
from gr_platform.sequences.reader import BUCKETS, Reader, ReaderConfig, thinned
from gr_platform.training.seeds import generator

MAX_LENGTH = 120
THIN = StochasticLength(alpha=1.4, choice="recency")


@pytest.fixture(scope="module")
def dataset(make_dataset):
    rng = np.random.default_rng(0)
    users = []
    for user in range(90):
        n = int(np.clip(np.exp(rng.normal(3, 1)), 1, MAX_LENGTH)) if user % 9 else 0
        times = np.cumsum(rng.integers(0, 10**7, n))
        users.append([(int(rng.integers(40)), int(rng.integers(1, 4)), int(at)) for at in times])
    return make_dataset(users, 40)


def reader_of(dataset, *, rank=0, rows=None, **config):
    rows = np.flatnonzero(dataset.lengths) if rows is None else rows
    fields = {"seed": 1, "max_length": MAX_LENGTH} | config
    if "max_tokens" not in fields:
        fields = {"batch_size": 8} | fields
    stops = dataset.lengths[rows]
    return Reader(dataset, rows, np.minimum(stops, 2), stops, ReaderConfig(**fields), rank=rank)


def raw(batch):
    """Return everything in a batch, comparable."""
    arrays = [batch.rows]
    for part in (batch.events, batch.targets):
        arrays += [part.offsets, part.items, part.actions, part.times]
    assert all(each.dtype == np.int64 and each.flags.c_contiguous for each in arrays)
    return [each.tolist() for each in arrays]


SETTINGS = [
    {"batch_size": 8},
    {"batch_size": 8, "stochastic_length": THIN},
    {"batch_size": 8, "windows": "random"},
    {"max_tokens": 150},
    {"max_tokens": 150, "tokens_per_event": 2, "stochastic_length": THIN},
]


@pytest.mark.parametrize("config", SETTINGS)
def test_an_epoch_is_a_function_of_seed_and_epoch_with_and_without_reading_ahead(dataset, config):
    plain = [raw(batch) for batch in reader_of(dataset, **config).read(3, read_ahead=0)]
    assert plain == [raw(batch) for batch in reader_of(dataset, **config).read(3)]
    assert plain == [raw(batch) for batch in reader_of(dataset, **config).read(3, read_ahead=1)]
    assert len(plain) == reader_of(dataset, **config).num_batches(3)
    others = [reader_of(dataset, **config).read(2), reader_of(dataset, **config | {"seed": 2}).read(3)]
    for other in others:
        assert plain != [raw(batch) for batch in other]
    rows = np.flatnonzero(dataset.lengths)
    assert sorted(row for batch in plain for row in batch[0]) == rows.tolist()


@pytest.mark.parametrize("config", SETTINGS)
def test_a_cursor_gives_exactly_the_batches_that_would_have_come(dataset, config):
    whole = [raw(batch) for batch in reader_of(dataset, **config).read(1)]
    for done in (0, 1, len(whole) - 1, len(whole)):
        written = json.dumps(reader_of(dataset, **config).cursor(1, done))
        resumed = reader_of(dataset, **config)
        assert [raw(batch) for batch in resumed.read(*resumed.position(json.loads(written)))] == whole[done:]


def test_a_cursor_of_other_sequences_users_or_settings_is_refused(dataset, make_dataset):
    cursor = reader_of(dataset).cursor(0, 2)
    other = SequenceDataset(
        [
            pa.table(
                {
                    "user_id": [1],
                    **{n: pa.array([[1]], pa.large_list(pa.int64())) for n in ("items", "actions", "times")},
                }
            )
        ],
        dataset.declaration,
        dataset.vocabulary,
        "other",
    )
    strangers = [
        reader_of(other),
        reader_of(dataset, rows=np.flatnonzero(dataset.lengths)[1:]),
        *(reader_of(dataset, **change) for change in ({"batch_size": 9}, {"seed": 2}, {"stochastic_length": THIN})),
        reader_of(dataset, max_tokens=150),
        reader_of(dataset, num_ranks=2),
    ]
    for stranger in strangers:
        with pytest.raises(UserError, match="other sequences"):
            stranger.position(cursor)
    with pytest.raises(UserError):
        reader_of(dataset).position({})
    # All ranks of a run share its cursor.
    assert reader_of(dataset, num_ranks=2, rank=1).position(reader_of(dataset, num_ranks=2).cursor(4, 1)) == (4, 1)


def test_a_fixed_number_of_users_comes_in_the_order_of_one_permutation(dataset):
    rows = np.flatnonzero(dataset.lengths)
    read = [batch.rows for batch in reader_of(dataset, seed=7).read(2)]
    order = generator(7, "shuffle", 2).permutation(rows)
    assert np.concatenate(read).tolist() == order.tolist()
    assert len(rows) == 80
    assert [len(each) for each in read] == [8] * 10
    # A last step of few users joins the one before.
    assert [len(each.rows) for each in reader_of(dataset, batch_size=25).read(0)] == [25, 25, 30]


@settings(deadline=None, max_examples=60)
@given(
    num_users=st.integers(1, 80),
    batch_size=st.integers(1, 40),
    parts=st.integers(1, 4),
    num_ranks=st.integers(1, 8),
    epoch=st.integers(0, 2),
)
def test_a_step_has_the_same_users_however_it_is_shared(dataset, num_users, batch_size, parts, num_ranks, epoch):
    rows = np.flatnonzero(dataset.lengths)[: max(num_users, num_ranks)]
    batch_size = max(batch_size, parts * num_ranks)
    alone = [batch.rows.tolist() for batch in reader_of(dataset, rows=rows, batch_size=batch_size).read(epoch)]
    shares = []
    for rank in range(num_ranks):
        reader = reader_of(dataset, rows=rows, batch_size=batch_size, parts=parts, num_ranks=num_ranks, rank=rank)
        shares.append([batch.rows.tolist() for batch in reader.read(epoch)])
    batches = [row for place in zip(*shares, strict=True) for row in place]  # part by part, the ranks of each
    assert [row for batch in batches for row in batch] == [row for step in alone for row in step]
    sizes = [len(batch) for batch in batches]
    if len(alone) > 1:
        assert sum(sizes[: parts * num_ranks]) == len(alone[0])
    assert min(sizes) >= 1


def test_batches_hold_the_spans_asked_for(dataset):
    reader = reader_of(dataset)
    for batch in reader.read(0):
        assert batch.targets is batch.events
        for row, found in zip(batch.rows.tolist(), batch.events.histories(), strict=True):
            expected = dataset.history(row, dataset.lengths[row])
            begin = min(2, dataset.lengths[row])
            for a, b in zip(found, expected, strict=True):
                assert a.tolist() == b[begin:].tolist()


def test_random_windows_lie_anywhere_in_a_history_and_nowhere_else(dataset):
    rows = np.flatnonzero(dataset.lengths >= 12)
    stops = dataset.lengths[rows] - 1  # the last exposure is held out
    config = ReaderConfig(seed=1, batch_size=len(rows), max_length=8, windows="random")
    reader = Reader(dataset, rows, stops - 8, stops, config)
    places = {row: set() for row in rows.tolist()}
    for epoch in range(300):
        batch = reader.form(np.arange(len(rows)), epoch)
        for row, found in zip(batch.rows.tolist(), batch.events.histories(), strict=True):
            known = dataset.history(row, dataset.lengths[row])
            # Times do not repeat, so they say where a window lies.
            at = int(np.searchsorted(known[2], found[2][0]))
            assert all(a.tolist() == b[at : at + 8].tolist() for a, b in zip(found, known, strict=True))
            places[row].add(at)
    for row, stop in zip(rows.tolist(), stops.tolist(), strict=True):
        possible = set(range(stop - 8 + 1))
        assert places[row] <= possible
        assert len(places[row]) >= 0.8 * len(possible)


@settings(deadline=None, max_examples=40)
@given(max_tokens=st.integers(1, 400), num_ranks=st.integers(1, 5), per_event=st.integers(1, 2), thin=st.booleans())
def test_batches_stay_in_the_budget_and_hold_users_of_like_length(dataset, max_tokens, num_ranks, per_event, thin):
    config = {"max_tokens": max_tokens, "tokens_per_event": per_event, "num_ranks": num_ranks}
    reader = reader_of(dataset, **config, stochastic_length=THIN if thin else StochasticLength())
    plan = reader.plan(0)
    tokens = 1 + per_event * reader._kept(np.arange(len(reader.rows)), 0)
    buckets = np.searchsorted(BUCKETS, tokens, side="right")
    # Hardly more users than batches: their number is made even by joining some.
    scarce = len(plan.begins) + num_ranks > len(reader.rows)
    ranges = []
    for begin, end in zip(plan.begins, plan.ends, strict=True):
        users = plan.order[begin:end]
        assert tokens[users].sum() <= max_tokens or len(users) == 1 or scarce
        ranges.append((buckets[users].min(), buckets[users].max()))
    # Ranges of buckets overlap at their ends alone.
    ranges.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    formed = reader.form(plan.order[plan.begins[0] : plan.ends[0]], 0)
    assert (
        len(formed.rows) + per_event * len(formed.events.items)
        == tokens[plan.order[plan.begins[0] : plan.ends[0]]].sum()
    )


def test_batches_of_a_budget_come_in_shuffled_order(dataset):
    sizes = [len(batch.rows) for batch in reader_of(dataset, max_tokens=150).read(0)]
    assert sizes != sorted(sizes)
    assert sizes != sorted(sizes, reverse=True)


@settings(deadline=None, max_examples=60)
@given(
    num_ranks=st.integers(1, 7),
    num_users=st.integers(1, 80),
    size=st.integers(1, 100),
    budget=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_ranks_share_all_users_without_overlap_in_equally_many_batches(
    dataset, num_ranks, num_users, size, budget, epoch
):
    rows = np.flatnonzero(dataset.lengths)[:num_users]
    config = {"max_tokens": 3 * size} if budget else {"batch_size": max(size, num_ranks)}
    if len(rows) < num_ranks:
        with pytest.raises(UserError, match="fewer processes"):
            reader_of(dataset, rows=rows, num_ranks=num_ranks, **config)
        return
    readers = [reader_of(dataset, rows=rows, num_ranks=num_ranks, rank=rank, **config) for rank in range(num_ranks)]
    shares = [[batch.rows.tolist() for batch in reader.read(epoch, read_ahead=0)] for reader in readers]
    assert {len(share) for share in shares} == {readers[0].num_batches(epoch)}
    assert all(batch for share in shares for batch in share)
    assert sorted(row for share in shares for batch in share for row in batch) == rows.tolist()


def test_a_thinned_batch_keeps_its_users_own_exposures_and_answers_the_ones_that_followed(dataset):
    dropped = 0
    for choice in ("recent", "recency", "uniform"):
        reader = reader_of(dataset, stochastic_length=StochasticLength(alpha=1.2, choice=choice))
        for batch in reader.read(0):
            assert batch.targets.offsets.tolist() == batch.events.offsets.tolist()
            for row, kept, targets in zip(batch.rows, batch.events.histories(), batch.targets.histories(), strict=True):
                begin = min(2, dataset.lengths[row])
                span = list(
                    zip(*(part[begin:].tolist() for part in dataset.history(row, dataset.lengths[row])), strict=True)
                )
                events, answers = (list(zip(*(p.tolist() for p in part), strict=True)) for part in (kept, targets))
                if not span:
                    assert not events
                    continue
                assert len(set(span)) == len(span)  # so that places are found by their values
                places = [span.index(event) for event in events]
                assert places == sorted(places)
                assert places[-1] == len(span) - 1
                assert answers == [span[0], *(span[place + 1] for place in places[:-1])]
                dropped += len(span) - len(events)
    assert dropped > 500


def test_context_is_thinned_with_its_exposures():
    offsets = np.array([0, 4, 4, 7])
    values = np.arange(7)
    span = Jagged(offsets, values, values + 10, values + 20, context={"device": values + 30})
    batch = thinned(np.arange(3), span, np.array([2, 0, 3]), np.array([1, 3, 4, 5, 6]))
    assert batch.events.context["device"].tolist() == [31, 33, 34, 35, 36]
    assert batch.targets.context["device"].tolist() == [30, 32, 34, 35, 36]
    assert batch.targets.items.tolist() == [0, 2, 4, 5, 6]


def test_arrays_of_a_batch_become_tensors_without_a_copy(dataset):
    for batch in islice(reader_of(dataset, stochastic_length=THIN).read(0), 3):
        for part in (batch.events, batch.targets):
            for values in (part.offsets, part.items, part.actions, part.times):
                assert torch.from_numpy(values).data_ptr() == values.ctypes.data
                assert values.flags.writeable


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_leaving_early_ends_the_thread_and_reading_ahead_is_bounded(dataset, monkeypatch):
    formed = []
    real = Reader.form
    monkeypatch.setattr(Reader, "form", lambda self, users, epoch: (formed.append(1), real(self, users, epoch))[1])
    for batch in reader_of(dataset, batch_size=1).read(0, read_ahead=3):
        assert len(batch.rows) == 1
        assert reader_threads()
        break
    assert not reader_threads()
    assert len(formed) <= 4
    with closing(reader_of(dataset).read(0)) as batches:
        next(batches)
        assert reader_threads()
    assert not reader_threads()


@pytest.mark.parametrize("read_ahead", [0, 4])
def test_an_error_of_the_thread_reaches_the_caller_after_the_batches_before_it(dataset, monkeypatch, read_ahead):
    real, calls = SequenceDataset.gather, iter(range(100))

    def failing(self, rows, starts, stops):
        if next(calls) == 3:
            raise OSError("the disk is gone")
        return real(self, rows, starts, stops)

    monkeypatch.setattr(SequenceDataset, "gather", failing)
    batches = reader_of(dataset).read(0, read_ahead=read_ahead)
    assert len(list(islice(batches, 3))) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert not reader_threads()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 8, "max_tokens": 8}, "either batch_size or max_tokens"),
        ({}, "either batch_size or max_tokens"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"batch_size": 1, "num_ranks": 0}, "num_ranks is 0"),
        ({"batch_size": 3, "parts": 2, "num_ranks": 2}, "at least parts . num_ranks = 4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ReaderConfig(seed=1, max_length=5, **config)


def test_a_span_longer_than_max_length_and_a_rank_beyond_the_last_are_refused(dataset):
    with pytest.raises(ValueError, match="more than max_length = 5"):
        reader_of(dataset, max_length=5)
    with pytest.raises(ValueError, match="rank is 2"):
        reader_of(dataset, num_ranks=2, rank=2)

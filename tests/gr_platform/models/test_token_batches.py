"""Tokens of whole batches: what tokens.py makes of each user, and where a slow series stands in them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.models.batch import Entries, EventBatch, TokenBatch
from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny
from gr_platform.models.tokens import ACTION, EVENT, FEATURE, ITEM, START, ranking_tokens, retrieval_tokens
from kernels import JaggedTimes

KINDS = ["retrieval", "ranking"]
FIELDS = ("kinds", "items", "actions")


def make_batch(lengths, seed=0, *, dropped=False, entries=()):
    """A batch of users with so many events; dropped: events between them were left out; entries: places of some."""
    rng = np.random.default_rng(seed)
    events, targets, requests = [], [], []
    for n in lengths:
        times = 10**12 + np.cumsum(rng.integers(1, 10**6, n + 1))
        events.append((rng.integers(1, 60, n), rng.integers(1, 8, n), times[:-1]))
        earlier = times[:-1] - rng.integers(0, 2, n) * dropped
        targets.append((rng.integers(1, 60, n) if dropped else events[-1][0], events[-1][1], earlier))
        requests.append(int(times[-1]))
    joined = [tuple(np.concatenate([np.zeros(0, np.int64), *part]) for part in zip(*each, strict=True)) for each in
              (events or [((), (), ())], targets or [((), (), ())])]  # fmt: skip
    offsets, places = np.cumsum([0, *lengths]), np.sort(np.array(entries, np.int64))
    said = Entries(
        names=("city", "plan"),
        places=places,
        series=rng.integers(0, 2, len(places)),
        codes=rng.integers(1, 9, len(places)),
        times=joined[0][2][places] - rng.integers(0, 5, len(places)),
    )
    context = {"device": rng.integers(0, 4, sum(lengths))}
    return EventBatch.of_arrays(offsets, joined[0], requests, joined[1], context=context, entries=said)


def user_by_user(batch, kind, device="cpu"):
    """Return the tokens of a batch without entries as tokens.py makes them."""
    build = ranking_tokens if kind == "ranking" else retrieval_tokens
    bounds = [slice(*span) for span in pairwise(batch.offsets.tolist())]
    users = [
        build(*history, at, next_times=batch.target_times.numpy()[span])
        for history, at, span in zip(batch.histories, batch.request_times.tolist(), bounds, strict=True)
    ]
    fields = {
        name: torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(getattr(user, name) for user in users)]))
        for name in (*FIELDS, "times", "query_times")
    }
    offsets = torch.from_numpy(np.cumsum([0, *map(len, users)]))
    positions = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(len(user)) for user in users)])
    is_last = torch.zeros(int(offsets[-1]), dtype=torch.bool)
    is_last[offsets[1:] - 1] = True
    return TokenBatch(
        positions=positions,
        jagged=JaggedTimes.of(offsets, fields.pop("times"), fields.pop("query_times")),
        codes={},
        answers=torch.nonzero(fields["kinds"] == ITEM if kind == "ranking" else ~is_last)[:, 0],
        last=torch.nonzero(is_last)[:, 0],
        **fields,
    )


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    seed=st.integers(0, 9),
    dropped=st.booleans(),
    kind=st.sampled_from(KINDS),
)
def test_tokens_of_a_batch_are_those_of_each_user_alone(lengths, seed, dropped, kind):
    batch = make_batch(lengths, seed, dropped=dropped)
    found, expected = batch.tokens(kind), user_by_user(batch, kind)
    for name in (*FIELDS, "positions", "answers", "last"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("seq_offsets", "times", "query_times", "plan"):
        assert torch.equal(getattr(found.jagged, name), getattr(expected.jagged, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_features_loss_and_gradients_are_those_of_tokens_made_user_by_user(kind, monkeypatch):
    batch = make_batch([0, 1, 17, 40, 3], seed=1)
    results = []
    for build in (EventBatch.tokens, user_by_user):
        monkeypatch.setattr(EventBatch, "tokens", build)
        torch.manual_seed(0)
        model = build_model(tiny(kind).model, num_rows=60, num_actions=3, tasks=["a", "b"])
        given = {"task_masks": [1, 2]} if kind == "ranking" else {"negatives": torch.arange(5, 25), "positive_mask": 3}
        loss, _ = model.loss(batch, **given)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


def token_by_token(batch, kind):
    """Return (kind, item, action, city, plan, device, time, query time, event answered) of every token, and lengths."""
    said, device = batch.entries, batch.context["device"].tolist()
    rows, lengths = [], []
    for user, (begin, end) in enumerate(pairwise(batch.offsets.tolist())):
        request, before = int(batch.request_times[user]), len(rows)
        first = int(batch.target_times[begin]) if begin < end else request
        tokens = [[START, 0, 0, 0, 0, 0, first, first, None]]
        for event in range(begin, end):
            for each in np.flatnonzero(said.places == event):
                codes = [int(said.codes[each]) * (said.series[each] == number) for number in range(2)]
                tokens.append([FEATURE, 0, 0, *codes, 0, int(said.times[each]), int(said.times[each]), None])
            item, action, time = (int(part[event]) for part in (batch.items, batch.actions, batch.times))
            if kind == "ranking":
                tokens.append([ITEM, item, 0, 0, 0, device[event], time, time, event])
                tokens.append([ACTION, 0, action, 0, 0, 0, time, time, None])
            else:
                asked = next(token for token in reversed(tokens) if token[0] in (START, EVENT))
                asked[7], asked[8] = int(batch.target_times[event]), event
                tokens.append([EVENT, item, action, 0, 0, device[event], time, None, None])
        if kind == "retrieval":
            tokens[-1][7] = request
        rows += tokens
        lengths.append(len(rows) - before)
    return rows, lengths


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    data=st.data(),
    kind=st.sampled_from(KINDS),
    dropped=st.booleans(),
)
def test_tokens_with_slow_series_are_what_a_reference_builds_token_by_token(lengths, data, kind, dropped):
    places = st.lists(st.integers(0, sum(lengths) - 1), max_size=8) if sum(lengths) else st.just([])
    batch = make_batch(lengths, 2, dropped=dropped, entries=data.draw(places))
    rows, sizes = token_by_token(batch, kind)
    found = batch.tokens(kind)
    names = ("context_device", "user_city", "user_plan")
    device, city, plan = (found.codes[name] for name in names)
    fields = (found.kinds, found.items, found.actions, city, plan, device, found.jagged.times, found.jagged.query_times)
    assert list(zip(*(field.tolist() for field in fields), strict=True)) == [tuple(row[:8]) for row in rows]
    assert found.jagged.seq_offsets.tolist() == np.cumsum([0, *sizes]).tolist()
    assert found.positions.tolist() == [place for size in sizes for place in range(size)]
    answers = {row[8]: place for place, row in enumerate(rows) if row[8] is not None}
    assert found.answers.tolist() == [answers[event] for event in range(sum(lengths))]
    assert found.last.tolist() == (np.cumsum(sizes) - 1).tolist()


def test_candidates_are_asked_after_copies_of_the_users_events_and_entries():
    batch = make_batch([2, 3], entries=[0, 1, 2, 2, 4])
    asked = batch.asked(1, torch.tensor([7, 9]))
    assert asked.offsets.tolist() == [0, 4, 8]
    for copy, candidate in enumerate((7, 9)):
        span = slice(4 * copy, 4 * copy + 4)
        assert asked.items[span].tolist() == [*batch.items[2:].tolist(), candidate]
        assert asked.actions[span].tolist() == [*batch.actions[2:].tolist(), 0]
        assert asked.times[span].tolist() == [*batch.times[2:].tolist(), int(batch.request_times[1])]
        assert asked.context["device"][span].tolist() == [*batch.context["device"][2:].tolist(), 0]
    assert asked.entries.places.tolist() == [0, 0, 2, 4, 4, 6]
    assert asked.entries.codes.tolist() == 2 * batch.entries.codes[2:].tolist()

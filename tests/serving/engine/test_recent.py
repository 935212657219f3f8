"""What a new model begins with: the histories of the old one, encoded by the new one alone."""

import os
import time

import numpy as np
import pytest

from gr_platform import serving_state
from gr_platform.models.tokens import FEATURE, Tokens
from serving.engine import recent
from serving.engine.recent import RecentHistories
from serving.engine.requests import RankRequest, RetrieveRequest
from tests.serving.engine.toy import FIRST_ITEM, NUM_ITEMS, some_history, toy_engine

NONE = np.zeros(0, np.int64)
NUM_ROWS = FIRST_ITEM + NUM_ITEMS


def request(num_events: int, seed: int) -> RankRequest:
    return RankRequest(history=some_history(num_events, seed=seed), candidates=105 + np.arange(4), request_time=10**7)


def asked(tmp_path, *, max_tokens: int = 1000):
    engine = toy_engine("ranking")
    engine.recent = RecentHistories(max_tokens)
    for seed, num_events in enumerate((12, 3, 9, 11)):
        for length in range(1, num_events + 1):
            engine.ask(request(length, seed))
    engine.recent.save(tmp_path / "recent", "toy")
    return recent.load(tmp_path / "recent", "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=25)


def ahead(engine, histories, seconds):
    return recent.encode_ahead(engine.model, engine.recent, histories, seconds)


def test_a_history_that_grew_is_kept_once_and_the_newest_is_last(tmp_path):
    histories = asked(tmp_path)
    # Histories of less than a page have no first page in common: each is one.
    assert [len(tokens) for tokens in histories if len(tokens) > 16] == [25, 19, 23]
    expected = toy_engine("ranking").model.prepare(request(11, 3)).tokens
    assert np.array_equal(histories[-1].times, expected.times)
    assert oct((tmp_path / "recent").stat().st_mode)[-3:] == "600"


def test_a_new_model_has_them_in_its_cache_and_scores_by_itself(tmp_path):
    histories = asked(tmp_path)
    new, fresh = (toy_engine("ranking", digest="new", salt=2) for _ in range(2))
    assert ahead(new, histories, 5.0) == len(histories)
    new.model.cache.check_integrity()
    for seed, num_events in enumerate((12, 3, 9, 11)):
        warm, cold = new.ask(request(num_events, seed)), fresh.ask(request(num_events, seed))
        assert np.array_equal(warm.scores, cold.scores)
        assert warm.cached_tokens == 2 * num_events + 1


def test_a_retrieval_model_has_all_but_the_last_token_of_them(tmp_path):
    asks = {n: RetrieveRequest(history=some_history(n), k=3, exclude=NONE, request_time=10**7) for n in (9, 12)}
    old, new, fresh = toy_engine("retrieval"), *(toy_engine("retrieval", digest="new", salt=2) for _ in range(2))
    old.ask(asks[9])
    old.recent.save(tmp_path / "recent", "toy")
    histories = recent.load(tmp_path / "recent", "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=13)
    assert ahead(new, histories, 5.0) == 1
    warm, cold = new.ask(asks[12]), fresh.ask(asks[12])
    assert (warm.cached_tokens, cold.cached_tokens) == (9, 0)
    assert np.array_equal(warm.scores, cold.scores)


def test_the_newest_come_first_where_room_is_short(tmp_path):
    histories = asked(tmp_path)
    small = toy_engine("ranking", cache_bytes=2 * (16 * (2 * 1 * 3 * 4 + 8) + 512))
    assert ahead(small, histories, 5.0) == 1
    assert small.ask(request(11, 3)).cached_tokens == 23
    assert ahead(toy_engine("ranking"), histories, -1.0) == 0


def test_the_oldest_of_them_go_first_from_the_cache_and_from_what_is_kept(tmp_path):
    histories = asked(tmp_path)
    engine = toy_engine("ranking", cache_bytes=len(histories) * 2 * (16 * (2 * 1 * 3 * 4 + 8) + 512))
    assert ahead(engine, histories, 5.0) == len(histories)
    assert [len(tokens) for tokens in engine.recent._histories.values()] == [len(tokens) for tokens in histories]
    while not engine.model.cache.counters.evictions:
        engine.ask(request(12, 100 + engine.totals.num_steps))
    found = [engine.model.cache.acquire(tokens).num_cached == len(tokens) for tokens in (histories[0], histories[-1])]
    assert found == [False, True]


def test_no_more_tokens_are_kept_than_the_bound_says(tmp_path):
    assert sum(len(tokens) for tokens in asked(tmp_path, max_tokens=60)) <= 60


def test_many_short_histories_are_bounded_too():
    kept = RecentHistories(max_tokens=160)
    tokens = toy_engine("ranking").model.prepare(request(1, 0)).tokens
    for number in range(1000):
        kept.note(number.to_bytes(20, "little"), tokens)
    assert len(kept._histories) == 10


def test_what_does_not_fit_is_passed_over(tmp_path):
    path = tmp_path / "recent"
    histories = asked(tmp_path)
    assert recent.load(path, "another", num_rows=NUM_ROWS, num_actions=3, most_tokens=25) == []
    assert recent.load(path, "toy", num_rows=FIRST_ITEM, num_actions=3, most_tokens=25) == []
    assert max(len(t) for t in recent.load(path, "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=20)) == 19
    assert recent.load(tmp_path / "none", "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=25) == []
    known = recent.load(path, "toy", num_rows=NUM_ROWS, num_actions=1, most_tokens=25)
    assert 0 < len(known) < len(histories)
    assert max(tokens.actions.max() for tokens in known) < 2
    odd = Tokens(**{name: np.full(3, FEATURE if name == "kinds" else 0, np.int64) for name in recent.FIELDS})
    kept = RecentHistories()
    kept.note(b"odd", odd)
    kept.save(tmp_path / "odd", "toy")
    assert recent.load(tmp_path / "odd", "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=25) == []
    path.write_bytes(path.read_bytes()[:-10])
    assert recent.load(path, "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=25) == []
    assert histories


def test_when_a_person_is_forgotten_no_history_stays_on_disk_or_comes_back(tmp_path):
    folder = serving_state.recent_folder(tmp_path)
    engine, path = toy_engine("ranking"), folder / "gr_ranker.safetensors"
    engine.ask(request(9, 1))
    engine.recent.save(path, "toy")
    kept = path.read_bytes()
    time.sleep(0.01)
    serving_state.forget_recent(tmp_path)
    assert not path.exists()
    # The running model drops what it knows, and a file that was written before is not read any more.
    engine.recent.save(path, "toy")
    assert not path.exists()
    path.write_bytes(kept)
    os.utime(path, (0, 0))
    assert recent.load(path, "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=25) == []
    time.sleep(2 * recent.CLOCK_LAG_S)
    engine.ask(request(5, 2))
    engine.recent.save(path, "toy")
    assert [len(t) for t in recent.load(path, "toy", num_rows=NUM_ROWS, num_actions=3, most_tokens=25)] == [11]


def test_whoever_is_forgotten_while_histories_are_written_is_in_none(tmp_path, monkeypatch):
    folder = serving_state.recent_folder(tmp_path)
    engine, path, write = toy_engine("ranking"), folder / "gr_ranker.safetensors", recent.save_file
    engine.ask(request(9, 1))

    def slow(*given, **named):
        write(*given, **named)
        serving_state.forget_recent(tmp_path)
        write(*given, **named)

    monkeypatch.setattr(recent, "save_file", slow)
    engine.recent.save(path, "toy")
    assert [file.name for file in folder.iterdir()] == [serving_state.FORGOTTEN]


def test_a_writer_that_was_killed_leaves_nothing_of_a_person_who_is_forgotten(tmp_path):
    folder = serving_state.recent_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / ".gr_ranker.safetensors-123").touch()
    serving_state.forget_recent(tmp_path)
    assert [file.name for file in folder.iterdir()] == [serving_state.FORGOTTEN]


def test_a_history_that_cannot_be_encoded_keeps_no_page(tmp_path):
    histories, engine = asked(tmp_path), toy_engine("ranking")
    engine.model.compute.broken = True
    with pytest.raises(RuntimeError):
        ahead(engine, histories, 5.0)
    assert not engine.model.cache._leases
    engine.model.cache.check_integrity()


def test_a_full_disk_costs_no_answer(tmp_path, monkeypatch, caplog):
    engine = toy_engine("ranking")
    engine.ask(request(9, 1))

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(recent, "save_file", full)
    engine.recent.save(tmp_path / "recent", "toy")
    assert "recent_histories_not_saved" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ranking", "retrieval"])
def test_an_engine_that_was_never_asked_saves_nothing(tmp_path, kind):
    toy_engine(kind).recent.save(tmp_path / "recent", "toy")
    assert list(tmp_path.iterdir()) == []

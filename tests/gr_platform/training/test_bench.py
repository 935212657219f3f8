"""The step benchmark measures what it says: the shape of ML-1M, one loss on every side, each part once."""

import ctypes
from dataclasses import replace

import pytest

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.training import bench

PARTS = [bench.BATCH, bench.ENCODER, bench.LOSS, bench.BACKWARD, bench.OPTIMIZER]


@pytest.fixture
def few_users(monkeypatch):
    monkeypatch.setattr(bench, "TRAINING", replace(bench.TRAINING, batch_size=4, num_negatives=8))


def test_the_batch_has_the_figures_of_ml_1m():
    step = bench.new_step(bench.RECIPES["HSTU"])
    assert 13_500 < step.num_tokens < 14_500
    assert min(len(items) + 1 for items, _, _ in step.histories) >= bench.MIN_LENGTH
    assert max(len(items) + 1 for items, _, _ in step.histories) == bench.MAX_LENGTH
    assert all(items.min() >= bench.FIRST_ITEM for items, _, _ in step.histories)
    assert max(items.max() for items, _, _ in step.histories) < bench.FIRST_ITEM + bench.NUM_ITEMS


def test_plain_pytorch_takes_the_same_step(few_users):
    ours, plain = (bench.new_step(bench.RECIPES["HSTU"], kind) for kind in (bench.RetrievalModel, bench.PlainRetrieval))
    for model in (ours.model, plain.model):
        model.encoder.dropout = 0.0
        for layer in model.encoder.layers:
            layer.dropout = 0.0
    assert [ours(index) for index in range(3)] == pytest.approx([plain(index) for index in range(3)], rel=1e-4)


def test_every_part_of_a_step_is_a_row_and_every_op_has_a_share(few_users):
    step = bench.new_step(bench.RECIPES["HSTU-large"])
    ours = step.milliseconds(1, 3)
    assert list(ours) == ["", *PARTS]
    assert ours[""] == pytest.approx(sum(ours[part] for part in PARTS), rel=0.5)
    shares = step.shares()
    assert sum(shares.values()) == pytest.approx(100)
    assert all(share > 0 for share in shares.values())
    names = [row["name"] for row in bench.rows("HSTU-large", step, ours)]
    assert len(names) == len(set(names)) == 1 + len(ours) + len(shares)


def test_without_its_environment_the_peer_is_left_out(monkeypatch, tmp_path):
    monkeypatch.delenv("GR_PEERS", raising=False)
    assert bench.rectools_ms(bench.RECIPES["HSTU"], 1, keep_memory=True) is None
    monkeypatch.setenv("GR_PEERS", str(tmp_path))
    with pytest.raises(UserError, match="GR_PEERS"):
        settings.peer_python()


def test_the_peer_is_given_the_same_users_and_its_first_step_is_not_counted(monkeypatch, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho '[9.0, 1.0, 3.0, 2.0]'\n", encoding="ascii")
    python.chmod(0o755)
    monkeypatch.setenv("GR_PEERS", str(tmp_path))
    assert bench.rectools_ms(bench.RECIPES["HSTU"], 1, keep_memory=True) == 2000.0
    users, items, times = bench.interactions()
    made, _ = bench.histories()
    assert len(users) == len(items) == len(times) == sum(len(h[0]) + 1 for h in made)
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n", encoding="ascii")
    with pytest.raises(RuntimeError, match="broken"):
        bench.rectools_ms(bench.RECIPES["HSTU"], 1, keep_memory=True)


def test_freed_memory_is_kept_where_the_c_library_can():
    assert bench.keep_freed_memory() == hasattr(ctypes.CDLL(None), "mallopt")

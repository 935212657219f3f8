"""The benchmarks of training measure what they say: the shape of ML-1M, one loss on every side, no invented figure."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from gr_platform import provenance, settings
from gr_platform.commands import bench
from gr_platform.errors import UserError
from gr_platform.training import bench_encoders, bench_memory, bench_peers, bench_step, bench_train

PARTS = [bench_step.BATCH, bench_step.ENCODER, bench_step.LOSS, bench_step.BACKWARD, bench_step.OPTIMIZER]
# What is asked for, row by row: name, target, and whether it is a limit.
ASKED = {
    "ML-1M step, HSTU, batch 128, 1 thread: authors' research code 4.4 s / ours": (5, False),
    "the same: RecTools in the same run or its recorded 3.3 s / ours": (4, False),
    "ML-1M step, HSTU-large, 1 thread: RecTools 8.2 s / ours": (4, False),
    "minutes to the 2-layer figure above, 2 threads": (75, True),
    "hours to the large figure, 2 threads": (3.5, True),
    "peak RSS of training, GB": (3, True),
}


@pytest.fixture
def few_users(monkeypatch):
    small = replace(bench_step.TRAINING, batch_size=4, num_negatives=8)
    for module in (bench_step, bench_peers):
        monkeypatch.setattr(module, "TRAINING", small)


def test_the_batch_has_the_figures_of_ml_1m():
    step = bench_step.new_step(bench_step.SHAPES["HSTU"])
    lengths = [len(items) + 1 for items, _, _ in step.histories]
    assert 13_500 < step.num_tokens < 14_500
    assert min(lengths) >= bench_step.MIN_LENGTH
    assert max(lengths) == bench_step.MAX_LENGTH
    assert all(items.min() >= bench_step.FIRST_ITEM for items, _, _ in step.histories)
    assert max(items.max() for items, _, _ in step.histories) < bench_step.FIRST_ITEM + bench_step.NUM_ITEMS


def test_plain_pytorch_takes_the_same_step(few_users):
    kinds = (bench_step.RetrievalModel, bench_step.PlainRetrieval)
    ours, plain = (bench_step.new_step(bench_step.SHAPES["HSTU"], kind) for kind in kinds)
    for model in (ours.model, plain.model):
        model.encoder.dropout = 0.0
        for layer in model.encoder.layers:
            layer.dropout = 0.0
    assert [ours(index) for index in range(3)] == pytest.approx([plain(index) for index in range(3)], rel=1e-4)


def test_every_part_of_a_step_is_a_row_and_every_op_has_a_share(few_users):
    step = bench_step.new_step(bench_step.SHAPES["HSTU-large"])
    ours = step.milliseconds(1, 3)
    assert list(ours) == ["", *PARTS]
    assert ours[""] == pytest.approx(sum(ours[part] for part in PARTS), rel=0.5)
    shares = step.shares()
    assert sum(shares.values()) == pytest.approx(100)
    assert all(share > 0 for share in shares.values())
    names = [row["name"] for row in bench_step.rows("HSTU-large", step, ours)]
    assert len(names) == len(set(names)) == 2 + len(ours) + len(shares)


def test_without_its_environment_the_peer_is_left_out(monkeypatch, tmp_path):
    monkeypatch.delenv("GR_PEERS", raising=False)
    assert bench_peers.rectools_ms(bench_step.SHAPES["HSTU"], 1, keep_memory=True) is None
    monkeypatch.setenv("GR_PEERS", str(tmp_path))
    with pytest.raises(UserError, match="GR_PEERS"):
        settings.peer_python()


def test_the_peer_is_given_the_same_users_and_its_first_step_is_not_counted(monkeypatch, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho '[9.0, 1.0, 3.0, 2.0]'\n", encoding="ascii")
    python.chmod(0o755)
    monkeypatch.setenv("GR_PEERS", str(tmp_path))
    assert bench_peers.rectools_ms(bench_step.SHAPES["HSTU"], 1, keep_memory=True) == 2000.0
    users, items, times = bench_peers.interactions()
    made, _ = bench_step.histories()
    assert len(users) == len(items) == len(times) == sum(len(h[0]) + 1 for h in made)
    python.write_text("#!/bin/sh\necho broken >&2\nexit 3\n", encoding="ascii")
    with pytest.raises(RuntimeError, match="broken"):
        bench_peers.rectools_ms(bench_step.SHAPES["HSTU"], 1, keep_memory=True)


@pytest.mark.parametrize("peer_ms", [None, 500.0])
def test_the_rows_are_those_asked_for(few_users, monkeypatch, tmp_path, peer_ms):
    monkeypatch.setattr(bench_train, "rectools_ms", lambda *_, **__: peer_ms)
    monkeypatch.setattr(bench_train, "peak_rss_gb", lambda: 1.5)
    monkeypatch.setattr(bench_train, "RESULTS", _recorded(tmp_path))
    for name in ("WARM_UP", "REPEATS", "PLAIN_REPEATS"):
        monkeypatch.setattr(bench_train, name, 1)
    rows = bench.run("train")
    targets = {row["name"]: (row["target"], row.get("at_most", False)) for row in rows if row["target"] is not None}
    assert targets == ASKED
    assert all(row["value"] is not None and row["ok"] is not None for row in rows[: len(ASKED)])
    against = {row["name"]: row["against"] for row in rows}
    assert against[bench_train.RECTOOLS_ROWS["HSTU"]] == ("recorded" if peer_ms is None else "same run")
    assert ("HSTU step: RecTools / ours" in against) == (peer_ms is not None)
    assert len(against) == len(rows)
    json.dumps(rows, allow_nan=False)


def _recorded(folder, machine=None, **figures):
    base = {"hr_at_10": 0.4, "ndcg_at_10": 0.25, "train_seconds": 3600.0} | figures
    machine = machine or provenance.machine()
    rows = [
        {"label": label, "seed": seed, "seconds": 1500.0 * seed, "figures": base, "machine": machine}
        for label in ("HSTU", "HSTU-large")
        for seed in (1, 2, 3)
    ]
    path = folder / "ml_1m.json"
    path.write_text(json.dumps({"name": "ml_1m", "rows": rows}), encoding="utf-8")
    return path


def test_the_time_to_a_quality_is_that_of_the_recorded_runs(tmp_path):
    minutes, hours = bench_train.quality_rows(_recorded(tmp_path))
    # A resumed run's seconds are those of its last part: its training passes took more.
    assert minutes["value"] == pytest.approx((3600 + 3600 + 4500) / 3 / 60)
    assert hours["value"] == pytest.approx((3600 + 3600 + 4500) / 3 / 3600)
    assert "3 recorded runs" in minutes["against"]


def test_a_quality_that_was_not_reached_is_missed(tmp_path):
    minutes, hours = bench_train.quality_rows(_recorded(tmp_path, hr_at_10=0.33))
    assert bench.reaches_target(minutes) is True
    assert hours["value"] is None
    assert bench.reaches_target(hours) is False
    assert "not reached" in hours["against"]


def test_what_a_gpu_took_says_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
    for row in bench_train.quality_rows(_recorded(tmp_path, machine=provenance.machine("cuda"))):
        assert row["value"] is None
        assert row["against"] == "not measured here"


def test_a_quality_that_nobody_recorded_is_said_to_be_unknown(tmp_path):
    for row in bench_train.quality_rows(tmp_path / "none.json"):
        assert row["value"] is None
        assert bench.reaches_target(row) is None
        assert row["against"] == "not measured here"


def test_the_memory_of_a_training_is_that_of_a_process_of_its_own():
    assert 0.2 < bench_memory.peak_rss_gb(num_users=40) < 3


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    held = np.ones(100_000_000)
    code = "from gr_platform.processes import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < held.nbytes


def test_the_made_up_log_has_the_size_of_ml_1m():
    dataset = bench_memory.made_up(bench_memory.NUM_USERS)
    assert 0.7e6 < dataset.lengths.sum() < 1.3e6
    assert dataset.vocabulary.num_items == bench_step.NUM_ITEMS


def test_encoders_are_of_equal_size():
    found = {
        variant: bench_encoders.measure(variant, 32, batch_tokens=64, repeats=1) for variant in bench_encoders.VARIANTS
    }
    hstu, usual, equal = (found[variant].num_parameters for variant in bench_encoders.VARIANTS)
    assert equal == pytest.approx(hstu, rel=0.02)
    assert usual > 2 * hstu
    for one in found.values():
        assert one.num_users == 2
        assert 0 < one.infer_ms < one.train_ms
    rows = bench_encoders.ratio_rows(list(found.values()))
    assert len(rows) == 2 * len(bench_encoders.FIGURES)
    assert {row["variant"] for row in rows} == {"Transformer++", "Transformer++ of as many weights"}
    names = [row["name"] for one in found.values() for row in bench_encoders.figure_rows(one)]
    assert len(names) == len(set(names)) == 5 * len(found)


def test_an_encoder_that_fails_in_its_process_is_named():
    with pytest.raises(RuntimeError, match="nonsense at 32 tokens failed"):
        bench_encoders.measure_apart("nonsense", 32)


def test_encoders_become_a_line_a_figure_and_a_small_picture(load_script):
    make = load_script("docs/benchmarks/make.py")
    one = bench_encoders.Measured(
        variant="HSTU",
        length=200,
        num_users=4,
        num_parameters=1_000_000,
        train_ms=1.0,
        infer_ms=2.0,
        train_mb=3.0,
        infer_mb=4.0,
        train_flops=5.0,
        flops_utilisation=0.25,
    )
    found = [replace(one, variant=variant, length=n) for n in (200, 512) for variant in bench_encoders.VARIANTS]
    rows = [row for each in found for row in bench_encoders.figure_rows(each)] + bench_encoders.ratio_rows(found)
    table = make.table([row | {"machine": "m", "date": "d"} for row in rows])
    assert "| training step | ms | HSTU, 1.00 M weights | 1 | 1 |" in table
    assert "| training step, / HSTU | x | Transformer++, 1.00 M weights | 1 | 1 |" in table
    picture = load_script("docs/benchmarks/plots.py").encoder_lengths(rows)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 60_000

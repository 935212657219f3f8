"""The harness says which rows reach their target and where they come from."""

import json

import pytest

from gr_platform.commands import bench
from gr_platform.errors import UserError


@pytest.mark.parametrize(
    ("row", "ok"),
    [
        ({"value": 15.0, "target": 15.0}, True),
        ({"value": 14.9, "target": 15.0}, False),
        ({"value": 1.2, "target": 1.15, "at_most": True}, False),
        ({"value": 1.1, "target": 1.15, "at_most": True}, True),
        ({"value": 3.0, "target": None}, None),
    ],
)
def test_a_row_is_held_against_its_target(row, ok):
    assert bench.reaches_target(row) is ok


def test_written_rows_carry_machine_commit_and_date(tmp_path):
    row = {"name": "x", "value": 1.0, "unit": "s", "against": None, "target": None, "ok": None}
    bench.write([row], tmp_path / "rows.json")
    (written,) = json.loads((tmp_path / "rows.json").read_text())
    assert written.items() >= row.items()
    assert {"machine", "commit", "date"} <= set(written)


def test_every_benchmark_has_a_runner():
    assert bench.BENCHES
    for name, (_, sentence) in bench.BENCHES.items():
        assert callable(bench.runner(name))
        assert sentence


def test_the_roofline_needs_no_gpu_and_has_no_target():
    rows = bench.run("kernels")
    assert len(rows) > 10
    assert {row["ok"] for row in rows} == {None}


def test_a_kernel_that_spills_misses_its_target(monkeypatch):
    from kernels import aot

    spilled = [{"value": 0, "target": 0, "at_most": True}, {"value": 4, "target": 0, "at_most": True}]

    def table(*, num_processes, on_progress):
        on_progress(2, 2)
        return spilled

    monkeypatch.setattr(aot, "table", table)
    assert [row["ok"] for row in bench.run("kernels", aot=True)] == [True, False]


def test_the_terminal_shows_the_worst_of_each_op_and_gpu():
    rows = [{"op": "o", "arch": arch, "name": f"{arch} {n}", "value": n, "target": 0} for arch in "ab" for n in (0, 4)]
    assert [row["name"] for row in bench.worst(rows)] == ["most of 2: a 4", "most of 2: b 4"]


def test_only_kernels_are_compiled():
    with pytest.raises(UserError, match="gr bench kernels --aot"):
        bench.run("all", aot=True)

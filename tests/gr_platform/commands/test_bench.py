"""The harness says which rows reach their target and where they come from."""

import json

import pytest

from gr_platform.commands import bench


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
    from importlib import import_module

    assert bench.BENCHES
    for module, sentence in bench.BENCHES.values():
        assert callable(import_module(module).run)
        assert sentence

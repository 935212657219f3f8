"""What MLflow is told of the data: our own digest, counts and time range. The sequences are stand-ins."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform import run_log, storage
from gr_platform.registry import lineage

DS = "shop"
DAY_MS = 86_400_000


def _sequences(home: Path, items: dict[str, list[int]]) -> str:
    parent = home / "sequences" / DS

    def vocabulary(folder: Path) -> dict[str, Any]:
        pq.write_table(pa.table(items), folder / "vocabulary.parquet")
        return {}

    made = storage.ensure(parent, "vocabulary", {"items": items}, vocabulary)
    declared = {"user_id_type": "string", "context": ["device"]}
    spec = {"vocabulary_folder": made.folder.name, "vocabulary": "v" * 40, "events": "e" * 40, "declaration": declared}
    facts = {"num_users": 3, "num_items": 2, "num_exposures": 40, "segments": []}
    return storage.ensure(parent, "sequences", spec, lambda folder: facts).manifest.digest


def _model(sequences: str, **spec: Any) -> storage.Manifest:
    return storage.Manifest(
        kind="retrieval_model",
        spec={"sequences": sequences} | spec,
        files={},
        facts={"trained_until_ms": 4 * DAY_MS},
        digest="m" * 40,
    )


@pytest.fixture
def sequences(tmp_path: Path) -> str:
    # The last item is known by its properties alone, so its time 0 is no time of the log.
    return _sequences(
        tmp_path,
        {"count": [30, 10, 0], "first_ts": [DAY_MS, 2 * DAY_MS, 0], "last_ts": [5 * DAY_MS, 6 * DAY_MS, 0]},
    )


def test_the_training_data_are_named_by_our_digest_with_counts_range_and_columns(
    tmp_path: Path, sequences: str
) -> None:
    logged = lineage.training_input(tmp_path, DS, _model(sequences))
    assert (logged.dataset.name, logged.dataset.digest) == (DS, sequences[:36])
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]
    told = json.loads(logged.dataset.profile)
    assert {name: told[name] for name in ("num_users", "num_items", "num_exposures")} == {
        "num_users": 3,
        "num_items": 2,
        "num_exposures": 40,
    }
    assert (told["first"], told["last"]) == ("1970-01-02T00:00:00Z", "1970-01-07T00:00:00Z")
    assert told["trained_until"] == "1970-01-05T00:00:00Z"
    columns = {column["name"]: column["type"] for column in json.loads(logged.dataset.schema)["mlflow_colspec"]}
    assert columns["user_id"] == "string"
    assert list(columns) == ["user_id", "items", "actions", "times", "context_device"]


def test_another_window_of_the_same_sequences_is_another_evaluation_set(tmp_path: Path, sequences: str) -> None:
    evaluation = {"retrieval": {"num_users": 7, "num_targets": 9}}
    splits: list[dict[str, int] | None] = [None]
    splits += [{"validation_cut": 3 * DAY_MS, "cut": 4 * DAY_MS, "end": end * DAY_MS} for end in (5, 6)]
    logged = [
        lineage.evaluation_input(tmp_path, DS, _model(sequences, split=split), evaluation, "retrieval")
        for split in splits
    ]
    assert len({each.dataset.digest for each in logged} | {sequences[:36]}) == 4
    assert {tag.value for each in logged for tag in each.tags} == {"evaluation"}
    told = [json.loads(each.dataset.profile) for each in logged]
    held_out = ["the last exposure of each user", "1970-01-05", "1970-01-05 to 1970-01-06"]
    assert [each["held_out"] for each in told] == held_out
    assert {(each["num_users"], each["num_targets"]) for each in told} == {(7, 9)}
    assert told[1]["cut"] == "1970-01-05T00:00:00Z"


def test_what_is_gone_is_left_out_and_nothing_else(tmp_path: Path, sequences: str) -> None:
    gone = lineage.training_input(tmp_path, DS, _model("0" * 40))
    assert gone.dataset.digest == "0" * 36
    assert json.loads(gone.dataset.profile) == {
        "trained_until_ms": 4 * DAY_MS,
        "trained_until": "1970-01-05T00:00:00Z",
    }
    (vocabulary,) = (tmp_path / "sequences" / DS).glob("vocabulary-*/vocabulary.parquet")
    vocabulary.write_bytes(b"damaged")
    told = lineage.profile(tmp_path, DS, sequences)
    assert told["num_exposures"] == 40
    assert "first_ms" not in told


def test_a_run_is_found_by_start_window_and_how_far_it_learned(sequences: str) -> None:
    split = {"validation_cut": 3 * DAY_MS, "cut": 4 * DAY_MS + 1, "end": 5 * DAY_MS + 1}
    tags = lineage.tags_of(DS, "retrieval", "small", _model(sequences, split=split, warm_start="w" * 40))
    assert tags["gr.start"] == "warm"
    assert tags["gr.warm_start"] == "w" * 40
    assert tags["gr.window"] == "1970-01-05 to 1970-01-06"
    assert tags["gr.trained_until"] == "1970-01-05T00:00:00Z"
    plain = lineage.tags_of(DS, "retrieval", "small", _model(sequences))
    assert plain["gr.start"] == "scratch"
    assert not {"gr.window", "gr.warm_start"} & plain.keys()


def test_a_run_names_the_dagster_run_that_trained_it_and_a_command_names_none(
    sequences: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GR_RUN_ID", raising=False)
    with run_log.under("8c1d2f"):
        assert lineage.tags_of(DS, "retrieval", "small", _model(sequences))["gr.dagster_run"] == "8c1d2f"
    with run_log.under("gr-1f2e"):
        assert "gr.dagster_run" not in lineage.tags_of(DS, "retrieval", "small", _model(sequences))

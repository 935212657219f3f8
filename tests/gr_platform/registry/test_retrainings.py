"""A retraining in MLflow: one parent run, the models' runs under it, the judgement as it was. Models are stand-ins."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from gr_platform import storage
from gr_platform.models.recipes import tiny
from gr_platform.registry import lineage, retrainings, tracking, versions

DS = "shop"
DAY_MS = 86_400_000
CUT = 20_000 * DAY_MS
TAGS = {lineage.SEQUENCES_DIGEST: "seq-1", lineage.START: "warm", "gr.recipe": "tiny"}


def _model(home: Path, kind: str, name: str = "a", **spec: Any) -> storage.Result:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "recipe.json").write_text(json.dumps(tiny(kind).to_json()))
        (folder / "curves.json").write_text(json.dumps([{"epoch": 0, "loss": 1.5}]))
        return {"trained_until_ms": CUT - 1}

    split = {"validation_cut": CUT - DAY_MS, "cut": CUT, "end": CUT + DAY_MS}
    made_of = {"name": name, "sequences": "seq-1", "split": split} | spec
    return storage.ensure(home / "runs" / DS, f"{kind}_model", made_of, build)


def _registered(home: Path, kind: str, run_id: str) -> dict[str, str]:
    client, name = tracking.connect(home), versions.model_name(DS, kind)
    client.create_registered_model(name)
    version = client.create_model_version(name, source=home.as_uri(), run_id=run_id).version
    return {"name": name, "version": str(version), "run": kind, "trained_until_ms": CUT - 1}


def _line(figure: str, at: float) -> dict[str, Any]:
    ends = {"difference": 0.125, "low": -0.25, "high": 0.5, "p_value": 0.75}
    return {"figure": figure, "a": at, "b": at + 0.125, **ends}


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Path, dict[str, Any], str, dict[str, str]]:
    """A state folder with a retraining of both kinds: home, the judgement's facts, the parent's and children's runs."""
    models = {kind: _model(tmp_path, kind) for kind in versions.KINDS}
    parents = {
        retrainings.for_model(tmp_path, DS, model.manifest, start="warm", recipe="auto") for model in models.values()
    }
    (parent,) = parents
    assert parent is not None
    runs = {kind: tracking.log_run(tmp_path, DS, model.folder, parent=parent).run_id for kind, model in models.items()}
    facts = {
        "window": {"kind": "time", "cut": CUT, "end": CUT + DAY_MS},
        "challenger": {kind: _registered(tmp_path, kind, run_id) for kind, run_id in runs.items()},
        "champion": {},
        "differences": {"retrieval": [_line("hr_at_10", 0.25)], "ranking": [_line("like_ne", 0.75)]},
        "slices": [{"slice": "user_age", "bin": "1 of 5", "lower": 0.0, "upper": 3.0, **_line("hr_at_10", 0.25)}],
        "figures": {},
        "gates": [
            {"gate": "parity", "ok": True, "value": 0.0, "bound": 1.0, "why": "equal"},
            {"gate": "quality", "ok": False, "value": -0.5, "bound": 0.0, "why": "HR@10 | NE is worse"},
        ],
        "passed": False,
    }
    return tmp_path, facts, parent, runs


def test_a_retraining_is_one_run_and_another_start_is_another(tmp_path: Path) -> None:
    first = retrainings.open_retraining(tmp_path, DS, name="retraining warm", tags=TAGS)
    assert retrainings.open_retraining(tmp_path, DS, name="again", tags=TAGS) == first
    other = retrainings.open_retraining(tmp_path, DS, name="scratch", tags=TAGS | {lineage.START: "scratch"})
    assert other != first
    found = tracking.connect(tmp_path).get_run(first)
    assert found.info.run_name == "retraining warm"
    assert found.info.status == "FINISHED"
    assert TAGS.items() <= found.data.tags.items()


def test_models_stand_under_their_retraining_and_keep_the_first(judged: Any) -> None:
    home, _, parent, runs = judged
    client = tracking.connect(home)
    for kind, run_id in runs.items():
        tags = client.get_run(run_id).data.tags
        assert tags[tracking.PARENT] == parent
        assert (tags[lineage.WINDOW], tags[lineage.START]) == ("2024-10-04", "scratch")
        assert tags[lineage.TRAINED_UNTIL] == "2024-10-03T23:59:59Z"
        again = tracking.log_run(home, DS, _model(home, kind).folder, parent="0" * 32)
        assert (again.run_id, again.reused) == (run_id, True)
        assert client.get_run(run_id).data.tags[tracking.PARENT] == parent
        # Asked for once more, from whatever start, a model that stands somewhere opens nothing new.
        assert retrainings.for_model(home, DS, _model(home, kind).manifest, start="x", recipe="y") == parent
    assert client.get_run(parent).info.run_name == "2024-10-04 warm retraining"


def test_a_run_that_was_logged_alone_is_put_under_a_retraining_later(tmp_path: Path) -> None:
    model = _model(tmp_path, "retrieval")
    alone = tracking.log_run(tmp_path, DS, model.folder)
    parent = retrainings.for_model(tmp_path, DS, model.manifest, start="warm", recipe="tiny")
    tracking.log_run(tmp_path, DS, model.folder, parent=parent)
    assert tracking.connect(tmp_path).get_run(alone.run_id).data.tags[tracking.PARENT] == parent


def test_a_judgement_is_logged_as_it_is_and_once(judged: Any) -> None:
    home, facts, parent, runs = judged
    for _ in range(2):
        assert set(retrainings.log_judgement(home, DS, facts)) == {parent, *runs.values()}
    client = tracking.connect(home)
    expected = {"challenger": "b", "champion": "a", "difference": "difference", "low": "low", "high": "high"}
    expected["p"] = "p_value"
    for kind, (line,) in facts["differences"].items():
        for run_id, prefix in ((runs[kind], ""), (parent, f"{kind}_")):
            found = client.get_run(run_id).data.metrics
            told = {end: found[f"judged/{prefix}{line['figure']}_{end}"] for end in expected}
            assert told == {end: line[part] for end, part in expected.items()}
    assert len(client.get_metric_history(parent, "judged/retrieval_hr_at_10_low")) == 1
    tags = client.get_run(parent).data.tags
    assert (tags[retrainings.OUTCOME], tags[lineage.WINDOW]) == ("refused", "2024-10-04")
    assert tags[retrainings.REASONS] == "quality: HR@10 | NE is worse"
    pictures = {file.path for file in client.list_artifacts(parent, retrainings.FOLDER)}
    assert pictures >= {f"judgement/{name}.png" for name in ("differences_retrieval", "differences_ranking", "slices")}
    local = Path(client.download_artifacts(parent, retrainings.FOLDER))
    assert json.loads((local / "gates.json").read_text())["gates"] == facts["gates"]
    assert json.loads((local / "judgement.json").read_text()) == facts
    rows = [line for line in (local / "gates.md").read_text().splitlines() if line.startswith("| quality")]
    assert rows == ["| quality | **no** | -0.5 | 0 | HR@10 \\| NE is worse |"]


def test_what_became_of_a_challenger_stands_on_its_run_and_on_the_retraining(judged: Any) -> None:
    home, facts, parent, runs = judged
    retrainings.log_judgement(home, DS, facts)
    retrainings.log_outcome(home, versions.versions(home, DS, "retrieval"), "promoted")
    client = tracking.connect(home)
    outcomes = {each: client.get_run(each).data.tags[retrainings.OUTCOME] for each in (parent, *runs.values())}
    assert outcomes == {parent: "promoted", runs["retrieval"]: "promoted", runs["ranking"]: "refused"}


def test_a_first_pair_is_logged_without_a_champion_to_differ_from(judged: Any) -> None:
    home, facts, parent, _ = judged
    window = {"kind": "leave_one_out", "cut": None, "end": None}
    retrainings.log_judgement(home, DS, facts | {"differences": {}, "slices": [], "window": window, "passed": True})
    found = tracking.connect(home).get_run(parent).data
    assert not [name for name in found.metrics if name.startswith("judged/")]
    assert found.tags[retrainings.OUTCOME] == "passed"


def test_a_model_is_trained_whatever_mlflow_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(home: Path) -> None:
        raise MlflowException("the database is gone")

    model = _model(tmp_path, "retrieval")
    monkeypatch.setattr(retrainings, "connect", down)
    assert retrainings.for_model(tmp_path, DS, model.manifest, start="warm", recipe="tiny") is None

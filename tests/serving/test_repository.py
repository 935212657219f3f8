"""The model repository: complete, relative, changed as a whole and only when something changed."""

import os
import re
import shutil

import pyarrow.parquet as pq
import pytest

from gr_platform import settings
from gr_platform.errors import UserError
from serving import repository
from serving.repository import ServingOptions, publish


def set_dataset(name):
    def change(folder, facts):
        facts["declaration"] = facts["declaration"] | {"name": name}

    return change


def set_actions(folder, facts):
    facts["declaration"] = facts["declaration"] | {"actions": ["view", "like", "purchase", "share"]}


def set_vocabulary(folder, facts):
    table = pq.read_table(folder / "vocabulary.parquet")
    pq.write_table(table.take(list(range(len(table)))[::-1]), folder / "vocabulary.parquet")


def test_a_pair_becomes_three_models_that_name_no_absolute_path(tmp_path, pair):
    published = publish(tmp_path, pair["retrieval"], pair["ranking"])
    link = tmp_path / "model_repository"
    assert link.resolve() == published.folder
    assert not os.path.isabs(os.readlink(link))
    for model in repository.MODELS:
        assert (link / model / "1" / "model.py").is_file()
        config = (link / model / "config.pbtxt").read_text()
        assert config.count("allow_ragged_batch: true") == config.split("output [")[0].count("data_type")
        assert "$" not in config
        assert "queue_policy" not in config, "a queue policy makes requests wait 500 ms (see the comment there)"
    assert (link / "gr_ranker/1/bundle/score.onnx").is_file()
    assert (link / "gr_retriever/1/bundle/item_vectors.safetensors").is_file()
    for file in published.folder.rglob("*"):
        assert not file.is_symlink()
        if file.is_file():
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content
            assert str(pair["ranking"].parent).encode() not in content
            assert str(settings.PROJECT_ROOT).encode() not in content, file.name


def test_publishing_twice_changes_nothing_and_another_option_is_another_repository(tmp_path, pair):
    first = publish(tmp_path, pair["retrieval"], pair["ranking"])
    second = publish(tmp_path, pair["retrieval"], pair["ranking"])
    assert (first.changed, second.changed) == (True, False)
    third = publish(tmp_path, pair["retrieval"], pair["ranking"], ServingOptions(cache_bytes=1 << 20))
    assert third.changed
    assert third.previous == first.folder
    assert 'string_value: "1048576"' in (tmp_path / "model_repository/gr_ranker/config.pbtxt").read_text()
    fourth = publish(tmp_path, pair["retrieval"], pair["ranking"], ServingOptions(cache_bytes=2 << 20))
    # The current pair and the one to go back to stay.
    assert sorted(p for p in fourth.folder.parent.iterdir()) == sorted([third.folder, fourth.folder])


def test_each_model_is_told_until_when_it_learned_if_its_bundle_says_so(tmp_path, pair, rewritten):
    def learned(folder, facts):
        facts["trained_until_ms"] = 1_700_000_000_123

    folder = publish(tmp_path, pair["retrieval"], rewritten(pair["ranking"], learned)).folder
    until = {model: _parameter(folder, model, "trained_until_ms") for model in ("gr_ranker", "gr_retriever")}
    assert until == {"gr_ranker": "1700000000123", "gr_retriever": ""}
    exported = (pair["retrieval"] / "manifest.json").stat().st_mtime_ns // 1_000_000
    assert int(_parameter(folder, "gr_retriever", "exported_ms")) == exported


def _parameter(folder, model, name):
    text = (folder / model / "config.pbtxt").read_text()
    return re.search(rf'key: "{name}" value: {{ string_value: "(.*?)" }}', text)[1]


def test_options_are_those_of_the_state_folder_unless_others_are_given(tmp_path, pair):
    (tmp_path / "serving.toml").write_text("max_queue = 7\n")
    folder = repository.publish(tmp_path, pair["retrieval"], pair["ranking"]).folder
    assert 'key: "max_queue" value: { string_value: "7" }' in (folder / "gr_ranker/config.pbtxt").read_text()
    given = repository.publish(tmp_path, pair["retrieval"], pair["ranking"], ServingOptions(max_queue=9)).folder
    assert 'key: "max_queue" value: { string_value: "9" }' in (given / "gr_ranker/config.pbtxt").read_text()


def test_bundles_that_do_not_go_together_are_refused_and_the_last_pair_stays(tmp_path, pair, rewritten):
    good = publish(tmp_path, pair["retrieval"], pair["ranking"])
    with pytest.raises(UserError, match="is a ranking bundle, expected a retrieval bundle"):
        publish(tmp_path, pair["ranking"], pair["ranking"])
    other = rewritten(pair["ranking"], set_dataset("elsewhere"))
    with pytest.raises(UserError, match=r"different data sets, random .* and elsewhere"):
        publish(tmp_path, pair["retrieval"], other)
    with pytest.raises(UserError, match="different actions"):
        publish(tmp_path, pair["retrieval"], rewritten(pair["ranking"], set_actions))
    with pytest.raises(UserError, match="different vocabularies"):
        publish(tmp_path, pair["retrieval"], rewritten(pair["ranking"], set_vocabulary))
    damaged = shutil.copytree(pair["ranking"], tmp_path / "damaged")
    (damaged / "score.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"score\.onnx is corrupt"):
        publish(tmp_path, pair["retrieval"], damaged)
    assert repository.current(tmp_path) == good.folder


def test_a_foreign_folder_is_not_overwritten(tmp_path, pair):
    (tmp_path / "model_repository").mkdir()
    with pytest.raises(UserError, match="folder of something else"):
        publish(tmp_path, pair["retrieval"], pair["ranking"])


def test_without_a_pair_there_is_an_empty_repository(tmp_path):
    assert repository.ensure_repository(tmp_path) == ()
    assert (tmp_path / "model_repository").is_dir()

"""A damaged manifest or pointer is one sentence that says what to do, and the result is made again."""

import os

import pytest

from gr_platform import storage
from gr_platform.errors import UserError


def _build(folder):
    (folder / "data").write_text("content")
    return {"rows": 1}


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"schema_version": 1}', b'{"schema_version": 9}'])
def test_a_damaged_manifest_is_a_user_error_and_ensure_heals_it(tmp_path, text):
    made = storage.ensure(tmp_path, "kind", {"a": 1}, _build)
    (made.folder / storage.MANIFEST).write_bytes(text)
    with pytest.raises(UserError, match="make it again") as error:
        storage.read_manifest(made.folder)
    assert str(tmp_path) not in str(error.value)
    again = storage.ensure(tmp_path, "kind", {"a": 1}, _build)
    assert not again.reused
    assert again.manifest == made.manifest


@pytest.mark.parametrize("text", [b"", b"\xff", b"gone\n", b"../..\n", b"\0"])
def test_a_damaged_pointer_is_a_user_error(tmp_path, text):
    (tmp_path / "kind.current").write_bytes(text)
    with pytest.raises(UserError, match="make kind again"):
        storage.current(tmp_path, "kind")


def test_two_processes_that_build_the_same_result_end_with_one(tmp_path):
    def build(folder):
        # The other process finishes while this one builds.
        storage.ensure(tmp_path, "thing", {"a": 1}, lambda other: {"n": (other / "x").write_text("1")})
        return {"n": (folder / "x").write_text("1")}

    result = storage.ensure(tmp_path, "thing", {"a": 1}, build)
    assert result.reused
    assert [path.name for path in tmp_path.iterdir()] == [result.folder.name]


def test_a_damaged_result_stays_until_the_new_one_is_there(tmp_path):
    made = storage.ensure(tmp_path, "kind", {"a": 1}, _build)
    (made.folder / "data").write_text("contents")

    def fails(folder):
        (folder / "data").write_text("cont")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        storage.ensure(tmp_path, "kind", {"a": 1}, fails)
    assert (made.folder / "data").read_text() == "contents"
    assert [path.name for path in tmp_path.iterdir()] == [made.folder.name]
    assert storage.ensure(tmp_path, "kind", {"a": 1}, _build).manifest == made.manifest
    assert (made.folder / "data").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == [made.folder.name]


def test_leftovers_of_killed_tasks_go_once_they_are_old(tmp_path):
    old, young = tmp_path / ".building-old", tmp_path / ".building-young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    storage.ensure(tmp_path, "thing", {}, lambda folder: {})
    assert not old.exists()
    assert young.exists()

"""Which bundle is deployed for a registered version."""

import os
from pathlib import Path

import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.lifecycle.folders import bundle_of
from gr_platform.registry import tracking
from gr_platform.registry.versions import Version

DS = "shop"


def version(run: str) -> Version:
    return Version(name=f"{DS}-ranking", version="3", run_id="r", aliases=(), tags={tracking.RUN_DIGEST: run})


def made(home: Path, name: str, run: str, age_s: int = 0) -> Path:
    folder = home / "bundles" / DS / name
    folder.mkdir(parents=True)
    storage.write_manifest(folder, kind="ranking", spec={"run": run}, facts={})
    now = folder.stat().st_mtime
    os.utime(folder, (now - age_s, now - age_s))
    return folder


def test_a_damaged_bundle_of_another_version_blocks_nobody(tmp_path: Path) -> None:
    wanted = made(tmp_path, "ranking-a", "run-a", age_s=60)
    for name, text in {"ranking-b": "{", "ranking-c": '{"schema_version": 99}', "ranking-d": "[]"}.items():
        (made(tmp_path, name, "run-b") / storage.MANIFEST).write_text(text)
    (tmp_path / "bundles" / DS / "ranking-e").mkdir()
    assert bundle_of(tmp_path, DS, "ranking", version("run-a")) == wanted


def test_of_several_bundles_of_a_run_the_current_one_is_taken_else_the_youngest(tmp_path: Path) -> None:
    old, young = made(tmp_path, "ranking-a", "run", age_s=60), made(tmp_path, "ranking-b", "run")
    assert bundle_of(tmp_path, DS, "ranking", version("run")) == young
    storage.point(old.parent, "ranking", old)
    assert bundle_of(tmp_path, DS, "ranking", version("run")) == old


def test_a_version_without_a_bundle_is_an_error_that_names_what_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"version 3 has no bundle; run gr materialize --select bundle$"):
        bundle_of(tmp_path, DS, "ranking", version("run"))
    (made(tmp_path, "ranking-a", "run") / storage.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"--select bundle \(.*is not valid JSON"):
        bundle_of(tmp_path, DS, "ranking", version("run"))

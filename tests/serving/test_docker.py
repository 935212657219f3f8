"""The container starts the server as `gr serve` does: its files are checked here, since no image can be built here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gr_platform import settings
from serving import server
from tests.serving.test_supervisor import a_handle

FOLDER = settings.PROJECT_ROOT / "serving" / "docker"
# What only the container says: its release bounds the size of HTTP requests, that of the embedded server cannot.
ONLY_THERE = {"http-max-input-size"}
# What the image has at the place where the server looks for it, or what it has a GPU for.
ONLY_HERE = {"backend-directory", "cache-directory", "allow-gpu-metrics", "pinned-memory-pool-byte-size"}


def option_names(arguments: list[str]) -> set[str]:
    return {argument.removeprefix("--").partition("=")[0] for argument in arguments}


@pytest.fixture
def started(tmp_path: Path) -> list[str]:
    """The arguments that start.sh gives the server, with two models deployed and the key `secret`."""
    for model in ("gr_ranker", "gr_retriever"):
        (tmp_path / "gr/model_repository" / model).mkdir(parents=True)
        (tmp_path / "gr/model_repository" / model / "config.pbtxt").touch()
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "tritonserver").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "GR_HOME": str(tmp_path / "gr"),
        "GR_ADMIN_KEY_FILE": str(tmp_path / "key"),
    }
    done = subprocess.run(["bash", FOLDER / "start.sh"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_container_has_the_options_of_our_own_start(started: list[str], tmp_path: Path) -> None:
    handle = a_handle(tmp_path / "gr", admin_key="secret", instance="gr")
    ours = server._arguments(handle, tmp_path, ("gr_ranker", "gr_retriever"))
    assert option_names(started) - ONLY_THERE == option_names(ours) - ONLY_HERE
    same = {each for each in ours if not re.match(r"--\w+-(address|port)=", each)}
    assert {each for each in same if option_names([each]) <= ONLY_HERE} == same - set(started)


def test_without_a_key_or_models_the_container_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("")
    environment = {"PATH": os.environ["PATH"], "GR_HOME": str(tmp_path), "GR_ADMIN_KEY_FILE": str(tmp_path / "key")}
    for text, message in (("", "admin key is empty"), ("secret", "no models are deployed")):
        (tmp_path / "key").write_text(text)
        done = subprocess.run(["bash", FOLDER / "start.sh"], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr


def test_compose_publishes_on_loopback_alone_and_takes_the_key_from_a_secret() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    service = compose["services"]["model-server"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["shm_size"] == "1g"
    assert service["user"] != "0"
    assert "command" not in service, "options belong in start.sh, which the test above holds against ours"
    assert compose["secrets"] == {"admin_key": {"environment": "GR_SERVER_ADMIN_KEY"}}
    assert (FOLDER / service["build"]["context"]).resolve() == settings.PROJECT_ROOT
    assert settings.PROJECT_ROOT / service["build"]["dockerfile"] == FOLDER / "Dockerfile"
    assert service["volumes"][0]["target"] == "/gr"


def test_the_image_copies_what_is_there_and_runs_as_no_root() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert [name for name in copied if not (settings.PROJECT_ROOT / name).exists()] == []
    kept = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == kept
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert "ENV GR_HOME=/gr" in "\n".join(lines)


@pytest.mark.parametrize(("linter", "file"), [("hadolint", "Dockerfile"), ("shellcheck", "start.sh")])
def test_the_images_files_pass_their_linters(linter: str, file: str) -> None:
    # Of the environment that runs the tests: both come as packages.
    done = subprocess.run([Path(sys.executable).parent / linter, FOLDER / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

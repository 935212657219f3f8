"""The figures of a state folder in which the whole pipeline ran, over HTTP."""

import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gr_platform import settings
from gr_platform.commands import observing, services
from gr_platform.errors import UserError
from serving import engine_metrics, figures


def _free_port():
    with socket.socket() as probe:
        probe.bind((services.HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def families(pipeline_home, tmp_path_factory):
    """Name -> samples, as `gr metrics` serves them of a copy of the folder; its log is checked to be free of faults."""
    home = tmp_path_factory.mktemp("metrics")
    for name in ("dagster_home", "mlflow.db", "landing", "events", "runs", "model_repository", "model_repositories"):
        source = pipeline_home / name
        copy = shutil.copy if source.is_file() else shutil.copytree
        copy(source, home / name, **({} if source.is_file() else {"symlinks": True}))
    port = _free_port()
    environment = os.environ | {"GR_HOME": str(home), "DAGSTER_HOME": str(home / "dagster_home")}
    command = [sys.executable, "-m", "gr_platform.cli", "metrics", "--port", str(port)]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout.readline().strip() == f"metrics  http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        for address in {each[4][0] for each in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}:
            if not address.startswith("127."):
                with pytest.raises(OSError, match=r"refused|timed out"):
                    socket.create_connection((address, port), timeout=2)
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    assert "figures_not_read" not in (home / "logs" / "gr.log").read_text()
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def _by(families, name, label, **others):
    return {each.labels[label]: each.value for each in families[name] if others.items() <= each.labels.items()}


@pytest.mark.slow
def test_every_part_of_the_platform_is_read(families):
    up = _by(families, "gr_platform_up", "part")
    assert set(up.values()) == {1.0}
    assert {"dagster", "registry", "data", "judgement"} <= up.keys()
    assert sum(_by(families, "gr_platform_read_seconds", "part").values()) < 60


@pytest.mark.slow
def test_assets_checks_and_runs_are_told(families):
    done = _by(families, "gr_asset_last_success_timestamp_seconds", "asset")
    assert {"events", "sequences", "retrieval_model", "deployment"} <= done.keys()
    assert all(0 < time.time() - moment < 86_400 for moment in done.values())
    assert _by(families, "gr_asset_last_duration_seconds", "asset")["retrieval_model"] > 0
    assert _by(families, "gr_runs", "status")["success"] == 1
    assert [each.value for each in families["gr_queue_runs"]] == [0]
    assert "full_pipeline" in _by(families, "gr_job_last_end_timestamp_seconds", "dagster_job", status="success")
    assert _by(families, "gr_failed_checks", "severity")["ERROR"] == 0
    assert "no_leakage" in _by(families, "gr_check_ok", "check", asset="sequences", severity="ERROR")


@pytest.mark.slow
def test_the_champions_are_told_and_that_they_serve(families):
    for name in ("gr_champion_info", "gr_champion_served"):
        assert _by(families, name, "kind", dataset="simulated") == {"retrieval": 1.0, "ranking": 1.0}
    assert families["gr_server_expected"][0].value == 1


@pytest.mark.slow
def test_the_rules_of_the_documentation_ask_for_figures_that_there_are(families):
    folder = settings.PROJECT_ROOT / "docs" / "prometheus"
    groups = yaml.safe_load((folder / "rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    asked = {re.sub("_(total|bucket)$", "", name) for rule in rules for name in re.findall(r"gr_\w+", rule["expr"])}
    sources = inspect.getsource(engine_metrics) + inspect.getsource(figures)
    of_server = {re.sub("_total$", "", name) for name in re.findall(r'"(gr_\w+)"', sources)}
    assert asked <= families.keys() | of_server
    assert asked & of_server
    assert all(rule["annotations"]["summary"] for rule in rules)
    targets = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    ports = services.Ports()
    assert [each["static_configs"][0]["targets"] for each in targets] == [
        [f"{services.HOST}:{ports.platform_metrics}"],
        [f"{services.HOST}:{ports.metrics}"],
    ]


def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind((services.HOST, 0))
        taken.listen()
        with pytest.raises(UserError, match="is in use, platform-metrics needs it"):
            next(observing.serve_metrics(tmp_path, tmp_path, taken.getsockname()[1]))

"""The two UIs in a real browser: the graph that ran is shown as materialised, the models as registered."""

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gr_platform.commands import services

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed (apt-get install chromium)"),
]
ASSETS = (
    "events item_vocabulary data_card sequences retrieval_model ranking_model evaluation registration bundle deployment"
)
TIMEOUT_MS = 120_000


@pytest.fixture(scope="module")
def browser(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script that takes the documentation's pictures: same browser, same pages."""
    return load_script("docs/take_screenshots.py")


@pytest.fixture(scope="module")
def home(pipeline_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished pipeline that runs started in the UI may change."""
    return Path(shutil.copytree(pipeline_home, tmp_path_factory.mktemp("ui") / "home", symlinks=True))


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[dict[str, services.Running]]:
    """Everything `gr up` starts, on free ports, stopped afterwards."""
    probes = [socket.socket() for _ in range(5)]
    for probe in probes:
        probe.bind((services.HOST, 0))
    dagster, mlflow, http, grpc, metrics = (probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    ports = services.Ports(dagster=dagster, mlflow=mlflow, http=http, grpc=grpc, metrics=metrics)
    wanted = services.platform_services(home, home / "dagster_home", ports)
    try:
        yield {service.name: service for service in services.up(home, wanted, timeout_s=240)}
    finally:
        services.down(home)


def test_dagster_shows_the_materialised_graph(running: dict[str, services.Running], browser: ModuleType) -> None:
    address = running["dagster-webserver"].address
    with browser.browser_page() as page:
        page.goto(browser.lineage_url(address))
        for name in ASSETS.split():
            page.get_by_text(name, exact=True).first.wait_for(timeout=TIMEOUT_MS)
        # The list holds only the rows that the window has room for.
        page.set_viewport_size({"width": 1600, "height": 4000})
        page.goto(f"{address}/assets")
        page.get_by_text("sequences", exact=True).first.wait_for(timeout=TIMEOUT_MS)
        page.get_by_text("Materialized", exact=True).nth(9).wait_for(timeout=TIMEOUT_MS)
        assert "Failed" not in page.inner_text("body")


def test_mlflow_shows_the_runs_and_the_champions(running: dict[str, services.Running], browser: ModuleType) -> None:
    address = running["mlflow"].address
    with browser.browser_page() as page:
        page.goto(browser.runs_url(address, "simulated"))
        for name in ("retrieval-tiny-", "ranking-tiny-", "hr_at_10"):
            page.get_by_text(name).first.wait_for(timeout=TIMEOUT_MS)
        page.goto(browser.models_url(address))
        for name in ("simulated-retrieval", "simulated-ranking"):
            page.get_by_text(name, exact=True).first.wait_for(timeout=TIMEOUT_MS)
        page.get_by_text("champion").nth(1).wait_for(timeout=TIMEOUT_MS)
        assert page.get_by_text("champion").count() == 2


def test_the_model_server_that_up_started_answers_a_known_user(
    running: dict[str, services.Running], home: Path
) -> None:
    from gr_platform.commands.query import Asker
    from gr_platform.commands.status import report

    assert "model-server" in running
    assert any("serves data set simulated" in line for line in report(home))
    with Asker(home) as asker:
        user = asker.dataset.user_ids[0]
        first, again = asker.recommend(user, 10), asker.recommend(user, 10)
        assert [line.item for line in first.lines] == [line.item for line in again.lines]
        assert len({line.item for line in first.lines}) == 10
        assert all(0 < p < 1 for line in first.lines for p in line.scores.values())
        assert again.cached_tokens > first.cached_tokens
        scored = asker.score(user, [str(line.item) for line in first.lines[:3]] + ["999999999"])
        for line, other in zip(first.lines[:3], scored.lines[:3], strict=True):
            assert line.scores == pytest.approx(other.scores, rel=1e-4)
        assert scored.lines[-1].title == "(not in the catalogue)"


def test_a_stage_started_by_a_click_succeeds_beside_the_running_server(
    running: dict[str, services.Running], browser: ModuleType, home: Path
) -> None:
    from gr_platform.commands.query import Asker

    address = running["dagster-webserver"].address
    with Asker(home) as asker, browser.browser_page() as page:
        user = asker.dataset.user_ids[1]
        asker.recommend(user, 3)
        page.goto(f"{address}/assets/deployment")
        page.get_by_role("button", name="Materialize").first.click(timeout=TIMEOUT_MS)
        page.get_by_text("Launched run").first.wait_for(timeout=TIMEOUT_MS)
        page.goto(f"{address}/runs")
        # The run of the fixture is the other one.
        page.get_by_text("Success", exact=True).nth(1).wait_for(timeout=TIMEOUT_MS)
        # The pair that served is champion already, so its cache is kept.
        assert asker.recommend(user, 3).cached_tokens > 0


def test_down_stops_exactly_these(running: dict[str, services.Running], home: Path) -> None:
    assert set(services.down(home)) == set(running)
    assert services.running_services(home) == []
    assert not services.answers(f"{running['mlflow'].address}/health")
    assert not (home / "serving" / "server.json").exists()

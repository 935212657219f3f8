"""The two UIs in a real browser, as a person uses them on a platform that has lived through days: one model was
promoted, the next one refused."""

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gr_platform.commands import browser, services
from gr_platform.lifecycle.options import LifecycleOptions
from gr_platform.registry import tracking

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "there is a browser"),
]
DS = "simulated"
ASSETS = (
    *("events", "item_vocabulary", "data_card", "sequences", "retrieval_model", "ranking_model", "evaluation"),
    *("registration", "bundle", "judgement", "deployment", "served"),
)
TIMEOUT_MS = 120_000
# A run in which every stage finds its result takes 15 s where nothing else works.
RUN_MS = 300_000


@pytest.fixture(scope="module")
def home(replayed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the replayed platform that runs started in the UI may change."""
    return Path(shutil.copytree(replayed / "home", tmp_path_factory.mktemp("ui") / "home", symlinks=True))


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[dict[str, services.Running]]:
    """Everything `gr up` starts, on free ports, stopped afterwards."""
    probes = [socket.socket() for _ in range(6)]
    for probe in probes:
        probe.bind((services.HOST, 0))
    dagster, mlflow, http, grpc, metrics, figures = (probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    ports = services.Ports(
        dagster=dagster, mlflow=mlflow, http=http, grpc=grpc, metrics=metrics, platform_metrics=figures
    )
    wanted = services.platform_services(home, home / "dagster_home", ports)
    with pytest.MonkeyPatch.context() as patch:
        # One thread: two that wait for each other stand still when other programs use the cores.
        patch.setenv("GR_THREADS", "1")
        patch.setenv("GR_DEVICE", "cpu")
        try:
            yield {service.name: service for service in services.up(home, wanted, timeout_s=240)}
        finally:
            services.down(home)


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of the browser."""
    with browser.browser_page() as opened:
        opened.set_default_timeout(TIMEOUT_MS)
        yield opened


@pytest.fixture
def dagster(running: dict[str, services.Running]) -> str:
    """The address of Dagster's UI."""
    return running["dagster-webserver"].address


@pytest.fixture
def mlflow(running: dict[str, services.Running]) -> str:
    """The address of MLflow's UI."""
    return running["mlflow"].address


def succeeds(page: Any) -> None:
    """Wait for the run that a click has launched."""
    launched, confirm = page.get_by_text("Launched run"), page.get_by_role("button", name="Confirm")
    launched.or_(confirm).first.wait_for()
    if confirm.is_visible():
        # Asked where an asset upstream was never materialised: the inbox of a platform that `gr import` feeds.
        confirm.click()
    launched.first.wait_for()
    page.get_by_text("View", exact=True).first.click()
    ended = page.get_by_text(re.compile("^(Success|Failure|Canceled)$")).first
    ended.wait_for(timeout=RUN_MS)
    assert ended.inner_text() == "Success"


def test_dagster_shows_the_materialised_graph(dagster: str, page: Any) -> None:
    page.goto(browser.lineage_url(dagster))
    for name in ASSETS:
        page.get_by_text(name, exact=True).first.wait_for()
    # The list holds only the rows that the window has room for.
    page.set_viewport_size({"width": 1600, "height": 4000})
    page.goto(f"{dagster}/assets")
    page.get_by_text("sequences", exact=True).first.wait_for()
    page.get_by_text("Materialized", exact=True).nth(len(ASSETS) - 1).wait_for()
    assert "Failed" not in page.inner_text("body")


def test_the_check_of_the_refused_challenger_says_why(dagster: str, page: Any) -> None:
    page.goto(browser.checks_url(dagster, "judgement", "gates"))
    page.get_by_text("Failed", exact=True).first.wait_for()
    page.get_by_text(re.compile("window: one item holds .* of the window's events")).first.wait_for()
    page.get_by_text("[Show Markdown]").click()
    gates = page.get_by_role("table").filter(has_text="why")
    closed = gates.get_by_role("row").filter(has_text="CLOSED")
    closed.filter(has_text="window").wait_for()
    assert gates.get_by_role("row").count() > closed.count() + 5


def test_what_runs_by_itself_is_listed_and_switched_on(dagster: str, page: Any) -> None:
    from assets import automation, cleaning, sensors, shadow

    # Not of the code location that this process has loaded: it may be another state folder's.
    chosen = LifecycleOptions()
    schedules = [*automation.schedules(chosen), *cleaning.schedules(chosen)]
    names = [each.name for each in (*schedules, *sensors.sensors, shadow.shadow)]
    assert len(names) == 11
    page.goto(f"{dagster}/automation")
    for name in names:
        page.get_by_text(name, exact=True).first.wait_for()
    switched_on = page.get_by_role("checkbox", checked=True)
    switched_on.nth(len(names) - 1).wait_for(state="attached")
    assert switched_on.count() == len(names)


def test_a_retraining_stands_in_mlflow_with_its_models_under_it_and_two_of_them_compare(
    mlflow: str, home: Path, page: Any
) -> None:
    client = tracking.connect(home)
    runs = client.search_runs([tracking.experiment_id(client, home, DS)], order_by=["start_time DESC"])
    parents = [run for run in runs if tracking.PARENT not in run.data.tags][:2]
    page.goto(browser.runs_url(mlflow, DS, "TABLE"))
    chosen = []
    for parent in parents:
        children = [run for run in runs if run.data.tags.get(tracking.PARENT) == parent.info.run_id]
        row(page, parent.info.run_name).get_by_role("button").first.click()
        for child in children:
            row(page, child.info.run_name).wait_for()
        chosen += [child for child in children if child.data.tags["gr.kind"] == "retrieval"]
    assert len(chosen) == 2
    for run in chosen:
        row(page, run.info.run_name).get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    # The first of the metrics: the page draws only those that are in sight.
    metric = min(chosen[0].data.metrics)
    page.get_by_text(metric, exact=True).first.scroll_into_view_if_needed()
    for run in chosen:
        page.get_by_text(run.info.run_name).first.wait_for()
        page.get_by_text(f"{round(run.data.metrics[metric], 3):g}", exact=True).first.wait_for()


def row(page: Any, text: str) -> Any:
    """Return the first row that holds a text."""
    return page.get_by_role("row").filter(has_text=text).first


def test_mlflow_shows_who_serves_who_did_and_who_was_refused(mlflow: str, page: Any) -> None:
    for kind in ("retrieval", "ranking"):
        page.goto(browser.models_url(mlflow))
        page.get_by_text(f"{DS}-{kind}", exact=True).first.click()
        for version, alias in (("3", "challenger"), ("2", "champion"), ("1", "previous")):
            of_version = page.get_by_role("row").filter(has_text=f"Version {version}")
            of_version.filter(has_text=re.compile(rf"@\s*{alias}")).wait_for()
        row(page, "Version 3").filter(has_text=re.compile(r"gr\.refused\s*: window: one item holds")).wait_for()


def test_the_model_server_that_up_started_answers_a_known_user(
    running: dict[str, services.Running], home: Path
) -> None:
    from gr_platform.commands.query import Asker
    from gr_platform.commands.status import report

    assert {"model-server", services.PLATFORM_METRICS} <= set(running)
    assert services.answers(running[services.PLATFORM_METRICS].address)
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


@pytest.mark.parametrize(
    ("address", "button"),
    [("assets/deployment", "Materialize"), ("locations/gr_platform.definitions/jobs/retraining", "Materialize all")],
    ids=["stage", "graph"],
)
def test_what_a_click_starts_succeeds_beside_the_running_server(
    dagster: str, page: Any, home: Path, address: str, button: str
) -> None:
    from gr_platform.commands.query import Asker

    with Asker(home) as asker:
        user = asker.dataset.user_ids[1]
        asker.recommend(user, 3)
        page.goto(f"{dagster}/{address}")
        page.get_by_role("button", name=button).first.click()
        succeeds(page)
        # Nothing was new and the challenger is refused again, so the pair that served serves on, its cache kept.
        assert asker.recommend(user, 3).cached_tokens > 0
    page.goto(browser.checks_url(dagster, "judgement", "gates"))
    page.get_by_text("Failed", exact=True).first.wait_for()


def test_the_daemon_asks_for_nothing_where_nothing_has_changed(dagster: str, page: Any) -> None:
    page.goto(f"{dagster}/runs")
    page.get_by_text("Success", exact=True).nth(4).wait_for()
    said = page.inner_text("body")
    assert "deploying" not in said
    assert "landing_day" not in said


def test_down_stops_exactly_these(running: dict[str, services.Running], home: Path) -> None:
    assert set(services.down(home)) == set(running)
    assert services.running_services(home) == []
    assert not services.answers(f"{running['mlflow'].address}/health")
    assert not (home / "serving" / "server.json").exists()

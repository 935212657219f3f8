"""What `gr bench lifecycle` concludes from a replay and the commands after it, each of which is stood in for here."""

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from gr_platform.commands import bench as benches
from gr_platform.errors import UserError
from gr_platform.registry.versions import Version
from gr_platform.replay import bench, report
from serving import server

NAMES = ["replay of 7 days of the default stream", "promotion to serving", "rollback", "code location load"]


def pair(number):
    return {
        kind: Version(name=kind, version=number, run_id="", aliases=(), tags={}) for kind in ("retrieval", "ranking")
    }


def day(outcome, deploy_s=None):
    return {"outcome": outcome, "deploy_s": deploy_s}


@pytest.fixture
def platform(tmp_path, monkeypatch):
    """A platform on which everything takes no time, but what its fields say."""
    said = SimpleNamespace(
        seconds=500.0,
        days=[day("promoted", 4.0), day("refused"), day("promoted", 9.0), *(day("promoted", 5.0) for _ in range(4))],
        total={"requests": 100, "answered": 100},
        staleness={"num_stale": 0, "num_probes": 20},
        previous=pair("6"),
        promoted=SimpleNamespace(outcome="promoted", server_loaded=True, sentence="promoted"),
        calls=[],
        folders=[],
    )

    def replay(folder, options, listener):
        said.folders.append(folder)
        said.options = options
        (folder / "home").mkdir(parents=True)
        listener.day(None)
        facts = {"dataset": "simulated", "seconds": said.seconds, "days": said.days}
        facts |= {"load": {"total": said.total}, "staleness": said.staleness}
        (folder / report.FACTS).write_text(json.dumps(facts))

    def run(command, **keywords):
        said.calls.append(command[-1] if command[1] == "-c" else command[3])
        assert keywords["env"]["GR_HOME"].startswith(str(tmp_path))
        return SimpleNamespace(returncode=0, stdout="\n", stderr="")

    monkeypatch.setenv("GR_HOME", str(tmp_path))
    monkeypatch.setattr(bench.replaying, "replay", replay)
    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench.promotion, "champions", lambda home, ds: pair("7"))
    monkeypatch.setattr(bench.promotion, "previous", lambda home, ds: said.previous)
    monkeypatch.setattr(bench.promotion, "contest", lambda home, ds: None)
    monkeypatch.setattr(bench.judgement, "judge", lambda home, ds, found: said.calls.append("judge"))
    monkeypatch.setattr(bench.versions, "move_alias", lambda home, v, alias: said.calls.append(f"{alias} {v.version}"))
    monkeypatch.setattr(bench.release, "release", lambda home, ds, force: said.calls.append("release") or said.promoted)
    monkeypatch.setattr(server, "EmbeddedServer", lambda home: nullcontext())
    monkeypatch.setattr(bench.browser, "missing", lambda: "Chromium is not installed")
    return said


def rows(**sizes):
    found = [row | {"ok": benches.reaches_target(row)} for row in bench.run(1, **sizes)]
    return {row["name"]: row for row in found}


def test_a_week_in_time_reaches_every_target_and_leaves_nothing(platform, tmp_path):
    found = rows()
    assert [name for name in found if found[name]["ok"]] == [NAMES[0], "failed and stale answers meanwhile", *NAMES[1:]]
    assert found[NAMES[0]]["value"] == 500.0
    assert found["promotion to serving"]["value"] == 9.0
    assert platform.options.stream.faults == {4: "poisoned"}
    assert platform.calls[:5] == ["rollback", "challenger 7", "challenger 7", "judge", "release"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("seconds", 601.0, NAMES[0]),
        ("total", {"requests": 100, "answered": 99}, "failed and stale answers meanwhile"),
        ("staleness", {"num_stale": 1, "num_probes": 20}, "failed and stale answers meanwhile"),
        ("days", [day("promoted", 15.5)] * 7, "promotion to serving"),
    ],
)
def test_what_is_too_slow_or_lost_misses_its_target(platform, field, value, name):
    setattr(platform, field, value)
    assert [row for row, each in rows().items() if each["ok"] is False] == [name]


def test_a_smaller_replay_has_no_target_of_its_own(platform):
    platform.days = [day("refused"), day("promoted", 3.0)]
    found = rows(days=2, num_events=20_000)
    assert found["replay of 2 days of 20,000 events"]["ok"] is None
    assert found["promotion to serving"]["ok"]


def test_a_week_without_a_promotion_is_missed_with_a_reason(platform):
    platform.previous = {}
    found = rows()
    assert [found[name]["ok"] for name in NAMES[1:3]] == [False, False]
    assert "nothing to go back to" in found["rollback"]["against"]


def test_without_chromium_the_page_is_not_measured_and_fails_nothing(platform):
    row = rows()["lineage page"]
    assert (row["value"], row["ok"]) == (None, None)
    assert "Chromium is not installed" in row["against"]


def test_a_code_location_that_loads_torch_misses_whatever_time_it_takes(platform, monkeypatch):
    heavy = SimpleNamespace(returncode=0, stdout="torch\n", stderr="")
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: heavy)
    row = rows()["code location load"]
    assert row["ok"] is False
    assert row["against"] == "it imports torch"


def test_a_rollback_that_fails_or_a_promotion_that_is_not_one_ends_the_benchmark_with_the_reason(platform, monkeypatch):
    platform.promoted = SimpleNamespace(outcome="refused", server_loaded=True, sentence="challenger refused: parity")
    with pytest.raises(UserError, match="challenger refused: parity"):
        bench.run(1)
    failed = SimpleNamespace(returncode=1, stdout="", stderr="the server is gone\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(UserError, match=r"gr rollback .* the server is gone"):
        bench.run(1)


def test_the_page_counts_once_every_asset_is_on_it(platform, monkeypatch, tmp_path):
    waited = []

    class Page:
        first = property(lambda self: self)

        def goto(self, address):
            waited.append(address)

        def get_by_text(self, text, *, exact):
            waited.append(text)
            return self

        def wait_for(self, *, timeout):
            pass

    @contextmanager
    def webserver(home):
        yield "http://here"

    monkeypatch.setattr(bench.browser, "missing", lambda: "")
    monkeypatch.setattr(bench.browser, "browser_page", lambda: nullcontext(Page()))
    monkeypatch.setattr(bench, "_webserver", webserver)
    assert rows()["lineage page"]["ok"]
    assert len(waited) == (1 + bench.REPEATS) * (1 + len(bench.ASSETS))
    assert waited[0].startswith("http://here/asset-groups")


def test_the_assets_of_the_page_are_those_of_its_three_groups():
    from gr_platform.definitions import defs

    nodes = defs.resolve_asset_graph().asset_nodes
    assert set(bench.ASSETS) == {node.key.to_user_string() for node in nodes if node.group_name in bench.browser.GROUPS}

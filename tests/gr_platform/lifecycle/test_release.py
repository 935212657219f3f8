"""From judged challengers to the served pair and back: whatever breaks on the way, what served before serves on."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import agreement, measures, release
from gr_platform.lifecycle.folders import bundle_of
from gr_platform.registry import card_facts, promotion, tracking, versions
from tests.gr_platform.lifecycle.spoiling import DS, nan, pair_of, spoiled, weights


class Killed(BaseException):
    """Stands for SIGKILL: nothing but its raiser's caller may come after it."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged here costs what it may, and nobody reads the cards."""
    monkeypatch.setattr(measures, "NUM_TURNS", 1)
    monkeypatch.setattr(card_facts, "try_record", lambda *_, **__: None)


@pytest.fixture
def home(replayed: Path, tmp_path: Path) -> Path:
    """A copy of the replay's platform: version 2 serves, 1 did before, 3 was refused."""
    home = tmp_path / "home"
    shutil.copytree(replayed / "home", home, symlinks=True)
    return home


def roles(home: Path) -> dict[str, str]:
    """Return alias -> the version that both models have of it; mixed pairs are `2/1`."""
    found = {}
    for alias in (versions.CHAMPION, versions.PREVIOUS, versions.CHALLENGER):
        held = [versions.by_alias(home, DS, kind, alias) for kind in versions.KINDS]
        numbers = {each.version if each else "-" for each in held}
        found[alias] = numbers.pop() if len(numbers) == 1 else "/".join(each.version if each else "-" for each in held)
    return found


def served(home: Path) -> str:
    """Return the version of the pair that the model repository holds."""
    link = storage.read_manifest(home / "model_repository").spec
    for number in range(1, 9):
        pair = pair_of(home, str(number))
        digests = {
            kind: storage.read_manifest(bundle_of(home, DS, kind, version)).digest for kind, version in pair.items()
        }
        if all(link[kind] == digest for kind, digest in digests.items()):
            return str(number)
    raise AssertionError("the repository holds no pair of one version")


def test_a_refused_challenger_leaves_everything_as_it_was(home: Path) -> None:
    done = release.release(home, DS)
    assert done.outcome == "refused"
    assert any(reason.startswith("window: ") for reason in done.reasons)
    assert roles(home) == {"champion": "2", "previous": "1", "challenger": "3"}
    assert served(home) == "2"


def test_whoever_insists_promotes_it_and_one_call_brings_the_pair_before_back(home: Path) -> None:
    assert release.release(home, DS, force=True).outcome == "promoted"
    assert roles(home) == {"champion": "3", "previous": "2", "challenger": "-"}
    assert served(home) == "3"
    champion = promotion.champions(home, DS)["ranking"]
    assert "window: " in champion.tags[promotion.FORCED]
    began = time.monotonic()
    done = release.rollback(home, DS)
    assert time.monotonic() - began < 10
    assert (done.outcome, done.server_loaded) == ("rolled back", False)
    assert roles(home) == {"champion": "2", "previous": "3", "challenger": "-"}
    assert served(home) == "2"
    # The next retraining without new data registers the same models again: they are not promoted by themselves.
    for version in promotion.previous(home, DS).values():
        versions.move_alias(home, version, versions.CHALLENGER)
    done = release.release(home, DS)
    assert any(reason.startswith("taken_back: ") for reason in done.reasons)
    assert (done.outcome, served(home)) == ("refused", "2")
    assert release.release(home, DS, force=True).outcome == "promoted"
    assert (roles(home)["champion"], served(home)) == ("3", "3")
    assert not {promotion.ROLLED_BACK, promotion.REASONS} & set(promotion.champions(home, DS)["ranking"].tags)


def test_nobody_can_promote_a_model_whose_scores_are_no_numbers_or_not_its_own(home: Path) -> None:
    for name, changes in (
        ("nan", {"run": weights(nan)}),
        ("other", {"bundle": lambda folder: _other_vectors(folder)}),
    ):
        sound = pair_of(home, "3")
        broken = spoiled(home, {"retrieval": sound["retrieval"]}, name, **changes)
        versions.move_alias(home, broken["retrieval"], versions.CHALLENGER)
        done = release.release(home, DS, force=True)
        assert done.outcome == "refused"
        assert roles(home)["champion"] == served(home) == "2"
        refused = versions.by_alias(home, DS, "retrieval", versions.CHALLENGER)
        assert refused is not None
        gate = "finite" if name == "nan" else "parity"
        assert f"{gate}: " in refused.tags[promotion.REASONS]


def _other_vectors(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    vectors = load_file(folder / "item_vectors.safetensors")["item_vectors"]
    save_file({"item_vectors": -vectors}, folder / "item_vectors.safetensors")


def test_a_first_pair_that_may_not_serve_is_an_error_and_serves_nowhere(home: Path) -> None:
    for kind, version in pair_of(home, "2").items():
        for alias in (versions.CHAMPION, versions.PREVIOUS):
            versions.drop_alias(home, version, alias)
        assert versions.by_alias(home, DS, kind, versions.CHAMPION) is None
    (home / "model_repository").unlink()
    with pytest.raises(UserError, match="no models of simulated may serve yet: window: one item holds"):
        release.release(home, DS)
    assert promotion.champions(home, DS) == {}
    assert not (home / "model_repository").exists()
    with pytest.raises(UserError, match="no pair of simulated is champion yet"):
        release.reconcile(home, DS)


def test_what_was_moved_by_hand_in_mlflow_is_served(home: Path) -> None:
    assert agreement.difference(home) is None
    for version in pair_of(home, "1").values():
        tracking.connect(home).set_registered_model_alias(version.name, versions.CHAMPION, version.version)
    found = agreement.difference(home)
    assert found is not None
    assert "champion is simulated-retrieval 1 and simulated-ranking 1" in found.text
    assert release.reconcile(home, DS).outcome == "already champion"
    assert served(home) == "1"
    assert agreement.difference(home) is None


def test_a_version_that_was_rolled_back_serves_if_it_is_made_champion_by_hand(home: Path) -> None:
    release.rollback(home, DS)
    assert served(home) == "1"
    for version in pair_of(home, "2").values():
        versions.move_alias(home, version, versions.CHAMPION)
    release.reconcile(home, DS)
    assert (roles(home)["champion"], served(home)) == ("2", "2")


def test_a_half_moved_pair_is_not_served(home: Path) -> None:
    versions.move_alias(home, pair_of(home, "1")["ranking"], versions.CHAMPION)
    with pytest.raises(UserError, match="have different vocabularies; train both models again"):
        release.reconcile(home, DS)
    assert served(home) == "2"


def test_a_pair_of_which_one_model_is_new_goes_back_as_it_was(home: Path) -> None:
    for version in pair_of(home, "3").values():
        versions.drop_alias(home, version, versions.CHALLENGER)
    alone = spoiled(home, {"ranking": pair_of(home, "2")["ranking"]}, "alone")
    versions.move_alias(home, alone["ranking"], versions.CHALLENGER)
    number = alone["ranking"].version
    found = promotion.contest(home, DS)
    promotion.refuse(home, found.pair, ["quality: none"])
    assert promotion.REASONS not in promotion.champions(home, DS)["retrieval"].tags
    assert release.release(home, DS, force=True).outcome == "promoted"
    assert (roles(home)["champion"], roles(home)["previous"]) == (f"2/{number}", "2")
    release.rollback(home, DS)
    assert roles(home) == {"champion": "2", "previous": f"2/{number}", "challenger": "-"}
    assert served(home) == "2"


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object], int], bool]:
    """Return run(act, n): do it, but die before the registry is written once more than n times; whether it died."""
    from mlflow import MlflowClient

    names = (
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "set_model_version_tag",
        "delete_model_version_tag",
    )

    def run(act: Callable[[], object], most: int) -> bool:
        count = 0

        def counted(real: Callable[..., None]) -> Callable[..., None]:
            def write(*args: object, **named: object) -> None:
                nonlocal count
                if count == most:
                    raise Killed
                count += 1
                real(*args, **named)

            return write

        with monkeypatch.context() as patched:
            for name in names:
                patched.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
            try:
                act()
            except Killed:
                return True
        return False

    return run


def _each_death(home: Path, run: Callable[[Callable[[], object], int], bool], act: Callable[[], object]) -> int:
    """Do `act` dying at each place, look at the sensor's answer to it; return how many places there are."""
    registry, link = (home / "mlflow.db").read_bytes(), (home / "model_repository").readlink()
    places = 0
    while True:
        (home / "mlflow.db").write_bytes(registry)
        (home / "model_repository").unlink()
        (home / "model_repository").symlink_to(link)
        if not run(act, places):
            return places
        found = release.reconcile(home, DS)
        champion = roles(home)["champion"]
        assert {v.version for v in found.champions.values()} == {champion} == {served(home)}, (places, roles(home))
        assert champion in ("1", "2", "3")
        assert agreement.difference(home) is None
        act()
        places += 1


def test_a_promotion_killed_at_any_write_leaves_a_whole_pair_and_is_finished_by_the_next(
    home: Path, killed_after: Callable[[Callable[[], object], int], bool]
) -> None:
    release.release(home, DS)

    def promote() -> None:
        release.release(home, DS, force=True)

    def checked() -> None:
        promote()
        assert (roles(home), served(home)) == ({"champion": "3", "previous": "2", "challenger": "-"}, "3")
        for version in promotion.champions(home, DS).values():
            assert not {promotion.PROMOTING, promotion.REASONS} & set(version.tags)

    assert _each_death(home, killed_after, checked) >= 10


def test_a_rollback_killed_at_any_write_leaves_a_whole_pair_and_is_finished_by_the_next(
    home: Path, killed_after: Callable[[Callable[[], object], int], bool]
) -> None:
    def back() -> None:
        # What was finished by somebody else is not rolled back again.
        if roles(home)["champion"] == "2":
            release.rollback(home, DS)
        assert (roles(home), served(home)) == ({"champion": "1", "previous": "2", "challenger": "3"}, "1")
        for version in promotion.previous(home, DS).values():
            assert promotion.ROLLED_BACK in version.tags

    assert _each_death(home, killed_after, back) >= 10


def test_a_rollback_killed_between_server_and_aliases_is_finished_by_the_next_deployment(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(promotion, "take_back", killed)
        with pytest.raises(Killed):
            release.rollback(home, DS)
    assert (roles(home)["champion"], served(home)) == ("2", "1")
    done = release.release(home, DS)
    assert done.outcome == "refused"
    assert roles(home) == {"champion": "1", "previous": "2", "challenger": "3"}
    assert served(home) == "1"


def test_without_the_bundle_of_the_pair_before_nothing_is_rolled_back(home: Path) -> None:
    link = (home / "model_repository").readlink()
    shutil.rmtree(bundle_of(home, DS, "ranking", pair_of(home, "1")["ranking"]))
    with pytest.raises(UserError, match="simulated-ranking version 1 has no bundle"):
        release.rollback(home, DS)
    assert roles(home) == {"champion": "2", "previous": "1", "challenger": "3"}
    assert (home / "model_repository").readlink() == link
    assert not any(promotion.is_retreating(version) for version in promotion.champions(home, DS).values())

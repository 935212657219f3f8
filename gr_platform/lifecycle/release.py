"""From a judged challenger to the served pair, and back: model repository, running server, aliases, in that order.

Invariant: aliases move last, so `champion` never names a pair that the server refused to load; a server that is started
later, or was gone meanwhile, is brought to what the alias names by `reconcile`.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, cast

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import options
from gr_platform.lifecycle.folders import bundle_of
from gr_platform.models.config import Kind
from gr_platform.registry import promotion, retrainings
from gr_platform.registry.promotion import Pair
from gr_platform.registry.versions import Version

log = logging.getLogger(__name__)
P = ParamSpec("P")

# Aliases are read, the server is swapped, aliases are moved: nobody else may do so in between.
LOCK, WAIT_S = "release", 600.0
Outcome = Literal["promoted", "already champion", "refused", "in the shadow", "rolled back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What serves now and why. digest names the pair of bundles; server_loaded is False where no server runs."""

    outcome: Outcome
    reasons: tuple[str, ...]
    champions: Mapping[Kind, Version]
    digest: str
    server_loaded: bool

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        if self.outcome == "refused":
            return f"challenger refused: {'; '.join(self.reasons)}"
        return self.outcome


def _alone(act: Callable[P, Release]) -> Callable[P, Release]:
    """Return the act, done by one program at a time in a state folder, its first argument."""

    @functools.wraps(act)
    def alone(*args: P.args, **named: P.kwargs) -> Release:
        with storage.exclusive(cast(Path, args[0]), LOCK, wait_s=WAIT_S):
            return act(*args, **named)

    return alone


@_alone
def release(home: Path, ds: str, *, force: bool = False) -> Release:
    """Judge the data set's challengers and let the pair serve that may: the passing one, else the champions.

    A challenger that passes all but the gate on live requests is loaded beside the champions, as their shadow. force:
    promote it whatever the gates say, but for scores that are not the model's. Raises UserError if no pair may serve,
    or the server refuses the new one: then what served before goes on and the aliases stay.
    """
    # Not at the top: whoever rolls back need not wait for torch.
    from gr_platform.lifecycle import judgement
    from gr_platform.registry import card_facts

    finish_interrupted(home, ds)
    found = promotion.contest(home, ds)
    if not found.is_new:
        return _serve(home, ds, found.reigning, "already champion")
    judged = judgement.judge(home, ds, found).manifest.facts
    reasons = judgement.reasons(judged)
    if not reasons or (force and not _broken(judged)):
        done = _serve(home, ds, found.pair, "promoted")
        promotion.crown(home, found, against="; ".join(reasons))
        card_facts.try_record(home, ds, judged, outcome="promoted")
        return replace(done, champions=promotion.champions(home, ds))
    if not found.reigning:
        promotion.refuse(home, found.pair, reasons)
        raise UserError(f"no models of {ds} may serve yet: {'; '.join(reasons)}; train on more data or longer")
    if _waits_for_requests(judged):
        return _serve(home, ds, found.reigning, "in the shadow", reasons, shadow=found.pair["ranking"])
    promotion.refuse(home, found.pair, reasons)
    return _serve(home, ds, found.reigning, "refused", reasons)


@_alone
def rollback(home: Path, ds: str) -> Release:
    """Let the pair serve again that served before the champions.

    Raises UserError if there is none, or a bundle is gone. Killed at any place, it is finished by the next call, or by
    the next deployment.
    """
    _finish_promotion(home, ds)
    reigning, before = promotion.retreat(home, ds)
    for kind, version in before.items():
        bundle_of(home, ds, kind, version)
    promotion.mark_taken_back(home, reigning, before)
    done = _serve(home, ds, before, "rolled back")
    promotion.take_back(home, reigning, before)
    retrainings.log_outcome(home, reigning.values(), "rolled back")
    return replace(done, champions=promotion.champions(home, ds))


def finish_interrupted(home: Path, ds: str) -> None:
    """Finish a promotion or rollback that was killed between two of its aliases, if there is one."""
    _finish_promotion(home, ds)
    if any(promotion.is_retreating(version) for version in promotion.champions(home, ds).values()):
        log.warning("event=rollback_finished dataset=%s", ds)
        rollback(home, ds)


def _finish_promotion(home: Path, ds: str) -> None:
    if half := promotion.interrupted(home, ds):
        log.warning("event=promotion_finished dataset=%s", ds)
        promotion.crown(home, half)


@_alone
def reconcile(home: Path, ds: str) -> Release:
    """Bring repository and server to the champions that the aliases name. Raises UserError if there are none."""
    finish_interrupted(home, ds)
    champions = promotion.champions(home, ds)
    if not champions:
        raise UserError(f"no pair of {ds} is champion yet; run gr materialize or gr promote first")
    return _serve(home, ds, champions, "already champion")


def _serve(
    home: Path,
    ds: str,
    pair: Pair,
    outcome: Outcome,
    reasons: list[str] | None = None,
    *,
    shadow: Version | None = None,
) -> Release:
    from serving import options as serving_options
    from serving import swap

    chosen = serving_options.read(home)
    folders = {kind: bundle_of(home, ds, kind, version) for kind, version in pair.items()}
    beside = None
    if shadow is not None:
        beside = bundle_of(home, ds, "ranking", shadow)
        chosen = replace(chosen, shadow_share=options.read(home).shadow.share)
    loaded = swap.deploy(home, folders["retrieval"], folders["ranking"], chosen, shadow=beside)
    log.info("event=deployed dataset=%s outcome=%r loaded=%s", ds, outcome, loaded)
    return Release(
        outcome=outcome,
        reasons=tuple(reasons or ()),
        champions=pair,
        digest=storage.digest_of({kind: storage.read_manifest(folder).digest for kind, folder in folders.items()}),
        server_loaded=loaded,
    )


def _broken(judged: Mapping[str, Any]) -> bool:
    """Return whether a judged pair's scores are not to be trusted at all, which nobody can promote."""
    return any(gate["gate"] in ("finite", "parity") and not gate["ok"] for gate in judged["gates"])


def _waits_for_requests(judged: Mapping[str, Any]) -> bool:
    """Return whether all that is missing is that the challenger scores live requests."""
    from gr_platform.lifecycle.gates import LIVE

    return [gate["gate"] for gate in judged["gates"] if not gate["ok"]] == [LIVE]

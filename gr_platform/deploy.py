"""From registered challengers to a serving pair: gate, model repository, running server, aliases, in that order.

Invariant: aliases move last, so `champion` never names a pair that the server refused to load.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.models.config import Kind
from gr_platform.registry import promotion
from gr_platform.registry.versions import Version

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What serves now and why. `digest` names the pair of bundles; `server_loaded` is False where no server runs."""

    promoted: bool
    reasons: tuple[str, ...]
    champions: Mapping[Kind, Version]
    digest: str
    server_loaded: bool

    @property
    def outcome(self) -> str:
        """What the gate decided, in words."""
        if self.reasons:
            return f"challenger refused: {'; '.join(self.reasons)}"
        return "promoted" if self.promoted else "already champion"


def deploy(home: Path, ds: str) -> Deployment:
    """Judge the data set's challengers and put the pair that may serve into the model repository.

    A running server loads it at once. Raises UserError if no pair may serve, or the server refuses the new one: then
    what served before goes on and the aliases stay.
    """
    from gr_platform.bundle.load import load
    from gr_platform.bundle.verify import parity
    from serving import options, swap

    contenders = promotion.contenders(home, ds)
    parity_ok = {kind: parity(load(bundle_of(home, ds, kind, v))).ok for kind, v in contenders.items()}
    verdict = promotion.judge(home, ds, parity_ok)
    folders = {kind: bundle_of(home, ds, kind, version) for kind, version in verdict.serving.items()}
    if folders:
        chosen = options.read(home)
        # A challenger that may not serve is what a shadow is for: what it says of live requests is logged.
        # One that fails its golden requests would not load, and the pair with it.
        refused = verdict.reasons and contenders.get("ranking") != verdict.serving.get("ranking")
        shadow = (
            bundle_of(home, ds, "ranking", contenders["ranking"])
            if refused and parity_ok["ranking"] and chosen.shadow_share
            else None
        )
        loaded = swap.deploy(home, folders["retrieval"], folders["ranking"], chosen, shadow=shadow)
    promotion.settle(home, verdict)
    if not folders:
        raise UserError(f"no models of {ds} may serve yet: {'; '.join(verdict.reasons)}; train on more data or longer")
    log.info("event=deployed dataset=%s promoted=%s loaded=%s", ds, verdict.is_new and not verdict.reasons, loaded)
    return Deployment(
        promoted=verdict.is_new and not verdict.reasons,
        reasons=verdict.reasons,
        champions=promotion.champions(home, ds),
        digest=storage.digest_of({kind: storage.read_manifest(f).digest for kind, f in folders.items()}),
        server_loaded=loaded,
    )


def bundle_of(home: Path, ds: str, kind: Kind, version: Version) -> Path:
    """Return the bundle folder that was exported from a version's run: the current one if it is, else the youngest.

    A damaged bundle of another version is passed over. Raises UserError if there is none.
    """
    parent = home / "bundles" / ds
    pointer = parent / f"{kind}.current"
    current = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else ""
    folders = sorted(parent.glob(f"{kind}-*"), key=lambda each: (each.name != current, -each.stat().st_mtime))
    damaged = []
    for folder in folders:
        try:
            run = storage.read_manifest(folder).spec.get("run")
        except UserError as error:
            damaged.append(str(error))
            continue
        if run == version.run_digest:
            return folder
    why = f" ({damaged[0]})" if damaged else ""
    raise UserError(f"{version.name} version {version.version} has no bundle; run gr materialize --select bundle{why}")

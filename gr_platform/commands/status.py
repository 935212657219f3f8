"""What there is and what runs, for a person at a terminal.

Invariant: reading only; a state folder with nothing in it is a valid answer.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr_platform import storage
from gr_platform.commands import services
from gr_platform.commands.messages import pasteable, spelt_out
from gr_platform.errors import UserError
from gr_platform.lifecycle import migration, options

if TYPE_CHECKING:
    from serving.health import Health


def report(home: Path) -> Iterator[str]:
    """Yield the lines of `gr status`."""
    from gr_platform.events.landing import active_dataset

    if (home / "landing").is_dir() and migration.layout(home) < migration.LAYOUT:
        yield "made by an earlier release: gr migrate brings the state folder up to date"
    try:
        options.read(home)
    except UserError as error:
        yield f"options      {spelt_out(str(error))}"
    try:
        active = active_dataset(home)
    except UserError as error:
        yield str(error)
        yield from _running(home)
        return
    for folder in sorted(path.parent for path in (home / "landing").glob("*/dataset.toml")):
        yield from _dataset(home, folder.name, active=folder.name == active)
        yield from _unfinished(home / "runs" / folder.name)
    yield from _running(home)


def _dataset(home: Path, ds: str, *, active: bool) -> Iterator[str]:
    yield f"data set {ds}" + (" (active)" if active else "")
    try:
        facts = storage.read_manifest(storage.current(home / "sequences" / ds, "sequences")).facts
        users, items, exposures = facts["num_users"], facts["num_items"], facts["num_exposures"]
        yield f"  sequences    {users:,} users, {items:,} items, {exposures:,} exposures"
        facts = storage.read_manifest(storage.current(home / "runs" / ds, "evaluation")).facts
        yield f"  evaluation   {'; '.join(_quality(facts))}"
    except UserError as error:
        yield f"  {spelt_out(str(error))}"
        return
    yield from _versions(home, ds)


def _quality(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the main figure of each kind that was judged."""
    if "retrieval" in facts:
        yield f"HR@10 {facts['retrieval']['hr_at_10']:.4f} (popularity {facts['popularity']['hr_at_10']:.4f})"
    entropies = {task: each["ne"] for task, each in facts.get("ranking", {}).items() if each.get("ne") is not None}
    if entropies:
        yield f"NE {', '.join(f'{task} {value:.4f}' for task, value in entropies.items())}"


def _unfinished(runs: Path) -> Iterator[str]:
    from gr_platform.training.unfinished import unfinished

    for each in unfinished(runs):
        done = f"{each.phase} epoch {each.num_epochs} done" if each.num_epochs else f"in {each.phase} epoch 1"
        yield (
            f"  unfinished   {each.kind} {each.recipe}, seed {each.seed}: {done}, saved {_ago(each.age_s)} ago; "
            f"the same gr train goes on, deleting {pasteable(each.folder)} gives it up"
        )


def _ago(seconds: float) -> str:
    """Return a time in its largest whole unit."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _versions(home: Path, ds: str) -> Iterator[str]:
    from gr_platform.registry import promotion, tracking, versions

    try:
        if not tracking.exists(home):
            return
    except UserError as error:
        yield f"  {error}"
        return
    for kind in versions.KINDS:
        for version in versions.versions(home, ds, kind):
            if version.aliases:
                why = version.tags.get(promotion.REASONS)
                roles = ", ".join(version.aliases) + (f" (refused: {why})" if why else "")
                yield f"  {version.name} version {version.version}: {roles}"


def _running(home: Path) -> Iterator[str]:
    from serving.handle import attach

    server = attach(home)
    if server is None:
        yield "model server  not running"
    else:
        whose = " (external)" if server.external else ""
        yield f"model server  gRPC {server.grpc_address}, http://{server.http_address}, serves {_served(home)}{whose}"
    yield from _health(home, is_running=server is not None)
    for service in services.running_services(home):
        if service.name != services.MODEL_SERVER:
            yield f"{service.name}  {service.address or 'running'}"
    yield from _alerts(home)


def _alerts(home: Path) -> Iterator[str]:
    """Yield how many alerts the last day had, and the last of them."""
    from gr_platform.lifecycle import alerts

    since_ms = (time.time() - 86_400) * 1000
    recent = [each for each in alerts.read(home) if each.at_ms >= since_ms and each.kind != alerts.HOOK]
    if recent:
        ago = _ago(time.time() - recent[-1].at_ms / 1000)
        yield f"alerts  {len(recent)} in the last day, last {ago} ago: {recent[-1].subject}; gr alerts shows them"


def _health(home: Path, *, is_running: bool) -> Iterator[str]:
    """Yield what the supervisor last saw and did."""
    from serving import health

    seen = health.read(home)
    if seen is None or (seen.stale and not is_running and seen.state != "failed"):
        return
    if seen.stale and seen.state != "failed":
        yield f"  health       nobody has looked for {_ago(time.time() - seen.checked_at)}; run gr serve again"
        return
    yield f"  health       {seen.state}, looked at {_ago(time.time() - seen.checked_at)} ago{_acts(seen)}"
    for model, each in seen.models.items():
        if each.outcome == "answers":
            yield f"  {model}  answers in {each.milliseconds:.1f} ms"
        else:
            last = f"answered {_ago(time.time() - each.answered_at)} ago" if each.answered_at else "never answered yet"
            yield f"  {model}  {each.outcome}, {last}"


def _acts(seen: "Health") -> str:
    """Return what the supervisor had to do, as the end of a sentence."""
    if not seen.acted_at:
        return ""
    counts = f"models loaded again: {seen.num_reloads}, restarts: {seen.num_restarts}"
    return f"; {counts}, last {_ago(time.time() - seen.acted_at)} ago: {seen.reason}"


def _served(home: Path) -> str:
    from serving import repository

    folder = repository.current(home)
    if folder is None or not (folder / storage.MANIFEST).is_file():
        return "no models yet"
    return f"data set {storage.read_manifest(folder).facts['dataset']}"

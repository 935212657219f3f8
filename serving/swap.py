"""Models change in a running server: each loaded beside the old one and flipped, all judged; or all go back.

Invariant: when `deploy` ends, and after one that was killed as soon as somebody looks, the server serves the new pair
whole or the one before it whole, and the repository's link names the one that is served.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tritonclient.grpc as grpcclient

from gr_platform import processes, storage
from gr_platform.errors import UserError, sentence_for
from serving import canary, repository, verification
from serving.handle import ServerHandle, attach, last_useful_line
from serving.server import LOCK

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 120.0
CANARY_S = 5.0
# A server that is starting, or another deployment, is waited for.
WAIT_S = 300.0
# The ranker goes first: the vocabulary only grows, so a new ranker knows every item that the old retriever returns,
# while an old ranker would score the new retriever's new items as unknown. Back goes the other way round.
SWAP_ORDER = ("gr_ranker", "gr_retriever", "gr_recommender")
# Who asks whom: a caller whose callee dies waits for ever (release 24.10), so it is replaced with it.
CALLERS = {
    "gr_ranker": ("gr_recommender", "gr_user_recommender"),
    "gr_retriever": ("gr_recommender", "gr_user_recommender"),
    repository.SHADOW: ("gr_recommender", "gr_user_recommender"),
    "gr_recommender": ("gr_user_recommender",),
}
# What a replaced process gets to answer the requests that it still can.
DRAIN_S = 5.0
JOURNAL = "serving/deploying.json"


def in_swap_order(models: Iterable[str]) -> tuple[str, ...]:
    """Return models in the order in which they are loaded; those that no order is known of come last."""
    rank = {model: at for at, model in enumerate(SWAP_ORDER)}
    return tuple(sorted(models, key=lambda model: rank.get(model, len(rank))))


def deploy(
    home: Path,
    retrieval: Path,
    ranking: Path,
    options: repository.ServingOptions | None = None,
    *,
    shadow: Path | None = None,
    timeout_s: float = LOAD_TIMEOUT_S,
) -> bool:
    """Publish two bundle folders (and a challenger's) and load them if a server runs; return whether one does.

    `timeout_s` bounds each model's load. Raises UserError if a bundle is damaged, a model does not load or does not
    give the scores that its bundle promises: then the pair before it serves, and the repository names it.
    """
    with storage.exclusive(home, LOCK, wait_s=WAIT_S):
        undo_interrupted(home)
        swapped: list[str] = []
        with _all_or_nothing(home, swapped):
            published = repository.publish(home, retrieval, ranking, options, shadow=shadow)
            handle = attach(home)
            if handle is None:
                return False
            _swap(handle, published.folder, swapped, timeout_s)
        log.info("event=swapped folder=%s models=%s", published.folder.name, swapped)
        return True


def load(handle: ServerHandle, model: str, timeout_s: float) -> None:
    """Have the server load a model from the repository and flip to it. Raises UserError; the old one then serves on."""
    before = handle.stubs(model)
    with handle.connect() as client:
        try:
            client.load_model(model, headers=handle.admin_headers, client_timeout=timeout_s)
        except grpcclient.InferenceServerException as error:
            reason = _reason(error, timeout_s)
            if "DEADLINE" in (error.status() or "") and not handle.external:
                # The server would wait for it for ever, and every later load of the model with it.
                processes.kill(handle.stubs(model) - before)
            log.warning("event=load_failed model=%s reason=%r", model, reason)
            raise UserError(f"the model server did not load {model}: {reason}; what served before goes on") from None


def reload(handle: ServerHandle, model: str, timeout_s: float) -> None:
    """Replace a model's process by a new one, for whatever reason, and end the old one if it does not end by itself.

    Raises UserError if it does not answer then.
    """
    before = handle.stubs(model)
    _load_changed(handle, model, timeout_s)
    processes.wait_gone(list(before), DRAIN_S)
    processes.kill(before)


def _load_changed(handle: ServerHandle, model: str, timeout_s: float) -> None:
    model_file = handle.home / repository.LINK / model / "1" / "model.py"
    try:
        # The server takes a model with unchanged files for loaded, its process dead or not.
        os.utime(model_file)
    except OSError as error:
        log.warning("event=not_touched model=%s reason=%s", model, error.strerror)
    with handle.connect() as client:
        load(handle, model, timeout_s)
        if canary.check(client, model, CANARY_S).outcome is canary.Outcome.ANSWERS:
            return
        # A server that does not share this folder has seen no change: take the model away and bring it back.
        _unload(handle, client, model)
        load(handle, model, timeout_s)
        found = canary.check(client, model, CANARY_S)
    if found.outcome is not canary.Outcome.ANSWERS:
        raise UserError(f"{model} was loaded again but does not answer ({found.outcome})")


def undo_interrupted(home: Path) -> bool:
    """Bring back the pair that served before a deployment that was killed; return whether there was one.

    The caller holds the lock, so no deployment is under way. Raises UserError if the server does not take it back.
    """
    journal = home / JOURNAL
    try:
        before = home / storage.read_object(journal)["previous"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):
        raise UserError(f"$GR_HOME/{JOURNAL} is damaged; delete it and deploy again") from None
    log.warning("event=deployment_undone folder=%s reason=it_was_killed", before.name)
    _roll_back(home, before, ())
    journal.unlink()
    return True


@contextmanager
def _all_or_nothing(home: Path, swapped: list[str]) -> Iterator[None]:
    """Undo what the block does to repository and server unless it ends well, by this process or by a later one."""
    repository.ensure_repository(home)
    before = repository.current(home)
    assert before is not None
    storage.write_text(home / JOURNAL, json.dumps({"previous": os.readlink(home / repository.LINK)}) + "\n")
    try:
        yield
    except BaseException as error:
        log.warning("event=rolled_back folder=%s reason=%r", before.name, sentence_for(error) or type(error).__name__)
        try:
            _roll_back(home, before, swapped)
        except UserError as second:
            raise UserError(f"{sentence_for(error) or 'the deployment failed'}; {second}") from error
        (home / JOURNAL).unlink()
        raise
    (home / JOURNAL).unlink()


def _swap(handle: ServerHandle, folder: Path, swapped: list[str], timeout_s: float) -> None:
    models = in_swap_order(models_in(folder))
    for model in models:
        load(handle, model, timeout_s)
        swapped.append(model)
    with handle.connect() as client:
        verification.verify(client, folder, models)
        for model in set(known(client)) - set(models):
            _unload(handle, client, model)


def _roll_back(home: Path, before: Path, swapped: Iterable[str]) -> None:
    """Point the repository at `before` and have the server serve it: what was swapped, and what is found to differ."""
    if not before.is_dir():
        # Somebody deleted it: what is loaded serves on.
        log.error("event=nothing_to_go_back_to folder=%s", before.name)
        return
    if repository.current(home) != before:
        repository.point_to(home, before)
    handle = attach(home)
    if handle is None:
        return
    failed = []
    models = models_in(before)
    with handle.connect() as client:
        for model in reversed(in_swap_order({*models, *known(client)})):
            try:
                if model not in models:
                    _unload(handle, client, model)
                elif model in swapped or not serves(client, before, model):
                    load(handle, model, LOAD_TIMEOUT_S)
            except UserError as error:
                failed.append(str(error))
    if failed:
        raise UserError(f"and those before did not come back yet ({failed[0]}); a running gr serve goes on trying")


def models_in(folder: Path) -> tuple[str, ...]:
    """Return those of our models that a repository folder holds."""
    return tuple(m for m in (*repository.MODELS, repository.SHADOW) if (folder / m / "config.pbtxt").is_file())


def serves(client: grpcclient.InferenceServerClient, folder: Path, model: str) -> bool:
    """Return whether the server answers with the model that a repository folder holds."""
    found = canary.check(client, model, CANARY_S)
    return found.outcome is canary.Outcome.ANSWERS and found.parameters == verification.wanted_parameters(folder, model)


def known(client: grpcclient.InferenceServerClient) -> list[str]:
    """Return those of our models that the server has; its own index forgets one whose folder is gone."""
    try:
        return [
            model
            for model in (*repository.MODELS, repository.SHADOW)
            if client.is_model_ready(model, client_timeout=CANARY_S)
        ]
    except grpcclient.InferenceServerException:
        return []


def _unload(handle: ServerHandle, client: grpcclient.InferenceServerClient, model: str) -> None:
    try:
        client.unload_model(model, headers=handle.admin_headers, client_timeout=CANARY_S)
    except grpcclient.InferenceServerException as error:
        raise UserError(f"the model server did not unload {model}: {_reason(error, CANARY_S)}") from None


def _reason(error: grpcclient.InferenceServerException, timeout_s: float) -> str:
    code, message = (error.status() or "").rpartition(".")[2], error.message() or ""
    if code == "DEADLINE_EXCEEDED":
        return f"it was not done in {timeout_s:g} s"
    if "restricted" in message:
        return "it refuses the admin key; set GR_SERVER_ADMIN_KEY to the one it was started with"
    if code == "UNAVAILABLE" and "load" not in message:
        return "it does not answer"
    return last_useful_line(message) or "no reason given"

"""One real model server for all tests of this folder, and the offline models its answers are held against."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gr_platform import storage
from gr_platform.bundle.export import expected_scores
from gr_platform.bundle.golden import GoldenRequest
from gr_platform.bundle.load import Bundle, load, model_digest
from gr_platform.models.build import Model, build_model
from gr_platform.sequences.window import window_start
from serving import repository
from serving.client import Client
from serving.engine.requests import History
from serving.handle import ServerHandle
from serving.server import EmbeddedServer

NUM_ITEMS = 200
BASE_MS = 1_600_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """A bundle with the offline model it was exported from: full forwards, no cache, no graph, no server."""

    bundle: Bundle
    model: Model

    def scores(self, history: History, candidates: np.ndarray, request_time: int) -> np.ndarray:
        """Scores of raw candidates: [C, tasks] (ranking) or [C] (retrieval)."""
        config, vocabulary = self.bundle.config, self.bundle.vocabulary
        start = window_start(len(history.items), config.max_events, config.chunk)
        request = GoldenRequest(
            items=vocabulary.lookup(history.items[start:]),
            actions=history.actions[start:],
            times=history.times[start:],
            candidates=vocabulary.lookup(candidates),
            request_time=request_time,
        )
        return expected_scores(self.model, request)


def offline(folder: Path) -> Offline:
    bundle = load(folder)
    declaration = bundle.declaration
    model = build_model(
        bundle.config,
        num_rows=bundle.vocabulary.num_rows,
        num_actions=len(declaration.actions),
        tasks=list(declaration.tasks),
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return Offline(bundle=bundle, model=model.eval())


def user(seed: int, num_events: int) -> History:
    """A made-up user; more events of the same seed continue the same history."""
    rng = np.random.default_rng(seed)
    gaps = (10 ** rng.uniform(3, 8, 400)).astype(np.int64)
    return History(
        items=rng.integers(1000, 1000 + NUM_ITEMS, 400)[:num_events],
        actions=rng.integers(1, 8, 400)[:num_events],
        times=BASE_MS + np.cumsum(gaps)[:num_events],
    )


def after(history: History, delay_ms: int = 60_000) -> int:
    """A request time after the last event."""
    return (int(history.times[-1]) if len(history.times) else BASE_MS) + delay_ms


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, random_bundle: Callable[..., Path]) -> dict[str, Path]:
    """Folders of a retrieval and a ranking bundle of one data set."""
    parent = tmp_path_factory.mktemp("pair")
    return {kind: random_bundle(parent / kind, kind, num_items=NUM_ITEMS) for kind in ("retrieval", "ranking")}


@pytest.fixture(scope="session")
def offline_models(pair: dict[str, Path]) -> dict[str, Offline]:
    torch.set_num_threads(2)
    return {kind: offline(folder) for kind, folder in pair.items()}


@pytest.fixture(scope="session")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return rewrite(bundle folder, change(folder, facts)): a copy with other content and digests that fit it."""

    def rewrite(source: Path, change: Callable[[Path, dict], None]) -> Path:
        folder = tmp_path_factory.mktemp("rewritten") / source.name
        shutil.copytree(source, folder)
        manifest = storage.read_manifest(folder)
        facts = dict(manifest.facts)
        change(folder, facts)
        files = {name: storage.file_sha256(folder / name) for name in manifest.files}
        facts["model_digest"] = model_digest(facts, files)
        storage.write_manifest(folder, kind=manifest.kind, spec={"rewritten": True}, facts=facts)
        return folder

    return rewrite


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def server(home: Path, pair: dict[str, Path]) -> Iterator[ServerHandle]:
    repository.publish(home, pair["retrieval"], pair["ranking"])
    embedded = EmbeddedServer(home)
    yield embedded.start()
    # A test made a model fail to load, which the server then waits for at its stop: no need to.
    embedded.stop(grace_s=3.0)


@pytest.fixture(scope="session")
def client(server: ServerHandle) -> Iterator[Client]:
    with Client(server.grpc_address, deadline_s=30) as connection:
        yield connection

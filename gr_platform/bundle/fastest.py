"""torch and ONNX Runtime over the same pages of one bundle: each piece of work goes where it is done faster.

Which that is depends on the CPU, the model and the size: a call of a graph costs a tenth of one of torch, which walks a
long history in causal tiles and takes several users at once. So it is measured (`tune`), here.

Invariant: both paths read and write the same pages, so either goes on from what the other left.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gr_platform.bundle.compute import (
    PAGE_TOKENS,
    TUNING_CALLS,
    Ask,
    CacheType,
    Compute,
    Piece,
    least_seconds,
    most_tokens,
    pages_for,
)
from gr_platform.bundle.onnx_compute import OnnxCompute, Shared
from gr_platform.bundle.torch_model import torch_compute
from gr_platform.models.compute import TorchCompute
from gr_platform.models.tokens import Tokens

if TYPE_CHECKING:
    from gr_platform.bundle.load import Bundle

# What both paths are timed on: numbers of candidates or new tokens, of one user and of so many, after so many tokens.
TUNED_SIZES = (1, 4, 16, 64, 256)
TUNED_USERS = 4
TUNED_PAST = 256
Work = TypeVar("Work", Piece, Ask)


def fastest_compute(
    bundle: "Bundle", num_pages: int, *, num_threads: int = 1, cache_dtype: CacheType = "fp32"
) -> "TorchCompute | FastestCompute":
    """Return the torch path, on a CPU together with the graphs."""
    compute = torch_compute(bundle, num_pages, num_threads=num_threads, cache_dtype=cache_dtype)
    if compute.device.type != "cpu":
        return compute
    shared = Shared(
        k=compute.pages.k.numpy(),
        v=compute.pages.v.numpy(),
        times=compute.pages.times.numpy(),
        items=compute.model.embedding.items.weight.detach().numpy(),
    )
    graph = OnnxCompute(
        bundle.folder, bundle.config, bundle.num_tasks, num_pages, num_threads=num_threads, shared=shared
    )
    return FastestCompute(compute, graph)


class FastestCompute:
    """`graph_to`: pieces of at most so many new tokens are encoded by the graph; `graph_from`: lists of at least so
    many candidates are scored by it; each in a step of one user ("alone") and of several ("together")."""

    def __init__(self, torch_path: TorchCompute, graph: OnnxCompute) -> None:
        self.torch_path, self.graph, self.num_pages = torch_path, graph, torch_path.num_pages
        self.graph_to: dict[str, float] = {"alone": 0, "together": 0}
        self.graph_from: dict[str, float] = {"alone": math.inf, "together": math.inf}

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Write the kept tokens' K/V and return the rows [R, d] of the pieces that want one."""
        most = self.graph_to[_company(pieces)]
        by_graph = [len(piece.tokens) <= most for piece in pieces]
        rows = [iter(path.encode(own)) if own else iter(()) for path, own in self._shares(pieces, by_graph)]
        found = [next(rows[graph]) for piece, graph in zip(pieces, by_graph, strict=True) if piece.wants_row]
        return np.stack(found) if found else np.zeros((0, self.graph.config.embedding_dim), np.float32)

    def score(self, asks: Sequence[Ask]) -> list[np.ndarray]:
        """Return probabilities [C, tasks] of each ask's candidates."""
        least = self.graph_from[_company(asks)]
        by_graph = [len(ask.candidates) >= least for ask in asks]
        scores = [iter(path.score(own)) for path, own in self._shares(asks, by_graph)]
        return [next(scores[graph]) for graph in by_graph]

    def paths(self) -> Sequence[Compute]:
        """Return torch alone, and the graphs alone."""
        graph = FastestCompute(self.torch_path, self.graph)
        graph.graph_to = dict.fromkeys(self.graph_to, math.inf)
        graph.graph_from = dict.fromkeys(self.graph_from, 0)
        return self.torch_path, graph

    def tune(self) -> None:
        """Measure both paths on work of every size, alone and together, and take the graph where it is faster."""
        for company, num_users in (("alone", 1), ("together", TUNED_USERS)):
            self.graph_to[company] = 0
            for size in TUNED_SIZES:
                if not self._is_faster("encode", [self._piece(size)] * num_users):
                    break
                self.graph_to[company] = size
            self.graph_from[company] = math.inf
            for size in reversed(TUNED_SIZES if self.graph.config.kind == "ranking" else ()):
                if not self._is_faster("score", [self._ask(size)] * num_users):
                    break
                self.graph_from[company] = size

    def _shares(self, work: Sequence[Work], by_graph: list[bool]) -> list[tuple[Compute, list[Work]]]:
        """Return what torch does, then what the graph does."""
        return [
            (path, [each for each, graph in zip(work, by_graph, strict=True) if graph == own])
            for path, own in ((self.torch_path, False), (self.graph, True))
        ]

    def _is_faster(self, method: str, work: Sequence[Piece] | Sequence[Ask]) -> bool:
        here, there = (
            least_seconds(partial(getattr(path, method), work), num_calls=TUNING_CALLS)
            for path in (self.torch_path, self.graph)
        )
        return there < here

    def _room(self) -> int:
        return min(most_tokens(self.graph.config), self.num_pages * PAGE_TOKENS)

    def _piece(self, num_new: int) -> Piece:
        num_new = min(num_new, self._room())
        past = min(TUNED_PAST, self._room() - num_new)
        zeros, ones = np.zeros(num_new, np.int64), np.ones(num_new, np.int64)
        return Piece(
            tokens=Tokens(kinds=ones, items=zeros, actions=zeros, times=zeros, query_times=zeros),
            past=past,
            pages=_first_pages(past + num_new),
            keep=num_new - (self.graph.config.kind == "retrieval"),
        )

    def _ask(self, num_candidates: int) -> Ask:
        past = min(TUNED_PAST, self._room())
        return Ask(candidates=np.zeros(num_candidates, np.int64), request_time=0, past=past, pages=_first_pages(past))


def _company(work: Sequence[object]) -> str:
    return "alone" if len(work) == 1 else "together"


def _first_pages(num_tokens: int) -> np.ndarray:
    return np.arange(pages_for(num_tokens), dtype=np.int32)

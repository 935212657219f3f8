"""A bundle's weights as a torch model, alone or beside the graphs: several users a step, on the CPU or a GPU.

Invariant: torch is imported with this module alone, so a server that runs the graphs never pays for it. Both paths read
the same pages, so either may score what the other encoded.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gr_platform import settings
from gr_platform.bundle.compute import PAGE_TOKENS, Ask, CacheType, Compute, Piece, most_tokens, pages_for
from gr_platform.bundle.onnx_compute import OnnxCompute
from gr_platform.errors import UserError
from gr_platform.models.build import build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.features import FeatureTables

if TYPE_CHECKING:
    from gr_platform.bundle.load import Bundle

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What both paths are timed on: numbers of candidates, of one user and of so many, against so many tokens of history.
TUNED_SIZES = (1, 4, 16, 64, 256)
TUNED_ASKS = 8
TUNED_PAST = 256


def torch_compute(
    bundle: "Bundle",
    num_pages: int,
    *,
    num_threads: int = 1,
    cache_dtype: CacheType = "fp32",
) -> TorchCompute:
    """Return the bundle's model with room for `num_pages` pages, on the device of GR_DEVICE.

    Sets the process's number of threads. Raises UserError if the weights do not fit the manifest, and for a short
    cache_dtype on a CPU, which computes those slowly.
    """
    torch.set_num_threads(num_threads)
    device = settings.device()
    if device == "cpu" and cache_dtype != "fp32":
        raise UserError(f"cache_dtype is {cache_dtype}, which is for a GPU, and there is none; set it to fp32")
    try:
        state = load_file(bundle.folder / "model.safetensors")
        model = build_model(
            bundle.config,
            num_rows=bundle.vocabulary.num_rows,
            num_actions=len(bundle.declaration.actions),
            tasks=list(bundle.tasks),
            features=FeatureTables.of_state(bundle.config, state),
        )
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the weights of bundle {bundle.folder.name} do not fit it ({reason}); export it again"
        ) from None
    return TorchCompute(model.to(device), num_pages, cache_dtype=_DTYPES[cache_dtype])


def fastest_compute(
    bundle: "Bundle", num_pages: int, *, num_threads: int = 1, cache_dtype: CacheType = "fp32"
) -> "TorchCompute | FastestCompute":
    """Return the torch path; for ranking on a CPU together with the graph, by what is faster there."""
    compute = torch_compute(bundle, num_pages, num_threads=num_threads, cache_dtype=cache_dtype)
    if bundle.kind != "ranking" or compute.device.type != "cpu":
        return compute
    pages = (compute.pages.k.numpy(), compute.pages.v.numpy(), compute.pages.times.numpy())
    graph = OnnxCompute(
        bundle.folder, bundle.config, bundle.num_tasks, num_pages, num_threads=num_threads, shared=pages
    )
    return FastestCompute(compute, graph)


class FastestCompute:
    """torch encodes; of candidates, long lists of one user go where they are scored faster, short ones stay together.

    Which is faster depends on the CPU: torch's MKL leaves AVX-512 unused on AMD, ONNX Runtime does not, while a step of
    many short lists is one call of torch and many of ONNX Runtime. So it is measured (`tune`), here.
    """

    def __init__(self, torch_path: TorchCompute, graph: OnnxCompute) -> None:
        self.torch_path, self.graph, self.num_pages = torch_path, graph, torch_path.num_pages
        # Lists of at least so many candidates go to the graph, in a step of one list and in one of several.
        self.graph_from = {"alone": math.inf, "together": math.inf}

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Write the kept tokens' K/V and return the rows [R, d] of the pieces that want one."""
        return self.torch_path.encode(pieces)

    def score(self, asks: Sequence[Ask]) -> list[np.ndarray]:
        """Return probabilities [C, tasks] of each ask's candidates."""
        enough = self.graph_from["alone" if len(asks) == 1 else "together"]
        paths = [self.graph if len(ask.candidates) >= enough else self.torch_path for ask in asks]
        scores = {
            path: iter(path.score([ask for ask, own in zip(asks, paths, strict=True) if own is path]))
            for path in (self.graph, self.torch_path)
        }
        return [next(scores[path]) for path in paths]

    def paths(self) -> Sequence[Compute]:
        """Return torch alone, and the graph for every list it can score."""
        graph = FastestCompute(self.torch_path, self.graph)
        graph.graph_from = dict.fromkeys(self.graph_from, 1)
        return self.torch_path, graph

    def tune(self) -> None:
        """Measure both paths on lists of every length, alone and several, and take the graph where it is faster."""
        past = min(TUNED_PAST, most_tokens(self.torch_path.model.config), self.num_pages * PAGE_TOKENS)
        pages = np.arange(pages_for(past), dtype=np.int32)
        for company, num_asks in (("alone", 1), ("together", TUNED_ASKS)):
            self.graph_from[company] = math.inf
            for size in reversed(TUNED_SIZES):
                ask = Ask(candidates=np.zeros(size, np.int64), request_time=0, past=past, pages=pages)
                here, there = (_seconds(path.score, [ask] * num_asks) for path in (self.torch_path, self.graph))
                if there >= here:
                    break
                self.graph_from[company] = size


def _seconds(score: Callable[[list[Ask]], object], asks: list[Ask]) -> float:
    """Return the least time of a few calls, after one that pays for what is made once."""
    score(asks)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        score(asks)
        times.append(time.perf_counter() - began)
    return min(times)

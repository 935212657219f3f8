"""What the engine drives: a loaded bundle that turns requests into jobs and jobs into answers.

Invariant: `prepare` does all that may be refused, so what is in the engine can be computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gr_platform.bundle.compute import ITEM_BYTES, CacheType, Compute, ComputePath, most_tokens, page_bytes, pages_for
from serving.engine.cache import KVCache
from serving.engine.jobs import Job
from serving.engine.microbatches import Microbatches

if TYPE_CHECKING:
    from gr_platform.bundle.load import Bundle


class Model(ABC):
    """A bundle with its `Compute` and its cache: `Ranker` and `Retriever`."""

    kind: ClassVar[str]

    def __init__(
        self,
        bundle: "Bundle",
        *,
        cache_bytes: int,
        num_threads: int = 1,
        path: ComputePath = "auto",
        cache_dtype: CacheType = "fp32",
    ) -> None:
        """`cache_bytes` bounds the K/V kept between requests; path, cache_dtype: see `Bundle.compute`."""
        self.bundle, self.longest = bundle, most_tokens(bundle.config)
        size = page_bytes(bundle.config, ITEM_BYTES[cache_dtype])
        self.cache = KVCache(bundle.digest, cache_bytes, size, self.longest)
        self.compute: Compute = bundle.compute(
            self.cache.num_pages, path=path, num_threads=num_threads, cache_dtype=cache_dtype
        )
        self.microbatches = Microbatches.fixed(256)

    @abstractmethod
    def prepare(self, request: Any) -> Job:
        """Return the job of a request. Raises InvalidRequestError."""

    @abstractmethod
    def answer(self, parts: Sequence[tuple[Job, int]]) -> None:
        """Compute the next so many answers of each encoded job."""

    @abstractmethod
    def result(self, job: Job) -> Any:
        """Return the result of a job all of whose answers are there."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run the shapes that requests have, so that the first callers do not pay for them; writes to free pages."""

    def budget(self, jobs: Sequence[Job]) -> int:
        """Return how many answers one step takes, of these jobs."""
        return self.microbatches.size(max((job.keep for job in jobs), default=0))

    def lengths(self) -> list[int]:
        """Return numbers of tokens that stand for all histories: none, 64, 256, ... and the longest."""
        steps = [0, *(4**power for power in range(3, 10))]
        return [*(step for step in steps if step < self.longest), self.longest]

    def warm_pages(self, num_tokens: int) -> np.ndarray:
        """Return pages for a made-up history: nobody's, as long as nothing is asked."""
        return np.arange(pages_for(num_tokens), dtype=np.int32)

"""Sequences in memory, for tests of what reads them: no files, no ingest."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr_platform.events.declaration import Declaration
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.vocabulary import NUM_OOV, Vocabulary

Event = tuple[int, int, int]
FIRST_ITEM = 1 + NUM_OOV


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products gain nothing from threads, and two of them on a busy machine wait for each other.

    Bits are promised on the CPU alone, so a GPU is for the tests that say so.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GR_THREADS", "1")
        patched.setenv("GR_DEVICE", "cpu")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., SequenceDataset]:
    """Return make(users, num_items, inactive=(), **declaration): users are lists of (item number, action mask, ms)."""

    def make(
        users: Sequence[Sequence[Event]], num_items: int, inactive: Sequence[int] = (), **declared: Any
    ) -> SequenceDataset:
        fields = {"actions": ("view", "like"), "positives": ("view", "like"), "tasks": {"like": ("like",)}} | declared
        vocabulary = pa.table(
            {
                "item_id": pa.array(np.arange(num_items) + 1000),
                "count": pa.array(np.ones(num_items, np.int64)),
                "first_ts": pa.array(np.zeros(num_items, np.int64)),
                "last_ts": pa.array(np.zeros(num_items, np.int64)),
                "active": pa.array([i not in inactive for i in range(num_items)]),
            }
        )
        as_lists = pa.large_list(pa.int64())
        table = pa.table(
            {
                "user_id": pa.array(np.arange(len(users)) + 1),
                "items": pa.array([[FIRST_ITEM + item for item, _, _ in user] for user in users], as_lists),
                "actions": pa.array([[mask for _, mask, _ in user] for user in users], as_lists),
                "times": pa.array([[ms for _, _, ms in user] for user in users], as_lists),
            }
        )
        return SequenceDataset([table], Declaration(name="made", **fields), Vocabulary(vocabulary), "made")

    return make


@pytest.fixture(scope="session")
def cycle_dataset(make_dataset: Callable[..., SequenceDataset]) -> SequenceDataset:
    """60 users who walk round a circle of 20 items from a place of their own and like every even one."""
    users = []
    for user in range(60):
        items = [(user * 7 + step) % 20 for step in range(6 + user % 9)]
        users.append([(item, 0b11 if item % 2 == 0 else 0b01, 60_000 * step) for step, item in enumerate(items)])
    return make_dataset(users, 20)

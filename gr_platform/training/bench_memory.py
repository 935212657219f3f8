"""How much memory a training takes: HSTU-large at ML-1M's size for an epoch, by the trainer that users call.

Invariant: the training runs in a process of its own, so its peak RSS is that of training and nothing else; the data are
made up in memory with ML-1M's figures: 6,040 users, about a million events of 3,706 items.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr_platform import settings
from gr_platform.events.declaration import Declaration
from gr_platform.models.config import Recipe
from gr_platform.processes import peak_rss_bytes
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.vocabulary import Vocabulary
from gr_platform.training.bench_step import (
    FIRST_ITEM,
    GAP_S,
    MEDIAN_LENGTH,
    MIN_LENGTH,
    NUM_ITEMS,
    SHAPES,
    START_MS,
    TRAINING,
)
from gr_platform.training.seeds import generator

NUM_USERS, SIGMA, LONGEST = 6_040, 1.0, 2_314
DEADLINE_S = 900


def peak_rss_gb(num_users: int = NUM_USERS) -> float:
    """Return the peak RSS of training on so many users, validation and checkpoints included.

    Raises RuntimeError if the training fails.
    """
    command = [sys.executable, "-m", "gr_platform.training.bench_memory", str(num_users)]
    done = subprocess.run(
        command, cwd=settings.PROJECT_ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    if done.returncode:
        raise RuntimeError(f"the training whose memory is measured failed: {done.stderr.strip()[-400:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def made_up(num_users: int) -> SequenceDataset:
    """Return users with ML-1M's lengths, items and actions."""
    rng = generator(TRAINING.seed, "memory")
    drawn = np.exp(rng.normal(np.log(MEDIAN_LENGTH), SIGMA, num_users)).astype(np.int64)
    lengths = np.clip(drawn, MIN_LENGTH, LONGEST)
    offsets, total = np.concatenate([[0], np.cumsum(lengths)]), int(lengths.sum())
    values = {
        "items": FIRST_ITEM + (NUM_ITEMS * rng.random(total) ** 2).astype(np.int64),
        "actions": 1 << rng.integers(0, 5, total),
        "times": START_MS + np.cumsum(rng.integers(1, 2_000 * int(GAP_S), total)),
    }
    lists = {n: pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(each)) for n, each in values.items()}
    ones = pa.array(np.ones(NUM_ITEMS, np.int64))
    columns = {"item_id": pa.array(np.arange(NUM_ITEMS)), "count": ones, "first_ts": ones, "last_ts": ones}
    actions = tuple(f"rate_{stars}" for stars in range(1, 6))
    return SequenceDataset(
        [pa.table({"user_id": pa.array(np.arange(num_users))} | lists)],
        Declaration(name="made-up", actions=actions, positives=actions, tasks={"like": actions[3:]}),
        Vocabulary(pa.table(columns | {"active": pa.array(np.ones(NUM_ITEMS, bool))})),
        "made-up",
    )


def main() -> None:
    """Train for an epoch and print the process's peak RSS in GB; the argument is the number of users."""
    from gr_platform.training.loop import train

    recipe = Recipe(name="memory", model=SHAPES["HSTU-large"], training=replace(TRAINING, max_epochs=1))
    with tempfile.TemporaryDirectory() as folder:
        train(made_up(int(sys.argv[1])), recipe, Path(folder) / "run", progress=False)
    print(json.dumps(peak_rss_bytes() / 1e9))


if __name__ == "__main__":
    main()

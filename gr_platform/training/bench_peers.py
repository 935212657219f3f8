"""The same training step elsewhere: RecTools' HSTU, timed in an environment of its own.

Invariant: a peer gets the users, the shape, the loss and the threads of ours; what its data loader does before a step
is not counted.
"""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from gr_platform import settings
from gr_platform.models.config import ModelConfig
from gr_platform.training.bench_step import MAX_LENGTH, TRAINING, histories
from gr_platform.training.memory import KEEP_MEMORY

REPEATS, DEADLINE_S = 3, 600


def rectools_ms(config: ModelConfig, num_threads: int, *, keep_memory: bool) -> float | None:
    """Return the median milliseconds of RecTools' HSTU step on the same users, or None without its environment.

    keep_memory: let its process keep freed memory, as ours does. Raises RuntimeError if it fails.
    """
    python = settings.peer_python()
    if python is None:
        return None
    script = Path(__file__).with_name("rectools_step.py")
    shape: dict[str, float] = {
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "embedding_dim": config.embedding_dim,
    }
    shape |= {"dropout": config.dropout, "temperature": config.temperature, "max_length": MAX_LENGTH}
    shape |= {"num_negatives": TRAINING.num_negatives, "learning_rate": TRAINING.learning_rate}
    shape |= {"num_threads": num_threads, "num_steps": 1 + REPEATS}
    environment = os.environ | (KEEP_MEMORY if keep_memory else {})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "interactions.npz"
        users, items, times = interactions()
        np.savez(source, users=users, items=items, times=times)
        command = [str(python), str(script), str(source), json.dumps(shape)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
    if done.returncode:
        raise RuntimeError(f"RecTools' step failed in the environment of GR_PEERS: {done.stderr.strip()[-400:]}")
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return 1e3 * statistics.median(seconds[1:])


def interactions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return users, items and times int64 of what a library reads that makes n - 1 targets of n interactions."""
    made, requests = histories()
    users = np.repeat(np.arange(len(made)), [len(items) + 1 for items, _, _ in made])
    items = np.concatenate([np.append(items, items[:1]) for items, _, _ in made])
    times = np.concatenate([np.append(times, at) for (_, _, times), at in zip(made, requests, strict=True)])
    return users, items, times

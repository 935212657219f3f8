"""Callers who each wait for their answer before they ask again: a process that prints how many a second got one.

Invariant: tensors are made once, so the callers' own CPU is that of gRPC alone.
"""

import json
import sys
import threading
import time

import numpy as np
import tritonclient.grpc as grpcclient

NUM_USERS = 8
NUM_TOKENS = 256
WARM_S, COUNTED_S = 1.0, 4.0
FIRST_ID, NUM_ITEMS = 1000, 10_000
START_MS = 1_577_836_800_000


def tensors(num_candidates: int, seed: int) -> list[grpcclient.InferInput]:
    """Return the inputs of one user's request to gr_ranker."""
    rng = np.random.default_rng(seed)
    num_events = (NUM_TOKENS - 1) // 2
    times = START_MS + np.cumsum(rng.integers(1_000, 10_000_000, num_events + 1))
    fields = {
        "HISTORY_ITEMS": FIRST_ID + rng.integers(0, NUM_ITEMS, num_events),
        "HISTORY_ACTIONS": np.ones(num_events, np.int64),
        "HISTORY_TIMES": times[:-1],
        "HISTORY_OFFSET": np.zeros(1, np.int64),
        "CANDIDATES": FIRST_ID + rng.integers(0, NUM_ITEMS, num_candidates),
        "REQUEST_TIME": times[-1:],
    }
    made = []
    for name, values in fields.items():
        tensor = grpcclient.InferInput(name, [1, len(values)], "INT64")
        tensor.set_data_from_numpy(values[None])
        made.append(tensor)
    return made


def rate(address: str, num_candidates: int) -> float:
    """Return the answers a second that all callers get together."""
    began = time.monotonic() + WARM_S
    counts = [0] * NUM_USERS

    def ask(user: int) -> None:
        inputs = tensors(num_candidates, user)
        while (now := time.monotonic()) < began + COUNTED_S:
            client.infer("gr_ranker", inputs)
            counts[user] += now >= began

    with grpcclient.InferenceServerClient(address) as client:
        threads = [threading.Thread(target=ask, args=(user,)) for user in range(NUM_USERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(counts) / COUNTED_S


if __name__ == "__main__":
    print(json.dumps(rate(sys.argv[1], int(sys.argv[2]))))

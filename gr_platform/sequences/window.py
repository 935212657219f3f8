"""Which events of a long history are visible: one rule for training, evaluation and serving.

Invariant: the start moves in chunks, so an appended event leaves the cached prefix untouched except once in `chunk`
events (DESIGN: at the maximum length). `chunk = 1` is the sliding window of the paper.
"""

import numpy as np


def window_start(num_events: int, max_events: int, chunk: int) -> int:
    """Return the index of the first visible event of a history of `num_events`.

    0 while the history fits, then `chunk * ceil((num_events - max_events) / chunk)`; between `max_events - chunk + 1`
    and `max_events` events stay visible.
    """
    return max(0, chunk * -(-(num_events - max_events) // chunk))


def window_starts(num_events: np.ndarray, max_events: int, chunk: int) -> np.ndarray:
    """Return `window_start` of many histories, int64 [B]."""
    return np.maximum(0, chunk * -(-(np.asarray(num_events, np.int64) - max_events) // chunk))

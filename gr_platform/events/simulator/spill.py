"""The views of all blocks of users on their way into order of time, on disk and in bounded memory.

Invariant: views leave in order of time, ties in the order in which they came, however many spans of time there are.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gr_platform.events.simulator.users import Views
from gr_platform.events.simulator.world import END_MS, START_MS

BYTES_A_VIEW = 16
_REACTION_BITS, _ITEM_BITS = 2, 32


class Spill:
    """One file of blocks, each in order of time and thereby cut into the same spans of time.

    A view is two int64: (time since START_MS, reaction) and (user, item). `ends` holds for each block where its
    spans end in the file. The first block, which is as good a sample as any, tells where to cut.
    """

    def __init__(self, path: Path, num_spans: int) -> None:
        self._file = path.open("w+b")
        self._num_spans = num_spans
        self._cuts: np.ndarray | None = None
        self._ends: list[np.ndarray] = []
        self._num_views = 0

    def add(self, views: Views) -> None:
        """Append a block."""
        order = _by_time(views.time)
        time, user = views.time[order], views.user[order]
        if self._cuts is None:
            self._cuts = time[len(time) * np.arange(1, self._num_spans) // self._num_spans]
        records = np.empty((len(time), 2), np.int64)
        records[:, 0] = (time - START_MS) << _REACTION_BITS | views.reaction[order]
        records[:, 1] = user << _ITEM_BITS | views.item[order]
        self._ends.append(self._num_views + np.append(np.searchsorted(time, self._cuts), len(time)))
        self._num_views += len(time)
        self._file.write(records.data)

    def spans(self) -> Iterator[Views]:
        """Yield the views of one span after the other."""
        ends = np.array(self._ends)
        starts = np.column_stack([np.append(0, ends[:-1, -1]), ends[:, :-1]])
        for span in range(self._num_spans):
            records = np.empty((int((ends[:, span] - starts[:, span]).sum()), 2), np.int64)
            filled = 0
            for start, end in zip(starts[:, span].tolist(), ends[:, span].tolist(), strict=True):
                self._file.seek(start * BYTES_A_VIEW)
                self._file.readinto(records[filled : filled + end - start].data)
                filled += end - start
            records = records[_by_time(records[:, 0] >> _REACTION_BITS)]
            yield Views(
                user=records[:, 1] >> _ITEM_BITS,
                item=records[:, 1] & ((1 << _ITEM_BITS) - 1),
                time=(records[:, 0] >> _REACTION_BITS) + START_MS,
                reaction=(records[:, 0] & ((1 << _REACTION_BITS) - 1)).astype(np.uint8),
            )

    def close(self) -> None:
        """Close the file; it stays where it is."""
        self._file.close()


def _by_time(time: np.ndarray) -> np.ndarray:
    """Return the order [V] of times, first come first where they are equal."""
    # Sorting values is several times as fast as argsort, so the place rides in the low bits: 34 of 180 days remain.
    bits = len(time).bit_length()
    keys = (time - time.min(initial=END_MS)) << bits | np.arange(len(time))
    keys.sort()
    return keys & ((1 << bits) - 1)

"""Work ahead: an iterator that is run in a thread of its own, a few values in front of who reads them.

Invariant: the values, their order and an error at the end are those of the iterator itself, and the thread ends with
the reader, also when the reader stops early.
"""

import threading
from collections.abc import Iterable, Iterator
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")
_LOOK_S = 0.1


def prefetched(source: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the values of `source`, which is run in a thread at most `depth` values ahead."""
    queue: Queue[tuple[bool, T | BaseException | None]] = Queue(depth)
    ended = threading.Event()

    def put(more: bool, value: "T | BaseException | None") -> bool:
        while not ended.is_set():
            try:
                queue.put((more, value), timeout=_LOOK_S)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for value in source:
                if not put(True, value):
                    return
        except BaseException as error:  # raised again where the values are read
            put(False, error)
        else:
            put(False, None)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = queue.get()
            if not more:
                if isinstance(value, BaseException):
                    raise value
                return
            yield value  # type: ignore[misc]
    finally:
        ended.set()
        thread.join()

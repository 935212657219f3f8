"""Work ahead: an iterator that is run in a thread of its own, a few values in front of who reads them.

Invariant: the values, their order and an error at the end are those of the iterator itself, and the thread ends with
the reader, also when the reader stops early.
"""

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetched(source: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the values of `source`, which is run in a thread at most `depth` values ahead."""
    made: SimpleQueue[tuple[bool, T | BaseException | None]] = SimpleQueue()
    room, ended = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        values = iter(source)
        try:
            while True:
                room.acquire()
                if ended.is_set():
                    return
                made.put((True, next(values)))
        except StopIteration:
            made.put((False, None))
        except BaseException as error:  # raised again where the values are read
            made.put((False, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = made.get()
            if not more:
                if isinstance(value, BaseException):
                    raise value
                return
            room.release()
            yield value  # type: ignore[misc]
    finally:
        ended.set()
        room.release()
        thread.join()

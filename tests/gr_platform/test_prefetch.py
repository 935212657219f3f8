"""Working ahead changes when values are made, never which, in what order, or how it ends."""

import threading

import pytest

from gr_platform.prefetch import prefetched


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_values_and_order_are_those_of_the_source(depth):
    assert list(prefetched(iter(range(50)), depth)) == list(range(50))
    assert list(prefetched(iter(()), depth)) == []


def test_the_thread_stays_at_most_as_far_ahead_as_asked():
    made, asked = [], threading.Semaphore(0)

    def source():
        for value in range(10):
            made.append(value)
            asked.release()
            yield value

    values = prefetched(source(), depth=2)
    assert next(values) == 0
    for _ in range(3):
        assert asked.acquire(timeout=5)
    assert not asked.acquire(timeout=0.3)
    assert len(made) == 3  # one read, two waiting
    values.close()


def test_an_error_comes_after_the_values_before_it():
    def source():
        yield 1
        raise OSError("the disk is full")

    values = prefetched(source())
    assert next(values) == 1
    with pytest.raises(OSError, match="the disk is full"):
        next(values)


def test_leaving_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    def running():
        return [thread for thread in threading.enumerate() if thread.name == "prefetch"]

    values = prefetched(source())
    next(values)
    assert running()
    values.close()
    assert not running()
    assert closed.wait(5)

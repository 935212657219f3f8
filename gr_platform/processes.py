"""Programs that run beside this one: found again after a restart, ended with all that they started.

Invariant: a program is known by its pid and start time together, so a reused pid is never taken for ours; what
`stop` was asked to end has ended when it returns.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

# The system derives a start time from its clock, which may be set by a second while the program runs.
_SAME_START_S = 2.0
_POLL_S = 0.05
_KILLED_S = 10.0


def find(pid: int, create_time: float) -> psutil.Process | None:
    """Return the running process with this pid that started at `create_time` (seconds since the epoch), or None."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - create_time) < _SAME_START_S
        return process if same and is_alive(process) else None
    except psutil.NoSuchProcess:
        return None


def peak_rss_bytes() -> int:
    """Return the peak RSS of this process's own program.

    Not `ru_maxrss`, which begins at that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; a zombie has ended."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def stop(roots: Sequence[psutil.Process], *, grace_s: float) -> None:
    """Ask each root to end, wait up to `grace_s`, then kill what is left of the roots and of all they started."""
    trees: list[psutil.Process] = []
    for root in roots:
        try:
            # Listed before the root ends: afterwards its children belong to init.
            trees += [*root.children(recursive=True), root]
            root.terminate()
        except psutil.NoSuchProcess:
            continue
    wait_gone(roots, grace_s)
    kill(trees)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill the processes that still run and wait until they are gone: the signal alone returns before they are."""
    doomed = [process for process in processes if is_alive(process)]
    for process in doomed:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    wait_gone(doomed, _KILLED_S)


def wait_gone(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Wait until none of the processes runs any more, `timeout_s` at the most."""
    # Not psutil.wait_procs: a zombie whose parent never reaps it (a container without an init) would never be gone.
    deadline = time.monotonic() + timeout_s
    while any(is_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)

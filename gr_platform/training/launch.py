"""A training in several processes, as the program that starts them sees it.

Invariant: torchrun starts the processes and ends all of them when one ends badly; none is started again, since the next
run goes on from the checkpoint. What a process has to say to the user it writes into the job's folder. A program that
is told to end (Ctrl-C, SIGTERM) ends all of them first.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from gr_platform import processes, run_log, settings, storage
from gr_platform.errors import UserError
from gr_platform.models.config import Recipe
from gr_platform.sequences.time_split import TimeSplit
from gr_platform.training.ranks import LostProcess

MODULE = "gr_platform.training.distributed"
JOB, FAILURE = "job.json", "failure.txt"
# torchrun itself gives its processes 30 s to end.
GRACE_S = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training of a data set in a state folder; warm_start: the name of the run's folder to start from.

    split: where the log is cut; None: leave-one-out.
    """

    home: Path
    ds: str
    recipe: Recipe
    warm_start: str | None = None
    split: TimeSplit | None = None
    progress: bool = True

    def write(self, folder: Path) -> None:
        """Write the job into a folder, for the processes to read."""
        fields: dict[str, Any] = {"home": str(self.home), "recipe": self.recipe.to_json()}
        fields["split"] = None if self.split is None else self.split.to_json()
        fields |= {name: getattr(self, name) for name in ("ds", "warm_start", "progress")}
        storage.write_text(folder / JOB, json.dumps(fields))

    @staticmethod
    def read(folder: Path) -> "Job":
        """Return the job that `write` wrote."""
        fields = storage.read_object(folder / JOB)
        read = {"home": Path(fields["home"]), "recipe": Recipe.from_json(fields["recipe"])}
        return Job(**fields | read | {"split": TimeSplit.from_json(fields["split"])})


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the processes: a command and what it needs in its environment."""

    command: list[str]
    environment: dict[str, str]
    folder: Path

    def failed(self) -> UserError:
        """Return the error that made the command end badly."""
        failure = self.folder / FAILURE
        if failure.is_file():
            return UserError(failure.read_text(encoding="utf-8"))
        return LostProcess(
            "a training process ended before its time; the last checkpoint is kept: run the same command again to go "
            "on from it"
        )


@contextmanager
def launching(job: Job, num_processes: int, module: str = MODULE) -> Iterator[Launch]:
    """Yield how to run a job in processes that each execute `module` with the job's folder as argument."""
    with tempfile.TemporaryDirectory(prefix="gr-train-") as name:
        job.write(Path(name))
        torchrun = [sys.executable, "-m", __name__, "--standalone", "--nproc-per-node"]
        # With a shared store, keys of processes that are gone would meet those of new ones.
        environment = {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": str(settings.num_threads()),
            run_log.VARIABLE: run_log.current(),
        }
        yield Launch([*torchrun, str(num_processes), "-m", module, name], environment, Path(name))


def torchrun(arguments: list[str]) -> int:
    """Run torchrun and return its exit status: that a process failed is said by whoever reads the job's folder, in a
    sentence, not here in a traceback of torchrun's own; nor is a signal that ended it a traceback."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # All of it: torch gives each of its loggers a level of its own.
    logging.disable(logging.CRITICAL)
    try:
        main(arguments)
    except ChildFailedError:
        return 1
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


def launch(job: Job, num_processes: int) -> None:
    """Run a job in several processes. Raises UserError with what a process had to say, LostProcess if one is gone."""
    with launching(job, num_processes) as started:
        environment = os.environ | started.environment
        # In a session of its own a terminal's signals reach this process alone, which ends the others in order.
        running = subprocess.Popen(started.command, env=environment, start_new_session=True)
        try:
            with _signals_interrupt():
                status = running.wait()
        except BaseException:
            if running.poll() is None:
                processes.stop([psutil.Process(running.pid)], grace_s=GRACE_S)
                running.wait()
            raise
        if status:
            raise started.failed()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt the block as Ctrl-C does, but for what is ignored, as SIGHUP is under nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    plain = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in plain:
        signal.signal(each, _interrupt)
    try:
        yield
    finally:
        for each in plain:
            signal.signal(each, signal.SIG_DFL)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def tell_failure(folder: Path, error: UserError) -> None:
    """Leave a sentence for the program that started the processes; that another one is gone is never the reason."""
    if not isinstance(error, LostProcess):
        storage.write_text(folder / FAILURE, str(error))


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))

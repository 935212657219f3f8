"""What each process of a training in several executes: python -m torch.distributed.run ... -m this JOB_FOLDER.

Invariant: the processes differ in their rank alone; whoever starts them reads what a user should know from the folder.
"""

import logging
import sys
from pathlib import Path

from gr_platform import run_log, storage
from gr_platform.errors import UserError
from gr_platform.training.launch import Job, tell_failure
from gr_platform.training.loop import train_share
from gr_platform.training.ranks import joined

logger = logging.getLogger(__name__)
FAILED = 2


def run(folder: Path) -> storage.Result | None:
    """Do this process's part of the job in `folder` and return the result, or None from all but the first process.

    Raises UserError, and leaves its sentence in the folder.
    """
    job = Job.read(folder)
    with run_log.written(job.home):
        try:
            with joined() as ranks:
                return train_share(job, ranks)
        except UserError as error:
            # Whoever started the processes shows the sentence, once.
            logger.info("event=failed reason=%s", error)
            tell_failure(folder, error)
            raise


def main() -> int:
    """Return the exit status of this process."""
    try:
        run(Path(sys.argv[1]))
    except UserError:
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())

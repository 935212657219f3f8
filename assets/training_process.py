"""What each process of a training executes that Dagster starts: the library's part, and the first one speaks of it.

Invariant: of all processes the first alone opens pipes, since their messages go to one file.
"""

import logging
import os
import sys

from dagster_pipes import open_dagster_pipes

from gr_platform.training import distributed


def main() -> int:
    """Return the exit status of this process; what the first one logs of its epochs goes to the run's log."""
    if os.environ.get("RANK") != "0":
        return distributed.main()
    with open_dagster_pipes() as pipes:
        epochs = logging.getLogger("gr_platform.training")
        epochs.setLevel(logging.INFO)
        for handler in pipes.log.handlers:
            epochs.addHandler(handler)
        return distributed.main()


if __name__ == "__main__":
    sys.exit(main())

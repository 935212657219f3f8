"""One state folder in which every experiment ran at smoke scale."""

from pathlib import Path

import pytest

from gr_platform.experiments.catalogue import experiments
from gr_platform.experiments.run import run_cell


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with every cell of every experiment: read it, do not change it."""
    home = tmp_path_factory.mktemp("lab")
    for experiment in experiments("smoke").values():
        for cell in experiment.cells:
            run_cell(home, experiment, cell, progress=False)
    return home

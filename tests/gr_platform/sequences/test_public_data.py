"""The public data sets go through their shipped declarations to sequences with the figures that docs/data.md states."""

import re
from pathlib import Path

import pytest

from gr_platform import settings
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.splits import check_no_leak
from gr_platform.sequences.vocabulary import build_vocabulary

DATA = settings.test_data()
PAGE = settings.PROJECT_ROOT / "docs" / "data.md"
FILES = {
    "ml-1m": "ml-1m/ratings.parquet",
    "retailrocket": "retailrocket/events.parquet",
    "amazon-sports": "amazon-sports/interactions.parquet",
}


@pytest.mark.skipif(DATA is None, reason="needs the real data sets: set GR_TEST_DATA")
@pytest.mark.parametrize("name", FILES)
def test_a_declared_public_data_set_has_the_figures_of_the_page(home: Path, name: str) -> None:
    assert DATA is not None
    import_file(DATA / FILES[name], home=home, declaration=name)
    result = ingest(home, name)
    build_vocabulary(home, name)
    dataset = SequenceDataset.open(sequentialize(home, name).folder)
    broken = sum(result.quarantined.values())
    counts = (result.rows_in, result.rows_kept, broken, result.duplicates)
    assert result.rows_in == result.rows_kept + broken + result.duplicates
    sizes = (dataset.num_users, dataset.vocabulary.num_items, dataset.num_exposures, int(dataset.lengths.max()))
    assert [f"{count:,}" for count in (*counts, *sizes)] == _stated(name)
    assert check_no_leak(dataset) == []


def _stated(name: str) -> list[str]:
    """Return the figures of a data set's line in the table of the page."""
    line = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert line, f"{PAGE.name} has no line for {name}"
    return [cell.strip() for cell in line.group(1).split("|")]

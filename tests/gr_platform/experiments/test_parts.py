"""The parts of the experiments: the stream's promises, one target an example, fitted laws, means over seeds."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gr_platform.experiments import derived, drifting_stream, passes, render
from gr_platform.experiments.drifting_stream import Stream
from gr_platform.experiments.report import means
from gr_platform.models.recipes import tiny
from gr_platform.sequences.dataset import SequenceDataset

STREAM = Stream(num_records=5_000, length=32, num_items=1_000, num_categories=20)


def _items() -> np.ndarray:
    return np.concatenate(list(drifting_stream.records(STREAM)))


def test_no_record_knows_an_item_that_appears_after_it() -> None:
    items = _items()
    known = STREAM.num_items * (STREAM.initial + (1 - STREAM.initial) * np.arange(len(items)) / len(items))
    assert (items.max(1) < known).all()
    assert items[-500:].max() > 0.95 * STREAM.num_items


def test_records_have_few_categories_of_which_the_frequent_ones_come_back() -> None:
    items = _items()
    category = drifting_stream.generator(STREAM.seed, "categories").permutation(
        np.arange(STREAM.num_items) % STREAM.num_categories
    )[items]
    distinct = np.array([len(np.unique(row)) for row in category])
    assert distinct.max() <= STREAM.categories_a_record
    first, last = category[:, :-1], category[:, -1]
    share = (first == last[:, None]).mean(1)
    # With five categories of equal rights the last one's share would be a fifth.
    assert share.mean() > 0.3


def test_popular_categories_change_along_the_stream() -> None:
    categories = drifting_stream.generator(STREAM.seed, "categories").permutation(
        np.arange(STREAM.num_items) % STREAM.num_categories
    )[_items()]
    begin, end = (np.bincount(part.ravel(), minlength=20) for part in (categories[:1000], categories[-1000:]))
    assert np.corrcoef(begin, end)[0, 1] < 0.8


def test_a_stream_is_a_function_of_its_parameters(tmp_path_factory: pytest.TempPathFactory) -> None:
    folders = [tmp_path_factory.mktemp("stream") for _ in range(2)]
    first, second = (drifting_stream.load(folder, STREAM) for folder in folders)
    rows = np.arange(STREAM.num_records)
    both = [each.gather(rows, np.zeros_like(rows), each.lengths) for each in (first, second)]
    assert np.array_equal(both[0].items, both[1].items)
    assert first.digest == second.digest != drifting_stream.digest(Stream())


def test_a_single_pass_trains_on_no_record_that_it_is_asked_for() -> None:
    split = drifting_stream.holdout(STREAM)
    assert (split.ends[split.targets.rows] == 0).all()
    assert len(split.targets) == 500
    assert int((split.ends > 0).sum()) == 4_500


def test_an_impression_is_one_target_with_all_that_was_known_before_it(cycle_dataset: SequenceDataset) -> None:
    recipe = tiny("retrieval")
    batch = passes.Impressions(cycle_dataset, recipe)(3)
    last = batch.events.offsets[1:] - 1
    assert np.count_nonzero(batch.targets.actions) == recipe.training.batch_size
    assert np.array_equal(batch.targets.actions[last], batch.events.actions[last])
    for row, events in zip(batch.rows, batch.events.histories(), strict=True):
        whole = cycle_dataset.history(int(row), len(events[0]))
        assert np.array_equal(events[0], whole[0])
        assert len(events[0]) <= cycle_dataset.lengths[row] - 2


def test_impressions_are_drawn_evenly_over_training_events(cycle_dataset: SequenceDataset) -> None:
    batches = passes.Impressions(cycle_dataset, tiny("retrieval"))
    drawn = np.concatenate([batches(step).rows for step in range(300)])
    share = np.bincount(drawn, minlength=cycle_dataset.num_users) / len(drawn)
    expected = np.maximum(cycle_dataset.lengths - 2, 0) / np.maximum(cycle_dataset.lengths - 2, 0).sum()
    assert np.abs(share - expected).max() < 0.006


def test_a_power_law_is_found_with_its_residual() -> None:
    x = [1e12, 1e13, 1e14, 1e15]
    fit = derived.power_law(x, [3.0 * value**-0.05 for value in x])
    assert fit is not None
    assert fit["factor"] == pytest.approx(3.0)
    assert fit["exponent"] == pytest.approx(-0.05)
    assert fit["residual"] == pytest.approx(0.0, abs=1e-12)
    assert derived.power_law(x[:2], [1.0, 2.0]) is None


def test_the_cost_of_the_same_quality_is_where_the_curve_first_reaches_it() -> None:
    def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"ndcg_at_10": q, "seconds": s, "tokens": 10 * s, "train_flops": 100 * s} for q, s in points]

    rows = [
        {"label": "generative", "curve": curve((0.05, 1.0), (0.12, 2.0), (0.2, 3.0))},
        {"label": "impression-level", "curve": curve((0.08, 10.0), (0.1, 20.0), (0.09, 30.0))},
    ]
    assert derived.same_quality(rows)["ratios"] == {"seconds": 10.0, "tokens": 10.0, "train_flops": 10.0}


def test_tokens_of_an_epoch_do_not_depend_on_how_long_the_refit_took() -> None:
    def row(alpha: float, quality: float, tokens: int, refits: int) -> dict[str, Any]:
        curve = [{"phase": "validation", "tokens": tokens}] * 3
        refit = [{"phase": "refit", "tokens": tokens + 7}] * refits
        return {"figures": {"alpha": alpha, "ndcg_at_10": quality}, "curve": curve + refit}

    lines = derived.cheaper([row(2.0, 0.2, 100, 1), row(1.6, 0.19, 67, 3)])["lines"]
    assert lines == ["alpha 1.6: NDCG@10 -5.0 %, tokens an epoch 67 %."]


def test_means_are_over_seeds_with_the_sample_deviation() -> None:
    rows = [{"figures": {"x": value}} for value in (1.0, 2.0, 3.0)]
    assert means(rows, "x") == (2.0, 1.0, 3)
    assert means(rows[:1], "x") == (1.0, None, 1)
    assert means(rows, "y") is None
    assert render.cell_of((2.0, 1.0, 3)) == "2 +- 1"


def _report(*machines: str) -> dict[str, Any]:
    rows = [
        {"label": label, "group": "main", "machine": machine, "figures": {"x": 0.5}, "dataset": "", "seed": 1}
        | {"commit": None, "date": "2026-01-01"}
        for label, machine in zip(("first", "second"), machines, strict=True)
    ]
    quoted = [{"label": "theirs", "figures": {"x": 0.25}}, {"label": "silent", "figures": {}}]
    table = {"title": "", "group": "main", "columns": {"x": "X"}, "published": quoted}
    return {"name": "some", "rows": rows, "tables": [table], "plot": {"kind": "bars", "y": ["x"], "group": "main"}}


def test_rows_of_several_machines_say_which() -> None:
    found = _report("slow", "fast")
    assert "machine A: fast; machine B: slow; date" in render.provenance(found)
    lines = render.tables(found)[0].splitlines()
    assert lines[0] == "|  | X | seeds | machine |"
    assert lines[2:5] == ["| first | 0.5000 | 1 | B |", "| second | 0.5000 | 1 | A |", "| *theirs* | 0.2500 |  |  |"]
    alone = _report("slow", "slow")
    assert "machine: slow; date" in render.provenance(alone)
    assert render.tables(alone)[0].splitlines()[2] == "| first | 0.5000 | 1 |"


def test_published_figures_stand_below_ours_in_the_picture() -> None:
    found = _report("slow", "slow")
    assert render._bars_of(found, "x") == [("first", 0.5, 0.0), ("second", 0.5, 0.0), ("theirs", 0.25, None)]
    assert render.plot(found).startswith(b"\x89PNG")


def test_the_results_page_is_made_of_its_files_alone(load_script: Callable[[str], ModuleType]) -> None:
    make = load_script("docs/results/make.py")
    page = make.PAGE.read_text(encoding="utf-8")
    assert make.make(page) == page
    assert {name for _, name, _ in make.BLOCK.findall(page)} == set(make.experiments())
    front = make.FRONT.read_text(encoding="utf-8")
    assert [name for _, name, _ in make.BLOCK.findall(front)] == ["ml_1m"]
    assert make.make(front, make.front_block) == front

"""Weights of an older model for a data set that has grown.

Invariant: a row of the item table is copied only where it means the same item: the older vocabulary is the beginning of
this one, which its digest shows. Rows of new items and everything else that is not copied are a fresh model's.
"""

from pathlib import Path
from typing import Any

import torch

from gr_platform.errors import UserError
from gr_platform.models.build import Model
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.training.load import load_model, read_run

ITEM_ROWS = "embedding.items.weight"


def copy_weights(model: Model, folder: Path, dataset: SequenceDataset) -> int:
    """Copy the weights of the run in `folder` into a fresh model of the data set and return the number of new items.

    Raises UserError if the run is damaged, of another vocabulary, of other tasks, or if any weight but the item table,
    which may have more rows now, has another shape.
    """
    older = load_model(folder)
    _require_beginning(folder, read_run(folder), dataset)
    ours, theirs = dict(model.named_parameters()), dict(older.named_parameters())
    for name in sorted(ours.keys() | theirs.keys()):
        had, has = _shape(theirs, name), _shape(ours, name)
        grown = name == ITEM_ROWS and had and has and had[1:] == has[1:]
        if had != has and not grown:
            raise UserError(
                f"cannot start from {folder.name}: its {name} is {had or 'missing'}, this recipe's is "
                f"{has or 'missing'}; start from a run of the same recipe, or train without one"
            )
    with torch.no_grad():
        for name, weight in theirs.items():
            ours[name][: len(weight)].copy_(weight)
    return len(ours[ITEM_ROWS]) - len(theirs[ITEM_ROWS])


def _require_beginning(folder: Path, run: dict[str, Any], dataset: SequenceDataset) -> None:
    vocabulary, shape = dataset.vocabulary, run["shape"]
    num_items = shape["num_rows"] - vocabulary.first_item
    if num_items > vocabulary.num_items or run.get("vocabulary") != vocabulary.digest_of_first(num_items):
        raise UserError(
            f"cannot start from {folder.name}: its {num_items} items are not the first ones of "
            f"{dataset.declaration.name}, which has {vocabulary.num_items}; start from a run on earlier sequences of "
            "the same data set, or train without one"
        )
    if shape["tasks"] != list(dataset.declaration.tasks):
        raise UserError(
            f"cannot start from {folder.name}: its tasks are {', '.join(shape['tasks'])}, the data set's are "
            f"{', '.join(dataset.declaration.tasks)}; train without it"
        )


def _shape(weights: dict[str, torch.nn.Parameter], name: str) -> list[int] | None:
    return list(weights[name].shape) if name in weights else None

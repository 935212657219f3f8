"""Weights of an older model for a data set that has grown.

Invariant: a row of the item table is copied only where it means the same item: the older vocabulary is the beginning of
this one, which its digest shows. So is a row of a feature's table, whose older values are the first ones of this one.
Rows of new items and values, and everything else that is not copied, are a fresh model's.
"""

import re
from pathlib import Path
from typing import Any

import torch

from gr_platform.errors import UserError
from gr_platform.models.build import Model
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.training.load import load_model, read_run

ITEM_ROWS = "embedding.items.weight"
FEATURE_ROWS = re.compile(r"embedding\.(items\.)?features\.\w+\.weight")


def copy_weights(model: Model, folder: Path, dataset: SequenceDataset) -> int:
    """Copy the weights of the run in `folder` into a fresh model of the data set and return the number of new items.

    Raises UserError if the run is damaged, of another vocabulary, of other tasks or values of a feature, or if any
    weight has another shape, but for the tables of items and of features, which may have more rows now.
    """
    older = load_model(folder)
    _require_beginning(folder, read_run(folder), dataset)
    ours, theirs = dict(model.named_parameters()), dict(older.named_parameters())
    for name in sorted(ours.keys() | theirs.keys()):
        had, has = _shape(theirs, name), _shape(ours, name)
        table = name == ITEM_ROWS or FEATURE_ROWS.fullmatch(name)
        grown = table and had and has and had[1:] == has[1:] and had[0] <= has[0]
        if had != has and not grown:
            raise UserError(
                f"cannot start from {folder.name}: its {name} is {had or 'missing'}, this recipe's is "
                f"{has or 'missing'}; start from a run of the same recipe, or train without one"
            )
    _require_first_values(folder, model, older)
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


def _require_first_values(folder: Path, model: Model, older: Model) -> None:
    """Raise UserError unless each feature's codes say now what they said then."""
    said = dict(model.named_buffers())
    for name, before in older.named_buffers():
        if not name.endswith(".words"):
            continue
        now = said[name][: len(before)]
        first, rest = now[:, : before.shape[1]], now[:, before.shape[1] :]
        if len(now) < len(before) or not torch.equal(first, before) or bool(rest.any()):
            raise UserError(
                f"cannot start from {folder.name}: {name.split('.')[-2]} has other values now than the ones that it "
                "learned; train without it"
            )


def _shape(weights: dict[str, torch.nn.Parameter], name: str) -> list[int] | None:
    return list(weights[name].shape) if name in weights else None

"""A trained model as files: weights in safetensors, recipe and shape in JSON.

Invariant: the folder alone gives the model back; nothing is unpickled.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gr_platform.errors import UserError
from gr_platform.models.build import Model, build_model
from gr_platform.models.config import Recipe
from gr_platform.models.features import FeatureTables
from gr_platform.storage import write_text
from gr_platform.training.checkpoint import State

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"


def save_model(
    folder: Path, recipe: Recipe, state: State, *, vocabulary: str, num_rows: int, num_actions: int, tasks: list[str]
) -> None:
    """Write model.safetensors and recipe.json: the recipe, `shape` (num_rows, num_actions, tasks) and `vocabulary`, the
    digest of the items that the rows are of."""
    shape = {"num_rows": num_rows, "num_actions": num_actions, "tasks": tasks}
    save_file(state, folder / WEIGHTS)
    fields = recipe.to_json() | {"shape": shape, "vocabulary": vocabulary}
    write_text(folder / RECIPE, json.dumps(fields, indent=1) + "\n")


def load_model(folder: Path) -> Model:
    """Return the model of a run folder in eval mode. Raises UserError if a file is missing, damaged or does not fit."""
    fields = read_run(folder)
    config = Recipe.from_json(fields).model
    try:
        state = load_file(folder / WEIGHTS)
        model = build_model(config, **fields["shape"], features=FeatureTables.of_state(config, state))
        model.load_state_dict(state)
    except (FileNotFoundError, SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, FileNotFoundError) else "it is missing"
        raise UserError(f"cannot use {folder.name}/{WEIGHTS} ({reason}); train the model again") from None
    return model.eval()


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `save_model` wrote beside the weights. Raises UserError if it is missing or damaged."""
    try:
        fields: dict[str, Any] = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder.name} holds no {RECIPE}, so it is no trained model; train it again") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder.name}/{RECIPE} is not valid JSON ({error}); train the model again") from None
    return fields

"""A trained model as files: weights in safetensors, recipe and shape in JSON.

Invariant: the folder alone gives the model back; nothing is unpickled.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gr_platform.errors import UserError
from gr_platform.models.build import Model, build_model
from gr_platform.models.config import Recipe
from gr_platform.storage import write_text
from gr_platform.training.checkpoint import State

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"


def save_model(
    folder: Path, recipe: Recipe, state: State, *, num_rows: int, num_actions: int, tasks: list[str]
) -> None:
    """Write model.safetensors and recipe.json (the recipe plus `shape`: num_rows, num_actions, tasks)."""
    shape = {"num_rows": num_rows, "num_actions": num_actions, "tasks": tasks}
    save_file(state, folder / WEIGHTS)
    write_text(folder / RECIPE, json.dumps(recipe.to_json() | {"shape": shape}, indent=1) + "\n")


def load_model(folder: Path) -> Model:
    """Return the model of a run folder in eval mode. Raises UserError if a file is missing, damaged or does not fit."""
    fields = _fields(folder)
    recipe = Recipe.from_json(fields)
    model = build_model(recipe.model, **fields["shape"])
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, FileNotFoundError) else "it is missing"
        raise UserError(f"cannot use {folder.name}/{WEIGHTS} ({reason}); train the model again") from None
    return model.eval()


def _fields(folder: Path) -> dict:
    try:
        fields: dict = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder.name} holds no {RECIPE}, so it is no trained model; train it again") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder.name}/{RECIPE} is not valid JSON ({error}); train the model again") from None
    return fields

"""Recipes in TOML files: what they change is changed; what is wrong in one is a sentence that names file and field."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.models.build import build_model
from gr_platform.models.config import StochasticLength
from gr_platform.models.recipe_files import chosen, command_for, read_recipe, require_known
from gr_platform.models.recipes import named, tiny

WHOLE = """
base = "tiny-hstu_no_time"
name = "mine"
[model]
embedding_dim = 24
item_features = ["genres"]
[training]
learning_rate = 1
refit = true
negatives = "all"
[training.stochastic_length]
alpha = 1.6
"""


def write(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text)
    return folder / "mine.toml"


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_a_file_changes_what_it_says_and_nothing_else(tmp_path, kind):
    base = named("tiny-hstu_no_time", kind)
    expected = replace(base, name="mine", model=replace(base.model, embedding_dim=24, item_features=("genres",)))
    expected = expected.with_training(
        learning_rate=1.0, refit=True, negatives="all", stochastic_length=StochasticLength(alpha=1.6)
    )
    found = chosen(str(write(tmp_path, WHOLE)), kind)
    assert found == expected
    # Results are known by the recipe's JSON, where 1 and 1.0 are two values.
    assert isinstance(found.training.learning_rate, float)


def test_a_recipe_without_a_name_is_called_as_its_file(tmp_path):
    recipe = read_recipe(write(tmp_path, 'base = "tiny"'), "ranking")
    assert recipe == replace(tiny("ranking"), name="mine")


def test_names_are_chosen_as_before():
    assert chosen("tiny-sasrec", "retrieval") == named("tiny-sasrec", "retrieval")
    require_known("auto")
    with pytest.raises(UserError, match="unknown recipe 'huge'"):
        require_known("huge")


def test_the_example_of_the_documentation_builds(tmp_path):
    page = (settings.PROJECT_ROOT / "docs/models.md").read_text(encoding="utf-8")
    [example] = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for kind in ("retrieval", "ranking"):
        recipe = read_recipe(write(tmp_path, example), kind)
        assert recipe.name not in (named("ml_1m", kind).name, "mine")
        with torch.device("meta"):
            build_model(recipe.model, num_rows=50, num_actions=3, tasks=["like"])


BASE = 'base = "tiny"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BASE + '[training]\nlearning_rate = "fast"', "training.learning_rate is 'fast', must be a number"),
        (BASE + "[training]\nlearning_rate = nan", "training.learning_rate is nan, must be a number"),
        (BASE + "[training]\nlearning_rate = -1.0", "training.learning_rate is -1.0, must be positive"),
        (BASE + "[training]\nmax_epochs = true", "training.max_epochs is True, must be a whole number"),
        (BASE + "[training]\nrefit = 1", "training.refit is 1, must be true or false"),
        (BASE + '[training]\nnegatives = "some"', "training.negatives is 'some', must be one of 'shared', 'per_token'"),
        (BASE + "[training]\nseed = 9223372036854775808", "training.seed is 9223372036854775808, must be in"),
        (BASE + "[training]\naccumulate = 3", "training.accumulate is 3, must divide batch_size = 32"),
        (BASE + "[training]\nlearnig_rate = 1.0", "there is no field training.learnig_rate; choose among learning_r"),
        (BASE + "[training]\nstochastic_length = 1.6", "training.stochastic_length is 1.6, must be a table"),
        (BASE + "[training.stochastic_length]\nalpha = 3.0", "training.stochastic_length.alpha is 3.0, must be above"),
        (BASE + "[training.stochastic_length]\nbeta = 3.0", "there is no field training.stochastic_length.beta"),
        (BASE + '[training]\ntable_optimizer = "frozen"', "training.table_optimizer is 'frozen', must be"),
        (BASE + "[model]\nnum_layers = 2.5", "model.num_layers is 2.5, must be a whole number"),
        (BASE + "[model]\nnum_layers = 0", "model.num_layers is 0, must be positive"),
        (BASE + "[model]\nchunk = 99", "model.chunk is 99, must not exceed max_events = 40"),
        (BASE + '[model]\nitem_features = "genres"', "model.item_features is 'genres', must be a list of texts"),
        (BASE + '[model]\nkind = "ranking"', "model.kind cannot be set, since --kind chooses it"),
        (BASE + '[model]\nencoder = "dlrm"', "dlrm ranks single items"),
        (BASE + "model = 3", "model is 3, must be a table"),
        (BASE + 'name = "ml_1m"', "name is 'ml_1m', which is a recipe of gr recipes"),
        (BASE + 'name = "a b"', "name is 'a b', must be 1 to 64 letters"),
        (BASE + "nmae = 3", "there is no entry 'nmae'; choose among base, name, model, training"),
        ('base = "huge"', "unknown recipe 'huge'"),
        ('base = "tiny-dlrm"', "for ranking alone: gr train --kind ranking"),
        ('base = "auto"', "base must name the recipe to start from"),
        ("", "base must name the recipe to start from"),
        ("base = ", "is not valid TOML"),
        ("base = 'tiny'\n[model]\nembedding_dim = 1\nembedding_dim = 2", "is not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence_with_file_and_field(tmp_path, text, told):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_recipe(path, "retrieval")
    sentence = str(caught.value)
    assert sentence.startswith("recipe file mine.toml")
    assert told in sentence
    assert str(tmp_path) not in sentence


def test_a_file_that_cannot_be_read_is_refused_at_once(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name, told in (("gone", "No such file"), ("folder", "Is a directory"), ("binary", "not valid TOML")):
        with pytest.raises(UserError, match=rf"recipe file {name}\.toml.*{told}"):
            require_known(str(tmp_path / f"{name}.toml"))
    require_known(str(write(tmp_path, BASE)))


def test_the_command_that_trains_a_recipe_says_how_it_differs_from_its_name(tmp_path):
    recipe = tiny("retrieval")
    assert command_for(recipe, "shop") == "gr train --recipe tiny --kind retrieval --dataset shop"
    changed = recipe.with_training(seed=7, max_epochs=3)
    assert command_for(changed, "shop", warm_start="12ab") == (
        "gr train --recipe tiny --kind retrieval --dataset shop --seed 7 --epochs 3 --warm-start 12ab"
    )
    for other in (recipe.with_training(learning_rate=0.5), read_recipe(write(tmp_path, BASE), "retrieval")):
        assert f"--recipe FILE-OF-{other.name}.toml --kind retrieval" in command_for(other, "shop")

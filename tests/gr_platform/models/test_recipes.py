"""Recipes and their variants: every name builds, differs from its base in what it says, and wrong ones say why."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from gr_platform.commands import options
from gr_platform.errors import UserError
from gr_platform.models.baselines import VARIANTS, baseline, require_servable
from gr_platform.models.build import build_model
from gr_platform.models.config import MAX_SEED, ModelConfig, Recipe
from gr_platform.models.recipes import RECIPES, named, require_recipe, settled, tiny

KINDS = ("retrieval", "ranking")
IMPOSSIBLE = {("retrieval", "dlrm"): "ranking", ("ranking", "bert4rec"): "retrieval"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds_and_survives_json(name, kind):
    recipe = named(name, kind)
    assert recipe.name == name
    shape = replace(recipe.model, item_features=(), user_features=())  # whose tables only a data set has
    with torch.device("meta"):
        build_model(shape, num_rows=50, num_actions=3, tasks=["like"])
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_builds_or_says_what_to_choose(variant, kind):
    name = f"tiny-{variant}"
    if (kind, variant) in IMPOSSIBLE:
        with pytest.raises(UserError, match=f"choose hstu.* alone: gr train --kind {IMPOSSIBLE[kind, variant]}$"):
            named(name, kind)
        with pytest.raises(UserError, match="choose hstu"):
            build_model(baseline(tiny(kind), variant).model, num_rows=50, num_actions=3, tasks=["like"])
        return
    recipe = named(name, kind)
    model = build_model(recipe.model, num_rows=50, num_actions=3, tasks=["like"])
    assert recipe.name == name
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_variant_keeps_the_shape_of_its_base(variant):
    base = RECIPES["ml_1m_large"]("ranking")
    fields, changed = asdict(base.model), asdict(baseline(base, variant).model)
    may_differ = {"encoder", "absolute_position", "use_actions", "position_bias", "time_bias"}
    assert {name for name in fields if fields[name] != changed[name]} <= may_differ
    assert fields != changed


def test_item_only_models_read_actions_in_ranking_alone():
    for variant in ("sasrec", "gru4rec"):
        assert not named(f"small-{variant}", "retrieval").model.use_actions
        assert named(f"small-{variant}", "ranking").model.use_actions
    assert not named("small-bert4rec", "retrieval").model.use_actions
    assert named("small-transformer", "retrieval").model.use_actions


def test_a_frozen_table_and_a_matching_start_are_for_models_that_can_have_them():
    with pytest.raises(ValueError, match=r"table_optimizer is 'frozen', must be .* for retrieval"):
        tiny("retrieval").with_training(table_optimizer="frozen")
    base = tiny("ranking").with_training(table_optimizer="frozen", start="matching")
    with pytest.raises(ValueError, match="start is 'matching', must be 'independent' for encoder 'sasrec'"):
        replace(base, model=replace(base.model, encoder="sasrec"))
    starts = {name: baseline(base, name).training.start for name in ("hstu_no_rab", "hstu_softmax", "sasrec", "dlrm")}
    assert starts == {
        "hstu_no_rab": "matching",
        "hstu_softmax": "independent",
        "sasrec": "independent",
        "dlrm": "independent",
    }
    assert baseline(base, "dlrm").training.table_optimizer == "frozen"


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_that_generators_cannot_take_is_refused(seed):
    assert tiny("retrieval").with_training(seed=MAX_SEED).training.seed == MAX_SEED == options.MAX_SEED
    with pytest.raises(ValueError, match=rf"TrainingConfig\.seed is {seed}, must be in"):
        tiny("retrieval").with_training(seed=seed)


def test_shapes_of_the_papers_data_sets_are_the_papers():
    shapes = {}
    for name in ("ml_1m", "ml_1m_large", "ml_20m", "ml_20m_large", "books", "books_large"):
        model = RECIPES[name]("retrieval").model
        shapes[name] = (model.embedding_dim, model.num_layers, model.num_heads, model.qk_dim, model.v_dim)
    assert shapes == {
        "ml_1m": (50, 2, 1, 50, 50),
        "ml_1m_large": (50, 8, 2, 25, 25),
        "ml_20m": (256, 4, 4, 64, 64),
        "ml_20m_large": (256, 16, 8, 32, 32),
        "books": (64, 4, 4, 16, 16),
        "books_large": (64, 16, 8, 8, 8),
    }


@pytest.mark.parametrize("name", ["huge", "tiny-", "tiny-huge", "huge-sasrec", "tiny-sasrec-gru4rec", "-sasrec"])
def test_an_unknown_name_is_refused_with_what_there_is(name):
    with pytest.raises(UserError, match=rf"unknown recipe '{name}'.* tiny, each also with one of -transformer"):
        require_recipe(name)
    with pytest.raises(UserError, match="unknown recipe"):
        named(name, "retrieval")


def test_auto_settles_on_the_recipe_of_the_data_set():
    assert settled("auto", "ml-1m") == "ml_1m"
    assert settled("auto", "of-our-own") == "small"
    assert settled("tiny", "ml-1m") == "tiny"
    require_recipe("auto")


def test_what_cannot_be_served_says_what_can():
    for variant in ("transformer", "sasrec", "hstu_softmax", "hstu_no_rab"):
        require_servable(baseline(tiny("ranking"), variant).model)
    for variant in ("gru4rec", "dlrm"):
        with pytest.raises(UserError, match="serve hstu, hstu_softmax, transformer or sasrec"):
            require_servable(baseline(tiny("ranking"), variant).model)


@pytest.mark.parametrize(("variant", "features"), [("bert4rec", "context_features"), ("dlrm", "user_features")])
def test_features_that_an_encoder_cannot_read_are_refused(variant, features):
    kind = "ranking" if variant == "dlrm" else "retrieval"
    fields = asdict(baseline(tiny(kind), variant).model) | {features: ("age",)}
    with pytest.raises(UserError, match=f"{variant} cannot read feature 'age'"):
        build_model(ModelConfig(**fields), num_rows=50, num_actions=3, tasks=["like"])

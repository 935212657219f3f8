"""The named recipes: one function each, `RECIPES[name](kind)` gives the retrieval or the ranking model of it."""

from collections.abc import Callable

from gr_platform.errors import UserError
from gr_platform.models.config import Kind, ModelConfig, Recipe, TrainingConfig


def tiny(kind: Kind) -> Recipe:
    """Return a model that trains in seconds: for tests."""
    return Recipe(
        name="tiny",
        model=ModelConfig(
            kind=kind, embedding_dim=16, num_layers=2, num_heads=2, qk_dim=8, v_dim=8, max_events=40, chunk=8
        ),
        training=TrainingConfig(learning_rate=4e-3, max_epochs=6, patience=6, batch_size=32, num_negatives=64),
    )


def small(kind: Kind) -> Recipe:
    """Return the default: trains on some 200 k events in about a minute on two cores."""
    return Recipe(
        name="small",
        model=ModelConfig(kind=kind, embedding_dim=48, num_layers=2, num_heads=2, qk_dim=24, v_dim=24, max_events=100),
        training=TrainingConfig(max_epochs=8, batch_size=32),
    )


def ml_1m(kind: Kind) -> Recipe:
    """Return the paper's ML-1M HSTU shape (2 layers, one head of 50) with the epochs that two cores have time for."""
    ranking = kind == "ranking"
    return Recipe(
        name="ml_1m",
        model=ModelConfig(
            kind=kind,
            embedding_dim=50,
            num_layers=2,
            num_heads=1,
            qk_dim=50,
            v_dim=50,
            max_events=100 if ranking else 200,
        ),
        training=TrainingConfig(max_epochs=6 if ranking else 36, batch_size=32, patience=3 if ranking else 6),
    )


RECIPES: dict[str, Callable[[Kind], Recipe]] = {"tiny": tiny, "small": small, "ml_1m": ml_1m}
AUTO = "auto"


def require_recipe(name: str) -> None:
    """Raise UserError unless `name` is a recipe's or `auto`: asked first, since training comes late in a run."""
    if name != AUTO and name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; choose {AUTO} or one of {', '.join(sorted(RECIPES))}")

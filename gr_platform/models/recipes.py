"""The named recipes: one function each, `named(name, kind)` gives the retrieval or the ranking model of it.

Shapes of the paper's data sets are those of its authors (PAPER section 6), and so is the training of ML-20M and Books;
that of ML-1M was chosen on validation (docs/results). Recipes of Retailrocket and Amazon Sports are sized to the data.
"""

from collections.abc import Callable
from dataclasses import replace

from gr_platform.errors import UserError
from gr_platform.models.baselines import VARIANTS, baseline, require_possible
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
    """Return the paper's ML-1M HSTU: 2 layers, one head of 50, its loss; refitted on all but the test.

    Batches of 32 on a cosine schedule reach in 32 epochs what the paper's, of 128 at a constant rate, take 80 for.
    """
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
        training=TrainingConfig(max_epochs=30, batch_size=32, patience=4, refit=True)
        if ranking
        else TrainingConfig(
            learning_rate=4e-3,
            schedule="cosine",
            batch_size=32,
            max_epochs=32,
            patience=32,
            num_negatives=128,
            negatives="per_token",
            windows="random",
            refit=True,
        ),
    )


def ml_1m_large(kind: Kind) -> Recipe:
    """Return the paper's HSTU-large for ML-1M: 8 layers, two heads of 25."""
    base = ml_1m(kind)
    return replace(base, name="ml_1m_large", model=replace(base.model, num_layers=8, num_heads=2, qk_dim=25, v_dim=25))


def ml_1m_features(kind: Kind) -> Recipe:
    """Return HSTU-large that also reads genres and who the viewers are, against all items instead of drawn ones.

    Needs MovieLens-1M's movies.dat and users.dat imported (docs/data.md, Features). Without a bundle: requests do not
    carry what is known of users.
    """
    base = ml_1m_large(kind)
    model = replace(base.model, item_features=("genres",), user_features=("gender", "age", "occupation"))
    return replace(base, name="ml_1m_features", model=model).with_training(negatives="all")


def ml_20m(kind: Kind) -> Recipe:
    """Return the paper's ML-20M HSTU: width 256, 4 layers, four heads of 64, its own loss and epochs."""
    return Recipe(
        name="ml_20m",
        model=ModelConfig(
            kind=kind,
            embedding_dim=256,
            num_layers=4,
            num_heads=4,
            qk_dim=64,
            v_dim=64,
            max_events=100 if kind == "ranking" else 200,
        ),
        training=TrainingConfig(max_epochs=101, patience=6, num_negatives=128, negatives="per_token"),
    )


def ml_20m_large(kind: Kind) -> Recipe:
    """Return the paper's ML-20M HSTU-large: width 256, 16 layers, eight heads of 32."""
    base = ml_20m(kind)
    model = replace(base.model, num_layers=16, num_heads=8, qk_dim=32, v_dim=32)
    return replace(base, name="ml_20m_large", model=model)


def books(kind: Kind) -> Recipe:
    """Return the paper's Amazon Books HSTU: width 64, 4 layers, four heads of 16, dropout .5, 50 events."""
    return Recipe(
        name="books",
        model=ModelConfig(
            kind=kind,
            embedding_dim=64,
            num_layers=4,
            num_heads=4,
            qk_dim=16,
            v_dim=16,
            max_events=50,
            dropout=0.5,
        ),
        training=TrainingConfig(max_epochs=201, patience=10, num_negatives=512, negatives="per_token"),
    )


def books_large(kind: Kind) -> Recipe:
    """Return the paper's Amazon Books HSTU-large: width 64, 16 layers, eight heads of 8."""
    base = books(kind)
    model = replace(base.model, num_layers=16, num_heads=8, qk_dim=8, v_dim=8)
    return replace(base, name="books_large", model=model)


def retailrocket(kind: Kind) -> Recipe:
    """Return a model for Retailrocket's views, carts and purchases: width 64, 2 layers, two heads of 32.

    What users do with an item hangs on whether they met it before. A ranking model that learns the items' vectors
    remembers instead what each item got, which is wrong the next time; so they stay the codes that they start as.
    """
    retrieval = TrainingConfig(max_epochs=40, patience=4, batch_size=32)
    codes = replace(
        retrieval, table_optimizer="frozen", start="matching", learning_rate=3e-3, schedule="cosine", patience=8
    )
    return Recipe(
        name="retailrocket",
        model=ModelConfig(
            kind=kind,
            embedding_dim=64,
            num_layers=2,
            num_heads=2,
            qk_dim=32,
            v_dim=32,
            max_events=100,
            dropout=0.3 if kind == "ranking" else 0.5,
        ),
        training=codes if kind == "ranking" else retrieval,
    )


def amazon_sports(kind: Kind) -> Recipe:
    """Return a model for Amazon Sports' short sequences: width 64, 2 layers, two heads of 32, dropout .5, 50 events."""
    return Recipe(
        name="amazon_sports",
        model=ModelConfig(
            kind=kind,
            embedding_dim=64,
            num_layers=2,
            num_heads=2,
            qk_dim=32,
            v_dim=32,
            max_events=50,
            dropout=0.5,
        ),
        training=TrainingConfig(max_epochs=40, patience=4),
    )


_FUNCTIONS = (
    tiny,
    small,
    ml_1m,
    ml_1m_large,
    ml_1m_features,
    ml_20m,
    ml_20m_large,
    books,
    books_large,
    retailrocket,
    amazon_sports,
)
RECIPES: dict[str, Callable[[Kind], Recipe]] = {recipe.__name__: recipe for recipe in _FUNCTIONS}
AUTO = "auto"
# What `auto` is for the data sets that a recipe was made for and that two cores train in hours, not days.
SUITED = {"ml-1m": "ml_1m", "retailrocket": "retailrocket", "amazon-sports": "amazon_sports"}


def named(name: str, kind: Kind) -> Recipe:
    """Return the recipe of that name (`ml_1m`), or a variant of it (`ml_1m-sasrec`, baselines.py).

    Raises UserError for an unknown name and for an encoder that cannot make a model of this kind.
    """
    base, variant = _parts(name)
    recipe = RECIPES[base](kind)
    if variant:
        recipe = baseline(recipe, variant)
    require_possible(recipe.model)
    return recipe


def settled(name: str, ds: str) -> str:
    """Return the name itself, or for `auto` that of the recipe that suits the data set."""
    return SUITED.get(ds, small.__name__) if name == AUTO else name


def require_recipe(name: str) -> None:
    """Raise UserError unless `name` is a recipe's or `auto`: asked first, since training comes late in a run."""
    if name != AUTO:
        _parts(name)


def _parts(name: str) -> tuple[str, str]:
    """Return the names of a recipe and of its variant, "" for the recipe itself. Raises UserError for other names."""
    base, dash, variant = name.partition("-")
    if base in RECIPES and (variant in VARIANTS or not dash):
        return base, variant
    raise UserError(
        f"unknown recipe {name!r}; choose {AUTO} or one of {', '.join(sorted(RECIPES))}, each also with one of "
        f"-{', -'.join(VARIANTS)}"
    )

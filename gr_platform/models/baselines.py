"""The models that HSTU is measured against, each a variant of any recipe: `ml_1m-sasrec` is `sasrec(ml_1m(kind))`.

Invariant: a variant keeps its base's data, loss, training and shape (width, layers, heads) and changes what its name
says, so two of them differ in one thing. Models that were published without actions and side information read none.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gr_platform.errors import UserError
from gr_platform.models.config import ModelConfig, Recipe

# What a Transformer has in place of rab, and what item-only models leave out.
NO_BIAS: dict[str, Any] = {"position_bias": False, "time_bias": False}
NO_FEATURES: dict[str, Any] = {"item_features": (), "context_features": (), "user_features": ()}
# Encoders that keep no K/V, or see what comes later.
UNSERVED = ("gru4rec", "bert4rec", "dlrm")


def transformer(base: Recipe) -> Recipe:
    """Return Transformer++ (softmax attention, rotary positions, SwiGLU) on the same tokens."""
    return _variant(base, "transformer", encoder="transformer", absolute_position=False, **NO_BIAS)


def sasrec(base: Recipe) -> Recipe:
    """Return SASRec: causal softmax attention over items and learned positions, no actions (but in ranking)."""
    return _variant(base, "sasrec", encoder="sasrec", absolute_position=True, **NO_BIAS, **_items_alone(base))


def gru4rec(base: Recipe) -> Recipe:
    """Return GRU4Rec: a recurrent network over items, no actions (but in ranking)."""
    return _variant(base, "gru4rec", encoder="gru4rec", absolute_position=False, **NO_BIAS, **_items_alone(base))


def bert4rec(base: Recipe) -> Recipe:
    """Return BERT4Rec: bidirectional attention that names hidden items, softmax over all of them; no actions."""
    model = _variant(base, "bert4rec", encoder="bert4rec", absolute_position=True, **NO_BIAS, **_items_alone(base))
    return model.with_training(negatives="all")


def dlrm(base: Recipe) -> Recipe:
    """Return DLRM: ranking by made features, dot-product crosses and MLPs."""
    return _variant(base, "dlrm", encoder="dlrm", absolute_position=False, user_features=(), **NO_BIAS)


def hstu_no_rab(base: Recipe) -> Recipe:
    """Return HSTU without relative attention bias."""
    return _variant(base, "hstu_no_rab", encoder="hstu", **NO_BIAS)


def hstu_no_time(base: Recipe) -> Recipe:
    """Return HSTU whose attention bias knows distances alone."""
    return _variant(base, "hstu_no_time", encoder="hstu", position_bias=True, time_bias=False)


def hstu_no_position(base: Recipe) -> Recipe:
    """Return HSTU whose attention bias knows times alone."""
    return _variant(base, "hstu_no_position", encoder="hstu", position_bias=False, time_bias=True)


def hstu_softmax(base: Recipe) -> Recipe:
    """Return HSTU with softmax in place of pointwise attention."""
    return _variant(base, "hstu_softmax", encoder="hstu_softmax")


def hstu_softmax_no_rab(base: Recipe) -> Recipe:
    """Return HSTU with softmax in place of pointwise attention and without relative attention bias."""
    return _variant(base, "hstu_softmax_no_rab", encoder="hstu_softmax", **NO_BIAS)


def _variant(base: Recipe, name: str, **model: Any) -> Recipe:
    changed = replace(base.model, **model)
    start = base.training.start if changed.encoder == "hstu" else "independent"
    return replace(base, name=f"{base.name}-{name}", model=changed, training=replace(base.training, start=start))


def _items_alone(base: Recipe) -> dict[str, Any]:
    """Return what an item-only model reads; a ranking model cannot do without its action tokens."""
    return {"use_actions": base.model.kind == "ranking"} | NO_FEATURES


_FUNCTIONS = (
    transformer,
    sasrec,
    gru4rec,
    bert4rec,
    dlrm,
    hstu_no_rab,
    hstu_no_time,
    hstu_no_position,
    hstu_softmax,
    hstu_softmax_no_rab,
)
VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {variant.__name__: variant for variant in _FUNCTIONS}


def baseline(base: Recipe, name: str) -> Recipe:
    """Return the variant of a recipe that stands in VARIANTS under this name. Raises UserError for another name."""
    if name not in VARIANTS:
        raise UserError(f"unknown variant {name!r} of a recipe; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name](base)


def require_possible(config: ModelConfig) -> None:
    """Raise UserError if the encoder cannot make a model of this kind, or cannot read the features asked for."""
    kind, encoder = config.kind, config.encoder
    if kind == "retrieval" and encoder == "dlrm":
        raise UserError(
            "dlrm ranks single items and cannot retrieve from a catalogue; choose hstu, hstu_softmax, transformer, "
            "sasrec, gru4rec or bert4rec for retrieval, or train dlrm for ranking alone: gr train --kind ranking"
        )
    if kind == "ranking" and encoder == "bert4rec":
        raise UserError(
            "bert4rec learns from hidden items and cannot rank by actions; choose hstu, hstu_softmax, transformer, "
            "sasrec, gru4rec or dlrm for ranking, or train bert4rec for retrieval alone: gr train --kind retrieval"
        )
    unread = {
        "bert4rec": (*config.context_features, *config.user_features),
        "dlrm": config.user_features,
    }.get(encoder, ())
    if unread:
        raise UserError(f"{encoder} cannot read feature {unread[0]!r}; drop it from the recipe or choose hstu")


def require_servable(config: ModelConfig) -> None:
    """Raise UserError unless a bundle can hold the model: its encoder must go on from cached K/V."""
    if config.encoder in UNSERVED:
        raise UserError(
            f"{config.encoder} cannot go on from cached keys and values, so there is no bundle of it; "
            "serve hstu, hstu_softmax, transformer or sasrec instead"
        )

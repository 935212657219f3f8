"""A model from its configuration and its data set's shape: the one place where kinds and encoders are told apart."""

from collections.abc import Callable

from gr_platform.errors import UserError
from gr_platform.models.config import ModelConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.hstu import HSTU
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.vocabulary import NUM_OOV

# Raised when the same configuration and weights would give other scores: part of every training fingerprint.
MODEL_VERSION = 2
Model = RetrievalModel | RankingModel
ENCODERS: dict[str, Callable[[ModelConfig], Encoder]] = {"hstu": HSTU}


def build_model(config: ModelConfig, *, num_rows: int, num_actions: int, tasks: list[str]) -> Model:
    """Return an untrained model; draws from torch's global generator, so seed it first.

    num_rows counts padding and out-of-vocabulary rows. Raises UserError for a ranking model without tasks.
    """
    first_item = 1 + NUM_OOV
    if config.kind == "retrieval":
        return RetrievalModel(
            config, build_encoder(config), num_rows=num_rows, first_item=first_item, num_actions=num_actions
        )
    if not tasks:
        raise UserError(
            "the data set declares no tasks, so there is nothing to rank by; add [tasks] to its dataset.toml"
        )
    return RankingModel(
        config, build_encoder(config), num_rows=num_rows, first_item=first_item, num_actions=num_actions, tasks=tasks
    )


def build_encoder(config: ModelConfig) -> Encoder:
    """Return the untrained encoder that the configuration names."""
    return ENCODERS[config.encoder](config)

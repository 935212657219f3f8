"""A model from its configuration and its data set's shape: the one place where kinds and encoders are told apart."""

from collections.abc import Callable
from typing import Any

from gr_platform.errors import UserError
from gr_platform.models.baselines import require_possible
from gr_platform.models.bert4rec import BERT4Rec, BidirectionalEncoder
from gr_platform.models.config import ModelConfig
from gr_platform.models.dlrm import DLRM
from gr_platform.models.encoder import Encoder
from gr_platform.models.features import FeatureTables
from gr_platform.models.gru4rec import GRU4Rec
from gr_platform.models.hstu import HSTU
from gr_platform.models.hstu_softmax import HSTUSoftmax
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.models.sasrec import SASRec
from gr_platform.models.transformer import Transformer
from gr_platform.sequences.vocabulary import NUM_OOV

# Raised when the same configuration and weights would give other scores: part of every training fingerprint.
MODEL_VERSION = 2
Model = RetrievalModel | RankingModel
ENCODERS: dict[str, Callable[[ModelConfig], Encoder]] = {
    "hstu": HSTU,
    "hstu_softmax": HSTUSoftmax,
    "transformer": Transformer,
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "bert4rec": BidirectionalEncoder,
}


def build_model(
    config: ModelConfig, *, num_rows: int, num_actions: int, tasks: list[str], features: FeatureTables | None = None
) -> Model:
    """Return an untrained model; draws from torch's global generator, so seed it first.

    num_rows counts padding and out-of-vocabulary rows; features: the tables of what `config` reads (features.py).
    Raises UserError for a ranking model without tasks and for an encoder that cannot do what is asked of it.
    """
    require_possible(config)
    first_item = 1 + NUM_OOV
    if config.kind == "retrieval":
        retrieval = BERT4Rec if config.encoder == "bert4rec" else RetrievalModel
        return retrieval(
            config,
            build_encoder(config),
            num_rows=num_rows,
            first_item=first_item,
            num_actions=num_actions,
            features=features,
        )
    if not tasks:
        raise UserError(
            "the data set declares no tasks, so there is nothing to rank by; add [tasks] to its dataset.toml"
        )
    shape: dict[str, Any] = {"num_rows": num_rows, "first_item": first_item, "num_actions": num_actions, "tasks": tasks}
    if config.encoder == "dlrm":
        return DLRM(config, **shape, features=features)
    return RankingModel(config, build_encoder(config), **shape, features=features)


def build_encoder(config: ModelConfig) -> Encoder:
    """Return the untrained encoder that the configuration names."""
    return ENCODERS[config.encoder](config)

"""What a model is and how it is trained, as frozen values; recipes are functions that return them.

Invariant: everything that changes a score stands in `ModelConfig`, which travels in the bundle; everything that changes
only how weights were found stands in `TrainingConfig`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Kind = Literal["retrieval", "ranking"]
Encoder = Literal["hstu", "hstu_softmax", "transformer", "sasrec", "gru4rec", "bert4rec", "dlrm"]
Negatives = Literal["shared", "per_token", "all"]
Choice = Literal["recent", "recency", "uniform"]
Windows = Literal["last", "random"]
Schedule = Literal["constant", "cosine", "linear"]
TableOptimizer = Literal["adamw", "rowwise", "frozen"]
Start = Literal["independent", "matching"]
Precision = Literal["auto", "fp32", "bf16"]
MAX_SEED = 2**63 - 1


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name} is {value}, must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model. Tokens: a start token, then one per event (retrieval) or two (ranking: item, action).

    encoder: what turns token vectors into rows (encoder.py). use_actions: whether a retrieval token says what was done
    with its item. position_bias, time_bias: the two terms of HSTU's rab. ffn_dim: width of a Transformer's
    feed-forward, 0 for its own default. item_features, context_features, user_features: names of the data set's side
    information that the model reads (models/features.py); a user's slow series become at most max_feature_tokens
    tokens of their own.
    """

    kind: Kind
    encoder: Encoder = "hstu"
    embedding_dim: int
    num_layers: int
    num_heads: int
    qk_dim: int
    v_dim: int
    max_events: int
    chunk: int = 16
    dropout: float = 0.2
    absolute_position: bool = True
    use_actions: bool = True
    position_bias: bool = True
    time_bias: bool = True
    ffn_dim: int = 0
    temperature: float = 0.05
    item_features: tuple[str, ...] = ()
    context_features: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    max_feature_tokens: int = 16

    def __post_init__(self) -> None:
        self._check_features()
        _positive(
            self, "embedding_dim", "num_layers", "num_heads", "qk_dim", "v_dim", "max_events", "chunk", "temperature"
        )
        if self.kind not in ("retrieval", "ranking"):
            raise ValueError(f"ModelConfig.kind is {self.kind!r}, must be 'retrieval' or 'ranking'")
        if self.encoder not in get_args(Encoder):
            raise ValueError(f"ModelConfig.encoder is {self.encoder!r}, must be one of {', '.join(get_args(Encoder))}")
        if self.ffn_dim < 0:
            raise ValueError(f"ModelConfig.ffn_dim is {self.ffn_dim}, must be 0 or more")
        if self.kind == "ranking" and not self.use_actions:
            raise ValueError(
                "ModelConfig.use_actions is False, must be True for ranking: its action tokens are the actions"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ModelConfig.dropout is {self.dropout}, must be in [0, 1)")
        if self.chunk > self.max_events:
            raise ValueError(f"ModelConfig.chunk is {self.chunk}, must not exceed max_events = {self.max_events}")

    def _check_features(self) -> None:
        for name in ("item_features", "context_features", "user_features"):
            # Out of JSON they come as lists.
            names = tuple(getattr(self, name))
            object.__setattr__(self, name, names)
            if len(set(names)) != len(names):
                raise ValueError(f"ModelConfig.{name} is {names}, must not name a feature twice")
        if self.max_feature_tokens < len(self.user_features):
            raise ValueError(
                f"ModelConfig.max_feature_tokens is {self.max_feature_tokens}, must be at least the number of "
                f"user_features, {len(self.user_features)}"
            )

    @property
    def max_seq_len(self) -> int:
        """Longest sequence in tokens: start, slow series, the visible history, and the event that is asked about."""
        events = (self.max_events + 1) * (2 if self.kind == "ranking" else 1)
        return 1 + (self.max_feature_tokens if self.user_features else 0) + events

    @property
    def attention_divisor(self) -> int:
        """The constant `N` that attention is divided by: never the length of a batch."""
        return self.max_seq_len


@dataclass(frozen=True, slots=True, kw_only=True)
class StochasticLength:
    """How training thins long sequences (PAPER section 3); alpha = 2 keeps all.

    Of a sequence longer than `max_len ** (alpha / 2)` events mostly that many are kept: the last ones ("recent"), or
    drawn with weights by recency ("recency") or equal ones ("uniform").
    """

    alpha: float = 2.0
    choice: Choice = "recency"

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 2:
            raise ValueError(f"StochasticLength.alpha is {self.alpha}, must be above 1 and at most 2")
        if self.choice not in get_args(Choice):
            raise ValueError(f"StochasticLength.choice is {self.choice!r}, must be 'recent', 'recency' or 'uniform'")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How weights are found.

    schedule, warmup_steps: the learning rate from step to step (training/optim.py). weight_decay: of weight matrices,
    never of embeddings, norms and biases. table_optimizer: "rowwise" keeps one second moment for each row of the item
    table, "frozen" leaves items the vectors that were drawn for them. start: "matching" starts HSTU's keys as its
    queries and its values as its gates, so that an item finds itself in the history. clip_norm: longest gradient of a
    step, 0 for any. batch_size: users a step; accumulate: how many parts they are read in, one after the other, to save
    memory. max_epochs, patience: when to stop, and after how many epochs without a better validation figure. refit:
    train again for the chosen number of epochs on everything but the test exposures. average: decay of a running mean
    of the weights, which is then judged and saved; 0 for the weights themselves. precision: "auto" is bf16 autocast on
    a GPU and fp32 on the CPU. compile: run the encoder through torch.compile. negatives: one draw a step that all its
    targets share, one for each target (the paper's), or all items. windows: which max_events of a longer history an
    epoch trains on: the last ones, as serving sees them, or ones drawn anew for each user and epoch, so that all of the
    history is learned from.
    """

    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    table_optimizer: TableOptimizer = "adamw"
    start: Start = "independent"
    clip_norm: float = 0.0
    batch_size: int = 128
    accumulate: int = 1
    max_epochs: int = 20
    patience: int = 2
    refit: bool = False
    average: float = 0.0
    precision: Precision = "auto"
    compile: bool = False
    num_negatives: int = 512
    negatives: Negatives = "shared"
    windows: Windows = "last"
    stochastic_length: StochasticLength = StochasticLength()
    seed: int = 1

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "batch_size", "accumulate", "max_epochs", "patience", "num_negatives")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"TrainingConfig.{name} is {getattr(self, name)}, must be 0 or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"TrainingConfig.seed is {self.seed}, must be in [0, 2**63)")
        if not 0 <= self.average < 1:
            raise ValueError(f"TrainingConfig.average is {self.average}, must be in [0, 1)")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"TrainingConfig.accumulate is {self.accumulate}, must divide batch_size = {self.batch_size}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(map(repr, get_args(choices)))
                raise ValueError(f"TrainingConfig.{name} is {getattr(self, name)!r}, must be one of {allowed}")


_CHOICES = {
    "schedule": Schedule,
    "table_optimizer": TableOptimizer,
    "start": Start,
    "precision": Precision,
    "negatives": Negatives,
    "windows": Windows,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A named model with its training: what the registry records and a re-run is recognised by."""

    name: str
    model: ModelConfig
    training: TrainingConfig

    def __post_init__(self) -> None:
        if self.training.table_optimizer == "frozen" and self.model.kind == "retrieval":
            raise ValueError(
                "TrainingConfig.table_optimizer is 'frozen', must be 'adamw' or 'rowwise' for retrieval: it ranks by "
                "the items' vectors"
            )
        if self.training.start == "matching" and self.model.encoder != "hstu":
            raise ValueError(
                f"TrainingConfig.start is 'matching', must be 'independent' for encoder "
                f"{self.model.encoder!r}: pointwise attention alone has a use for it"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON-able values."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Recipe":
        """Return the recipe that `to_json` wrote."""
        training = dict(fields["training"])
        if "stochastic_length" in training:
            training["stochastic_length"] = StochasticLength(**training["stochastic_length"])
        return Recipe(name=fields["name"], model=ModelConfig(**fields["model"]), training=TrainingConfig(**training))

    def with_training(self, **changes: Any) -> "Recipe":
        """Return the recipe with training fields replaced."""
        return replace(self, training=replace(self.training, **changes))

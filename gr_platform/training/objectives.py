"""What each kind of model minimises and which validation figure chooses its best epoch.

Invariant: what `validate` returns as goal is higher-is-better for every kind; validation sees the targets of at most
VALIDATION_USERS users, the same ones in every epoch.
"""

from typing import Any, Protocol

import numpy as np
import torch

from gr_platform.errors import UserError
from gr_platform.evaluation.protocols import evaluate_ranking, evaluate_retrieval, split_targets
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import Model
from gr_platform.models.config import Recipe
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel, target_events
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import Holdout, leave_one_out
from gr_platform.training.negatives import uniform_negatives

VALIDATION_USERS = 2_000


class Objective(Protocol):
    """One kind's loss and validation. goal: the figure that chooses; num_outputs: logits of a target."""

    goal: str
    num_outputs: int

    def num_targets(self, batch: EventBatch) -> int:
        """Return how many targets of a batch have negatives of their own, 0 where none has."""
        ...

    def loss(self, model: Model, batch: EventBatch, step: int, first_target: int = 0) -> tuple[torch.Tensor, int]:
        """Return the sum of the losses of the batch's targets, on the model's device, and the number of targets.

        first_target: how many targets with negatives of their own the step has before the batch's.
        """
        ...

    def validate(self, model: Model) -> tuple[dict[str, Any], float]:
        """Return the validation figures and the goal, the one to maximise."""
        ...


class RetrievalObjective:
    """Sampled softmax; the goal is NDCG@10 over the whole catalogue."""

    goal = "ndcg_at_10"

    def __init__(self, dataset: SequenceDataset, recipe: Recipe, validation: Holdout | None = None) -> None:
        self.dataset, self.training = dataset, recipe.training
        self.validation = validation or leave_one_out(dataset, "validation")
        self.positive_mask = dataset.declaration.positive_mask()
        drawn, items = recipe.training.num_negatives, dataset.vocabulary.num_items
        self.num_outputs = items if recipe.training.negatives == "all" else 1 + drawn
        require_targets(dataset, self.validation, positives_only=True)

    def num_targets(self, batch: EventBatch) -> int:
        """Return how many targets have negatives of their own."""
        per_token = self.training.negatives == "per_token"
        return int(target_events(batch, self.positive_mask).sum()) if per_token else 0

    def loss(self, model: Model, batch: EventBatch, step: int, first_target: int = 0) -> tuple[torch.Tensor, int]:
        """Return the summed loss against this step's negatives."""
        assert isinstance(model, RetrievalModel)
        if self.training.negatives == "all":
            return model.loss(batch, negatives=None, positive_mask=self.positive_mask)
        vocabulary = self.dataset.vocabulary
        negatives = uniform_negatives(
            first_item=vocabulary.first_item,
            num_rows=vocabulary.num_rows,
            num_negatives=self.training.num_negatives,
            seed=self.training.seed,
            step=step,
            num_targets=self.num_targets(batch) if self.training.negatives == "per_token" else None,
            first_target=first_target,
        )
        return model.loss(batch, negatives=negatives, positive_mask=self.positive_mask)

    def validate(self, model: Model) -> tuple[dict[str, Any], float]:
        """Return hr_at_10 and ndcg_at_10."""
        assert isinstance(model, RetrievalModel)
        facts = evaluate_retrieval(model, self.dataset, self.validation, max_users=VALIDATION_USERS)
        return {name: facts[name] for name in ("hr_at_10", "ndcg_at_10")}, facts["ndcg_at_10"]


class RankingObjective:
    """Binary cross entropy of every task; the goal is the negated mean log loss over tasks."""

    goal = "log_loss"

    def __init__(self, dataset: SequenceDataset, recipe: Recipe, validation: Holdout | None = None) -> None:
        self.dataset = dataset
        self.validation = validation or leave_one_out(dataset, "validation")
        self.task_masks = list(dataset.declaration.task_masks().values())
        self.num_outputs = len(self.task_masks)
        require_learnable_task(dataset, self.validation.ends)
        require_targets(dataset, self.validation, positives_only=False)

    def num_targets(self, batch: EventBatch) -> int:
        """Return 0: there are no negatives to draw."""
        return 0

    def loss(self, model: Model, batch: EventBatch, step: int, first_target: int = 0) -> tuple[torch.Tensor, int]:
        """Return the summed loss of events, a mean over tasks each."""
        assert isinstance(model, RankingModel)
        return model.loss(batch, task_masks=self.task_masks)

    def validate(self, model: Model) -> tuple[dict[str, Any], float]:
        """Return the mean log_loss and each task's NE (`ne_<task>`)."""
        assert isinstance(model, RankingModel)
        facts = evaluate_ranking(model, self.dataset, self.validation, max_users=VALIDATION_USERS)
        loss = float(np.mean([task["log_loss"] for task in facts.values()]))
        return {"log_loss": loss} | {f"ne_{name}": task["ne"] for name, task in facts.items()}, -loss


def objective_of(dataset: SequenceDataset, recipe: Recipe, validation: Holdout | None = None) -> Objective:
    """Return the objective of the recipe's kind, judged on `validation`, the next-to-last exposures where None.

    Raises UserError if the data set cannot train it or there is nothing to validate on.
    """
    kind = RankingObjective if recipe.model.kind == "ranking" else RetrievalObjective
    return kind(dataset, recipe, validation)


def require_targets(dataset: SequenceDataset, validation: Holdout, *, positives_only: bool) -> None:
    """Raise UserError if the validation split is empty, so that no epoch could be chosen."""
    if not len(validation.targets):
        raise UserError(
            f"the {validation.name} split has no targets, so no epoch can be chosen; import a longer log, or hold out "
            "a longer time"
        )
    if positives_only and not len(split_targets(dataset, validation, positives_only=True)):
        which = "next-to-last exposure" if validation.window is None else "held-out exposure"
        raise UserError(
            f"no user's {which} has one of the positive actions ({', '.join(dataset.declaration.positives)}); set "
            "positives in the data set's dataset.toml"
        )


def require_learnable_task(dataset: SequenceDataset, ends: np.ndarray) -> None:
    """Raise UserError unless some task is positive for some but not all of each user's first `ends` exposures."""
    hits = dict.fromkeys(dataset.declaration.tasks, 0)
    for _, trained in dataset.blocks(ends=ends):
        for name, mask in dataset.declaration.task_masks().items():
            hits[name] += int(np.count_nonzero(trained.actions & mask))
    rates = {name: count / int(ends.sum()) for name, count in hits.items()}
    if len(dataset.declaration.actions) == 1:
        raise UserError(
            f"every event of the log is the same action ({dataset.declaration.actions[0]}), so there is nothing to "
            "rank by; import a log that also tells likes, purchases or ratings (--action-column, --value-column)"
        )
    if not any(0 < rate < 1 for rate in rates.values()):
        found = ", ".join(f"{name} in {rate:.0%}" for name, rate in rates.items()) or "none declared"
        raise UserError(
            f"a ranking model needs a task that some but not all exposures fulfil, got: {found}; declare tasks in the "
            'data set\'s dataset.toml, for example like = ["rate_4", "rate_5"]'
        )

"""What each kind of model minimises and which validation figure chooses its best epoch.

Invariant: `goal` is higher-is-better for every kind; validation sees the next-to-last exposure of at most
VALIDATION_USERS users, the same ones in every epoch.
"""

from typing import Any, Protocol

import numpy as np
import torch

from gr_platform.errors import UserError
from gr_platform.evaluation.protocols import evaluate_ranking, evaluate_retrieval
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import Model
from gr_platform.models.config import Recipe
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel, target_events
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import train_ends
from gr_platform.training.negatives import uniform_negatives

VALIDATION_USERS = 2_000


class Objective(Protocol):
    """One kind's loss and validation."""

    def loss(self, model: Model, batch: EventBatch, step: int) -> tuple[torch.Tensor, int]:
        """Return the sum of the losses of the batch's targets and the number of targets."""
        ...

    def validate(self, model: Model) -> tuple[dict[str, Any], float]:
        """Return the validation figures and `goal`, the one to maximise."""
        ...


class RetrievalObjective:
    """Sampled softmax; the goal is NDCG@10 over the whole catalogue."""

    def __init__(self, dataset: SequenceDataset, recipe: Recipe) -> None:
        self.dataset, self.training = dataset, recipe.training
        self.positive_mask = dataset.declaration.positive_mask()

    def loss(self, model: Model, batch: EventBatch, step: int) -> tuple[torch.Tensor, int]:
        """Return the summed loss against this step's negatives."""
        assert isinstance(model, RetrievalModel)
        if self.training.negatives == "all":
            return model.loss(batch, negatives=None, positive_mask=self.positive_mask)
        vocabulary = self.dataset.vocabulary
        per_token = self.training.negatives == "per_token"
        negatives = uniform_negatives(
            first_item=vocabulary.first_item,
            num_rows=vocabulary.num_rows,
            num_negatives=self.training.num_negatives,
            seed=self.training.seed,
            step=step,
            num_targets=int(target_events(batch, self.positive_mask).sum()) if per_token else None,
        )
        return model.loss(batch, negatives=negatives, positive_mask=self.positive_mask)

    def validate(self, model: Model) -> tuple[dict[str, Any], float]:
        """Return hr_at_10 and ndcg_at_10. Raises UserError if no user has a positive validation target."""
        assert isinstance(model, RetrievalModel)
        facts = evaluate_retrieval(model, self.dataset, "validation", max_users=VALIDATION_USERS)
        if facts["ndcg_at_10"] is None:
            raise UserError(
                "no user's next-to-last exposure has one of the positive actions "
                f"({', '.join(self.dataset.declaration.positives)}); set positives in the data set's dataset.toml"
            )
        return {"hr_at_10": facts["hr_at_10"], "ndcg_at_10": facts["ndcg_at_10"]}, facts["ndcg_at_10"]


class RankingObjective:
    """Binary cross entropy of every task; the goal is the negated mean log loss over tasks."""

    def __init__(self, dataset: SequenceDataset, recipe: Recipe) -> None:
        self.dataset = dataset
        self.task_masks = list(dataset.declaration.task_masks().values())
        require_learnable_task(dataset)

    def loss(self, model: Model, batch: EventBatch, step: int) -> tuple[torch.Tensor, int]:
        """Return the summed loss of events, a mean over tasks each."""
        assert isinstance(model, RankingModel)
        return model.loss(batch, task_masks=self.task_masks)

    def validate(self, model: Model) -> tuple[dict[str, Any], float]:
        """Return the mean log_loss and each task's NE (`ne_<task>`)."""
        assert isinstance(model, RankingModel)
        facts = evaluate_ranking(model, self.dataset, "validation", max_users=VALIDATION_USERS)
        loss = float(np.mean([task["log_loss"] for task in facts.values()]))
        return {"log_loss": loss} | {f"ne_{name}": task["ne"] for name, task in facts.items()}, -loss


def objective_of(dataset: SequenceDataset, recipe: Recipe) -> Objective:
    """Return the objective of the recipe's kind. Raises UserError if the data set cannot train it."""
    kind = RankingObjective if recipe.model.kind == "ranking" else RetrievalObjective
    return kind(dataset, recipe)


def require_learnable_task(dataset: SequenceDataset) -> None:
    """Raise UserError unless some task is positive for some but not all exposures of the training part."""
    ends = train_ends(dataset.lengths)
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

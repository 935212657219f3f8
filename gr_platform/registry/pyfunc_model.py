"""A registered model as MLflow loads it: code plus safetensors, no pickle.

Invariant: this file runs on every load (models-from-code), so it holds only what prediction needs; weights, recipe and
vocabulary come from the version's artifacts.
"""

from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class RegisteredModel(PythonModel):
    """Answers for one user a row: items to retrieve, or the candidates' probabilities a task."""

    def load_context(self, context: Any) -> None:
        """Load weights and vocabulary from the version's artifacts."""
        from gr_platform.sequences.vocabulary import Vocabulary
        from gr_platform.training.load import load_model

        self.model: Any = load_model(Path(context.artifacts["run"]))
        self.vocabulary = Vocabulary.load(Path(context.artifacts["vocabulary"]))
        self.kind = self.model.config.kind

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[Any]:
        """Return one answer a row of a table with `history_items`, `history_actions` (masks), `history_times` (ms),
        `request_time` (ms) and, for ranking, `candidates`.

        Retrieval: the ids of the `params["k"]` (10) best items. Ranking: float [candidates, tasks].
        """
        import torch

        k = int((params or {}).get("k", 10))
        with torch.inference_mode():
            return [self._answer(row, k) for row in model_input.to_dict("records")]

    def _answer(self, row: dict[str, Any], k: int) -> Any:
        import numpy as np
        import torch

        from gr_platform.models.batch import EventBatch
        from gr_platform.sequences.window import window_start

        items = self.vocabulary.lookup(np.asarray(row["history_items"]))
        actions, times = (np.asarray(row[name], dtype=np.int64) for name in ("history_actions", "history_times"))
        start = window_start(len(items), self.model.config.max_events, self.model.config.chunk)
        batch = EventBatch.of([(items[start:], actions[start:], times[start:])], [int(row["request_time"])])
        if self.kind == "ranking":
            candidates = torch.from_numpy(self.vocabulary.lookup(np.asarray(row["candidates"])))
            return self.model.score(batch, candidates[None]).numpy()[0]
        scores = (self.model.user_vectors(batch) @ self.model.item_vectors().T)[0].numpy()
        scores[~self.vocabulary.active] = -np.inf
        best = np.argsort(-scores, kind="stable")[:k]
        return self.vocabulary.ids(best).tolist()


set_model(RegisteredModel())

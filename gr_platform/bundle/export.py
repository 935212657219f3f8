"""A trained model becomes a bundle: a folder that serving understands without the code that trained it.

Invariant: the expected scores in golden.safetensors come from the training path (full forward), never from the graphs
that they are to judge.
"""

import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from gr_platform import provenance, storage
from gr_platform.bundle import golden
from gr_platform.bundle.load import EXPORT_VERSION, model_digest
from gr_platform.errors import UserError
from gr_platform.models.baselines import require_servable
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import Model
from gr_platform.models.compute import encode_tokens, score_candidates
from gr_platform.models.config import Kind, ModelConfig
from gr_platform.models.paged import PaddedPast
from gr_platform.models.ranking import RankingModel
from gr_platform.sequences.vocabulary import NUM_OOV
from kernels import TIME_THRESHOLDS_MS

OPSET = 20


def _halves(past_kv: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return k and v of every layer."""
    num_layers = len(past_kv) // 2
    return past_kv[:num_layers], past_kv[num_layers:]


class _Encode(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        kinds: Tensor,
        items: Tensor,
        actions: Tensor,
        times: Tensor,
        query_times: Tensor,
        past_times: Tensor,
        *past_kv: Tensor,
    ) -> tuple[Tensor, ...]:
        past = (past_times, *_halves(past_kv))
        row, k, v = encode_tokens(self.model, kinds, items, actions, times, query_times, past)
        # A ranking model's candidates come later, so nobody asks for a row of its history: the graph leaves it out.
        return (row, k, v) if self.model.config.kind == "retrieval" else (k, v)


class _Score(nn.Module):
    def __init__(self, model: RankingModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        candidates: Tensor,
        request_times: Tensor,
        num_past: Tensor,
        past_times: Tensor,
        *past_kv: Tensor,
    ) -> Tensor:
        k, v = _halves(past_kv)
        past = PaddedPast(num_tokens=num_past, times=past_times, k=k, v=v)
        return score_candidates(self.model, candidates, request_times, past)


def _export_graph(
    module: nn.Module, path: Path, inputs: dict[str, Tensor], dynamic: dict[str, Any], outputs: list[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _forget_origin(proto)
    onnx.save(proto, path)


def _forget_origin(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces with this machine's paths, by which equal models would differ."""
    for graph in (proto.graph, *proto.functions):
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for value in graph.value_info:
            del value.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.metadata_props[:]


def _past(model: Model, *lengths: int) -> dict[str, Tensor]:
    """Return the inputs of a past of these dimensions; the layers apart, because a graph copies what it splits."""
    config, times = model.config, torch.zeros(*lengths, dtype=torch.int64)
    widths = {"past_k": config.qk_dim, "past_v": config.v_dim}
    return {"past_times": times} | {
        f"{name}_{layer}": torch.zeros(*lengths, config.num_heads, width)
        for name, width in widths.items()
        for layer in range(config.num_layers)
    }


def write_graphs(model: Model, folder: Path) -> None:
    """Write encode.onnx of one user and, for ranking, score.onnx of several.

    Users, history, new tokens and candidates have dynamic numbers.
    """
    new, past, users = (torch.export.Dim(name) for name in ("new", "past", "users"))
    num_layers = model.config.num_layers
    token_names = ("kinds", "items", "actions", "times", "query_times")
    tokens = {name: torch.ones(3, dtype=torch.int64) for name in token_names}
    _export_graph(
        _Encode(model),
        folder / "encode.onnx",
        tokens | _past(model, 5),
        {name: {0: new} for name in token_names}
        | {"past_times": {0: past}, "past_kv": tuple({0: past} for _ in range(2 * num_layers))},
        ["row", "k", "v"] if model.config.kind == "retrieval" else ["k", "v"],
    )
    if isinstance(model, RankingModel):
        asked = {
            "candidates": torch.ones(2, 3, dtype=torch.int64),
            "request_times": torch.zeros(2, dtype=torch.int64),
            "num_past": torch.full((2,), 5),
        }
        axes = {
            "candidates": {0: users, 1: torch.export.Dim("candidates")},
            "request_times": {0: users},
            "num_past": {0: users},
            "past_times": {0: users, 1: past},
            "past_kv": tuple({0: users, 1: past} for _ in range(2 * num_layers)),
        }
        _export_graph(_Score(model), folder / "score.onnx", asked | _past(model, 2, 5), axes, ["scores"])


@torch.no_grad()
def expected_scores(model: Model, request: golden.GoldenRequest) -> np.ndarray:
    """Return the offline scores of a golden request by one full forward: [C, tasks] (ranking) or [C] (retrieval)."""
    batch = EventBatch.of([(request.items, request.actions, request.times)], [request.request_time])
    candidates = torch.from_numpy(request.candidates)
    if isinstance(model, RankingModel):
        return model.score(batch, candidates[None])[0].numpy()
    return (model.item_vectors()[candidates] @ model.user_vectors(batch)[0] / model.config.temperature).numpy()


def write_bundle(
    folder: Path,
    *,
    model: Model,
    weights: Path,
    vocabulary: Path,
    num_rows: int,
    declaration: dict[str, Any],
    recipe: str,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Fill an empty folder with a bundle and return the manifest's facts; `weights` is the run's model.safetensors.

    Raises UserError for an encoder without K/V and for a model that reads features which no request carries.
    """
    require_servable(model.config)
    _require_served(model.config)
    model.eval()
    shutil.copy(weights, folder / "model.safetensors")
    shutil.copy(vocabulary, folder / "vocabulary.parquet")
    write_graphs(model, folder)
    requests = golden.draw(
        first_item=1 + NUM_OOV,
        num_rows=num_rows,
        num_actions=len(declaration["actions"]),
        max_events=model.config.max_events,
    )
    golden.save(folder / "golden.safetensors", requests, [expected_scores(model, request) for request in requests])
    if not isinstance(model, RankingModel):
        with torch.no_grad():
            save_file({"item_vectors": model.item_vectors().numpy()}, folder / "item_vectors.safetensors")
    constants = _constants(model, declaration["actions"])
    files = {name: storage.file_sha256(folder / name) for name in ("model.safetensors", "vocabulary.parquet")}
    return constants | {
        "model_digest": model_digest(constants, files),
        "declaration": declaration,
        "export_version": EXPORT_VERSION,
        "recipe": recipe,
        "metrics": metrics,
        "git_commit": provenance.git_commit(),
    }


def _require_served(config: ModelConfig) -> None:
    """Item features are in the model itself; what is known of users and contexts would have to come with a request."""
    if asked := (*config.context_features, *config.user_features):
        raise UserError(
            f"the model reads {', '.join(asked)}, which requests to the server do not carry, so there is no bundle of "
            "it; train a recipe without context_features and user_features to serve"
        )


def _constants(model: Model, actions: list[str]) -> dict[str, Any]:
    """Return what decides a score beside weights and vocabulary."""
    return {
        "config": asdict(model.config),
        "actions": actions,
        "tasks": list(model.tasks) if isinstance(model, RankingModel) else [],
        "time_thresholds_ms": list(TIME_THRESHOLDS_MS),
        "attention_divisor": model.config.attention_divisor,
    }


def export(home: Path, dataset: str, kind: Kind) -> storage.Result:
    """Return the bundle of the current run of `kind`, exporting it unless it exists, and make it the current bundle.

    Raises UserError unless run, evaluation and sequences belong together: else its figures would be another model's.
    """
    from gr_platform.sequences.dataset import SequenceDataset
    from gr_platform.training.load import load_model

    run_folder = storage.current(home / "runs" / dataset, f"{kind}_model")
    run = storage.read_manifest(run_folder)
    sequences_folder = storage.current(home / "sequences" / dataset, "sequences")
    made_of = storage.read_manifest(sequences_folder).spec
    sequences = SequenceDataset.open(sequences_folder)
    evaluation = storage.read_manifest(storage.current(home / "runs" / dataset, "evaluation"))
    if run.spec["sequences"] != sequences.digest:
        raise UserError(f"the current {kind} model of {dataset} was trained on other sequences; train it again first")
    if evaluation.spec["models"][kind] != run.digest:
        raise UserError(f"the current {kind} model of {dataset} is not evaluated yet; run the evaluation stage first")
    spec = {
        "run": run.digest,
        "vocabulary": sequences.vocabulary.digest,
        "evaluation": evaluation.digest,
        "export_version": EXPORT_VERSION,
    }

    def build(folder: Path) -> dict[str, Any]:
        facts = write_bundle(
            folder,
            model=load_model(run_folder),
            weights=run_folder / "model.safetensors",
            vocabulary=sequences_folder.parent / made_of["vocabulary_folder"] / "vocabulary.parquet",
            num_rows=sequences.vocabulary.num_rows,
            declaration=sequences.declaration.to_json(),
            recipe=run.spec["recipe"]["name"],
            metrics={kind: evaluation.facts[kind]},
        )
        return facts | {"trained_until_ms": run.facts.get("trained_until_ms"), "split": run.spec.get("split")}

    result = storage.ensure(home / "bundles" / dataset, kind, spec, build)
    storage.point(home / "bundles" / dataset, kind, result.folder)
    return result

"""Does a running server serve what a repository folder holds? Asked over gRPC, as callers ask.

Invariant: nothing is taken from the server's word alone: the configuration it serves is compared with the file, every
model answers a canary, and the golden requests of the bundles get the scores that the offline models gave them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from gr_platform import storage
from gr_platform.bundle import golden
from gr_platform.bundle.verify import SHORT_TOLERANCE, TOLERANCE
from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.sequences.vocabulary import Vocabulary
from serving import calls, canary, client_tensors
from serving.client_tensors import Answer, CallOptions
from serving.engine.requests import History

DEADLINE_S = 30.0
# Before all others: a deployment must not fail because many ask.
_FIRST = CallOptions(request_id=calls.GOLDEN, priority=0)
# Asked of the retriever: the best of the catalogue, among which a small one's golden candidates are.
_DEPTH = 1000


def wanted_parameters(folder: Path, model: str) -> dict[str, str]:
    """Return the parameters in the config.pbtxt of a repository folder's model, its `model_digest` among them.

    Raises UserError if the file is damaged.
    """
    try:
        text = (folder / model / "config.pbtxt").read_text(encoding="utf-8")
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
    except (UnicodeDecodeError, text_format.ParseError):
        raise UserError(
            f"the config.pbtxt of {model} in the served repository is damaged; deploy the pair again"
        ) from None
    return {key: value.string_value for key, value in config.parameters.items()}


def verify(client: grpcclient.InferenceServerClient, folder: Path, models: Sequence[str]) -> None:
    """Raise UserError unless the server serves these models as the repository folder has them, with the right scores.

    Scores may differ by what the type of the cached K/V explains, a share of the largest one.
    """
    for model in models:
        found = canary.check(client, model, DEADLINE_S)
        if found.outcome is not canary.Outcome.ANSWERS:
            raise UserError(f"{model} was loaded but {_why(found)}")
        if found.parameters != wanted_parameters(folder, model):
            raise UserError(f"the model server goes on serving another {model} than the one that was loaded")
    for model in models:
        if (bundle := folder / model / "1" / "bundle").is_dir():
            exact = wanted_parameters(folder, model).get("cache_dtype", "fp32") == "fp32"
            _ask_golden(client, model, bundle, TOLERANCE if exact else SHORT_TOLERANCE)


def _why(found: canary.Check) -> str:
    if found.outcome is canary.Outcome.LATE:
        return f"gave no answer in {DEADLINE_S:g} s"
    return "its process died" if found.outcome is canary.Outcome.DEAD else "does not answer a smallest request"


def _ask_golden(client: grpcclient.InferenceServerClient, model: str, bundle: Path, tolerance: float) -> None:
    facts = storage.read_manifest(bundle)
    judge = _Judge(
        kind=facts.kind,
        vocabulary=Vocabulary.load(bundle / "vocabulary.parquet"),
        declaration=Declaration.from_json(facts.facts["declaration"]),
    )
    errors, references = [0.0], [0.0]
    for request, expected in golden.load(bundle / "golden.safetensors"):
        errors.append(judge.error(client, model, request, expected))
        references.append(float(np.max(np.abs(expected))))
    # np.max, because Python's max() lets a NaN pass as the smaller one.
    worst, allowed = float(np.max(errors)), tolerance * float(np.max(references))
    if not worst <= allowed:
        raise UserError(
            f"{model} answers the golden requests of its bundle with other scores, off by {worst:.2g} where "
            f"{allowed:.2g} is allowed"
        )


class _Judge:
    """Asks golden requests by the items' own ids and says how far the answers are from what is expected."""

    def __init__(self, *, kind: str, vocabulary: Vocabulary, declaration: Declaration) -> None:
        self._kind = kind
        self._vocabulary = vocabulary
        self._declaration = declaration

    def error(
        self,
        client: grpcclient.InferenceServerClient,
        model: str,
        request: golden.GoldenRequest,
        expected: np.ndarray,
    ) -> float:
        """Return the largest absolute error of one request's scores; inf where an item is missing."""
        ids, id_type = self._vocabulary.ids, self._declaration.item_id_type
        history = History(items=ids(request.items), actions=request.actions, times=request.times)
        candidates = ids(request.candidates)
        if self._kind == "ranking":
            call = client_tensors.score(history, candidates, request.request_time, id_type=id_type)
        else:
            call = client_tensors.ranked_list(model, history, _DEPTH, request.request_time, (), id_type=id_type)
        arguments = replace(call, model=model).arguments(_FIRST, DEADLINE_S)
        try:
            answer = call.answer(client.infer(**arguments))
        except grpcclient.InferenceServerException as failed:
            code = (failed.status() or "").rpartition(".")[2]
            raise UserError(f"{model} does not answer a golden request of its bundle ({code})") from None
        if self._kind == "ranking":
            return float(np.max(np.abs(answer.scores - expected)))
        return self._list_error(answer, request, expected)

    def _list_error(self, answer: Answer, request: golden.GoldenRequest, expected: np.ndarray) -> float:
        """A listed candidate has its score; one that may be listed and is not has none above the last of the list."""
        rank = {item: at for at, item in enumerate(answer.items.tolist())}
        seen = set(request.items.tolist()) if self._declaration.exclude_seen == "all" else set()
        full = len(answer.items) == _DEPTH
        errors = [0.0]
        for candidate, score in zip(request.candidates.tolist(), expected.tolist(), strict=True):
            at = rank.get(self._vocabulary.ids([candidate]).tolist()[0])
            if at is not None:
                errors.append(abs(float(answer.scores[at]) - score))
            elif candidate not in seen and self._vocabulary.active[candidate]:
                errors.append(max(0.0, score - float(answer.scores[-1])) if full else np.inf)
        return float(np.max(errors))

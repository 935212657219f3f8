"""Smallest requests that a model's own process has to answer, and what an answer says about it.

Invariant: a canary changes nothing: no history, no candidates, no events. Readiness is not asked, because the server
calls a model ready whose process is dead.
"""

import http.client
import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype

from serving import calls

# Before all others, so that a long queue does not look like a dead model.
_FIRST = {calls.PRIORITY: 0}
_STATISTICS_S = 2.0
# A model whose engine hangs still refuses requests.
_WORK = r"gr_(?!\w*(?:rejected|refused))\w+(?:_total|_count)"


class Outcome(StrEnum):
    """What a canary says of a model.

    answers; dead: its process is gone, for sure; fails: it answered with an error of its own making; late: no answer in
    time or none to be had now, as from a model with more work than it can do; absent: the server has not loaded it.
    """

    ANSWERS = "answers"
    DEAD = "dead"
    FAILS = "fails"
    LATE = "late"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One canary: how it went, ms until then, the error's text ('' for an answer), the served parameters."""

    model: str
    outcome: Outcome
    milliseconds: float
    error: str
    parameters: Mapping[str, str]


def check(client: grpcclient.InferenceServerClient, model: str, deadline_s: float) -> Check:
    """Return how a model answers its canary within about `deadline_s`; never raises for what a server may do."""
    started, parameters = time.monotonic(), dict[str, str]()
    outcome, error = Outcome.ANSWERS, ""
    try:
        config = client.get_model_config(model, client_timeout=deadline_s).config
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        client.infer(
            model,
            inputs_for(config),
            request_id=calls.CANARY,
            client_timeout=deadline_s,
            timeout=int(1e6 * deadline_s),
            parameters=dict(_FIRST),
        )
    except grpcclient.InferenceServerException as failed:
        outcome, error = outcome_of(failed.status() or "", failed.message() or ""), failed.message() or "no message"
    return Check(
        model=model,
        outcome=outcome,
        milliseconds=1e3 * (time.monotonic() - started),
        error=error,
        parameters=parameters,
    )


def inputs_for(config: model_config_pb2.ModelConfig) -> list[grpcclient.InferInput]:
    """Return inputs that fit a model's configuration: nothing where any length will do, else zeros; K is one."""
    inputs = []
    for each in config.input:
        shape = [1, *(0 if size < 0 else size for size in each.dims)]
        name = model_config_pb2.DataType.Name(each.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        values = np.full(shape, b"" if name == "BYTES" else int(each.name == "K"), triton_to_np_dtype(name))
        inputs.append(grpcclient.InferInput(each.name, shape, name).set_data_from_numpy(values))
    return inputs


def outcome_of(status: str, message: str) -> Outcome:
    """Return what an error (gRPC's status and the server's text) says of the model that was asked."""
    code = status.rpartition(".")[2]
    if "Stub process" in message and "is not healthy" in message:
        return Outcome.DEAD
    if code == "NOT_FOUND" or "unknown model" in message or "is not ready" in message:
        return Outcome.ABSENT
    if code in ("INTERNAL", "UNKNOWN", "DATA_LOSS"):
        return Outcome.FAILS
    if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED"):
        return Outcome.LATE
    # The model looked at the request and found it wanting, as it may: it lives.
    return Outcome.ANSWERS


def work_done(metrics_address: str, model: str) -> float | None:
    """Return a figure that grows with every step of a model's own work; None where the server does not say.

    The model's own counters are read: the server counts a request as done when the model has taken it.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{metrics_address}/metrics", timeout=_STATISTICS_S) as answer:
            text = answer.read().decode("utf-8", errors="replace")
    except (OSError, ValueError, http.client.HTTPException):
        return None
    label = rf'\{{[^}}]*model="{re.escape(model)}"[^}}]*\}}'
    for family in (_WORK, "nv_inference_request_success"):
        if found := re.findall(rf"^{family}{label} (\S+)$", text, re.MULTILINE):
            return sum(map(float, found))
    return None

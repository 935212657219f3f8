"""How both clients hold a connection: size limit, retries, and what an error of the channel means to a caller.

Invariant: only a server that is not available is asked again, by gRPC's own policy and within the call's deadline.
"""

import json
import time

import tritonclient.grpc as grpcclient

from serving.client_tensors import MAX_MESSAGE_BYTES, ServingError, invalid

MAX_ATTEMPTS = 4
_SERVICE = "inference.GRPCInferenceService"


def channel_arguments(max_attempts: int = MAX_ATTEMPTS) -> list[tuple[str, int | str]]:
    """Return the channel's options; `max_attempts` 1 asks once, more retry with growing pauses up to a second."""
    arguments: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", int(max_attempts > 1)),
    ]
    if max_attempts > 1:
        policy = {
            "maxAttempts": max_attempts,
            "initialBackoff": "0.05s",
            "maxBackoff": "1s",
            "backoffMultiplier": 3,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        config = {"methodConfig": [{"name": [{"service": _SERVICE}], "retryPolicy": policy}]}
        arguments.append(("grpc.service_config", json.dumps(config)))
    return arguments


def friendly(
    error: grpcclient.InferenceServerException, *, address: str, model: str, deadline_s: float
) -> ServingError:
    """Return tritonclient's error as a sentence that says what to do."""
    code = (error.status() or "UNKNOWN").rpartition(".")[2]
    message = error.message() or "no message"
    if code == "CANCELLED" and "deadline" in message:
        # A model has no other code for it; it can tell a moment before the channel's own clock does.
        code = "DEADLINE_EXCEEDED"
    if "Stub process" in message:
        # The model's process has died; the supervisor loads it again.
        code, message = "UNAVAILABLE", f"{model} is being restarted"
    if "unknown model" in message:
        advice = f"the model server at {address} has no model {model}; run gr materialize to deploy one"
        return ServingError(advice, "UNAVAILABLE")
    if "larger than max" in message:
        what = "the request" if "ent message" in message else "the answer"
        limit = f"{MAX_MESSAGE_BYTES >> 20} MiB"
        return invalid(f"{what} of {model} is larger than {limit}, the most a message may have; ask for fewer items")
    if code == "UNAVAILABLE" and "connect" in message:
        message = f"no model server answers at {address}; start it with gr serve or make up"
    elif code == "UNAVAILABLE":
        message = (
            f"the model server at {address} cannot take the request now ({message}); try again, and restart gr serve "
            "if it stays so"
        )
    elif code == "DEADLINE_EXCEEDED":
        message = f"the model server at {address} did not answer {model} within {deadline_s:g} s"
    return ServingError(message, code)


def seconds_to(moment: float) -> float:
    """Return the seconds until `moment` of the monotonic clock, at least the millisecond that gRPC needs to say no."""
    return max(1e-3, moment - time.monotonic())

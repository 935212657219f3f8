"""What one server model tells another that calls it inside the server.

Invariant: an error keeps its code from model to model. The server (release 24.10) hands on the text of a called model's
error and makes its code INTERNAL, so a caller asks for the code as the first word of the text (parameter CODED). Text
that came without one was not written for callers, and none of them sees it.
"""

import json
import traceback
from typing import Any

from serving.engine.jobs import EngineError
from serving.engine.requests import InvalidRequestError

CODED, PRIORITY = "gr_coded", "gr_priority"
INVALID_ARGUMENT, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED", "INTERNAL"
INTERNAL_TEXT = "internal error"
# Ids of the requests by which the platform looks whether a model answers and answers right: nobody was served.
CANARY, GOLDEN = "gr-canary", "gr-golden"
PROBES = (CANARY, GOLDEN)
# gRPC's names of the codes -> those of the server's Python module.
_SERVER_NAMES = {INVALID_ARGUMENT: "INVALID_ARG"}


class RefusedError(RuntimeError):
    """A request that cannot be answered now, or not any more; the text may be shown to callers."""

    def __init__(self, message: str, code: str = UNAVAILABLE) -> None:
        super().__init__(message)
        self.code = code


class CalledModelError(RuntimeError):
    """A called model failed on its own fault; the text names the model and may go to the log alone."""


def error_of(model: str, text: str) -> Exception:
    """Return what to raise for the error text of a called model."""
    code, found, message = text.partition(": ")
    if found and code == INVALID_ARGUMENT:
        return InvalidRequestError(message)
    if found and code in (UNAVAILABLE, CANCELLED):
        return RefusedError(message, code)
    if text.removeprefix(f"{INTERNAL}: ") == INTERNAL_TEXT:
        return CalledModelError(f"{model}: {text}")
    # The server's own words: not loaded, its process died, its queue's time was up. Another try may find it well.
    unavailable = RefusedError(f"{model} is not available now; try again")
    unavailable.__cause__ = CalledModelError(f"{model}: {text}")
    return unavailable


def described(error: Exception) -> tuple[str, str]:
    """Return the text and the code that callers get for an exception."""
    if isinstance(error, InvalidRequestError):
        return str(error), INVALID_ARGUMENT
    if isinstance(error, RefusedError | EngineError):
        return str(error), error.code
    return INTERNAL_TEXT, INTERNAL


def error_response(pb_utils: Any, request: Any, message: str, code: str) -> Any:
    """Return the server's error response, with the code in the text if the request asks for it."""
    if CODED in parameters_of(request):
        message = f"{code}: {message}"
    codes = pb_utils.TritonError
    return pb_utils.InferenceResponse(error=codes(message, getattr(codes, _SERVER_NAMES.get(code, code))))


def send(pb_utils: Any, sender: Any, response: Any) -> None:
    """Send a request's one answer, from whichever thread."""
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    try:
        sender.send(response, flags=final)
    except Exception:
        # Shared memory may be full of answers: a small one must still tell the caller that there is none.
        pb_utils.Logger.log_error("event=answer_not_sent " + traceback.format_exc())
        error = pb_utils.TritonError(INTERNAL_TEXT, pb_utils.TritonError.INTERNAL)
        sender.send(pb_utils.InferenceResponse(error=error), flags=final)


def parameters_of(request: Any) -> dict[str, Any]:
    """Return the parameters that came with a request."""
    text = request.parameters()
    return json.loads(text) if len(text) > len("{}") else {}

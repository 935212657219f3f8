"""gr_events: what users did, into their histories. All logic is in serving.user_models."""

import triton_python_backend_utils as pb_utils

from serving.user_models import EventsModel


class TritonPythonModel(EventsModel):
    """The server's Python model interface."""

    pb_utils = pb_utils

"""gr_user_recommender: recommendations by user id. All logic is in serving.user_models."""

import triton_python_backend_utils as pb_utils

from serving.user_models import UserRecommenderModel


class TritonPythonModel(UserRecommenderModel):
    """The server's Python model interface."""

    pb_utils = pb_utils

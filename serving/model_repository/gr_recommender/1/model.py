"""gr_recommender: retrieve widely, rank precisely, return the best k. All logic is in serving.recommending."""

import triton_python_backend_utils as pb_utils

from serving.recommending import RecommenderModel


class TritonPythonModel(RecommenderModel):
    """The server's Python model interface."""

    pb_utils = pb_utils

"""What runs inside the model server needs only what its environment has."""

import subprocess
import sys

import pytest

from gr_platform import settings

CODE = """
import sys
import gr_platform.bundle.load, serving.backend, serving.wire
import serving.engine.cache, serving.engine.history, serving.engine.ranker, serving.engine.retriever
forbidden = {"polars", "duckdb", "dagster", "mlflow", "torch", "pandas", "tritonclient", "psutil"} & set(sys.modules)
assert not forbidden, forbidden
"""


@pytest.mark.parametrize("environment", ["platform", "serving"])
def test_the_engine_imports_neither_platform_packages_nor_torch(environment):
    python = sys.executable if environment == "platform" else settings.serving_python()
    result = subprocess.run([python, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

"""The examples of docs/serving_clients.md run against a real server, as a reader would run them."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from gr_platform import settings
from serving.handle import ServerHandle

pytestmark = pytest.mark.e2e
PAGE = (settings.PROJECT_ROOT / "docs" / "serving_clients.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(python|sh) served\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in EXAMPLES if language == "python"]
SHELL = [text for language, text in EXAMPLES if language == "sh"]


def here(example: str, server: ServerHandle) -> str:
    return example.replace("127.0.0.1:8001", server.grpc_address).replace("127.0.0.1:8000", server.http_address)


def test_there_is_an_example_of_each_client():
    for client, example in zip(("Client(", "AsyncClient(", "InferenceServerClient("), PYTHON, strict=True):
        assert client in example
    assert "from serving" not in PYTHON[2]
    assert SHELL[0].startswith("curl")


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_a_python_example_runs(server: ServerHandle, number: int):
    done = subprocess.run(
        [sys.executable, "-c", here(PYTHON[number], server)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = ("INVALID_ARGUMENT REQUEST_TIME is 0", "2 events", "[[[")[number]
    assert expected in done.stdout


def test_the_curl_example_gets_items_and_a_configuration(server: ServerHandle):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["bash", "-ec", here(SHELL[0], server)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    answer, rest = json.JSONDecoder().raw_decode(done.stdout)
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert answer["id"] == "page-17"
    assert outputs["ITEMS"]["shape"] == [1, 5]
    assert 1002 not in outputs["ITEMS"]["data"]
    assert json.loads(done.stdout[rest:])["name"] == "gr_ranker"


def test_http_takes_empty_inputs_and_names_what_is_wrong(server: ServerHandle):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    empty = SHELL[0].partition("curl --silent --show-error --fail-with-body http://127.0.0.1:8000/v2/models/gr_ranker")[
        0
    ]
    empty = empty.replace(
        '"shape": [1, 1], "datatype": "INT64", "data": [1002]', '"shape": [1, 0], "datatype": "INT64", "data": []'
    )
    done = subprocess.run(["bash", "-ec", here(empty, server)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    wrong = here(empty.replace("[1767225700000]", "[5]"), server)
    wrong = wrong.replace("curl ", "curl --write-out '\\n%{http_code}' ")
    done = subprocess.run(["bash", "-c", wrong], capture_output=True, text=True, timeout=60)
    error, status = done.stdout.splitlines()
    assert "REQUEST_TIME is 5" in json.loads(error)["error"]
    assert status == "400"

"""The age of what serves, on the metrics endpoint, across a swap of models in a real server."""

import math
import re
import time
import urllib.request

import pytest

from serving.figures import PERIOD_S
from serving.swap import deploy


def learned(until_ms):
    def change(folder, facts):
        facts["trained_until_ms"] = until_ms
        # Facts are no part of a digest: another file makes it another bundle.
        (folder / "note").write_text(str(until_ms))

    return change


def test_after_a_swap_the_age_shown_is_that_of_the_new_models(server, home, pair, rewritten):
    def shown():
        time.sleep(3 * PERIOD_S)
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        found = re.findall(r'gr_model_trained_until_seconds{model="(\w+)"} (\S+)', text)
        return {model: float(value) for model, value in found}

    unknown = {"gr_ranker": pytest.approx(math.nan, nan_ok=True), "gr_retriever": pytest.approx(math.nan, nan_ok=True)}
    assert shown() == unknown
    for until in (1_700_000_000, 1_800_000_000, 1_750_000_000):
        folders = [rewritten(pair[kind], learned(1000 * until)) for kind in ("retrieval", "ranking")]
        assert deploy(home, *folders)
        assert shown() == dict.fromkeys(("gr_ranker", "gr_retriever"), until)
    assert deploy(home, pair["retrieval"], pair["ranking"])
    assert shown() == unknown, "the age of models that are gone is nobody's"

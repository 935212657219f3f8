"""The two UIs in a headless browser: their pages' addresses, and how to open them.

Invariant: nothing outside the machine is called, and a page looks as it does to somebody who has dismissed what greets
a first visit.
"""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = Path("/usr/bin/chromium")
# As root in a container without a network: no sandbox, and nothing that calls home.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
GROUPS = ("data", "models", "release")
# What a person clicks away at the first visit.
_SETTINGS = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.settings.telemetry": "false",
    "_mlflow_model_registry_promo_modal_dismissed_v1": "true",
}


@contextmanager
def browser_page(width: int = 1900, height: int = 860) -> Iterator["Page"]:
    """Yield a page of headless Chromium with the first-visit dialogues dismissed."""
    from playwright.sync_api import sync_playwright

    stored = "".join(f"localStorage.setItem({key!r}, {value!r});" for key, value in _SETTINGS.items())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.add_init_script(stored)
            yield page
        finally:
            browser.close()


def missing() -> str:
    """Return what there is no browser for, '' if there is one."""
    import importlib.util

    if not CHROMIUM.is_file():
        return "Chromium is not installed (apt-get install chromium)"
    return "" if importlib.util.find_spec("playwright") else "Playwright is not installed (make setup)"


def lineage_url(dagster: str) -> str:
    """Return the address of the lineage page with every group of assets unfolded."""
    expanded = "%2C".join(f"global%40global%3A{group}" for group in GROUPS)
    return f"{dagster}/asset-groups?expanded={expanded}"


def checks_url(dagster: str, asset: str, check: str) -> str:
    """Return the address of an asset's check: its last outcome and those before."""
    return f"{dagster}/assets/{asset}?view=checks&checkDetail={check}"


def runs_url(mlflow: str, experiment: str, mode: str = "CHART") -> str:
    """Return the address of an experiment's runs, as charts side by side or, mode TABLE, as a list."""
    number = experiment_number(mlflow, experiment)
    return f"{mlflow}/#/experiments/{number}/runs?workflowType=machine_learning&compareRunsMode={mode}"


def compare_url(mlflow: str, experiment: str, runs: Sequence[str]) -> str:
    """Return the address of the page that compares runs (ids of MLflow) of an experiment."""
    listed = [json.dumps(names, separators=(",", ":")) for names in (runs, [experiment_number(mlflow, experiment)])]
    return f"{mlflow}/#/compare-runs?runs={listed[0]}&experiments={listed[1]}"


def models_url(mlflow: str) -> str:
    """Return the address of the registered models."""
    return f"{mlflow}/#/models?workflowType=machine_learning"


def model_url(mlflow: str, name: str) -> str:
    """Return the address of a registered model with its versions and their aliases."""
    return f"{mlflow}/#/models/{name}"


def experiment_number(mlflow: str, experiment: str) -> str:
    """Return an experiment's id. Raises OSError if MLflow has none of that name."""
    query = f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={experiment}"
    with urllib.request.urlopen(query, timeout=30) as answer:
        return str(json.load(answer)["experiment"]["experiment_id"])

"""Screenshots of the two UIs for the documentation, taken of simulated data only.

Run after `gr demo` and `gr up`, and, so that there is something to compare, `gr train --recipe small-sasrec --kind
retrieval`, `small-transformer` and `small --seed 2`, each with `gr evaluate RUN`:

    python docs/take_screenshots.py [--dagster URL] [--mlflow URL] [--experiment simulated]

Invariant: refuses an experiment whose name does not start with `simulated`; every picture stays below 300 KB.
"""

import argparse
import io
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
# As root in a container without a network: no sandbox, and nothing that calls home.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
GROUPS = ("data", "models", "release")
MAX_BYTES = 300_000
WIDTH = 1500
# What a person clicks away at the first visit.
SETTINGS = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.settings.telemetry": "false",
}


@contextmanager
def browser_page(width: int = 1900, height: int = 860) -> Iterator[Page]:
    """Yield a page of headless Chromium with the first-visit dialogues dismissed."""
    stored = "".join(f"localStorage.setItem({key!r}, {value!r});" for key, value in SETTINGS.items())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.add_init_script(stored)
            yield page
        finally:
            browser.close()


def lineage_url(dagster: str) -> str:
    """Return the address of the lineage page with every group of assets unfolded."""
    expanded = "%2C".join(f"global%40global%3A{group}" for group in GROUPS)
    return f"{dagster}/asset-groups?expanded={expanded}"


def save(page: Page, path: Path, *, settle_ms: int = 2500) -> None:
    """Write a downscaled picture of the page. Raises RuntimeError above 300 KB."""
    page.wait_for_timeout(settle_ms)
    picture: Any = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(128).save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise RuntimeError(f"{path.name} has {path.stat().st_size} bytes, at most {MAX_BYTES} are allowed")


def runs_url(mlflow: str, experiment: str) -> str:
    """Return the address of an experiment's runs with their charts side by side."""
    query = f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={experiment}"
    with urllib.request.urlopen(query, timeout=30) as answer:
        number = json.load(answer)["experiment"]["experiment_id"]
    return f"{mlflow}/#/experiments/{number}/runs?workflowType=machine_learning&compareRunsMode=CHART"


def models_url(mlflow: str) -> str:
    """Return the address of the registered models."""
    return f"{mlflow}/#/models?workflowType=machine_learning"


def take(dagster: str, mlflow: str, experiment: str, out: Path) -> None:
    """Write all pictures into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with browser_page() as page:
        page.goto(lineage_url(dagster))
        page.get_by_text("deployment").first.wait_for(timeout=60_000)
        save(page, out / "dagster-lineage.png")
        page.goto(f"{dagster}/assets/retrieval_model")
        page.get_by_text("num_parameters").first.wait_for(timeout=60_000)
        save(page, out / "dagster-asset.png")
        page.goto(runs_url(mlflow, experiment))
        page.get_by_text("retrieval-").first.wait_for(timeout=60_000)
        save(page, out / "mlflow-runs.png", settle_ms=6000)
        page.goto(models_url(mlflow))
        page.get_by_text("champion").first.wait_for(timeout=60_000)
        page.wait_for_timeout(1500)
        page.keyboard.press("Escape")  # the announcement of the alias view
        save(page, out / "mlflow-models.png")


def main() -> None:
    """Parse the arguments and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dagster", default="http://127.0.0.1:3000")
    parser.add_argument("--mlflow", default="http://127.0.0.1:5000")
    parser.add_argument("--experiment", default="simulated")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    arguments = parser.parse_args()
    if not arguments.experiment.startswith("simulated"):
        parser.error("pictures in the documentation show simulated data only")
    take(arguments.dagster, arguments.mlflow, arguments.experiment, arguments.out)


if __name__ == "__main__":
    main()

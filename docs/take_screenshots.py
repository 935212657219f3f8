"""Screenshots of the two UIs for the documentation, taken of simulated data only.

Those of the first list after `gr demo` and `gr up`, and, so that there is something to compare, `gr train --recipe
small-sasrec --kind retrieval`, `small-transformer` and `small --seed 2`, each with `gr evaluate RUN`; those of the
second after `gr replay --days 7 --poisoned 7 --keep`, with `gr up` in the replay's folder `home`:

    python docs/take_screenshots.py {models,lifecycle} [--dagster URL] [--mlflow URL] [--experiment simulated]

Invariant: refuses an experiment whose name does not start with `simulated`; every picture stays below 300 KB.
"""

import argparse
import io
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page

from gr_platform.commands.browser import (
    browser_page,
    checks_url,
    compare_url,
    experiment_number,
    lineage_url,
    model_url,
    models_url,
    runs_url,
)

MAX_BYTES = 300_000
WIDTH = 1500
WAIT_MS = 60_000


def save(page: Page, path: Path, *, settle_ms: int = 2500) -> None:
    """Write a downscaled picture of the page. Raises RuntimeError above 300 KB."""
    page.wait_for_timeout(settle_ms)
    picture: Any = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(128).save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise RuntimeError(f"{path.name} has {path.stat().st_size} bytes, at most {MAX_BYTES} are allowed")


def seen(page: Page, *texts: str) -> None:
    """Wait until each text is on the page."""
    for text in texts:
        page.get_by_text(text).first.wait_for(timeout=WAIT_MS)


def newest_runs(mlflow: str, experiment: str, kind: str) -> list[str]:
    """Return the ids of the two newest runs of a kind of model that was promoted, the older first."""
    body = {
        "experiment_ids": [experiment_number(mlflow, experiment)],
        "filter": f"attributes.run_name LIKE '{kind}-%' AND tags.`gr.outcome` = 'promoted'",
        "order_by": ["attributes.start_time DESC"],
        "max_results": 2,
    }
    request = urllib.request.Request(
        f"{mlflow}/api/2.0/mlflow/runs/search",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [run["info"]["run_id"] for run in json.load(answer)["runs"]][::-1]


def take_models(dagster: str, mlflow: str, experiment: str, out: Path) -> None:
    """Write the pictures of the graph, an asset, runs side by side and registered models."""
    with browser_page() as page:
        page.goto(lineage_url(dagster))
        seen(page, "deployment")
        save(page, out / "dagster-lineage.png")
        page.goto(f"{dagster}/assets/retrieval_model")
        seen(page, "num_parameters")
        save(page, out / "dagster-asset.png")
        page.goto(runs_url(mlflow, experiment))
        seen(page, "retrieval-")
        save(page, out / "mlflow-runs.png", settle_ms=6000)
        page.goto(models_url(mlflow))
        seen(page, "champion")
        save(page, out / "mlflow-models.png")


def take_lifecycle(dagster: str, mlflow: str, experiment: str, out: Path) -> None:
    """Write the pictures of a refused challenger, what runs by itself, two runs compared and the aliases."""
    with browser_page() as page:
        page.goto(checks_url(dagster, "judgement", "gates"))
        seen(page, "Latest execution", "window: one item holds")
        page.get_by_text("[Show Markdown]").click()
        save(page, out / "dagster-gates.png")
        page.goto(f"{dagster}/automation")
        seen(page, "daily_retraining", "champion")
        save(page, out / "dagster-automation.png")
        page.goto(compare_url(mlflow, experiment, newest_runs(mlflow, experiment, "retrieval")))
        seen(page, "Comparing 2 Runs")
        for unfolded in ("Visualizations", "Parameters"):
            page.get_by_role("button", name=unfolded).or_(page.get_by_text(unfolded, exact=True)).first.click()
        save(page, out / "mlflow-compare.png", settle_ms=6000)
        page.goto(model_url(mlflow, f"{experiment}-ranking"))
        seen(page, "champion", "previous", "challenger")
        # Versions and their roles stand below the description and the tags.
        page.get_by_text("Version 1", exact=True).first.scroll_into_view_if_needed()
        save(page, out / "mlflow-aliases.png")


LISTS: dict[str, Callable[[str, str, str, Path], None]] = {"models": take_models, "lifecycle": take_lifecycle}


def main() -> None:
    """Parse the arguments and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", choices=LISTS)
    parser.add_argument("--dagster", default="http://127.0.0.1:3000")
    parser.add_argument("--mlflow", default="http://127.0.0.1:5000")
    parser.add_argument("--experiment", default="simulated")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    arguments = parser.parse_args()
    if not arguments.experiment.startswith("simulated"):
        parser.error("pictures in the documentation show simulated data only")
    arguments.out.mkdir(parents=True, exist_ok=True)
    LISTS[arguments.list](arguments.dagster, arguments.mlflow, arguments.experiment, arguments.out)


if __name__ == "__main__":
    main()

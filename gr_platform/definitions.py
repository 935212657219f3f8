"""The Dagster code location: every asset, check, job and resource of the platform.

Invariant: importing it loads neither torch nor MLflow, so the UI and the daemon start fast.
"""

import logging

import dagster as dg

from assets import (
    data_card,
    data_checks,
    deployment,
    evaluation,
    events,
    experiments,
    model_checks,
    registration,
    sequences,
    served,
    training,
)
from assets.resources import Platform

FULL_PIPELINE = "full_pipeline"

full_pipeline = dg.define_asset_job(
    FULL_PIPELINE,
    selection=dg.AssetSelection.all()
    - dg.AssetSelection.groups(experiments.GROUP)
    - dg.AssetSelection.assets(evaluation.comparison),
    description="From landed files to the served pair of models and what it served; finished stages are reused.",
)


@dg.logger(
    config_schema={
        "path": dg.Field(str, description="file to append to"),
        "level": dg.Field(str, default_value="INFO"),
    },
    description="Dagster's own log as lines of a file: what `gr demo` uses so that its screen stays readable.",
)
def file_logger(context: dg.InitLoggerContext) -> logging.Logger:
    """Return a logger that appends to the configured file."""
    path = context.logger_config["path"]
    logger = logging.Logger("gr.dagster", level=context.logger_config["level"])
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    return logger


defs = dg.Definitions(
    assets=dg.load_assets_from_modules(
        [events, data_card, sequences, training, evaluation, registration, deployment, served, experiments]
    ),
    asset_checks=dg.load_asset_checks_from_modules([data_checks, model_checks]),
    jobs=[full_pipeline],
    resources={"platform": Platform(), "lab": experiments.Experiments()},
    executor=dg.in_process_executor,
    loggers={"console": dg.colored_console_logger, "file": file_logger},
)

"""The Dagster code location: every asset, check, job, schedule, sensor and resource of the platform.

Invariant: importing it loads neither torch nor MLflow, so the UI and the daemon start fast.
"""

import logging

import dagster as dg

from assets import (
    automation,
    cleaning,
    data_card,
    data_checks,
    deployment,
    drift_checks,
    evaluation,
    events,
    experiments,
    inbox,
    jobs,
    judgement,
    model_checks,
    registration,
    sensors,
    sequences,
    served,
    shadow,
    training,
)
from assets.resources import Platform, StateFolder
from gr_platform import settings
from gr_platform.lifecycle import options


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


# Read once: a cron line that is changed counts when the code location is loaded again, every other option at once.
_options = options.loadable(settings.home())

defs = dg.Definitions(
    assets=dg.load_assets_from_modules(
        [
            inbox,
            events,
            data_card,
            sequences,
            training,
            evaluation,
            registration,
            judgement,
            deployment,
            served,
            experiments,
        ]
    ),
    asset_checks=dg.load_asset_checks_from_modules([data_checks, model_checks, judgement, drift_checks]),
    jobs=[*jobs.jobs(_options), cleaning.cleaning],
    schedules=[*automation.schedules(_options), *cleaning.schedules(_options)],
    sensors=[*sensors.sensors, shadow.shadow],
    resources={"platform": Platform(), "state_folder": StateFolder(), "lab": experiments.Experiments()},
    executor=dg.in_process_executor,
    loggers={"console": dg.colored_console_logger, "file": file_logger},
)

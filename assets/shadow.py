"""When a challenger has scored enough live requests: the sensor that has it judged with them.

Invariant: as in sensors.py: a look is cheap, and whatever cannot be read is a reason to skip.
"""

import time

import dagster as dg

from assets import runs
from assets.jobs import deploying_config
from assets.runs import DEPLOYING
from assets.sensors import AGAIN_S, RUNNING, Asked
from gr_platform import settings
from gr_platform.errors import UserError


@dg.sensor(job_name=DEPLOYING, minimum_interval_seconds=60, default_status=RUNNING)
def shadow(context: dg.SensorEvaluationContext) -> Asked:
    """The challenger in the shadow has scored as many live requests as are wanted: it is judged, and served or not."""
    from gr_platform.lifecycle import options
    from gr_platform.lifecycle.live import in_the_shadow

    home = settings.home()
    try:
        wanted = options.read(home).shadow.requests
        found = in_the_shadow(home) if wanted else None
    except UserError as error:
        return dg.SkipReason(str(error))
    if found is None:
        return dg.SkipReason("no challenger scores live requests")
    if found.num_requests < wanted:
        return dg.SkipReason(f"the challenger has scored {found.num_requests} live requests, {wanted} are wanted")
    return dg.RunRequest(
        run_key=f"{found.digest[:16]}-{int(time.time() // AGAIN_S)}",
        run_config=deploying_config(champion_only=False, dataset=found.dataset),
        tags={runs.REASON: f"the challenger has scored {found.num_requests} live requests"},
    )

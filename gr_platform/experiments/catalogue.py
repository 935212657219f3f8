"""The nine experiments by name, the most valuable first.

Invariant: building them needs no data and no torch, so definitions and command lines can name every cell.
"""

from functools import lru_cache

from gr_platform.errors import UserError
from gr_platform.experiments import costs, properties, public
from gr_platform.experiments.experiment import Experiment, Scale, at_scale

BUILDERS = (
    public.ml_1m,
    public.retailrocket,
    properties.drifting_stream,
    properties.stochastic_length,
    properties.rab_ablation,
    costs.generative_training,
    costs.scaling,
    costs.encoder_efficiency,
    public.amazon_sports,
)


@lru_cache(maxsize=2)
def experiments(scale: Scale = "full") -> dict[str, Experiment]:
    """Return name -> experiment at a scale."""
    found = [at_scale(build(), scale) for build in BUILDERS]
    return {each.name: each for each in found}


def named(name: str, scale: Scale = "full") -> Experiment:
    """Return the experiment of that name. Raises UserError if there is none."""
    known = experiments(scale)
    if name not in known:
        raise UserError(f"there is no experiment {name!r}; choose among {', '.join(known)}")
    return known[name]

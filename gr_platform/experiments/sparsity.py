"""The sparsity table of Stochastic Length, computed again with the rule that training uses.

Invariant: lengths are drawn, not read from a data set: no public log has histories of thousands of events.
"""

from typing import Any

import numpy as np

from gr_platform.experiments.run import Work
from gr_platform.sequences.subsequence import kept_lengths
from gr_platform.training.seeds import generator


def sparsity(work: Work) -> dict[str, Any]:
    """Return for each alpha, in percent: `sparsity`, the places of max_length that hold no kept token, and what
    Stochastic Length removes of all tokens and of all pairs of tokens, which is what attention costs.

    options: max_length, alphas, num_users, median and spread: lengths are lognormal, cut at max_length.
    """
    options = work.cell.options
    max_length = options["max_length"]
    users = np.arange(options["num_users"])
    drawn = generator(1, "lengths").lognormal(np.log(options["median"]), options["spread"], len(users))
    lengths = np.clip(drawn, 1, max_length).astype(np.int64)
    figures: dict[str, Any] = {"mean_length": float(lengths.mean()), "full_share": float((drawn >= max_length).mean())}
    for alpha in options["alphas"]:
        kept = kept_lengths(lengths, users, max_length=max_length, alpha=alpha, seed=1, epoch=0)
        figures[f"sparsity_{alpha}"] = 100.0 * (1 - kept.mean() / max_length)
        figures[f"removed_tokens_{alpha}"] = 100.0 * (1 - kept.sum() / lengths.sum())
        figures[f"removed_pairs_{alpha}"] = 100.0 * (1 - np.square(kept).sum() / np.square(lengths).sum())
    return {"figures": {name: float(value) for name, value in figures.items()}}

"""What a challenger did with live requests: read from the served log, where its scores stand beside the served ones.

Invariant: only rows of this very challenger count, whatever was the shadow before it.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.stats import rankdata

from gr_platform import serving_state
from gr_platform.bundle.load import load
from gr_platform.events.judgements import psi
from gr_platform.lifecycle.gates import ShadowEvidence

MAX_ROWS = 20_000
SCORE_BINS = 10
_COLUMNS = ["latency_ms", "scores", "shadow_digest", "shadow_scores", "shadow_ms"]


def shadow_evidence(home: Path, ds: str, bundle: Path) -> ShadowEvidence:
    """Return what the ranking bundle in a folder did as a shadow, of the newest MAX_ROWS requests it was asked about.

    latency_ratio: median time to score against the median of the whole answer that was served, in which the champion
    retrieves and scores. score_drift: PSI over deciles of the served probabilities, the worst of the tasks. agreement:
    mean Spearman correlation of both orders, by the mean probability, of requests whose scores differ.
    """
    rows = _rows(serving_state.served_folder(home, ds), load(bundle).digest)
    if not len(rows):
        return ShadowEvidence(num_requests=0, failures=0.0, latency_ratio=None, score_drift=None, agreement=None)
    answered = rows.filter(pc.is_valid(rows["shadow_scores"]))
    served, shadow = ([np.array(each) for each in answered[name].to_pylist()] for name in ("scores", "shadow_scores"))
    pairs = [(a, b) for a, b in zip(served, shadow, strict=True) if a.shape == b.shape and a.size]
    return ShadowEvidence(
        num_requests=len(rows),
        failures=1 - len(answered) / len(rows),
        latency_ratio=_latency_ratio(rows),
        score_drift=_drift(pairs) if pairs else None,
        agreement=_agreement(pairs),
    )


def _rows(folder: Path, digest: str) -> pa.Table:
    """Return the newest rows of the log that name the shadow, newest part first."""
    parts, count = [], 0
    for part in reversed(serving_state.log_parts(folder)):
        try:
            # By name of the file alone: the folder's date is no column of ours.
            file = pq.ParquetFile(part)
            if not set(_COLUMNS) <= set(file.schema_arrow.names):
                continue
            table = file.read(columns=_COLUMNS)
        except (OSError, pa.ArrowInvalid):
            # The server has just deleted it for room, or it is damaged: what it holds is no evidence.
            continue
        table = table.filter(pc.equal(table["shadow_digest"], digest))
        parts.append(table)
        count += len(table)
        if count >= MAX_ROWS:
            break
    return pa.concat_tables(parts).slice(0, MAX_ROWS) if parts else pa.table({name: [] for name in _COLUMNS})


def _latency_ratio(rows: pa.Table) -> float | None:
    ours, theirs = (rows[name].drop_null().to_numpy() for name in ("shadow_ms", "latency_ms"))
    return float(np.median(ours) / max(np.median(theirs), 1e-6)) if len(ours) and len(theirs) else None


def _drift(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    served, shadow = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    worst = 0.0
    for task in range(served.shape[1]):
        edges = np.quantile(served[:, task], np.arange(1, SCORE_BINS) / SCORE_BINS)
        counts = [
            np.bincount(np.searchsorted(edges, scores[:, task]), minlength=SCORE_BINS) for scores in (served, shadow)
        ]
        worst = max(worst, psi(*(dict(enumerate(each.tolist())) for each in counts)))
    return worst


def _agreement(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    found = []
    for pair in pairs:
        ranks = [rankdata(scores.mean(axis=1)) for scores in pair]
        if all(np.ptp(rank) > 0 for rank in ranks):
            found.append(float(np.corrcoef(*ranks)[0, 1]))
    return float(np.mean(found)) if found else None

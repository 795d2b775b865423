"""How well scores of training rows foretell trainings on a part of them: the linear datamodeling score.

Source: Park et al. 2023, arXiv 2303.14186.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Datamodeling:
    """How well scores foretell trainings on subsets: the linear datamodeling score.

    Attributes:
      value: the mean over questions of the rank correlation of found and foretold losses, from -1 to 1. It counts as 0
        for scores that are the same for all rows.
      low, high: its 95 % interval, by the bootstrap over subsets.
      each: the correlation of each question, `[Q]`.
      subsets: how many there were.
    """

    value: float
    low: float
    high: float
    each: np.ndarray
    subsets: int


def datamodeling_score(scores: Any, kept: Any, losses: Any, *, resamples: int = 1000, seed: int = 0) -> Datamodeling:
    r"""The linear datamodeling score: for each question the rank correlation over subsets S of

    $$ \sum_{i \in S} s_{qi} \quad\text{with}\quad F_q(w_K(1_S)), $$

    and the mean over questions.

    Args:
      scores: `[Q, N]`, how much the weight of a row raises the loss of a question.
      kept: bool `[M, N]`, the rows of each subset.
      losses: `[M, Q]`, the losses of the questions after training on each.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: for arrays that do not fit together, fewer than three subsets, or numbers that are not finite.

    Examples:
      >>> import numpy as np
      >>> from methods.datamodeling import datamodeling_score
      >>> kept = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
      >>> scores = np.array([[-3.0, -2.0, 1.0]])
      >>> found = datamodeling_score(scores, kept, np.array([[0.1], [0.3], [0.9], [0.2]]))
      >>> found.value
      1.0
    """
    scores, kept, losses = np.asarray(scores, float), np.asarray(kept), np.asarray(losses, float)
    if kept.dtype != bool:
        raise ValueError(f"datamodeling_score: subsets of {kept.dtype} are no masks: give bool [M, N].")
    if scores.ndim != 2 or kept.shape[1:] != scores.shape[1:] or losses.shape != (len(kept), len(scores)):
        raise ValueError(
            f"datamodeling_score: scores {list(scores.shape)}, subsets {list(kept.shape)} and losses "
            f"{list(losses.shape)} must be [Q, N], [M, N] and [M, Q]."
        )
    if len(kept) < 3:
        raise ValueError(f"datamodeling_score: {len(kept)} subsets have no rank correlation to speak of: take more.")
    if not (np.isfinite(scores).all() and np.isfinite(losses).all()):
        raise ValueError("datamodeling_score: a score or a loss is not finite.")
    foretold = kept @ scores.T
    # Sums that are equal but for rounding are equal: ranks would tell them apart.
    foretold = np.round(foretold / (np.abs(foretold).max(axis=0, initial=0) + np.finfo(float).tiny), 10)
    each = _rank_correlation(foretold, losses)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(kept), size=len(kept)) for _ in range(resamples)]
    means = [_rank_correlation(foretold[at], losses[at]).mean() for at in drawn]
    low, high = np.quantile(means, [0.025, 0.975]) if resamples else (np.nan, np.nan)
    return Datamodeling(float(each.mean()), float(low), float(high), each, len(kept))


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's, of each column; 0 where one is constant."""
    from scipy.stats import rankdata  # half a second

    a, b = (rankdata(x, axis=0) for x in (first, second))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return (a * b).sum(axis=0) / np.where(size > 0, size, 1.0)


def subsets(count: int, rows: int, share: float, seed: int = 0) -> np.ndarray:
    """Random subsets of the rows, bool `[count, rows]`: each a share of them, drawn without replacement.

    Raises:
      ValueError: for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"subsets(share={share}): must be above 0 and at most 1.")
    rng = np.random.default_rng(seed)
    size = max(1, round(share * rows))
    return np.stack([np.isin(np.arange(rows), rng.permutation(rows)[:size]) for _ in range(count)])

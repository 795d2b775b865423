r"""The metrics of classification and regression: `metric(predictions, labels) -> float`, larger is better.

Accuracy, F1 and Matthews are counts, a line of numpy each; the correlations are scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def checked(task: str, values: Mapping[str, float]) -> dict[str, float]:
    """`values` by the names of their metrics.

    Raises:
      ValueError: for one that is not finite, by name: an average with it would be none of anything.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"The metric {name} of {task} is {value}: the predictions or the labels are not finite.")
    return dict(values)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions that are right."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    r"""`2 TP / (2 TP + FP + FN)` of class 1 against all others; 0 where class 1 is neither predicted nor there."""
    hits = np.sum((predictions == 1) & (labels == 1))
    total = np.sum(predictions == 1) + np.sum(labels == 1)
    return float(2 * hits / total) if total else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    r"""Matthews' correlation of two classes, the Pearson correlation of 0 and 1; 0 where one side is constant.

        (TP TN - FP FN) / sqrt( (TP+FP) (TP+FN) (TN+FP) (TN+FN) )

    Matthews, "Comparison of the predicted and observed secondary structure of T4 phage lysozyme", 1975.
    """
    tp, tn, fp, fn = (float(np.sum((predictions == p) & (labels == y))) for p, y in ((1, 1), (0, 0), (1, 0), (0, 1)))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation (`scipy.stats.pearsonr`); 0 where one side is constant, which correlates with nothing."""
    from scipy import stats  # half a second

    return 0.0 if _constant(predictions, labels) else float(stats.pearsonr(predictions, labels).statistic)  # pyright: ignore


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation (`scipy.stats.spearmanr`); 0 where one side is constant."""
    from scipy import stats

    return 0.0 if _constant(predictions, labels) else float(stats.spearmanr(predictions, labels).statistic)  # pyright: ignore


def _constant(*sides: np.ndarray) -> bool:
    return any(np.all(side == side[0]) for side in sides)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""What a classification or a regression may be scored by, by name."""

"""In which unit the number of a metric is told, whether more of it is better, and what an interval is of.

Every table and figure of a run, and of runs side by side, asks here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Unit(NamedTuple):
    """How a metric is told.

    Attributes:
      times: what its value is multiplied by.
      digits: after the point.
      sign: behind the number, where it stands alone.
      less: whether less of it is better.
      words: what it is; "" for a share in per cent.
    """

    times: float = 100.0
    digits: int = 1
    sign: str = " %"
    less: bool = False
    words: str = ""

    def shown(self, value: float) -> str:
        """The number in a column of that metric; the perplexity of a model that knows nothing has many digits."""
        number = self.times * value
        return f"{number:.{self.digits}f}" if abs(number) < 1e7 else f"{number:.3g}"

    def alone(self, value: float) -> str:
        """The number with its sign."""
        return self.shown(value) + self.sign

    def better(self, value: float) -> float:
        """The value so that more is better, whatever the metric; what is not finite is worst."""
        return -math.inf if not math.isfinite(value) else -value if self.less else value


SHARE = Unit()
CORRELATION = Unit(sign="", words="a correlation, times 100")
UNITS = {
    "loss": Unit(1.0, 3, "", less=True, words="the mean over all learned tokens, in nats"),
    "perplexity": Unit(1.0, 3, "", less=True, words="its exponential"),
    "matthews": CORRELATION,
    "pearson": CORRELATION,
    "spearman": CORRELATION,
    "nist": Unit(1.0, 3, "", words="the information of word sequences that are right, in bits"),
    "cider": Unit(1.0, 3, "", words="from 0 to 10"),
}
"""Metrics that are no shares."""


def of(metric: str) -> Unit:
    """The unit of a metric: a share, in per cent, if nothing else is known."""
    return UNITS.get(metric, SHARE)


def shown(metric: str, value: float) -> str:
    """A metric as a cell of its own column."""
    return of(metric).shown(value)


def axis(metric: str) -> str:
    """What an axis of a metric is called."""
    unit = of(metric)
    more = ", %" if unit is SHARE else ", times 100" if unit is CORRELATION else ""
    return f"{metric}{more}{' (less is better)' if unit.less else ''}"


def told(metrics: Iterable[str]) -> str:
    """A sentence, or some, on what the numbers in columns of these metrics are."""
    names = list(metrics)
    words = [f"{name}: {UNITS[name].words}" for name in names if name in UNITS]
    shares = [name for name in names if name not in UNITS]
    if not words:
        return "Metrics in per cent."
    if "exact" in shares and "loss" in names:
        words.append("exact: answers whose every token is the model's first choice, in per cent")
    elif shares:
        words.append(f"{', '.join(shares)}: in per cent")
    return f"{'; '.join(words)}."


def share_of(result: Mapping[str, Any]) -> str | None:
    """The share of right answers of which a result has an interval, by its name; None where it has none.

    It need not be among the metrics: a task that is measured by Matthews' correlation counts right answers too.
    """
    if not result.get("accuracy"):
        return None
    metrics = result.get("metrics") or {}
    return next((name for name in metrics if name == "exact" or name.startswith("accuracy")), "accuracy")


def interval(result: Mapping[str, Any], sign: str = "") -> str:
    """The ends of that interval, as a cell of a column that names the share."""
    low, high = (SHARE.shown(result["accuracy"][end]) for end in ("low", "high"))
    return f"{low} to {high}{sign}"


def ends(result: Mapping[str, Any]) -> list[list[float]]:
    """How far that interval goes below and above the share, in per cent, as figures draw it."""
    score = result["accuracy"]
    gaps = score["value"] - score["low"], score["high"] - score["value"]
    return [[SHARE.times * max(gap, 0.0)] for gap in gaps]

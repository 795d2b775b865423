"""Whether an estimator keeps the contract of `Hypergradient`, tried duty by duty on small problems.

An estimator may be biased, so its numbers are not compared with the true hypergradient. They are compared with its own
on another form of the same problem: with a leaf frozen by the optimizer or constant in the loss, in bounded or in free
coordinates, with batches stacked or indexed. An estimate that differs there is wrong in one of the two, however biased.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import optax

from bilevel.measuring.duties import DUTIES, RATE, STEPS, Make


@dataclasses.dataclass(frozen=True)
class EstimatorCheck:
    """What `check_estimator` found; `print` it.

    Attributes:
      name: of the estimator.
      tried: the duties that were tried.
      unmet: a sentence for each that is not met.

    Examples:
      >>> from bilevel.testing import EstimatorCheck
      >>> print(EstimatorCheck("Mine", tried=("results",), unmet=("results: grad has no array.",)))
      Mine: 1 thing is not met
        results: grad has no array.
    """

    name: str
    tried: tuple[str, ...]
    unmet: tuple[str, ...]

    def __str__(self) -> str:
        if not self.unmet:
            return f"{self.name}: all of {', '.join(self.tried)} are as a hypergradient must have them"
        count = "1 thing is" if len(self.unmet) == 1 else f"{len(self.unmet)} things are"
        return "\n  ".join([f"{self.name}: {count} not met", *self.unmet])


def check_estimator(make: Make, *, duties: Sequence[str] | None = None) -> EstimatorCheck:
    """Tries whether an estimator keeps the contract that `bilevel.Hypergradient` states; in float64.

    A duty that does not apply counts as met: an estimator that refuses a problem in a sentence (ValueError) where the
    contract allows it, or one that does not train by the optimizer it is given. Estimators of tasks are not for this.

    Args:
      make: `make(optimizer, steps)`, the estimator; the class itself, if it has no other settings.
      duties: some of `DUTIES`, by name; None is all.

    Returns:
      An `EstimatorCheck`; `not check.unmet` where all is met.

    Raises:
      ValueError: for a duty that there is not.

    Examples:
      >>> import bilevel
      >>> from bilevel.testing import check_estimator
      >>> check_estimator(bilevel.Unrolled, duties=["results"]).unmet
      ()
    """
    chosen = tuple(DUTIES if duties is None else duties)
    if unknown := [name for name in chosen if name not in DUTIES]:
        raise ValueError(f"check_estimator(duties=...): there is no {unknown[0]!r}, but {', '.join(DUTIES)}.")
    unmet: list[str] = []
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = type(make(optax.sgd(RATE), STEPS)).__name__
        for duty in chosen:
            try:
                unmet += [f"{duty}: {sentence}." for sentence in DUTIES[duty](make)]
            except Exception as error:  # whatever an estimator raises is what there is to tell
                said = str(error).partition("\n")[0]
                unmet.append(f"{duty}: {type(error).__name__} where an estimate was wanted: {said}")
    return EstimatorCheck(name, chosen, tuple(unmet))

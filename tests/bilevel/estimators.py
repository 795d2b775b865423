"""Every estimator, one row each: what the tests that hold for all of them loop over."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import bilevel
from bilevel.testing import Quadratic


@dataclasses.dataclass(frozen=True)
class Row:
    """An estimator and what it should return.

    `closed_form(quadratic, outer, steps, **kwargs)` is what it should return on the quadratic family, `tolerance` the
    relative error allowed there (None skips it), `blind` the leaves of `outer` whose derivative it cannot see.
    """

    name: str
    make: Callable[[Any, int], bilevel.Hypergradient]
    closed_form: Callable[..., dict] | None
    tolerance: float | None = 1e-10
    blind: tuple[str, ...] = ()


def unseen(closed_form: Callable[..., dict], *names: str) -> Callable[..., dict]:
    """`closed_form` with 0 for `names`."""

    def changed(quadratic, outer, steps, **kwargs):
        result = closed_form(quadratic, outer, steps, **kwargs)
        return {name: np.zeros_like(leaf) if name in names else leaf for name, leaf in result.items()}

    return changed


last_step = functools.partial(Quadratic.unrolled, truncate=1)

ESTIMATORS = [
    Row("mixed", bilevel.Unrolled, Quadratic.unrolled),
    Row("reverse", functools.partial(bilevel.Unrolled, mode="reverse"), Quadratic.unrolled),
    Row("forward", functools.partial(bilevel.Unrolled, mode="forward"), Quadratic.unrolled),
    Row("first order", bilevel.FirstOrder, Quadratic.first_order, blind=("rate", "start")),
    Row(
        "implicit",
        functools.partial(bilevel.Implicit, linear_solver=bilevel.Dense()),
        Quadratic.implicit,
        blind=("rate", "start"),
    ),
    Row("one step", bilevel.OneStep, last_step, blind=("start",)),
    Row(
        "finite difference",
        bilevel.FiniteDifference,
        unseen(last_step, "rate"),
        tolerance=1e-9,  # it divides rounding by its radius
        blind=("rate", "start"),
    ),
    Row("sama", bilevel.SAMA, unseen(last_step, "rate"), tolerance=1e-9, blind=("rate", "start")),
]

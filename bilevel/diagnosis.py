"""Why a step failed, found by replaying it: nothing of this runs unless something went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bilevel.trees import PyTree, is_inexact, leaf_names

_START = "check the start values."


def not_finite(tree: PyTree) -> list[str]:
    """Names of the leaves of `tree` that hold a NaN or an infinity."""
    named = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return [name for name, leaf in named if is_inexact(leaf) and not np.isfinite(np.asarray(leaf)).all()]


class _Recorder:
    """A hypergradient that hands out what the real one estimated."""

    def __init__(self, hypergradient: Any, keep: Callable[[Any], None]):
        self._hypergradient, self._keep = hypergradient, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hypergradient, name)

    def estimate(self, *args: Any) -> Any:
        estimate = self._hypergradient.estimate(*args)
        self._keep(estimate)
        return estimate


def describe_failure(solver: Any, state: Any, step: Callable[..., Any], number: int, norms: str = "") -> str:
    """One sentence on why outer step `number`, taken from `state` by `step(solver, state)`, is not finite.

    `norms` says how large the last finite metrics were.
    """
    where = f"Outer step {number}: "
    if names := not_finite((state.outer, state.inner)):
        where += f"the state it starts from is already not finite, in {', '.join(names)}; "
        return where + (f"the step before it diverged ({norms}): lower the step sizes." if norms else _START)
    kept: list[Any] = []
    if hasattr(solver, "hypergradient"):
        solver = dataclasses.replace(solver, hypergradient=_Recorder(solver.hypergradient, kept.append))
    new, metrics = step(solver, state)
    remedy = "lower the inner learning rate, or check the data for values that are not finite."
    for estimate in kept:
        losses = np.asarray(estimate.aux.info.get("inner_loss", ()))
        if not np.isfinite(losses).all():
            t = int(np.argmin(np.isfinite(losses)))
            leaves = ", ".join(not_finite(estimate.inner_state.params)) or "no leaf of the trained parameters"
            return where + f"inner_loss is {losses[t]} at inner step {t} (then not finite: {leaves}); " + remedy
        if names := not_finite(estimate.inner_state.params):
            return where + f"the inner update made {', '.join(names)} not finite; " + remedy
        if not np.isfinite(estimate.value):
            return where + f"outer_loss is {estimate.value} at a finite point; check outer_loss and its data."
        if names := not_finite(estimate.grad):
            return where + (
                f"the hypergradient is not finite at outer leaf {', '.join(names)} while both losses are finite; "
                "look for a root, logarithm, norm or division at 0 in a loss."
            )
    names = [name for name, value in metrics.items() if not np.isfinite(np.asarray(value)).all()]
    leaves = ", ".join(not_finite((new.outer, new.inner))) or "no leaf of the state"
    before = f"; before it {norms}" if norms else ""
    return where + (
        f"{', '.join(names)} is not finite (not finite after the step: {leaves}{before}); lower the step sizes."
    )

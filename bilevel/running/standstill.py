"""A run that did not move: its hypergradient was 0 in every step, for the values that there were."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np

from bilevel.differentiation.influence import StructuralZeroWarning, ZeroHypergradientWarning
from bilevel.differentiation.loss_checks import traced_losses, warn_if_misplaced
from bilevel.hypergradients.contract import traceable
from bilevel.running.replay import asked_for


def stood_still(rows: dict[str, np.ndarray]) -> bool:
    """Whether the hypergradient was 0 in every step of which these are the metrics."""
    return "hypergradient_norm" in rows and bool(np.all(rows["hypergradient_norm"] == 0))


def warn_of_zeros(solver: Any, state: Any, data: Any, steps: int) -> None:
    """Warns that the hypergradient was 0 in all steps of a run, unless that is so by construction, which was said.

    Args:
      solver, state, data: of the run, at its end.
      steps: how many there were.

    Warns:
      ZeroHypergradientWarning: says what it may come from.
    """
    if _by_construction(solver, state, data):
        return
    warnings.warn(
        f"The hypergradient was exactly 0 in {'the' if steps == 1 else f'all {steps}'} outer step{'s' * (steps > 1)}, "
        "so that it has not moved outer. It is not 0 by construction: where outer stands, something between it and the "
        "outer loss has no slope, such as a clip, a relu or a maximum beyond its edge, a product with 0, or a learning "
        "rate of 0. Start elsewhere, or take a smooth operation; bilevel.testing.check_hypergradient looks at every "
        "leaf.",
        ZeroHypergradientWarning,
        stacklevel=3,
    )


def _by_construction(solver: Any, state: Any, data: Any) -> bool:
    """Whether a derivative is 0 whatever the values are: of the estimate, or of one of the losses."""
    hypergradient, asked = getattr(solver, "hypergradient", None), asked_for(solver, state, data)
    if hypergradient is None or not asked:
        return False
    problem, inner_state, outer, inner_batches, outer_batch, key = asked
    params, steps = None if inner_state is None else inner_state.params, hypergradient.steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_misplaced(traced_losses(problem, params, outer, inner_batches, outer_batch, key, steps))
        # A function of its own, so that it is traced, whatever has been traced before.
        jax.eval_shape(lambda *arguments: traceable(hypergradient).estimate(*arguments).grad, *asked)
    return any(issubclass(warning.category, StructuralZeroWarning) for warning in caught)

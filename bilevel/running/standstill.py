"""A run that did not move: its hypergradient was 0 in every step, for the values that there were."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.influence import StructuralZeroWarning, ZeroHypergradientWarning
from bilevel.differentiation.loss_checks import traced_losses, warn_if_misplaced
from bilevel.hypergradients.contract import traceable
from bilevel.running.chunks import batches
from bilevel.running.replay import asked_for
from bilevel.solvers.stochastic import Stochastic
from bilevel.trees import PyTree, leaf_names, named, partition


def stood_still(rows: dict[str, np.ndarray]) -> bool:
    """Whether these metrics are of steps in all of which the hypergradient, or a stochastic direction, was 0."""
    norms = rows.get("hypergradient_norm", rows.get("direction_norm"))
    return norms is not None and bool(np.all(norms == 0))


def warn_of_zeros(solver: Any, state: Any, data: Any, steps: int) -> None:
    """Warns that the hypergradient was 0 in all steps of a run, unless that is so by construction, which was said.

    Args:
      solver, state, data: of the run, at its end.
      steps: how many there were.

    Warns:
      ZeroHypergradientWarning: says what it may come from, and names the leaves where others are 0 by construction.
    """
    of_estimate = hasattr(solver, "hypergradient")
    zeros = (_of_estimate if of_estimate else _of_iteration)(solver, state, data)
    if not zeros:
        return
    moving = partition(state.outer)[0]
    everything = len(zeros) == len(_names(moving))
    whose = "" if everything else f" of {named('outer', *zeros)}"
    kinds = sorted({str(jnp.result_type(x)) for x in jax.tree.leaves(moving)})
    warnings.warn(
        f"The {'hypergradient' if of_estimate else 'direction'}{whose} was exactly 0 in "
        f"{'the' if steps == 1 else f'all {steps}'} outer step{'s' * (steps > 1)}: what has moved outer, if anything, "
        "is something else, such as a weight decay. It is not 0 by construction: where outer stands, something between "
        "it and the outer loss has no slope, such as a clip, a relu or a maximum beyond its edge, a product with 0, or "
        f"a learning rate of 0; or a slope too small for {' or '.join(kinds)} was rounded to 0, as of a loss in tiny "
        "units; or the rows and random draws of these steps have none, as of an outer loss that is at its least "
        "already. Start elsewhere, take a smooth operation, or more rows and steps; "
        "bilevel.testing.check_hypergradient looks at every leaf.",
        ZeroHypergradientWarning,
        stacklevel=3,
    )


def _of_estimate(solver: Any, state: Any, data: Any) -> list[str]:
    """The leaves whose hypergradient is 0 for the values that there are, of those that are all 0."""
    hypergradient, asked = solver.hypergradient, asked_for(solver, state, data)
    if hypergradient is None or not asked:
        return _names(partition(state.outer)[0])
    problem, inner_state, outer, inner_batches, outer_batch, key = asked
    params, steps = None if inner_state is None else inner_state.params, hypergradient.steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_misplaced(traced_losses(problem, params, outer, inner_batches, outer_batch, key, steps))
        # A function of its own, so that it is traced, whatever has been traced before.
        jax.eval_shape(lambda *arguments: traceable(hypergradient).estimate(*arguments).grad, *asked)
    return _not_told(partition(outer)[0], caught)


def _of_iteration(solver: Any, state: Any, data: Any) -> list[str]:
    """The leaves that no iteration of a stochastic solver from here would move; none where some leaf would be moved.

    That the direction was 0 says little of a solver that begins with an adjoint of 0. What would ever make another of
    it is looked at here: the slope of the outer loss in `outer`, and the mixed product with any vector.
    """
    if not isinstance(solver, Stochastic):  # how it moves is its own
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        at = solver.iteration(state, *batches(solver, state, data))
        try:
            outside = at.outer_gradient(at.w, at.lam, at.outer_draws[0])
            mixed = at.products(at.w, at.lam, _any_vector(at.w), at.draws[0]).mixed
        except Exception:  # a loss without a second derivative: nothing is known of it
            return []
    pulled = any(np.any(x) for x in jax.tree.leaves(outside.inner))
    slopes = zip(jax.tree.leaves(outside.outer), jax.tree.leaves(mixed), strict=True)
    if any(np.any(direct) or (pulled and np.any(trained)) for direct, trained in slopes):
        return []
    return _not_told(at.lam, caught)


def _any_vector(like: PyTree) -> PyTree:
    """A tree of random numbers: a product with it is 0 where every product is."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)])


def _names(moving: PyTree) -> list[str]:
    """The names of the leaves that have an entry."""
    return [name for name, x in zip(leaf_names(moving), jax.tree.leaves(moving), strict=True) if np.size(x)]


def _not_told(moving: PyTree, caught: list[warnings.WarningMessage]) -> list[str]:
    """The leaves of which no warning tells that they are 0 by construction; none where one tells it of a loss."""
    told = [warning.message for warning in caught if isinstance(warning.message, StructuralZeroWarning)]
    if any(not warning.leaves for warning in told):
        return []
    named_ones = {name for warning in told for name in warning.leaves}
    return [name for name in _names(moving) if name not in named_ones]

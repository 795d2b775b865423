"""Many questions about one training: the hypergradients of several outer batches, stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from bilevel.data import rows
from bilevel.hypergradients.contract import Hypergradient, driven_from_host, is_hypergradient
from bilevel.hypergradients.training import InnerState
from bilevel.problem.problem import Problem, is_problem
from bilevel.settings.fields import checked
from bilevel.trees import Batch, Key, Outer, PyTree


def value_and_hyperjacobian(problem: Problem, hypergradient: Hypergradient) -> Callable[..., tuple[jax.Array, PyTree]]:
    r"""The outer losses of several batches after one training, and their derivatives by `outer`:

    $$ J_q = \frac{d}{d\lambda} F(w_K(\lambda), \lambda; b_q), \qquad q = 1 \ldots Q . $$

    Row q is what `value_and_hypergrad` gives for batch q with the same key. The training, and what its backward pass
    computes anew, are shared: Q questions cost Q backward passes and one forward pass, in the memory of one training
    and Q adjoints of its state.

    Args:
      problem: the problem.
      hypergradient: an estimator; one that keeps a state of its own starts each question from the same.

    Returns:
      `f(outer, inner_state, inner_batches, outer_batches, key) -> (values, jacobian)`, the arguments of `estimate` with
      an axis of Q batches in front of each array of `outer_batches`: `values[Q]`, and for each leaf of `outer` an array
      `[Q, ...]`. It can be compiled (`jax.jit`), but for `Replay`.

    Raises:
      ValueError: for outer batches that have no such axis, or of different lengths; and as `estimate`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> function = bilevel.value_and_hyperjacobian(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20))
      >>> questions = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), val)  # each about a half of the rows
      >>> values, jacobian = function(
      ...     jax.numpy.zeros(()), None, bilevel.FullBatch(train), questions, jax.random.key(0)
      ... )
      >>> values.shape, jacobian.shape
      ((2,), (2,))
    """
    checked("value_and_hyperjacobian", "problem", problem, is_problem)
    checked("value_and_hyperjacobian", "hypergradient", hypergradient, is_hypergradient)

    def function(
        outer: Outer, inner_state: InnerState | None, inner_batches: Batch, outer_batches: Batch, key: Key
    ) -> tuple[jax.Array, PyTree]:
        question(outer_batches)
        if driven_from_host(hypergradient):
            whole: Any = hypergradient
            found = whole.estimates(problem, inner_state, outer, inner_batches, outer_batches, key)
            return found.value, found.grad

        def asked(batch: Batch) -> tuple[jax.Array, PyTree]:
            found = hypergradient.estimate(problem, inner_state, outer, inner_batches, batch, key)
            return found.value, found.grad

        # What does not depend on the batch is not batched: training is computed once.
        return jax.vmap(asked)(outer_batches)

    return function


def question(outer_batches: Batch) -> Batch:
    """The first of several outer batches.

    Raises:
      ValueError: if they are not arrays that lead with one axis of batches.
    """
    try:
        rows(outer_batches)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "The outer batches of several questions are arrays that lead with an axis of batches, the same for all: "
            f"{error}"
        ) from None
    return jax.tree.map(lambda x: x[0], outer_batches)

"""The direct term alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from bilevel.hypergradients.base import INSIDE_TRAINING, Trained
from bilevel.hypergradients.query import Answer, Query
from bilevel.settings.fields import register


@register
@dataclasses.dataclass(frozen=True)
class FirstOrder(Trained):
    r"""Trains K steps, then takes $\partial_\lambda F(w_K, \lambda)$ with $w_K$ held constant.

    It leaves out $(dw_K/d\lambda)^\top \partial_w F$, the whole effect of training. It is right when the inner
    problem does not depend on `outer`, or when $\partial_w F(w_K, \lambda) = 0$ (inner and outer loss share
    their minimiser); it is exactly 0 for variables that act only inside training (learning rates, dropout rates,
    regularisation weights), for which a `StructuralZeroWarning` names the leaf.

    Args:
      optimizer, steps: as for `Unrolled`.

    Raises:
      ValueError: for steps < 1.

    References:
      Liu et al. 2019 (DARTS, "first-order approximation"), arXiv 1806.09055.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import quadratic
      >>> problem = quadratic().problem  # its outer loss has a term |tilt|^2 / 2
      >>> hypergradient = bilevel.FirstOrder(optax.sgd(0.5), steps=10)
      >>> outer = {"tilt": jax.numpy.array([1.0, 2.0, 3.0])}
      >>> hypergradient.estimate(problem, None, outer, None, None, jax.random.key(0)).grad["tilt"].tolist()
      [1.0, 2.0, 3.0]
    """

    takes_complex: ClassVar[bool] = True

    takes_frozen: ClassVar[bool] = True

    blind: ClassVar[str | None] = INSIDE_TRAINING

    def meet_custom_rule(self, name: str) -> None:
        """Nothing is differentiated twice."""

    def differentiate(self, query: Query) -> Answer:
        """Costs `steps` inner gradients and one outer gradient."""
        state, trace = self.trajectory(query)
        objective = lambda moving: query.outer_loss(state.params, query.at(moving))  # noqa: E731
        (value, aux), grad = jax.value_and_grad(objective, has_aux=True)(query.moving)
        return Answer(value, grad, state, trace, aux)

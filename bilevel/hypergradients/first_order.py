"""The direct term alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from bilevel.differentiation.influence import value_and_grad
from bilevel.differentiation.loss_checks import guarded
from bilevel.hypergradients.base import Aux, Estimate, Trained, schedule
from bilevel.settings import register
from bilevel.trees import combine, partition


@register
@dataclasses.dataclass(frozen=True)
class FirstOrder(Trained):
    r"""Trains K steps, then takes :math:`\partial_\lambda F(w_K, \lambda)` with :math:`w_K` held constant.

    It leaves out :math:`(dw_K/d\lambda)^\top \partial_w F`, the whole effect of training. It is right when the inner
    problem does not depend on `outer`, or when :math:`\partial_w F(w_K, \lambda) = 0` (inner and outer loss share
    their minimiser); it is exactly 0 for variables that act only inside training (learning rates, dropout rates,
    regularisation weights), for which a `StructuralZeroWarning` names the leaf.

    Args:
      optimizer, steps: as for `Unrolled`.

    Raises:
      ValueError: for steps < 1.

    References:
      Liu et al. 2019 (DARTS, "first-order approximation"), arXiv 1806.09055.
    """

    takes_complex: ClassVar[bool] = True

    @guarded
    def estimate(self, problem, inner_state, outer, inner_batches, outer_batch, key) -> Estimate:
        """See `Hypergradient`. Costs `steps` inner gradients and one outer gradient."""
        moving, fixed = partition(outer)
        keys = schedule(key, self.steps)
        state, trace = self.trajectory(problem, inner_state, outer, inner_batches, keys)

        def objective(moving):
            return self.outer_loss(problem, state.params, combine(moving, fixed), outer_batch, keys)

        training = self.training(problem, inner_state, outer, inner_batches, keys)
        lost = self.lost(problem, inner_state, outer, inner_batches, keys)
        (value, aux), grad = value_and_grad(objective, moving, estimator="FirstOrder", training=training, lost=lost)
        return Estimate(value, grad, state, Aux(trace.aux, aux, {"inner_loss": trace.value}))

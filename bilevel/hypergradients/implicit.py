"""Implicit differentiation of a stationary point."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from bilevel.hypergradients.implicit_function import AtSolution, Backward, refuse_symmetric, with_adjoint
from bilevel.hypergradients.optimality import (
    at_rest,
    mean_loss,
    require_constant_held,
    stationary,
    trained_part,
)
from bilevel.hypergradients.training import InnerState
from bilevel.linear_solvers.base import LinearSolver, is_linear_solver
from bilevel.linear_solvers.krylov import CG
from bilevel.problem.problem import split_inner
from bilevel.settings.fields import child, register


@register
@dataclasses.dataclass(frozen=True)
class Implicit(AtSolution):
    r"""Trains K steps, then differentiates the stationary point that training has approached:

    $$
    \widehat{\frac{dF}{d\lambda}} = \partial_\lambda F - \partial^2_{\lambda w} f\,
      (\partial^2_{ww} f + \delta I)^{-1}\, \partial_w F \quad\text{at } (w_K, \lambda),
    $$

    f being the mean inner loss over the K batches of this estimate, with the random keys training used. Nothing of
    training is differentiated, so time and memory of the backward pass do not grow with K (but for the mean: an HVP
    visits every batch, one at a time; once where `FullBatch` data and a loss without randomness make them all equal).

    The error is proportional to the distance of $w_K$ from a stationary point (`info["stationarity_relative"]`),
    to that of the linear solve (`info["linear_residual"]`) and to `damping`; it is 0 when all three are. Leaves that
    act through training alone (learning rates, starting points) have derivative 0 and are named in a warning.
    The system is over what the optimizer moves: leaves and entries that it freezes (`set_to_zero`, masks) are
    constants.
    `Problem.mutable` entries are constants here, as training left them: what moves the outer loss through running
    statistics alone is not seen, and only `Unrolled` sees it.

    Args:
      optimizer, steps: as for `Unrolled`. The optimizer must come to rest at stationary points of `inner_loss`:
        one with decoupled weight decay is refused, see `FixedPoint`.
      linear_solver: one of `bilevel.linear_solvers`.
      damping: $\delta$. It makes a Hessian with eigenvalues down to $-\delta$ invertible, and biases by
        about $\delta / \lambda_{\min}$.
      warm_start: whether the linear solve starts from the solution of the estimate before, kept in
        `inner_state.extra`. The hypergradient is the same up to the solver's tolerance.

    Raises:
      ValueError: for steps < 1, negative damping, an optimizer whose fixed point is not stationary, a linear solver for
        symmetric systems where the inner loss has a derivative of its own (`jax.custom_vjp`: a straight-through
        estimator, gradient reversal), or a start that makes frozen leaves from `outer`.

    References:
      Pedregosa 2016, arXiv 1602.02355; Lorraine et al. 2020, arXiv 1911.02590; Rajeswaran et al. 2019,
      arXiv 1909.04630.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Implicit(optax.sgd(0.5), steps=20, linear_solver=bilevel.CG(max_steps=2))
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)
      0.143
    """

    linear_solver: LinearSolver = dataclasses.field(default=CG(), kw_only=True, metadata=child(is_linear_solver))
    symmetric: ClassVar[bool] = True

    def init(self, problem, outer, key) -> InnerState:
        """As `Trained.init`; `extra` is the adjoint, zero at first (None without `warm_start`)."""
        state = super().init(problem, outer, key)
        return with_adjoint(state, trained_part("Implicit", problem, self.optimizer, outer, state)[1], self.warm_start)

    def solve(self, problem, inner_state, outer, inner_batches, key) -> InnerState:
        """The trained point, with the derivative of a stationary point: in both modes, to any order.

        It depends on `outer` and on arrays inside `problem` and `inner_batches`, not on `inner_state`.
        """
        state, condition, z = self._solution(self.asked(problem, inner_state, outer, inner_batches, key))
        return state._replace(params=condition.params(z))

    def system(self, query, state):
        problem, outer, keys = query.problem, query.outer, query.keys
        trained, _ = split_inner(problem, state.params)
        division = at_rest("Implicit", problem, self.optimizer, outer, state)
        loss = mean_loss(problem, state.params, outer, query.inner_batches, keys.inner)
        refuse_symmetric("Implicit", self.linear_solver, loss)
        if query.inner_state is None:
            require_constant_held("Implicit", problem, division, outer, keys.start)
        backward = Backward(self.linear_solver, self.damping, keys.own)
        return backward, *stationary(loss, division, trained)

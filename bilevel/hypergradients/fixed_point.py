"""Implicit differentiation of a fixed point of the optimizer itself."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from bilevel.hypergradients.implicit_function import AtSolution, Backward, with_adjoint
from bilevel.hypergradients.optimality import FixedPointOf, fixed_point_of, mean_loss, require_constant_held, unknowns
from bilevel.hypergradients.training import InnerState
from bilevel.linear_solvers.base import LinearSolver, is_linear_solver
from bilevel.linear_solvers.neumann import Neumann
from bilevel.settings.fields import child, register


@register
@dataclasses.dataclass(frozen=True)
class FixedPoint(AtSolution):
    r"""Trains K steps, then differentiates the fixed point $z = U(z, \lambda)$ that training has approached:

    $$
    \widehat{\frac{dF}{d\lambda}} = \partial_\lambda F + (\partial_\lambda U)^\top
      \big((1 + \delta) I - (\partial_z U)^\top\big)^{-1} \partial_z F \quad\text{at } (z_K, \lambda).
    $$

    U is one step of the optimizer on the mean inner loss over the K batches of this estimate. It is right for any fixed
    point, stationary or not: decoupled weight decay (adamw), projected and proximal steps (`bilevel.proximal_gradient`:
    on a lasso the derivative is that of the active set by itself).

    **Optimizers with a state.** z is the pair of inner variable and optimizer state (momentum, second moments), and
    both are differentiated: with the state held, the answer would be the same where the fixed point is stationary, but
    wrong for adamw, whose moments at rest are functions of the gradient at rest. Step counts (bias correction,
    schedules) are held where training left them. `Neumann(T)` is then the unroll truncated to T steps, as if all
    had been taken at the trained point. Adam-like denominators close to 0 at rest make the system badly conditioned:
    stationary fixed points are better served by `Implicit`.

    Leaves and entries that the optimizer freezes (`set_to_zero`, masks) are no unknowns but constants.

    Second moments come to rest long after the parameters: by 1/(1 - b2) steps for each factor e, so that adamw with its
    default b2 = 0.999 takes some 5,000 steps, and 20,000 where the gradient at rest is as small as 1e-4.
    `info["stationarity_relative"]` shows it: it stays large as long as moments that matter are not at rest.

    The error is proportional to the distance from a fixed point (`info["stationarity_relative"]`), to that of the
    linear solve (`info["linear_residual"]`), and to `damping`. The derivative does not depend on starting points.

    Args:
      optimizer, steps: as for `Unrolled`.
      linear_solver: a solver for nonsymmetric systems: `Neumann` (with scale 1 it converges whenever training does),
        `GMRES`, `BiCGStab`, `NormalCG`, `Dense`.
      damping, warm_start: as for `Implicit`.

    Raises:
      ValueError: for steps < 1, negative damping, or a linear solver for symmetric systems.

    References:
      Grazzi et al. 2020, arXiv 2006.16218; Bertrand et al. 2020 (lasso), arXiv 2002.08943.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.FixedPoint(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)
      0.143
    """

    linear_solver: LinearSolver = dataclasses.field(
        default=Neumann(terms=100), kw_only=True, metadata=child(is_linear_solver)
    )
    symmetric: ClassVar[bool] = False

    def init(self, problem, outer, key) -> InnerState:
        """As `Trained.init`; `extra` is the adjoint, zero at first (None without `warm_start`)."""
        state = super().init(problem, outer, key)
        return with_adjoint(state, unknowns("FixedPoint", problem, self.optimizer, outer, state)[2], self.warm_start)

    def solve(self, problem, inner_state, outer, inner_batches, key) -> InnerState:
        """The trained point, with the derivative of a fixed point; as `Implicit.solve`."""
        query = self.asked(problem, inner_state, outer, inner_batches, key)
        state, condition, z = self._solution(query)
        assert isinstance(condition, FixedPointOf)
        return condition.state(z, state)

    def system(self, query, state):
        problem, outer, keys = query.problem, query.outer, query.keys
        loss = mean_loss(problem, state.params, outer, query.inner_batches, keys.inner)
        backward = Backward(self.linear_solver, self.damping, keys.own)
        condition, z = fixed_point_of("FixedPoint", self.optimizer, loss, state)
        if query.inner_state is None:
            require_constant_held("FixedPoint", problem, condition.division, outer, keys.start)
        return backward, condition, z

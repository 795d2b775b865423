"""Implicit differentiation around a solver that is not ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilevel.data import resolve, slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.frozen import whole
from bilevel.differentiation.optimizers import Optimizer
from bilevel.hypergradients import implicit_function
from bilevel.hypergradients.base import Estimator
from bilevel.hypergradients.implicit_function import Backward, attach, refuse_symmetric, with_adjoint
from bilevel.hypergradients.optimality import fixed_point_of, mean_loss, stationary, unknowns
from bilevel.hypergradients.query import Answer, Query, split_keys
from bilevel.hypergradients.training import InnerState, Trace
from bilevel.linear_solvers.base import LinearSolver, is_linear_solver
from bilevel.linear_solvers.krylov import CG
from bilevel.problem.problem import Problem, split_inner
from bilevel.settings.fields import check_fields, child, register, setting
from bilevel.settings.numeric import real
from bilevel.settings.rules import boolean, function, optional
from bilevel.trees import PyTree, as_arrays, at_step, replayed


@register
@dataclasses.dataclass(frozen=True)
class ImplicitSolve(Estimator):
    r"""`Implicit`, or `FixedPoint`, at the solution that a function of yours returns.

    `minimise(problem, outer, batch, key) -> inner` may be anything JAX can call: L-BFGS, a loop that stops at a
    tolerance, scikit-learn behind `jax.pure_callback`. It is never differentiated. An outer iteration gives it one
    batch, `run(inner_data=arrays)` the whole data.

    Args:
      minimise: returns a tree like `init_inner`'s.
      rest: what its solution satisfies. None: $\nabla_w f = 0$. An optimizer: it is a fixed point of that
        optimizer's step, as for `FixedPoint`; for a lasso `bilevel.proximal_gradient(learning_rate, prox)`.
      linear_solver, damping, warm_start: as for `Implicit` or `FixedPoint`.

    Raises:
      ValueError: for negative damping, a linear solver that does not apply, or a solution unlike `init_inner`'s.

    The error is that of `Implicit`; a solution good to a tolerance t gives a hypergradient good to a multiple of t.

    References:
      Blondel et al. 2022, arXiv 2105.15183.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> def minimise(problem, log_decay, batch, key):
      ...     rows, targets = batch
      ...     decay = jax.numpy.exp(log_decay) * jax.numpy.eye(2)
      ...     return jax.numpy.linalg.solve(rows.T @ rows / 4 + decay, rows.T @ targets / 4)
      >>> function = bilevel.value_and_hypergrad(problem, bilevel.ImplicitSolve(minimise))
      >>> value, grad = function(jax.numpy.zeros(()), None, bilevel.FullBatch(train), val, jax.random.key(0))
      >>> round(float(grad), 3)
      0.143
    """

    minimise: Callable[[Problem, PyTree, PyTree, jax.Array], PyTree] = dataclasses.field(
        metadata=child(function("problem", "outer", "batch", "key", result="inner"))
    )
    rest: Optimizer | None = dataclasses.field(
        default=None, kw_only=True, metadata=setting(optional(optimizers.is_optimizer))
    )
    linear_solver: LinearSolver = dataclasses.field(default=CG(), kw_only=True, metadata=child(is_linear_solver))
    damping: float = dataclasses.field(default=0.0, kw_only=True, metadata=setting(real(low=0.0)))
    warm_start: bool = dataclasses.field(default=True, kw_only=True, metadata=setting(boolean))

    steps = 1

    blind: ClassVar[str | None] = implicit_function.BLIND

    def meet_custom_rule(self, name: str) -> None:
        """As for `Implicit`: `system` looks at it."""

    def __post_init__(self):
        check_fields(self)
        implicit_function.validate("ImplicitSolve", self.linear_solver, symmetric=self.rest is None)

    def init(self, problem, outer, key) -> InnerState:
        """`init_inner(key, outer)`, which `minimise` does not see; `extra` is the adjoint, as for `Implicit`."""
        state = self._state(problem, problem.start_inner(key, outer), outer)
        if self.rest is None:
            return with_adjoint(state, split_inner(problem, state.params)[0], self.warm_start)
        return with_adjoint(state, unknowns("ImplicitSolve", problem, self.rest, outer, state)[2], self.warm_start)

    def solve(self, problem, inner_state, outer, inner_batches, key) -> InnerState:
        """The solution, with the derivative of what it satisfies; as `Implicit.solve`."""
        keys = split_keys(key, self.steps)
        query = Query(problem, self.steps, inner_state, outer, inner_batches, None, keys)
        constants = jax.lax.stop_gradient((problem, inner_state, outer, inner_batches))
        state = self._solution(Query(constants[0], self.steps, *constants[1:], None, keys))
        backward, condition, z = self.system(query, state)
        return state._replace(params=condition.params(attach(backward, condition, z)))

    def differentiate(self, query: Query) -> Answer:
        """Costs a solve, one inner loss, and `info["hvps"]` Hessian-vector products."""
        state = self._solution(query)
        batch, inner_key = self._slot(query)
        trace = Trace(*query.problem.inner_value(state.params, at_step(query.outer, 0), batch, inner_key))
        trace = jax.tree.map(lambda x: jnp.asarray(x)[None], trace)
        return implicit_function.answer(query, *self.system(query, state), state, trace, self.warm_start)

    def trained(self, query: Query, moving: PyTree) -> PyTree:
        # What `minimise` reads cannot be seen; what the loss does can.
        state = self._solution(query)
        batch, inner_key = self._slot(query)
        return query.problem.inner_value(state.params, at_step(query.at(moving), 0), batch, inner_key)[0]

    def _slot(self, query: Query) -> tuple[PyTree, jax.Array]:
        xs, bind = slots(query.inner_batches, self.steps)
        return resolve(bind(jax.tree.map(lambda x: x[0], xs))), replayed(query.keys.inner)[0]

    def _state(self, problem, params, outer) -> InnerState:
        opt_state = None
        if self.rest is not None:
            opt_state = optimizers.init(self.rest, outer, split_inner(problem, params)[0])
        return InnerState(params, opt_state, jnp.zeros((), jnp.int32))

    def _solution(self, query: Query) -> InnerState:
        problem, outer, before = query.problem, query.outer, query.inner_state
        if before is None:
            before = self.init(problem, outer, query.keys.start)
        batch, inner_key = self._slot(query)
        params = as_arrays(self.minimise(problem, at_step(outer, 0), batch, inner_key), "minimise returned")
        found, wanted = _kinds(params), _kinds(before.params)
        if found != wanted:
            raise ValueError(
                f"ImplicitSolve: minimise returned {found}, but init_inner gives {wanted}: they must agree."
            )
        state = self._state(problem, params, outer)
        return state._replace(step=before.step + 1, extra=before.extra)

    def system(self, query: Query, state: InnerState):
        loss = mean_loss(query.problem, state.params, query.outer, query.inner_batches, query.keys.inner)
        backward = Backward(self.linear_solver, self.damping, query.keys.own)
        if self.rest is None:
            refuse_symmetric("ImplicitSolve", self.linear_solver, loss)
            trained = split_inner(query.problem, state.params)[0]
            return backward, *stationary(loss, whole(trained), trained)
        return backward, *fixed_point_of("ImplicitSolve", self.rest, loss, state)


def _kinds(tree: PyTree) -> Any:
    return jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree)

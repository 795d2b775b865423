r"""The implicit function theorem: the derivative of a z that is defined by $R(z, \lambda) = 0$.

$$
\dot z = -(\partial_z R + \delta I)^{-1}\, \partial_\lambda R\, \dot\lambda, \qquad
  \frac{dF}{d\lambda} = \partial_\lambda F - (\partial_\lambda R)^\top q, \quad
  (\partial_z R + \delta I)^\top q = \partial_z F .
$$

`attach` gives z this derivative, in both modes and to any order. `answer` computes the second formula directly: its
Hessian-vector products are forward over reverse, and it reports what the solve cost and left over.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from bilevel.differentiation.gradients import mixed_gradient, reverse_gradient
from bilevel.differentiation.tracing import detached, evaluate
from bilevel.hypergradients.arguments import refuse_complex
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.optimality import FixedPointOf, MeanLoss, Stationary
from bilevel.hypergradients.query import Answer, Query
from bilevel.hypergradients.training import InnerState, Trace
from bilevel.linear_solvers.base import LinearSolver, is_linear_solver, solved
from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import real
from bilevel.settings.rules import boolean
from bilevel.trees import PyTree, cast_like, global_norm, widened

Condition = Stationary | FixedPointOf


@register
@dataclasses.dataclass(frozen=True)
class Backward:
    """How systems in dR/dz are solved: the solver, damping (delta), and the solver's randomness."""

    linear_solver: LinearSolver
    damping: float = dataclasses.field(metadata=setting())
    key: jax.Array

    def damped(self, image: PyTree, x: PyTree) -> PyTree:
        """(A + delta I) x from `image` = A x, in the dtype of x."""
        return jax.tree.map(lambda a, x: a.astype(x.dtype) + self.damping * x, image, x)


def validate(estimator: str, linear_solver: Any, *, symmetric: bool) -> None:
    """Raises ValueError for a solver for symmetric systems where they are not."""
    if not symmetric and getattr(linear_solver, "symmetric_only", False):
        raise ValueError(
            f"{estimator}: the derivative of an update map is not symmetric, so {type(linear_solver).__name__} does "
            "not apply: use Neumann, GMRES, BiCGStab, NormalCG or Dense."
        )


def refuse_symmetric(estimator: str, linear_solver: Any, loss: MeanLoss) -> None:
    """Raises ValueError for a solver of symmetric systems where `loss` has a derivative of its own."""
    if loss.own_rule is not None and getattr(linear_solver, "symmetric_only", False):
        raise ValueError(
            f"{estimator}: inner_loss has a derivative of its own (`{loss.own_rule}`, by jax.custom_vjp or "
            "custom_jvp) which is not known to be that of its values, so the matrix of its linear system need not be "
            f"symmetric, which {type(linear_solver).__name__} takes for granted: use GMRES, BiCGStab, NormalCG or "
            "Dense, or Unrolled."
        )


def attach(backward: Backward, condition: Condition, z: PyTree) -> PyTree:
    """z itself, with the derivative that `condition` gives it; z's own derivative is dropped."""
    refuse_complex("Implicit differentiation", "inner", z, "use Unrolled, or write it in real and imaginary parts")
    # Where this is transposed, one batch is linearised at a time.
    rule = jax.checkpoint(reverse_gradient, prevent_cse=False)
    # A custom rule sees its arguments only, so what the losses captured from outside is made one: `consts`.
    closed, shape = jax.make_jaxpr(lambda z, condition: condition.residual(z, rule), return_shape=True)(z, condition)
    residual = _Residual(detached(closed), jax.tree.structure(shape), condition.symmetric)
    return _attach(residual, backward, (jax.tree.leaves(condition), closed.consts), z)


@dataclasses.dataclass(frozen=True, eq=False)
class _Residual:
    """R as a jaxpr, a function of z and of `given`, the leaves of a condition and captured constants."""

    jaxpr: Any
    structure: Any
    symmetric: bool

    def __call__(self, z: PyTree, given: tuple[list[Any], list[Any]]) -> PyTree:
        leaves, consts = given
        return jax.tree.unflatten(self.structure, evaluate(self.jaxpr, *consts, *jax.tree.leaves(z), *leaves))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attach(residual: _Residual, backward: Backward, given: PyTree, z: PyTree) -> PyTree:
    del residual, backward, given
    return z


def _attach_jvp(residual, primals, tangents):
    backward, given, z = primals
    # Through the rule again: a second derivative sees z as a function too.
    z = _attach(residual, backward, given, z)
    leaves, structure = jax.tree.flatten(given)
    perturbed = [(i, t) for i, t in enumerate(jax.tree.leaves(tangents[1])) if not isinstance(t, SymbolicZero)]
    if not perturbed:
        return z, jax.tree.map(jnp.zeros_like, z)

    def moved(moving):
        full = list(leaves)
        for (i, _), leaf in zip(perturbed, moving, strict=True):
            full[i] = leaf
        return residual(z, jax.tree.unflatten(structure, full))

    _, rhs = jax.jvp(moved, ([leaves[i] for i, _ in perturbed],), ([t for _, t in perturbed],))

    def matvec(x):
        _, image = jax.jvp(lambda z: residual(z, given), (z,), (cast_like(x, z),))
        return backward.damped(image, x)

    def solve(matvec, rhs):
        return solved(backward.linear_solver, matvec, rhs, None, backward.key, symmetric=residual.symmetric)[0]

    solution = jax.lax.custom_linear_solve(matvec, rhs, solve, transpose_solve=solve, symmetric=residual.symmetric)
    return z, jax.tree.map(lambda x, z: -x.astype(z.dtype), solution, z)


_attach.defjvp(_attach_jvp, symbolic_zeros=True)


def with_adjoint(state: InnerState, z: PyTree, warm_start: bool) -> InnerState:
    """`state` before the first solve: its adjoint is zero, a tree like z; None without `warm_start`."""
    return state._replace(extra=jax.tree.map(jnp.zeros_like, widened(z)) if warm_start else None)


BLIND = "the derivative of a solution does not depend on how it was found (start, learning rate); use Unrolled"
"""`Estimator.blind` of the estimators that stand on the theorem."""


def answer(
    query: Query,
    backward: Backward,
    condition: Condition,
    z: PyTree,
    state: InnerState,
    trace: Trace,
    warm_start: bool,
) -> Answer:
    """The hypergradient at z.

    Args:
      query: what was asked.
      backward, condition, z: as for `attach`.
      state, trace: the inner problem at z, and how it came there.
      warm_start: whether the solve starts from the adjoint in `state.extra` (where that is a tree like z: the state may
        come from another estimator), and leaves its own there.

    `info`: `stationarity`, the norm of R; `stationarity_relative`, that over the norm of (dR/dz)^T z (for a quadratic
    loss w'Hw/2 - b'w it is |Hw - b| / |Hw|), or how far the optimizer's state is from rest, if that is more;
    `linear_residual`, |b - A q| / |b|; `linear_iterations`; `hvps`, products with one batch's Hessian, all included.
    """
    moving = query.moving

    def residual(z, moving):
        loss = dataclasses.replace(condition.loss, outer=query.at(moving))
        return dataclasses.replace(condition, loss=loss).residual(z, mixed_gradient)

    evaluate = lambda z, moving: query.outer_loss(condition.params(z), query.at(moving))  # noqa: E731
    value, pull_loss, aux = jax.vjp(evaluate, z, moving, has_aux=True)
    _, pull_z = jax.vjp(lambda z: residual(z, moving), z)
    left, pull_both = jax.vjp(residual, z, moving)

    toward_z, direct = pull_loss(jnp.ones_like(value))
    rhs = widened(toward_z)
    product = lambda x: cast_like(pull_z(cast_like(x, left))[0], x)  # noqa: E731
    start = state.extra if warm_start and _alike(state.extra, rhs) else None
    damped = lambda x: backward.damped(product(x), x)  # noqa: E731
    adjoint, counts = solved(backward.linear_solver, damped, rhs, start, backward.key, symmetric=condition.symmetric)
    # One product in the direction of the adjoint gives the cross term and, beside it, the residual of the solve.
    image, cross = pull_both(cast_like(adjoint, left))
    image = backward.damped(image, adjoint)
    apart = _ratio(global_norm(left), global_norm(product(cast_like(z, rhs))))
    info = {
        "stationarity": global_norm(left),
        "stationarity_relative": jnp.maximum(apart, condition.unfinished(z, left).astype(apart.dtype)),
        "linear_residual": _ratio(global_norm(jax.tree.map(jnp.subtract, rhs, image)), global_norm(rhs)),
        "linear_iterations": counts["iterations"],
        "hvps": condition.loss.terms * (counts["matvecs"] + 2),
    }
    new_state = state._replace(extra=adjoint if warm_start else None)
    return Answer(value, jax.tree.map(jnp.subtract, direct, cross), new_state, trace, aux, info)


def _alike(a: PyTree, b: PyTree) -> bool:
    shape = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)  # noqa: E731
    return jax.tree.structure(a) == jax.tree.structure(b) and shape(a) == shape(b)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a == 0, jnp.zeros_like(a), a / jnp.where(b > 0, b, jnp.ones_like(b)))


@register
@dataclasses.dataclass(frozen=True)
class AtSolution(Trained):
    """Trains K steps, then applies the theorem to what `_system` says of the trained point."""

    linear_solver: LinearSolver = dataclasses.field(kw_only=True, metadata=child(is_linear_solver))
    damping: float = dataclasses.field(default=0.0, kw_only=True, metadata=setting(real(low=0.0)))
    warm_start: bool = dataclasses.field(default=True, kw_only=True, metadata=setting(boolean))
    symmetric: ClassVar[bool]
    """Whether the matrix dR/dz is symmetric, so that solvers for symmetric systems apply."""

    def __post_init__(self):
        super().__post_init__()
        validate(type(self).__name__, self.linear_solver, symmetric=self.symmetric)

    blind: ClassVar[str | None] = BLIND

    takes_frozen: ClassVar[bool] = True

    def meet_custom_rule(self, name: str) -> None:
        """`system` looks at the mean loss, and refuses solvers of symmetric systems."""

    def differentiate(self, query: Query) -> Answer:
        """Costs `steps` inner gradients, and `info["hvps"]` Hessian-vector products."""
        state, trace = self.trajectory(query)
        return answer(query, *self.system(query, state), state, trace, self.warm_start)

    def _solution(self, query: Query) -> tuple[InnerState, Condition, PyTree]:
        """The trained state, what holds there, and its unknowns with the derivative that follows."""
        constants = query.problem, query.inner_state, query.outer, query.inner_batches
        names = "problem", "inner_state", "outer", "inner_batches"
        held = dataclasses.replace(query, **dict(zip(names, jax.lax.stop_gradient(constants), strict=True)))
        state, _ = self.trajectory(held)
        backward, condition, z = self.system(query, state)
        return state, condition, attach(backward, condition, z)

    def system(self, query: Query, state: InnerState) -> tuple[Backward, Condition, PyTree]:
        raise NotImplementedError

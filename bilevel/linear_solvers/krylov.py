"""Krylov methods: each solution lies in the space that products with A span. GMRES is lineax's.

Conjugate gradients are ours: lineax takes a curvature below 200 eps n for zero and returns NaN, and so, in float32, for
every system of 100,000 unknowns whose eigenvalues are below 2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from bilevel.linear_solvers.base import info
from bilevel.settings.fields import Unfit, check_fields, child, register, setting
from bilevel.settings.numeric import integer, real
from bilevel.settings.rules import function, optional
from bilevel.trees import PyTree, global_norm


def _is_preconditioner(value: Any) -> Any:
    if hasattr(value, "inverse") and not isinstance(value, type):
        return value
    try:
        return function("x")(value)
    except Unfit as reason:
        raise Unfit(f"{reason}, or a Nystrom(...)") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioned:
    """Settings of the solvers that take a preconditioner."""

    tol: float | None = dataclasses.field(default=None, metadata=setting(optional(real(low=0.0))))
    max_steps: int = dataclasses.field(default=100, metadata=setting(integer(1)))
    preconditioner: Any = dataclasses.field(default=None, metadata=child(optional(_is_preconditioner)))

    def __post_init__(self):
        check_fields(self)

    def inverse(self, matvec, rhs, key) -> tuple[Any, int]:
        """The preconditioner as a function, and the matvecs of sketching it."""
        own = self.preconditioner
        function = own.inverse(matvec, rhs, key) if hasattr(own, "inverse") else own
        return function, getattr(own, "rank", 0)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(Preconditioned):
    r"""Conjugate gradients, for symmetric positive definite A.

    After n steps the error in the A-norm is at most $2 ((\sqrt\kappa - 1)/(\sqrt\kappa + 1))^n$ of the first.
    Where A is not positive definite this is no longer so, and the residual may grow: once a direction without positive
    curvature was met, the iterate is returned whose residual was the smallest, never one that is worse than the start,
    and the linear residual shows how small. If it is not, raise `damping`, or use `NormalCG` or `GMRES`. Costs one HVP
    an iteration, one for a start, and one more if A is not positive definite.

    Args:
      tol: relative residual.
      max_steps: most iterations.
      preconditioner: None, a linear function `x -> M^{-1} x` on trees like the inner variable (symmetric positive
        definite), or a `Nystrom`, sketched anew in each solve.

    References:
      Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, arXiv 1602.02355.

    Examples:
      >>> import bilevel, jax
      >>> A, b = jax.numpy.array([[2.0, 1.0], [1.0, 3.0]]), jax.numpy.array([4.0, 7.0])
      >>> solver = bilevel.CG()
      >>> x, info = solver.solve(lambda x: A @ x, b, None, jax.random.key(0), symmetric=True)
      >>> [round(float(entry), 3) for entry in x]
      [1.0, 2.0]
    """

    symmetric_only = True

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        inverse, sketched = self.inverse(matvec, rhs, key)
        goal = tolerance(self.tol, rhs) * global_norm(rhs)
        solution, steps, matvecs = _conjugate_gradients(matvec, rhs, start, inverse, goal, self.max_steps)
        return solution, info(steps, matvecs + sketched + (0 if start is None else 1))


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG:
    r"""Conjugate gradients on the normal equations $A^\top A x = A^\top b$, for any nonsingular A.

    It takes indefinite and nonsymmetric A, for the square of the condition number. `tol` is for the residual
    $A^\top(b - Ax)$ of those equations, relative to $\|A^\top b\|$. Two matvecs an iteration, one for
    $A^\top b$, two for a start, and two more if A turns out to be singular.

    Args:
      tol, max_steps: as for `CG`.

    References:
      Hestenes and Stiefel 1952.

    Examples:
      >>> import bilevel, jax
      >>> A, b = jax.numpy.array([[2.0, 1.0], [-1.0, 3.0]]), jax.numpy.array([4.0, 5.0])
      >>> solver = bilevel.NormalCG()
      >>> x, info = solver.solve(lambda x: A @ x, b, None, jax.random.key(0), symmetric=False)
      >>> [round(float(entry), 3) for entry in x]
      [1.0, 2.0]
    """

    tol: float | None = dataclasses.field(default=None, metadata=setting(optional(real(low=0.0))))
    max_steps: int = dataclasses.field(default=100, metadata=setting(integer(1)))

    symmetric_only = False

    def __post_init__(self):
        check_fields(self)

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        transpose = matvec if symmetric else _transpose(matvec, rhs)
        normal = lambda x: transpose(matvec(x))  # noqa: E731
        pulled = transpose(rhs)
        # Relative to A'b and not to b, so that the units of A do not matter.
        goal = tolerance(self.tol, rhs) * global_norm(pulled)
        solution, steps, matvecs = _conjugate_gradients(normal, pulled, start, None, goal, self.max_steps)
        return solution, info(steps, 2 * matvecs + (1 if start is None else 3))


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(Preconditioned):
    r"""Generalised minimal residuals with restarts, for any nonsingular A.

    The residual is smallest over the Krylov space of `restart` vectors, and never grows; with `restart` at least the
    dimension it is exact after one cycle. The residual is looked at between cycles only, and a second cycle confirms
    the first, so choose `restart` near the iterations that are needed. Holds `restart` + 1 vectors. Where A is singular
    a cycle may break down and what it gives be worse than the start, which is then returned; two matvecs show it.

    Args:
      tol: relative residual.
      restart: Krylov vectors a cycle.
      max_steps: most matvecs, rounded up to whole cycles.
      preconditioner: as for `CG`, though it need not be symmetric.

    `info["matvecs"]` is an upper bound: a cycle that breaks off early, having the exact solution, is counted in full.

    References:
      Saad and Schultz 1986. Computed by lineax.

    Examples:
      >>> import bilevel, jax
      >>> A, b = jax.numpy.array([[2.0, 1.0], [-1.0, 3.0]]), jax.numpy.array([4.0, 5.0])
      >>> solver = bilevel.GMRES(restart=2)
      >>> x, info = solver.solve(lambda x: A @ x, b, None, jax.random.key(0), symmetric=False)
      >>> [round(float(entry), 3) for entry in x]
      [1.0, 2.0]
    """

    restart: int = dataclasses.field(default=20, metadata=setting(integer(1)))
    max_steps: int = dataclasses.field(default=200, metadata=setting(integer(1)))

    symmetric_only = False

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        restart = min(self.restart, size)
        # lineax's first pass only computes the residual.
        passes = 1 + math.ceil(self.max_steps / restart)
        inverse, sketched = self.inverse(matvec, rhs, key)
        solution, steps = _gmres(tolerance(self.tol, rhs), restart, passes, matvec, rhs, start, inverse)
        cycles = jnp.maximum(steps - 1, 0)
        matvecs = 3 + cycles * (restart + 1) + (0 if start is None else 1)
        return solution, info(cycles * restart, matvecs + sketched)


def tolerance(tol: float | None, rhs: PyTree) -> float:
    """Returns `tol`, or the default that stands for None, which depends on the dtype of `rhs`."""
    return float(jnp.finfo(jnp.result_type(jax.tree.leaves(rhs)[0])).eps) ** 0.75 if tol is None else tol


def _transpose(matvec, like):
    transposed = jax.linear_transpose(matvec, like)
    return lambda y: transposed(y)[0]


def _conjugate_gradients(matvec, rhs, start, inverse, goal, max_steps) -> tuple[PyTree, jax.Array, jax.Array]:
    """`(solution, steps, matvecs)` after the first step whose residual is below `goal`, see `CG`.

    Curvature, p'Ap / p'p, is positive if above what rounding may make of 0: a few eps of the largest |Ap| / |p| so
    far. One of 0 makes the next iterate infinite or NaN, whose residual ends the loop.
    """
    inverse = inverse or (lambda r: r)
    x = jax.tree.map(jnp.zeros_like, rhs) if start is None else start
    r = rhs if start is None else along(-1, matvec(start), rhs)
    p, first = inverse(r), global_norm(r)
    rounding = 10 * jnp.finfo(first.dtype).eps

    def more(state):
        size = state["size"]
        return (size > goal) & jnp.isfinite(size) & (state["steps"] < max_steps)

    def step(state: dict[str, Any]) -> dict[str, Any]:
        p, image = state["p"], matvec(state["p"])
        # The residual, r = b - Ax, is smallest in the norm of A^-1 along p where x moves by alpha p.
        work, square = dot(p, image), dot(p, p)
        alpha = state["rz"] / work
        x, r = along(alpha, p, state["x"]), along(-alpha, image, state["r"])
        # The next direction is the preconditioned residual, made A-orthogonal to those before.
        z, size = inverse(r), global_norm(r)
        rz = dot(r, z)
        p = along(rz / state["rz"], p, z)
        # What is known of A: the largest |Ap| / |p|, and whether each curvature was positive.
        largest = larger(state["largest"], jnp.sqrt(dot(image, image) / square))
        definite = state["definite"] & (work / square > rounding * largest)
        better = size < state["least"]  # not for NaN
        best = jax.tree.map(lambda x, b: jnp.where(better, x, b), x, state["best"])
        least = jnp.where(better, size, state["least"])
        vectors = {"x": x, "r": r, "p": p, "best": best}
        numbers = {"rz": rz, "size": size, "least": least, "largest": largest}
        return vectors | numbers | {"definite": definite, "steps": state["steps"] + 1}

    vectors = {"x": x, "r": r, "p": p, "best": x}
    numbers = {"rz": dot(r, p), "size": first, "least": first, "largest": jnp.zeros_like(first)}
    flags = {"definite": jnp.asarray(True), "steps": jnp.zeros((), jnp.int32)}
    end = jax.lax.while_loop(more, step, vectors | numbers | flags)
    definite = end["definite"] & jnp.isfinite(end["size"])

    def checked():
        # Where the iterates have been large the recurrence is far from the residual.
        good = residual_bound(matvec(end["best"]), rhs, end["best"], end["largest"]) <= first
        return jax.tree.map(lambda b, x: jnp.where(good, b, x), end["best"], x)

    # While A may be positive definite the last iterate is the best one, in the norm that counts.
    found = forward_only(jax.lax.cond(definite, lambda: end["x"], checked))
    return found, end["steps"], end["steps"] + jnp.where(definite, 0, 1).astype(jnp.int32)


@jax.custom_jvp
def forward_only(x):
    """The tree x, whose derivative by reverse mode is refused in a sentence; JAX would blame a while_loop."""
    return x


def _refuse_reverse(_, cotangent):
    raise ValueError(
        "A hypergradient by an iterative linear solver, a loop of unknown length, cannot be differentiated in reverse "
        "mode: take Neumann or Dense as the linear solver, or differentiate the estimator's solve, which has an "
        "implicit derivative of its own."
    )


@forward_only.defjvp
def _forward_only_jvp(primals, tangents):
    return primals[0], jax.custom_derivatives.linear_call(lambda _, t: t, _refuse_reverse, (), tangents[0])


def along(a: Any, p: PyTree, x: PyTree) -> PyTree:
    """`x + a p`."""
    return jax.tree.map(lambda p, x: x + a * p, p, x)


def larger(scale: jax.Array, other: jax.Array) -> jax.Array:
    """The larger of the two, of which `other` may be no number where an iteration has broken down."""
    return jnp.where(jnp.isfinite(other), jnp.maximum(scale, other), scale)


def residual_bound(image: PyTree, rhs: PyTree, x: PyTree, scale: jax.Array) -> jax.Array:
    """At least |b - Ax|, rounding included: `image` is Ax as computed, `scale` the size of A.

    Of an x as large as 1/eps, all digits of the residual are rounding.
    """
    rounding = 10 * jnp.finfo(scale.dtype).eps
    return global_norm(along(-1, image, rhs)) + rounding * scale * global_norm(x)


def dot(x: PyTree, y: PyTree) -> jax.Array:
    """The inner product of two trees."""
    products = jax.tree.map(jnp.vdot, x, y)
    return jax.tree.reduce(jnp.add, products)


def _gmres(tol, restart, passes, matvec, rhs, start, preconditioner) -> tuple[PyTree, jax.Array]:
    """`(solution, steps)` of lineax's GMRES, or the start where the solution is worse."""
    # lineax compares every entry with its own scale, atol + rtol |b_i|, and asks the same of the last step. On a unit
    # right-hand side, with the 2-norm and atol = rtol, that is the usual relative residual.
    norm = global_norm(rhs)
    unit = jnp.where(norm > 0, norm, jnp.ones_like(norm))
    structure = jax.eval_shape(lambda: rhs)
    operator = lx.FunctionLinearOperator(matvec, structure)
    options: dict[str, Any] = {}
    if start is not None:
        options["y0"] = jax.tree.map(lambda x: x / unit, start)
    if preconditioner is not None:
        options["preconditioner"] = lx.FunctionLinearOperator(preconditioner, structure)
    method = lx.GMRES(tol, tol, norm=global_norm, restart=restart, max_steps=passes)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        vector = jax.tree.map(lambda b: b / unit, rhs)
        result = lx.linear_solve(operator, vector, method, options=options, throw=False)
    found = jax.tree.map(lambda x: x * unit, result.value)
    first = norm if start is None else global_norm(along(-1, matvec(start), rhs))
    start = jax.tree.map(jnp.zeros_like, rhs) if start is None else start
    # It is worse, or no number, where a cycle broke down.
    good = residual_bound(matvec(found), rhs, found, global_norm(matvec(rhs)) / unit) <= first
    return jax.tree.map(lambda x, s: jnp.where(good, x, s), found, start), result.stats["num_steps"]

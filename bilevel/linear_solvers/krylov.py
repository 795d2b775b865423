"""Krylov methods: each solution lies in the space that products with A span. GMRES and BiCGStab are lineax's.

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

from bilevel.linear_solvers.base import info, static, validate
from bilevel.problem import as_pytree
from bilevel.trees import PyTree, global_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Preconditioned:
    """Settings of the solvers that take a preconditioner."""

    tol: float | None = static(None)
    max_steps: int = static(100)
    preconditioner: Any = None

    def __post_init__(self):
        validate(self, "max_steps", 1)
        object.__setattr__(self, "preconditioner", as_pytree(self.preconditioner))

    def inverse(self, matvec, rhs, key) -> tuple[Any, int]:
        """The preconditioner as a function, and the matvecs of sketching it."""
        own = self.preconditioner
        function = own.inverse(matvec, rhs, key) if hasattr(own, "inverse") else own
        return function, getattr(own, "rank", 0)

    def iterate(self, method, matvec, rhs, start, key) -> tuple[PyTree, jax.Array, int]:
        """`(solution, steps)` of lineax's `method(rtol, atol)`, and the matvecs of sketching the preconditioner."""
        inverse, sketched = self.inverse(matvec, rhs, key)
        solution, steps = _krylov(method, self.tol, matvec, rhs, start, inverse)
        return solution, steps, sketched


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(_Preconditioned):
    r"""Conjugate gradients, for symmetric positive definite A.

    After n steps the error in the A-norm is at most :math:`2 ((\sqrt\kappa - 1)/(\sqrt\kappa + 1))^n` of the first.
    Where A is not positive definite this is no longer so, and the residual may grow: from the first direction without
    positive curvature on, the iterate is kept whose residual is smallest, by the recurrence, and the linear residual
    shows how small. If it is not, raise `damping`, or use `NormalCG` or `GMRES`. Costs one HVP an iteration, and one
    for a start.

    Args:
      tol: relative residual.
      max_steps: most iterations.
      preconditioner: None, a linear function `x -> M^{-1} x` on trees like the inner variable (symmetric positive
        definite), or a `Nystrom`, sketched anew in each solve.

    References:
      Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, arXiv 1602.02355.
    """

    symmetric_only = True

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        inverse, sketched = self.inverse(matvec, rhs, key)
        goal = _tolerance(self.tol, rhs) * global_norm(rhs)
        solution, steps = _conjugate_gradients(matvec, rhs, start, inverse, goal, self.max_steps)
        return solution, info(steps, steps + sketched + (0 if start is None else 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG:
    r"""Conjugate gradients on the normal equations :math:`A^\top A x = A^\top b`, for any nonsingular A.

    It takes indefinite and nonsymmetric A, for the square of the condition number. `tol` is relative to
    :math:`\|b\|` for the residual :math:`A^\top(b - Ax)` of those equations. Two matvecs an iteration, one for
    :math:`A^\top b`, and two for a start.

    Args:
      tol, max_steps: as for `CG`.

    References:
      Hestenes and Stiefel 1952.
    """

    tol: float | None = static(None)
    max_steps: int = static(100)

    symmetric_only = False

    def __post_init__(self):
        validate(self, "max_steps", 1)

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        transpose = matvec if symmetric else _transpose(matvec, rhs)
        goal = _tolerance(self.tol, rhs) * global_norm(rhs)
        normal = lambda x: transpose(matvec(x))  # noqa: E731
        solution, steps = _conjugate_gradients(normal, transpose(rhs), start, None, goal, self.max_steps)
        return solution, info(steps, 2 * steps + (1 if start is None else 3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES(_Preconditioned):
    r"""Generalised minimal residuals with restarts, for any nonsingular A.

    The residual is smallest over the Krylov space of `restart` vectors, and never grows; with `restart` at least the
    dimension it is exact after one cycle. The residual is looked at between cycles only, and a second cycle confirms
    the first, so choose `restart` near the iterations that are needed. Holds `restart` + 1 vectors.

    Args:
      tol: relative residual.
      restart: Krylov vectors a cycle.
      max_steps: most matvecs, rounded up to whole cycles.
      preconditioner: as for `CG`, though it need not be symmetric.

    `info["matvecs"]` is an upper bound: a cycle that breaks off early, having the exact solution, is counted in full.

    References:
      Saad and Schultz 1986. Computed by lineax.
    """

    restart: int = static(20)
    max_steps: int = static(200)

    symmetric_only = False

    def __post_init__(self):
        super().__post_init__()
        validate(self, "restart", 1)

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        restart = min(self.restart, size)
        # lineax's first pass only computes the residual.
        passes = 1 + math.ceil(self.max_steps / restart)
        method = lambda rtol, atol: lx.GMRES(rtol, atol, norm=global_norm, restart=restart, max_steps=passes)  # noqa: E731
        solution, steps, sketched = self.iterate(method, matvec, rhs, start, key)
        cycles = jnp.maximum(steps - 1, 0)
        return solution, info(cycles * restart, 1 + cycles * (restart + 1) + sketched)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiCGStab(_Preconditioned):
    """Stabilised biconjugate gradients, for any nonsingular A, in the memory of a few vectors.

    Converges as a rule, not by a theorem: it may break down where an inner product vanishes, and then returns what it
    has, or its start if that is no number; the linear residual shows it. Two matvecs an iteration, one at the start.

    Args:
      tol, max_steps, preconditioner: as for `GMRES`; `max_steps` counts iterations.

    References:
      van der Vorst 1992. Computed by lineax.
    """

    symmetric_only = False

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        method = lambda rtol, atol: lx.BiCGStab(rtol, atol, norm=global_norm, max_steps=self.max_steps)  # noqa: E731
        solution, steps, sketched = self.iterate(method, matvec, rhs, start, key)
        return solution, info(steps, 2 * steps + 1 + sketched)


def _tolerance(tol: float | None, rhs: PyTree) -> float:
    """`tol`, or what None stands for in the dtype of `rhs`."""
    return float(jnp.finfo(jnp.result_type(jax.tree.leaves(rhs)[0])).eps) ** 0.75 if tol is None else tol


def _transpose(matvec, like):
    transposed = jax.linear_transpose(matvec, like)
    return lambda y: transposed(y)[0]


def _conjugate_gradients(matvec, rhs, start, inverse, goal, max_steps) -> tuple[PyTree, jax.Array]:
    """`(solution, steps)` after the first step whose residual is below `goal`, see `CG`.

    Curvature, p'Ap / p'p, is positive if above eps of the largest so far. One of 0 makes the next iterate infinite or
    NaN, whose residual ends the loop.
    """
    inverse = inverse or (lambda r: r)
    along = lambda a, p, x: jax.tree.map(lambda p, x: x + a * p, p, x)  # noqa: E731
    x = jax.tree.map(jnp.zeros_like, rhs) if start is None else start
    r = rhs if start is None else along(-1, matvec(start), rhs)
    p, size = inverse(r), global_norm(r)
    eps = jnp.finfo(size.dtype).eps

    def more(state):
        size, steps = state[4], state[-1]
        return (size > goal) & jnp.isfinite(size) & (steps < max_steps)

    def step(state):
        x, r, p, rz, _, kept, least, largest, steps = state
        image = matvec(p)
        work = _dot(p, image)
        curvature = work / _dot(p, p)
        x, r = along(rz / work, p, x), along(-rz / work, image, r)
        z, size = inverse(r), global_norm(r)
        # Infinite from the first curvature that is not positive on: no later one is above eps of that.
        largest = jnp.where(curvature > eps * largest, jnp.maximum(curvature, largest), jnp.inf)
        keep = jnp.isfinite(size) & (jnp.isfinite(largest) | (size < least))
        kept = jax.tree.map(lambda x, k: jnp.where(keep, x, k), x, kept)
        after = _dot(r, z)
        return x, r, along(after / rz, p, z), after, size, kept, jnp.where(keep, size, least), largest, steps + 1

    none = jnp.zeros((), jnp.int32)
    state = x, r, p, _dot(r, p), size, x, size, jnp.zeros_like(size), none
    *_, kept, _, _, steps = jax.lax.while_loop(more, step, state)
    return kept, steps


def _dot(x, y):
    products = jax.tree.map(jnp.vdot, x, y)
    return jax.tree.reduce(jnp.add, products)


def _krylov(method, tol, matvec, rhs, start, preconditioner) -> tuple[PyTree, jax.Array]:
    """`(solution, steps)` of lineax's `method(rtol, atol)`."""
    tol = _tolerance(tol, rhs)
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
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        vector = jax.tree.map(lambda b: b / unit, rhs)
        result = lx.linear_solve(operator, vector, method(tol, tol), options=options, throw=False)
    # Both break down in 0 / 0: BiCGStab where the start is already exact, GMRES where A is 0.
    finite = jnp.isfinite(global_norm(result.value))
    start = jax.tree.map(jnp.zeros_like, rhs) if start is None else start
    solution = jax.tree.map(lambda x, s: jnp.where(finite, x * unit, s), result.value, start)
    return solution, result.stats["num_steps"]

"""Krylov methods: each solution lies in the space that products with A span. Computed by lineax."""

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

_PSD = lx.positive_semidefinite_tag


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Preconditioned:
    """Settings of the solvers that take a preconditioner."""

    tol: float | None = static(None)
    max_steps: int = static(100)
    preconditioner: Any = None

    def __post_init__(self):
        validate(self, "max_steps", 1)
        object.__setattr__(self, "preconditioner", as_pytree(self.preconditioner))

    def iterate(self, method, matvec, rhs, start, key, tags=()) -> tuple[PyTree, jax.Array, int]:
        """`(solution, steps)` of lineax's `method(rtol, atol)`, and the matvecs of sketching the preconditioner."""
        inverse = _inverse(self.preconditioner, matvec, rhs, key)
        solution, steps = _krylov(method, self.tol, matvec, rhs, start, tags, inverse)
        return solution, steps, getattr(self.preconditioner, "rank", 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CG(_Preconditioned):
    r"""Conjugate gradients, for symmetric positive definite A.

    After n steps the error in the A-norm is at most :math:`2 ((\sqrt\kappa - 1)/(\sqrt\kappa + 1))^n` of the first. A
    Hessian that is not positive definite makes it stop early or diverge, which the linear residual shows: raise
    `damping`, or use `NormalCG` or `GMRES`. Costs one HVP an iteration, one at the start, and one every tenth
    iteration, where the residual is computed anew.

    Args:
      tol: relative residual.
      max_steps: most iterations.
      preconditioner: None, a linear function `x -> M^{-1} x` on trees like the inner variable (symmetric positive
        definite), or a `Nystrom`, sketched anew in each solve.

    References:
      Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, arXiv 1602.02355. Computed by lineax.
    """

    symmetric_only = True

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        method = lambda rtol, atol: lx.CG(rtol, atol, norm=global_norm, stabilise_every=10, max_steps=self.max_steps)  # noqa: E731
        solution, steps, sketched = self.iterate(method, matvec, rhs, start, key, _PSD)
        return solution, info(steps, steps + steps // 10 + 1 + sketched)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG:
    r"""Conjugate gradients on the normal equations :math:`A^\top A x = A^\top b`, for any nonsingular A.

    It takes indefinite and nonsymmetric A, for the square of the condition number. `tol` is relative to
    :math:`\|b\|` for the residual :math:`A^\top(b - Ax)` of those equations. Two matvecs an iteration.

    Args:
      tol, max_steps: as for `CG`.

    References:
      Hestenes and Stiefel 1952. Computed by lineax.
    """

    tol: float | None = static(None)
    max_steps: int = static(100)

    symmetric_only = False

    def __post_init__(self):
        validate(self, "max_steps", 1)

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        tags = lx.symmetric_tag if symmetric else ()
        method = lambda rtol, atol: lx.Normal(  # noqa: E731
            lx.CG(rtol, atol, norm=global_norm, stabilise_every=10, max_steps=self.max_steps)
        )
        solution, steps = _krylov(method, self.tol, matvec, rhs, start, tags, None)
        return solution, info(steps, 2 * (steps + steps // 10 + 1) + 1)


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
        # lineax's divides 0 by 0 where the start is already exact.
        finite = jnp.isfinite(global_norm(solution))
        start = jax.tree.map(jnp.zeros_like, rhs) if start is None else start
        solution = jax.tree.map(lambda x, s: jnp.where(finite, x, s), solution, start)
        return solution, info(steps, 2 * steps + 1 + sketched)


def _krylov(method, tol, matvec, rhs, start, tags, preconditioner) -> tuple[PyTree, jax.Array]:
    """`(solution, steps)` of lineax's `method(rtol, atol)`."""
    dtype = jnp.result_type(jax.tree.leaves(rhs)[0])
    if tol is None:
        tol = float(jnp.finfo(dtype).eps) ** 0.75
    # lineax compares every entry with its own scale, atol + rtol |b_i|, and asks the same of the last step. On a unit
    # right-hand side, with the 2-norm and atol = rtol, that is the usual relative residual.
    norm = global_norm(rhs)
    unit = jnp.where(norm > 0, norm, jnp.ones_like(norm))
    structure = jax.eval_shape(lambda: rhs)
    operator = lx.FunctionLinearOperator(matvec, structure, tags)
    options: dict[str, Any] = {}
    if start is not None:
        options["y0"] = jax.tree.map(lambda x: x / unit, start)
    if preconditioner is not None:
        options["preconditioner"] = lx.FunctionLinearOperator(preconditioner, structure, tags)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        vector = jax.tree.map(lambda b: b / unit, rhs)
        result = lx.linear_solve(operator, vector, method(tol, tol), options=options, throw=False)
    return jax.tree.map(lambda x: x * unit, result.value), result.stats["num_steps"]


def _inverse(preconditioner, matvec, like, key):
    """The preconditioner as a function: its own, or that of a solver that can be prepared for `matvec`."""
    return preconditioner.inverse(matvec, like, key) if hasattr(preconditioner, "inverse") else preconditioner

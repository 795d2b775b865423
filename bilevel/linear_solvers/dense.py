"""Solves a linear system by forming its matrix."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

from bilevel.linear_solvers.base import info
from bilevel.settings.fields import register


@register
@dataclasses.dataclass(frozen=True)
class Dense:
    """Forms the matrix A, one product with it a column, and solves by LU.

    It is for inner variables of at most a few thousand entries.

    Exact to rounding for any nonsingular A. Where that leaves a residual, A is singular, and the shortest x of least
    residual is taken instead, by a singular value decomposition. The dimension in HVPs, in one batch; the square of it
    in memory.

    References:
      Computed by lineax.

    Examples:
      >>> import bilevel, jax
      >>> A, b = jax.numpy.array([[2.0, 1.0], [1.0, 3.0]]), jax.numpy.array([4.0, 7.0])
      >>> solver = bilevel.Dense()
      >>> x, info = solver.solve(lambda x: A @ x, b, None, jax.random.key(0), symmetric=True)
      >>> [round(float(entry), 3) for entry in x]
      [1.0, 2.0]
    """

    symmetric_only = False

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        flat, unravel = ravel_pytree(rhs)
        rows = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
        matrix = rows.T
        by = lambda solver: lx.linear_solve(lx.MatrixLinearOperator(matrix), flat, solver, throw=False).value  # noqa: E731
        direct = by(lx.LU())
        # NaN is no solution either.
        solved = jnp.linalg.norm(matrix @ direct - flat) <= jnp.sqrt(jnp.finfo(flat.dtype).eps) * jnp.linalg.norm(flat)
        return unravel(jax.lax.cond(solved, lambda: direct, lambda: by(lx.SVD()))), info(1, flat.size)

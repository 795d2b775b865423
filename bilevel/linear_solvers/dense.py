"""A made explicit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

from bilevel.linear_solvers.base import info


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A made explicit, and an LU solve: for inner variables of at most a few thousand entries.

    Exact to rounding for any nonsingular A. The dimension in HVPs, in one batch; the square of it in memory.

    References:
      Computed by lineax.
    """

    symmetric_only = False

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        flat, unravel = ravel_pytree(rhs)
        rows = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
        solution = lx.linear_solve(lx.MatrixLinearOperator(rows.T), flat, lx.LU(), throw=False).value
        return unravel(solution), info(1, flat.size)

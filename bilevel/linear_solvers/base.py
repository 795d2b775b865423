"""The contract of a linear solver."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bilevel.settings import having
from bilevel.trees import PyTree

Matvec = Callable[[PyTree], PyTree]


class LinearSolver(Protocol):
    """A way to solve A x = b; see `bilevel.linear_solvers`. `symmetric_only` says that A must equal its transpose.

    Examples:
      >>> import dataclasses, bilevel, jax, optax
      >>> from bilevel.extend import register
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class Identity:  # takes A for the identity: no product with it is needed
      ...     symmetric_only = False
      ...     def solve(self, matvec, rhs, start, key, *, symmetric):
      ...         return rhs, {"iterations": 0, "matvecs": 0}
      >>> hypergradient = bilevel.Implicit(optax.sgd(0.5), steps=20, linear_solver=Identity())
      >>> function = bilevel.value_and_hypergrad(problem, hypergradient)
      >>> value, grad = function(jax.numpy.zeros(()), None, bilevel.FullBatch(train), val, jax.random.key(0))
      >>> round(float(grad), 3)  # with `Dense()` 0.143
      0.214
    """

    @property
    def symmetric_only(self) -> bool: ...

    def solve(
        self, matvec: Matvec, rhs: PyTree, start: PyTree | None, key: jax.Array, *, symmetric: bool
    ) -> tuple[PyTree, dict[str, jax.Array]]: ...


is_linear_solver = having("a linear solver, such as bilevel.CG()", "solve", "symmetric_only")
"""The rule of a setting that is a `LinearSolver`."""


def info(iterations: Any, matvecs: Any) -> dict[str, jax.Array]:
    """Makes the report of a `solve`: how many iterations, and how many products with the matrix, it took."""
    return {"iterations": jnp.asarray(iterations, jnp.int32), "matvecs": jnp.asarray(matvecs, jnp.int32)}

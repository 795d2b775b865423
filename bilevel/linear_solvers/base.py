"""The contract of a linear solver."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bilevel.settings.rules import having, pytree
from bilevel.trees import PyTree, power_of_two, shapes, times, unlike_array

Matvec = Callable[[PyTree], PyTree]


class LinearSolver(Protocol):
    """A way to solve A x = b; see `bilevel.linear_solvers`.

    It is a pytree, a frozen dataclass with `register` above it, since it is an argument of compiled functions.

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
    def symmetric_only(self) -> bool:
        """Whether A must equal its transpose."""
        ...

    def solve(
        self, matvec: Matvec, rhs: PyTree, start: PyTree | None, key: jax.Array, *, symmetric: bool
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The solution, and `{"iterations": int, "matvecs": int}`: how many it took.

        Args:
          matvec: A as a function of trees like `rhs`.
          rhs: b, a tree of arrays, in a unit in which its largest entry is near 1.
          start: where to begin, a tree like `rhs`; None for nowhere in particular.
          key: of the solver's own randomness.
          symmetric: whether A equals its transpose.

        Returns:
          `(x, info)`: x a tree like `rhs`, of the same shapes and dtypes.
        """
        ...


is_linear_solver = pytree(having("a linear solver, such as bilevel.CG()", "solve", "symmetric_only"))
"""The rule of a setting that is a `LinearSolver`."""


def solved(
    solver: LinearSolver, matvec: Matvec, rhs: PyTree, start: PyTree | None, key: jax.Array, *, symmetric: bool
) -> tuple[PyTree, dict[str, jax.Array]]:
    """`solver.solve(...)`, with what it returned understood or refused.

    The solver is given b in a unit in which its largest entry is near 1, and x is given back in that of b: a solver
    squares what it is given, and the squares of a b of 1e-200 are 0.

    Raises:
      ValueError: names the class of the solver, and what is not as `LinearSolver` says.
    """
    name = type(solver).__name__
    unit = power_of_two(rhs)
    start = None if start is None else times(start, 1 / unit)
    result: Any = solver.solve(matvec, times(rhs, 1 / unit), start, key, symmetric=symmetric)
    must = 'must return a pair: x, a tree like rhs, and {"iterations": int, "matvecs": int}'
    if not isinstance(result, tuple) or len(result) != 2:
        found = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"no pair, but {shapes(result)}"
        raise ValueError(f"{name}.solve returned {found}: it {must}.")
    x, report = result
    found, wanted = shapes(x), shapes(rhs)
    if jax.tree.structure(x) != jax.tree.structure(rhs) or found != wanted:
        raise ValueError(f"{name}.solve returned an x that is {found}, where rhs is {wanted}: it {must}.")
    for count in ("iterations", "matvecs"):
        number: Any = report.get(count) if isinstance(report, dict) else None
        integral = unlike_array(number) is None and jnp.issubdtype(jnp.result_type(number), jnp.integer)
        if not integral or jnp.shape(number):
            what = f"{count} {'is no integer' if number is not None else 'is missing'}"
            raise ValueError(f"{name}.solve: {what} in the second of what it returned: it {must}.")
    return times(x, unit), report | info(report["iterations"], report["matvecs"])


def info(iterations: Any, matvecs: Any) -> dict[str, jax.Array]:
    """Makes the report of a `solve`: how many iterations, and how many products with the matrix, it took."""
    return {"iterations": jnp.asarray(iterations, jnp.int32), "matvecs": jnp.asarray(matvecs, jnp.int32)}

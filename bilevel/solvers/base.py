"""The contract of a solver."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from bilevel.problem import Problem
from bilevel.trees import PyTree


class SolverState(Protocol):
    """What every solver state has."""

    outer: PyTree
    inner: Any
    step: jax.Array
    key: jax.Array


class Solver(Protocol):
    """One outer iteration, pure and jit-able. A solver is a pytree: pass it as an argument of the compiled function.

    A solver that wants several outer batches a step has an attribute `outer_batches` too: see `outer_batches`.
    """

    @property
    def problem(self) -> Problem:
        """The bilevel problem."""
        ...

    @property
    def inner_batches(self) -> int:
        """Inner batches a step wants: the leading axis of what `step` is given."""
        ...

    def init(self, key: jax.Array) -> Any:
        """The state before the first step."""
        ...

    def step(self, state: Any, inner_batches: PyTree, outer_batch: PyTree) -> tuple[Any, dict[str, jax.Array]]:
        """One outer iteration: the next state, and scalars by name."""
        ...


def outer_batches(solver: Solver) -> int:
    """Outer batches a step of `solver` wants: 1, a batch without a leading axis, unless it says otherwise."""
    return getattr(solver, "outer_batches", 1)

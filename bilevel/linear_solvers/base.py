"""The contract of a linear solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bilevel.trees import PyTree

Matvec = Callable[[PyTree], PyTree]


class LinearSolver(Protocol):
    """A way to solve A x = b; see `bilevel.linear_solvers`. `symmetric_only` says that A must equal its transpose."""

    @property
    def symmetric_only(self) -> bool: ...

    def solve(
        self, matvec: Matvec, rhs: PyTree, start: PyTree | None, key: jax.Array, *, symmetric: bool
    ) -> tuple[PyTree, dict[str, jax.Array]]: ...


def static(default: Any) -> Any:
    """A field that is part of the structure of a solver as a pytree."""
    return dataclasses.field(default=default, metadata={"static": True})


def info(iterations: Any, matvecs: Any) -> dict[str, jax.Array]:
    """What `solve` reports."""
    return {"iterations": jnp.asarray(iterations, jnp.int32), "matvecs": jnp.asarray(matvecs, jnp.int32)}


def validate(solver: Any, name: str, low: int) -> None:
    """Raises ValueError unless the setting `name` is an integer of at least `low`."""
    value = getattr(solver, name)
    if not isinstance(value, int) or value < low:
        raise ValueError(f"{type(solver).__name__}({name}={value!r}): must be an integer >= {low}.")

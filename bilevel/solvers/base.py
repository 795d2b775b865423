"""The contract of a solver."""

# pyright: strict

from __future__ import annotations

from typing import Any, Protocol

import jax

from bilevel.problem.problem import Problem
from bilevel.trees import Batch, Key, Outer


class SolverState(Protocol):
    """What every solver state has; a `NamedTuple`, or another pytree, with these attributes and others.

    Attributes:
      outer: the outer variable, which `Result.outer` is.
      inner: the inner problem: an `InnerState`, or whatever else the solver trains. (`run` traces the losses at
        `inner.params`; without `params` it does so at what `init_inner` returns.)
      step: outer iterations taken, an integer that `step` adds 1 to: batches are drawn by it.
      key: randomness.
    """

    outer: Outer
    inner: Any
    step: jax.Array
    key: Key


class Solver(Protocol):
    """One outer iteration, pure and jit-able. A solver is a pytree: pass it as an argument of the compiled function.

    Its state is a pytree with the attributes of `SolverState`: outer, inner, step and key. A step returns a state of
    the same structure, shapes and dtypes.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver: bilevel.Solver = bilevel.SOBA(problem, inner_step=0.5, outer_step=1.0)
      >>> state = solver.init(jax.random.key(0))
      >>> state, metrics = solver.step(state, bilevel.FullBatch(train), bilevel.FullBatch(val))
      >>> int(state.step), float(metrics["outer_loss"])  # at the start, where w = 0
      (1, 0.5)
    """

    @property
    def problem(self) -> Problem:
        """The bilevel problem."""
        ...

    @property
    def inner_batches_per_step(self) -> int:
        """Inner batches a step wants: the leading axis of what `step` is given."""
        ...

    @property
    def outer_batches_per_step(self) -> int:
        """Outer batches a step wants: for 1 a batch without a leading axis, otherwise the leading axis of them."""
        ...

    def init(self, key: Key) -> Any:
        """The state before the first step, a `SolverState`."""
        ...

    def step(self, state: Any, inner_batches: Batch, outer_batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """One outer iteration: the next state, and scalars by name."""
        ...

"""The contract of a hypergradient, and what the estimators that train by an optimizer have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from bilevel import inner, optimizers
from bilevel.gradients import reverse_gradient
from bilevel.inner import InnerState
from bilevel.optimizers import Optimizer
from bilevel.problem import Problem
from bilevel.trees import PyTree, at_step, combine, partition


class Aux(NamedTuple):
    """What came with an estimate.

    Attributes:
      inner: what `inner_loss` returned beside its value, stacked over the inner steps; None without `has_aux`.
      outer: what `outer_loss` returned beside its value; None without `has_aux`.
      info: the estimator's own numbers; always `inner_loss[steps]`.
    """

    inner: PyTree
    outer: PyTree
    info: dict[str, Any]


class Estimate(NamedTuple):
    """A hypergradient.

    Attributes:
      value: the outer loss at the trained point, a scalar.
      grad: estimate of d value / d outer, a tree like `outer` with None at leaves that are not inexact.
      inner_state: the inner problem after its `steps` steps.
      aux: an `Aux`.
    """

    value: jax.Array
    grad: PyTree
    inner_state: InnerState
    aux: Aux


class Hypergradient(Protocol):
    """A way to estimate d outer_loss / d outer. Every estimator in `bilevel` has these three methods."""

    @property
    def steps(self) -> int:
        """K, inner steps an outer iteration."""
        ...

    def init(self, problem: Problem, outer: PyTree, key: jax.Array) -> InnerState:
        """The inner state before any training."""
        ...

    def solve(
        self, problem: Problem, inner_state: InnerState | None, outer: PyTree, inner_batches: PyTree, key: jax.Array
    ) -> InnerState:
        """Trains K steps from `inner_state` (None: from the start), as a function that may be differentiated again."""
        ...

    def estimate(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: PyTree,
        inner_batches: PyTree,
        outer_batch: PyTree,
        key: jax.Array,
    ) -> Estimate:
        """Trains as `solve` does, then the outer loss, its hypergradient and the state that training has reached."""
        ...


def schedule(key: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """The random keys of one estimate, the same for every estimator: `(inner[steps], outer)`."""
    keys = jax.random.split(key, steps + 1)
    return keys[:-1], keys[-1]


def own_key(key: jax.Array, steps: int) -> jax.Array:
    """The key of an estimator's own randomness (sketches, perturbations), apart from those of the losses."""
    # Not `split(key, n)[i]` for any i <= steps, though `fold_in(key, i)` equals it for jax's default generator.
    return jax.random.fold_in(key, steps + 1)


def outer_value(problem: Problem, steps: int, params: PyTree, outer: PyTree, batch: PyTree, key: jax.Array):
    """`(value, aux)` of the outer loss after `steps` inner steps, at its place in the key schedule."""
    return problem.outer_value(params, at_step(outer, steps), batch, schedule(key, steps)[1])


def static(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A dataclass field that is part of the structure of the object as a pytree: a setting, not an array."""
    if default is not dataclasses.MISSING:
        kwargs["default"] = default
    return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """An inner problem trained by `steps` steps of `optimizer`; the base of the estimators that do so."""

    optimizer: Optimizer = static()
    steps: int = static()

    def __post_init__(self):
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"{type(self).__name__}(steps={self.steps!r}): the number of inner steps must be an integer >= 1."
            )

    def init(self, problem: Problem, outer: PyTree, key: jax.Array) -> InnerState:
        """The inner problem before its first step: `init_inner(key, outer)` and a fresh optimizer state."""
        return inner.start(problem, self.optimizer, outer, key)

    def solve(
        self, problem: Problem, inner_state: InnerState | None, outer: PyTree, inner_batches: PyTree, key: jax.Array
    ) -> InnerState:
        """The training map: `steps` steps from `inner_state`, differentiable in `inner_state` and `outer`.

        With `inner_state=None` it starts from `init(problem, outer, key)`. A third level is built on this method.
        """
        return self.trajectory(problem, inner_state, outer, inner_batches, key)[0]

    def trajectory(self, problem, inner_state, outer, inner_batches, key, **options) -> tuple[InnerState, inner.Trace]:
        """`solve`, with what the steps reported. `options` go to `bilevel.inner.train`."""
        keys, _ = schedule(key, self.steps)
        state = self.resume(problem, inner_state, outer, key)
        return inner.train(problem, self.optimizer, state, outer, inner_batches, keys, **options)

    def training(self, problem: Problem, inner_state, outer, inner_batches, key) -> Callable[[PyTree], PyTree]:
        """The trained variable as a function of the inexact leaves of `outer`, for guards to see what it depends on."""
        _, fixed = partition(outer)

        def trained(moving):
            # A gradient with a rule of its own would hide from the trace what it reads.
            arguments = problem, inner_state, combine(moving, fixed), inner_batches, key
            return self.trajectory(*arguments, gradient=reverse_gradient)[0].params

        return trained

    def resume(self, problem: Problem, inner_state: InnerState | None, outer: PyTree, key: jax.Array) -> InnerState:
        """`inner_state` ready for a step at this `outer`; a start of its own where it is None."""
        if inner_state is None:
            return self.init(problem, outer, key)
        moving, _ = problem.split(inner_state.params)
        opt_state = optimizers.refresh(self.optimizer, outer, moving, inner_state.opt_state)
        return inner_state._replace(opt_state=opt_state)

    def outer_loss(self, problem: Problem, params: PyTree, outer: PyTree, batch: PyTree, key: jax.Array):
        """`outer_value` after this estimator's `steps`."""
        return outer_value(problem, self.steps, params, outer, batch, key)


def value_and_hypergrad(problem: Problem, hypergradient: Hypergradient) -> Callable[..., tuple[jax.Array, PyTree]]:
    """`f(outer, inner_state, inner_batches, outer_batch, key) -> (value, grad)`, for any other outer method."""

    def function(outer, inner_state, inner_batches, outer_batch, key):
        estimate = hypergradient.estimate(problem, inner_state, outer, inner_batches, outer_batch, key)
        return estimate.value, estimate.grad

    return function

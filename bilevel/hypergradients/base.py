"""The contract of a hypergradient, and what the estimators that train by an optimizer have in common."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from bilevel.data import slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.gradients import Point, reverse_gradient
from bilevel.differentiation.influence import Lost, arrives
from bilevel.differentiation.optimizers import Optimizer
from bilevel.hypergradients.arguments import check_call
from bilevel.hypergradients.training import InnerState, Trace, begin, train
from bilevel.problem import Problem, is_problem
from bilevel.settings import check_fields, checked, having, integer, register, setting
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


class Keys(NamedTuple):
    """The random keys of one estimate: no two things that are drawn share one.

    A key is consumed once. Where the same noise is wanted again (a Hessian on the batches that training saw, a member
    of a population beside another), the replay takes a `jax.random.clone` of it.

    Attributes:
      start: of `init_inner`, where the estimate itself starts the inner problem.
      inner: `[steps]`, of the inner steps.
      outer: of the outer loss.
      own: of the estimator's own randomness (sketches, perturbations).
    """

    start: jax.Array
    inner: jax.Array
    outer: jax.Array
    own: jax.Array


def schedule(key: jax.Array, steps: int) -> Keys:
    """The `Keys` of one estimate, the same for every estimator: `split(key, steps + 2)`, its own noise apart."""
    # Not one of the keys below, though `fold_in(key, i)` equals `split(key, n)[i]` for jax's default generator.
    own = jax.random.fold_in(key, steps + 2)
    keys = jax.random.split(key, steps + 2)
    return Keys(keys[0], keys[1:-1], keys[-1], own)


def outer_value(problem: Problem, steps: int, params: PyTree, outer: PyTree, batch: PyTree, keys: Keys):
    """`(value, aux)` of the outer loss after `steps` inner steps, with its key."""
    return problem.outer_value(params, at_step(outer, steps), batch, keys.outer)


is_hypergradient = having("a hypergradient, such as bilevel.Unrolled(...)", "steps", "init", "solve", "estimate")
"""The rule of a setting that is a `Hypergradient`."""


_WARM = (
    "it acts through init_inner, and a warm start is a constant: start training anew at each outer step, with "
    "Nested(..., inner_start='cold') or inner_state=None"
)

_BETWEEN = (
    "it acts through the gradient of inner_loss, and the update of the inner optimizer has no derivative by its "
    "gradient (lion and other sign methods): use another optimizer"
)


@register
@dataclasses.dataclass(frozen=True)
class Trained:
    """An inner problem trained by `steps` steps of `optimizer`; the base of the estimators that do so."""

    optimizer: Optimizer = dataclasses.field(metadata=setting(optimizers.is_optimizer))
    steps: int = dataclasses.field(metadata=setting(integer(1)))

    def __post_init__(self):
        check_fields(self)

    def init(self, problem: Problem, outer: PyTree, key: jax.Array) -> InnerState:
        """The inner problem before its first step: `init_inner(key, outer)` and a fresh optimizer state."""
        check_call(f"{type(self).__name__}.init", problem=problem, outer=outer, key=key)
        return begin(problem, self.optimizer, outer, key)

    def solve(
        self, problem: Problem, inner_state: InnerState | None, outer: PyTree, inner_batches: PyTree, key: jax.Array
    ) -> InnerState:
        """The training map: `steps` steps from `inner_state`, differentiable in `inner_state` and `outer`.

        With `inner_state=None` it starts from `init_inner`. A third level is built on this method.
        """
        method = f"{type(self).__name__}.solve"
        check_call(method, problem=problem, inner_state=inner_state, outer=outer, key=key)
        return self.trajectory(problem, inner_state, outer, inner_batches, schedule(key, self.steps))[0]

    def trajectory(
        self, problem, inner_state, outer, inner_batches, keys: Keys, **options
    ) -> tuple[InnerState, Trace]:
        """`solve`, with what the steps reported. `options` go to `bilevel.hypergradients.training.train`."""
        state = self.resume(problem, inner_state, outer, keys)
        return train(problem, self.optimizer, state, outer, inner_batches, keys.inner, **options)

    def training(self, problem: Problem, inner_state, outer, inner_batches, keys: Keys) -> Callable[[PyTree], PyTree]:
        """The trained variable as a function of the inexact leaves of `outer`, for guards to see what it depends on."""
        _, fixed = partition(outer)

        def trained(moving):
            # A gradient with a rule of its own would hide from the trace what it reads.
            arguments = problem, inner_state, combine(moving, fixed), inner_batches, keys
            return self.trajectory(*arguments, gradient=reverse_gradient)[0].params

        return trained

    def lost(self, problem: Problem, inner_state, outer, inner_batches, keys: Keys) -> Lost:
        """Where the influence of a leaf of `outer` may be lost; see `bilevel.differentiation.influence.Lost`."""
        moving, fixed = partition(outer)

        def start(moving):
            return problem.split(problem.start_inner(keys.start, combine(moving, fixed)))[0]

        def gradient(moving):
            state = jax.lax.stop_gradient(self.resume(problem, inner_state, outer, keys))
            trained, rest = problem.split(state.params)
            xs, bind = slots(inner_batches, self.steps)
            batch = bind(jax.tree.map(lambda x: x[0], xs))
            point = Point(trained, moving, rest, at_step(fixed, 0), problem, batch, keys.inner[0])
            return reverse_gradient(point).grad

        def reasons():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                by_start = arrives(start, moving) if inner_state is not None else [False] * len(leaves)
                by_gradient = arrives(gradient, moving)
            return [
                _WARM if starts else (self._between() if inside else None)
                for starts, inside in zip(by_start, by_gradient, strict=True)
            ]

        leaves = jax.tree.leaves(moving)
        return reasons

    def _between(self) -> str:
        """What is between the inner gradient, which a leaf enters, and the hypergradient, which it does not reach."""
        return _BETWEEN

    def resume(self, problem: Problem, inner_state: InnerState | None, outer: PyTree, keys: Keys) -> InnerState:
        """`inner_state` ready for a step at this `outer`; a start of its own where it is None."""
        if inner_state is None:
            return self.init(problem, outer, keys.start)
        moving, _ = problem.split(inner_state.params)
        optimizers.check_state(self.optimizer, outer, moving, inner_state.opt_state)
        opt_state = optimizers.refresh(self.optimizer, outer, moving, inner_state.opt_state)
        return inner_state._replace(opt_state=opt_state)

    def outer_loss(self, problem: Problem, params: PyTree, outer: PyTree, batch: PyTree, keys: Keys):
        """`outer_value` after this estimator's `steps`."""
        return outer_value(problem, self.steps, params, outer, batch, keys)


def value_and_hypergrad(problem: Problem, hypergradient: Hypergradient) -> Callable[..., tuple[jax.Array, PyTree]]:
    """`f(outer, inner_state, inner_batches, outer_batch, key) -> (value, grad)`, for any other outer method."""

    checked("value_and_hypergrad", "problem", problem, is_problem)
    checked("value_and_hypergrad", "hypergradient", hypergradient, is_hypergradient)

    def function(outer, inner_state, inner_batches, outer_batch, key):
        estimate = hypergradient.estimate(problem, inner_state, outer, inner_batches, outer_batch, key)
        return estimate.value, estimate.grad

    return function

"""Train, differentiate, move: the solver made of a problem, a hypergradient and an outer optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from bilevel import bijectors
from bilevel.differentiation import optimizers
from bilevel.differentiation.influence import EXACTNESS
from bilevel.differentiation.optimizers import Optimizer
from bilevel.hypergradients.base import Hypergradient, is_hypergradient
from bilevel.hypergradients.contract import driven_from_host
from bilevel.hypergradients.training import InnerState
from bilevel.problem.arguments import check_outer
from bilevel.problem.problem import Problem, is_problem, projected
from bilevel.settings.fields import check_fields, checked, child, register, setting
from bilevel.settings.rules import instance, one_of, random_key
from bilevel.trees import Batch, Outer, PyTree, advance_keys, combine, distinct, global_norm, partition

InnerStart = Literal["warm", "cold"]


class NestedState(NamedTuple):
    """State of `Nested`: the outer variable, the inner problem, the outer optimizer, the iteration and its key."""

    outer: Outer
    inner: InnerState
    opt_state: PyTree
    step: jax.Array
    key: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class Nested:
    r"""One outer iteration: $\lambda \leftarrow \Pi(\lambda + \mathrm{update}(\hat\nabla F(\lambda)))$.

    Args:
      problem: the bilevel problem.
      hypergradient: how $\hat\nabla F$ is estimated.
      outer_optimizer: an `optax.GradientTransformation`; it sees `outer` with None at leaves that are not inexact, and
        in free coordinates where `Problem.domain` bounds it.
      inner_start: `"warm"` continues training where the last outer iteration ended (its start is then a constant);
        `"cold"` starts it anew each time, inside the differentiated map.

    Raises:
      ValueError: for an unknown `inner_start`.

    Metrics of a step: `outer_loss`, `inner_loss` (of the last inner step), `hypergradient_norm`, and of the estimators
    that take Hessian-vector products `hvps`; of an implicit one also `stationarity_relative` and `linear_residual`.

    Examples:
      >>> import math, bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), optax.sgd(1.0))
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    problem: Problem = dataclasses.field(metadata=child(is_problem))
    hypergradient: Hypergradient = dataclasses.field(metadata=child(is_hypergradient))
    outer_optimizer: Optimizer = dataclasses.field(metadata=setting(optimizers.is_optimizer))
    inner_start: InnerStart = dataclasses.field(
        default="warm", kw_only=True, metadata=setting(one_of(*get_args(InnerStart)))
    )

    def __post_init__(self):
        check_fields(self)

    @property
    def inner_batches_per_step(self) -> int:
        """Inner batches a step wants: the estimator's inner steps."""
        return self.hypergradient.steps

    @property
    def outer_batches_per_step(self) -> int:
        """Outer batches a step wants: one, without a leading axis."""
        return 1

    @property
    def driven_from_host(self) -> bool:
        """Whether its steps cannot be compiled, because its estimator's cannot: `run` then takes them one by one."""
        return driven_from_host(self.hypergradient)

    def init(self, key: jax.Array) -> NestedState:
        """The state before the first outer iteration."""
        checked("Nested.init", "key", key, random_key)
        outer_key, inner_key, key = jax.random.split(key, 3)
        outer = self.problem.start_outer(outer_key)
        check_outer("init_outer returned", outer)
        inner = self.hypergradient.init(self.problem, outer, inner_key)
        free = bijectors.free(self.problem.domain, partition(outer)[0])
        opt_state = optimizers.init(self.outer_optimizer, outer, free)
        return distinct(NestedState(outer, inner, opt_state, jnp.zeros((), jnp.int32), key))

    def step(
        self, state: NestedState, inner_batches: Batch, outer_batch: Batch
    ) -> tuple[NestedState, dict[str, jax.Array]]:
        """One outer iteration; `inner_batches` as `Hypergradient.estimate` takes them."""
        checked("Nested.step", "state", state, instance(NestedState, "a state that init(key) returned"))
        next_key, key = jax.random.split(state.key)
        warm = state.inner if self.inner_start == "warm" else None
        estimate = self.hypergradient.estimate(self.problem, warm, state.outer, inner_batches, outer_batch, key)
        outer, opt_state = self._move(state, estimate)
        metrics = {
            "outer_loss": estimate.value,
            "inner_loss": estimate.aux.info["inner_loss"][-1],
            "hypergradient_norm": global_norm(estimate.grad),
        }
        # What an implicit estimator says of its own exactness, of which `run` warns, and of its cost.
        told = (*EXACTNESS, "hvps")
        metrics |= {name: estimate.aux.info[name] for name in told if name in estimate.aux.info}
        return NestedState(outer, estimate.inner_state, opt_state, state.step + 1, next_key), metrics

    def _transform(self, outer: Outer):
        return optimizers.transformation(self.outer_optimizer, outer)

    def _move(self, state: NestedState, estimate: Any) -> tuple[PyTree, PyTree]:
        moving, fixed = partition(state.outer)
        transform = self._transform(state.outer)
        free, grad = bijectors.free_gradient(self.problem.domain, moving, estimate.grad)
        updates, opt_state = optimizers.update(transform, grad, state.opt_state, free, estimate.value)
        outer = combine(bijectors.natural(self.problem.domain, optimizers.apply(free, updates)), advance_keys(fixed))
        return projected(self.problem, outer), opt_state

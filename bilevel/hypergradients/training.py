"""The inner problem in training: its state, and the differentiable map of K optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.data import resolve, slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.checkpointing import scan
from bilevel.differentiation.gradients import Gradient, Point, mixed_gradient
from bilevel.differentiation.optimizers import Optimizer
from bilevel.differentiation.schedules import Checkpoint
from bilevel.problem.problem import Problem, mutable_entries, split_inner
from bilevel.sharding.held import on_one_device
from bilevel.trees import Inner, Outer, PyTree, as_words, at_step, combine, is_key, nbytes, partition


class InnerState(NamedTuple):
    """Where the inner problem stands.

    Attributes:
      params: the inner variable.
      opt_state: state of the inner optimizer.
      step: inner steps taken since the start, int32.
      extra: what an estimator carries from one outer iteration to the next (an adjoint, particles); None otherwise.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> outer, key = jax.numpy.zeros(()), jax.random.key(0)
      >>> state = hypergradient.solve(problem, None, outer, bilevel.FullBatch(train), key)
      >>> [round(float(w), 3) for w in state.params], int(state.step)
      ([0.75, 0.6], 20)
    """

    params: Inner
    opt_state: PyTree
    step: jax.Array
    extra: PyTree = None


class Trace(NamedTuple):
    """What K inner steps reported: `value[K]`, the inner losses, and `aux` stacked along a leading axis K.

    Examples:
      >>> import jax
      >>> from bilevel.extend import Trace
      >>> trace = Trace(value=jax.numpy.array([4.0, 1.0, 0.25]), aux=None)  # of K = 3 steps
      >>> float(trace.value[-1])
      0.25
    """

    value: jax.Array
    aux: PyTree


def begin(problem: Problem, optimizer: Optimizer, outer: Outer, key: jax.Array) -> InnerState:
    """The state before the first inner step: `init_inner(key, outer)` and a fresh optimizer."""
    params = problem.start_inner(key, outer)
    opt_state = optimizers.init(optimizer, outer, split_inner(problem, params)[0])
    return InnerState(params, opt_state, jnp.zeros((), jnp.int32))


def train(
    problem: Problem,
    optimizer: Optimizer,
    state: InnerState,
    outer: Outer,
    batches: PyTree,
    keys: jax.Array,
    *,
    first: int = 0,
    gradient: Callable[[Point], Gradient] = mixed_gradient,
    checkpoint: Checkpoint = "none",
) -> tuple[InnerState, Trace]:
    r"""`len(keys)` inner steps, $w_{t+1} = U(w_t, \nabla_w f(w_t, \lambda; b_t, k_t), \lambda)$.

    Step t sees the t-th of `batches` and of `keys`, and every random key inside `outer` folded with `first + t`.
    Inner leaves that are not inexact are constants; `mutable` entries become what `inner_loss` returned for them.
    Differentiable in `state` and `outer`, as `gradient` and `checkpoint` say.
    """
    steps = keys.shape[0]
    moving, fixed = split_inner(problem, state.params)
    outer_moving, outer_fixed = partition(outer)
    transform = optimizers.transformation(optimizer, outer)
    # A schedule may do a step more than once; keys of `outer` are folded anew each time, from their words.
    outer_words, as_keys = as_words(outer_fixed)
    xs, bind = slots(batches, steps)

    def step(carry, x):
        params, carried, opt_state = carry
        t, slot, key = x
        rest = fixed | carried if carried else fixed
        point = Point(params, outer_moving, rest, at_step(as_keys(outer_words), t), problem, bind(slot), key)
        result = gradient(point)
        updates, new_opt_state = optimizers.update(transform, result.grad, opt_state, params, result.value)
        opt_state = jax.tree.map(_like, new_opt_state, opt_state)
        carried = jax.tree.map(_like, result.updates, carried)
        carry = optimizers.apply(params, updates), carried, opt_state
        if problem.sharding is not None:
            carry = problem.sharding.pin_training(state.params, carry)
        return carry, Trace(result.value, result.aux)

    times = first + jnp.arange(steps, dtype=jnp.int32)
    carry = moving, mutable_entries(problem, state.params), state.opt_state
    size = nbytes
    if problem.sharding is not None:
        one = jax.eval_shape(lambda xs: resolve(bind(jax.tree.map(lambda x: x[0], xs))), xs)
        size = on_one_device(problem.sharding, state.params, one)
    (moving, carried, opt_state), trace = scan(checkpoint, step, carry, (times, xs, keys), steps, size)
    params = combine(moving, fixed | carried if carried else fixed)
    return InnerState(params, opt_state, state.step + steps, state.extra), trace


def _like(new: Any, old: Any) -> Any:
    # A schedule may return a wider type than its state started with, or a Python number: a loop keeps what it started
    # with.
    return new if is_key(new) else jnp.asarray(new, jnp.result_type(old))

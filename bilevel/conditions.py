r"""What holds at a trained point: systems :math:`R(z, \lambda) = 0` that define it as a function of `outer`.

`Stationary`: :math:`z = w`, :math:`R = \nabla_w f`. `FixedPointOf`: :math:`z = (w, s)`, the inner variable with the
optimizer state that moves, :math:`R = z - U(z, \lambda)`. In both f is the mean inner loss over the batches of one
estimate, with the random keys of its schedule. A condition holds everything R reads but z, and is a pytree: all of it
can be differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from bilevel import optimizers
from bilevel.data import FullBatch, slots
from bilevel.gradients import Gradient, Point
from bilevel.guards import dependence
from bilevel.inner import InnerState
from bilevel.optimizers import Optimizer
from bilevel.problem import Problem
from bilevel.trees import PyTree, at_step, cast_like, combine, is_inexact, is_key, partition, widened

Rule = Callable[[Point], Gradient]
"""`mixed_gradient` where R is pulled back, `reverse_gradient` where it is pushed forward."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """The mean inner loss over `batches`, the t-th with the t-th of `keys`, and random keys in `outer` folded with t.

    Attributes:
      problem, outer: the problem, and its outer variable.
      fixed: the inner leaves that are not trained.
      batches, keys: as for `bilevel.inner.train`.
      constant: whether all terms of the mean are the same, so that one of them is enough.
    """

    problem: Problem
    outer: PyTree
    fixed: PyTree
    batches: PyTree
    keys: jax.Array
    constant: bool = dataclasses.field(metadata={"static": True})

    @property
    def terms(self) -> int:
        """Gradient evaluations a mean takes."""
        return 1 if self.constant else self.keys.shape[0]

    def gradient(self, params: PyTree, rule: Rule) -> tuple[PyTree, jax.Array]:
        """`(gradient, value)` of the mean at the trained leaves `params`, in `widened` precision.

        Batches are visited one after the other: activations of one batch are alive at a time.
        """
        moving, fixed = partition(self.outer)
        steps = self.keys.shape[0]
        xs, bind = slots(self.batches, steps)

        def term(t, slot, key):
            point = Point(params, moving, self.fixed, at_step(fixed, t), self.problem, bind(slot), key)
            result = rule(point)
            return widened((result.grad, result.value))

        times = jnp.arange(steps, dtype=jnp.int32)
        if self.constant:
            return term(*jax.tree.map(lambda x: x[0], (times, xs, self.keys)))
        shape = jax.eval_shape(lambda args: term(*args), jax.tree.map(lambda x: x[0], (times, xs, self.keys)))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        add = lambda total, x: (jax.tree.map(jnp.add, total, term(*x)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, start, (times, xs, self.keys))
        return jax.tree.map(lambda x: x / steps, total)


def mean_loss(problem: Problem, params: PyTree, outer: PyTree, batches: PyTree, keys: jax.Array) -> MeanLoss:
    """The `MeanLoss` of one estimate. `params`: the whole inner variable."""
    fixed = problem.split(params)[1]
    same_data = batches is None or isinstance(batches, FullBatch)
    constant = keys.shape[0] == 1 or (same_data and not _is_random(problem, params, outer, batches, keys[0]))
    return MeanLoss(problem, outer, fixed, batches, keys, constant)


def _is_random(problem, params, outer, batch, key) -> bool:
    """Whether the inner loss reads its random key, or one inside `outer`; decided from its trace."""
    leaves, structure = jax.tree.flatten(outer)

    def value(keys):
        inside = iter(keys[1])
        filled = jax.tree.unflatten(structure, [next(inside) if is_key(x) else x for x in leaves])
        return problem.inner_value(params, filled, batch, keys[0])[0]

    return any(dependence(value, (key, [x for x in leaves if is_key(x)]))[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stationary:
    """The gradient form; `residual(z, rule)` is the gradient of the mean loss at z, the trained inner leaves."""

    loss: MeanLoss

    symmetric = True

    def residual(self, z: PyTree, rule: Rule) -> PyTree:
        """R(z), a tree like z in `widened` precision."""
        return self.loss.gradient(z, rule)[0]

    def params(self, z: PyTree) -> PyTree:
        """The whole inner variable of z."""
        return combine(z, self.loss.fixed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPointOf:
    """The fixed-point form; z is `(params, leaves)`: trained inner leaves, and the optimizer state leaves that move.

    Attributes:
      loss: the mean loss whose gradient the optimizer is given.
      opt_state: the optimizer's whole state. Its integer leaves (step counts) are held where training left them, and
        leaves it hands on unchanged (injected hyper-parameters) are constants, or functions of `outer`.
      optimizer: the optimizer.
      moves: for each leaf of `opt_state`, whether it is part of z.
    """

    loss: MeanLoss
    opt_state: PyTree
    optimizer: Optimizer = dataclasses.field(metadata={"static": True})
    moves: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    symmetric = False

    def residual(self, z: PyTree, rule: Rule) -> PyTree:
        """R(z) = z - U(z), a tree like z in `widened` precision."""
        params, _ = z
        opt_state = optimizers.refresh(self.optimizer, self.loss.outer, params, self._state(z))
        grad, value = self.loss.gradient(params, rule)
        transform = optimizers.transformation(self.optimizer, self.loss.outer)
        updates, new_state = optimizers.update(transform, cast_like(grad, params), opt_state, params, value)
        moved = zip(self.moves, jax.tree.leaves(new_state), strict=True)
        image = optimizers.apply(params, updates), [x for m, x in moved if m]
        return jax.tree.map(jnp.subtract, widened(z), cast_like(image, widened(z)))

    def params(self, z: PyTree) -> PyTree:
        """The whole inner variable of z."""
        return combine(z[0], self.loss.fixed)

    def state(self, z: PyTree, state: InnerState) -> InnerState:
        """`state` at z."""
        return state._replace(params=self.params(z), opt_state=self._state(z))

    def _state(self, z: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(self.opt_state)
        moving = iter(z[1])
        return jax.tree.unflatten(
            structure, [next(moving) if m else x for m, x in zip(self.moves, leaves, strict=True)]
        )


def moving_leaves(problem: Problem, optimizer: Optimizer, outer: PyTree, state: InnerState) -> tuple[bool, ...]:
    """For each leaf of `state.opt_state`, whether training moves it and a derivative can pass through it."""
    params = problem.split(state.params)[0]
    handed_on = optimizers.carried(optimizers.transformation(optimizer, outer), params, state.opt_state)
    leaves = jax.tree.leaves(state.opt_state)
    return tuple(is_inexact(x) and not same for x, same in zip(leaves, handed_on, strict=True))


def unknowns(problem: Problem, moves: tuple[bool, ...], state: InnerState) -> PyTree:
    """The z of `state` in a fixed-point condition."""
    leaves = zip(moves, jax.tree.leaves(state.opt_state), strict=True)
    return problem.split(state.params)[0], [x for m, x in leaves if m]


def fixed_point_of(optimizer: Optimizer, loss: MeanLoss, state: InnerState) -> tuple[FixedPointOf, PyTree]:
    """The condition that `state` is a fixed point of `optimizer`, and the z of `state`."""
    moves = moving_leaves(loss.problem, optimizer, loss.outer, state)
    return FixedPointOf(loss, state.opt_state, optimizer, moves), unknowns(loss.problem, moves, state)


def require_stationary_limit(estimator: str, optimizer: Optimizer, trained: PyTree, outer: PyTree) -> None:
    """Refuses an optimizer that moves parameters where the gradient is 0: it does not stop at a stationary point.

    Decided when the estimate is traced, by one update from a fresh state with zero gradients, all numbers being 0.5.

    Raises:
      ValueError: naming the remedies.
    """
    seen = () if isinstance(optimizer, optax.GradientTransformation) else (outer,)
    leaves, structure = jax.tree.flatten((trained, seen))
    if _moves_at_zero_gradient(optimizer, structure, tuple(_kind(x) for x in leaves)):
        raise ValueError(
            f"{estimator}: the optimizer moves parameters where the gradient is 0 (decoupled weight decay as in adamw, "
            "a proximal step, added noise), so training does not end at a stationary point of inner_loss: use the "
            "fixed-point form, FixedPoint, or put the penalty into inner_loss and take it out of the optimizer."
        )


def _kind(leaf: Any) -> tuple[Any, ...]:
    if is_key(leaf):
        return jnp.shape(leaf), str(jax.random.key_impl(leaf)), True
    return jnp.shape(leaf), jnp.result_type(leaf), False


def _sample(shape: Any, kind: Any, of_keys: bool) -> jax.Array:
    if of_keys:
        key = jax.random.key(0, impl=kind)
        return jnp.broadcast_to(key, shape)
    return jnp.full(shape, 0.5 if jnp.issubdtype(kind, jnp.inexact) else 1, kind)


@functools.lru_cache(maxsize=64)
def _moves_at_zero_gradient(optimizer: Optimizer, structure: Any, kinds: tuple[tuple[Any, ...], ...]) -> bool:
    def probe():
        params, seen = jax.tree.unflatten(structure, [_sample(*kind) for kind in kinds])
        transform = optimizers.transformation(optimizer, *(seen or (None,)))
        grads, value = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
        updates, _ = optimizers.update(transform, grads, transform.init(params), params, value)
        # A NaN is no movement: 0.5 may be a setting the optimizer cannot work with.
        return jnp.any(jnp.stack([jnp.any(jnp.abs(u) > 0) for u in jax.tree.leaves(updates)]))

    # Inside a trace, but of no traced value.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        moved = jax.jit(probe)()
    # What an optimizer does that holds a traced value, such as a step size under vmap, is not known.
    return not isinstance(moved, Tracer) and bool(moved)

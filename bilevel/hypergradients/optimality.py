r"""What holds at a trained point: systems $R(z, \lambda) = 0$ that define it as a function of `outer`.

`Stationary`: $z = w$, $R = \nabla_w f$. `FixedPointOf`: $z = (w, s)$, the inner variable with the
optimizer state that moves, $R = z - U(z, \lambda)$. In both f is the mean inner loss over the batches of one
estimate, with the random keys of its schedule. A condition holds everything R reads but z, and is a pytree: all of it
can be differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel.data import FullBatch, slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.frozen import Division, Update, divide, traced
from bilevel.differentiation.gradients import Gradient, Point, own_rule, reverse_gradient
from bilevel.differentiation.influence import dependence
from bilevel.differentiation.optimizers import Optimizer
from bilevel.differentiation.trials import Trial, trial
from bilevel.hypergradients.training import InnerState
from bilevel.problem.problem import Problem, split_inner
from bilevel.trees import (
    PyTree,
    at_step,
    cast_like,
    combine,
    global_norm,
    is_inexact,
    is_key,
    leaf_names,
    named,
    partition,
    replayed,
    widened,
)

Rule = Callable[[Point], Gradient]
"""`mixed_gradient` where R is pulled back, `reverse_gradient` where it is pushed forward."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """The mean inner loss over `batches`, the t-th with the t-th of `keys`, and random keys in `outer` folded with t.

    Attributes:
      problem, outer: the problem, and its outer variable.
      fixed: the inner leaves that are not trained.
      batches, keys: as for `bilevel.hypergradients.training.train`.
      constant: whether all terms of the mean are the same, so that one of them is enough.
      own_rule: the name of a function in the inner loss whose rule is not its derivative; None if second derivatives
        commute, so that the Hessian is symmetric.
    """

    problem: Problem
    outer: PyTree
    fixed: PyTree
    batches: PyTree
    keys: jax.Array
    constant: bool = dataclasses.field(metadata={"static": True})
    own_rule: str | None = dataclasses.field(metadata={"static": True})

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
        keys = replayed(self.keys)

        def term(t, slot, key):
            point = Point(params, moving, self.fixed, at_step(fixed, t), self.problem, bind(slot), key)
            result = rule(point)
            return widened((result.grad, result.value))

        times = jnp.arange(steps, dtype=jnp.int32)
        if self.constant:
            return term(*jax.tree.map(lambda x: x[0], (times, xs, keys)))
        shape = jax.eval_shape(lambda args: term(*args), jax.tree.map(lambda x: x[0], (times, xs, replayed(keys))))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        add = lambda total, x: (jax.tree.map(jnp.add, total, term(*x)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, start, (times, xs, keys))
        return jax.tree.map(lambda x: x / steps, total)


def mean_loss(problem: Problem, params: PyTree, outer: PyTree, batches: PyTree, keys: jax.Array) -> MeanLoss:
    """The `MeanLoss` of one estimate. `params`: the whole inner variable; `keys`: those that training saw."""
    fixed = split_inner(problem, params)[1]
    constant = same_terms(problem, params, outer, batches, keys)
    first = _first(batches, keys)
    outer_moving, outer_fixed = partition(outer)
    outer_fixed, key = at_step(outer_fixed, 0), replayed(keys)[0]
    point = Point(split_inner(problem, params)[0], outer_moving, fixed, outer_fixed, problem, first, key)
    return MeanLoss(problem, outer, fixed, batches, keys, constant, own_rule(point))


def same_terms(problem: Problem, params: PyTree, outer: PyTree, batches: PyTree, keys: jax.Array) -> bool:
    """Whether the inner loss is the same at all steps: on one batch, without randomness. Decided from its trace."""
    same_data = batches is None or isinstance(batches, FullBatch)
    return keys.shape[0] == 1 or (
        same_data and not _is_random(problem, params, outer, _first(batches, keys), replayed(keys)[0])
    )


def _first(batches: PyTree, keys: jax.Array) -> PyTree:
    """The batch of the first step."""
    xs, bind = slots(batches, keys.shape[0])
    return bind(jax.tree.map(lambda x: x[0], xs))


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
    """The gradient form; `residual(z, rule)` is the gradient of the mean loss at z, the inner leaves that move.

    Attributes:
      loss: the mean loss; leaves that do not move are among those it holds.
      division: which entries of the trained leaves move.
    """

    loss: MeanLoss
    division: Division

    @property
    def symmetric(self) -> bool:
        """Whether dR/dz is: the Hessian, unless the loss has a derivative of its own."""
        return self.loss.own_rule is None

    def residual(self, z: PyTree, rule: Rule) -> PyTree:
        """R(z), a tree like z in `widened` precision."""
        return self.division.rows(self.loss.gradient(self.division.pinned(z), rule)[0], z)

    def unfinished(self, z: PyTree, left: PyTree) -> jax.Array:
        """0: there is no optimizer in it."""
        del z, left
        return jnp.zeros(())

    def params(self, z: PyTree) -> PyTree:
        """The whole inner variable of z."""
        return combine(z, self.loss.fixed)


def stationary(loss: MeanLoss, division: Division, trained: PyTree) -> tuple[Stationary, PyTree]:
    """The condition that the mean loss is stationary in what moves of `trained`, and the z of that."""
    z, held = division.split(trained)
    return Stationary(dataclasses.replace(loss, fixed=combine(held, loss.fixed)), division), z


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPointOf:
    """The fixed-point form; z is `(params, leaves)`: inner leaves that move, and the optimizer state leaves that do.

    Attributes:
      loss: the mean loss whose gradient, by all trained leaves, the optimizer is given.
      division: which entries of the trained leaves move.
      held: the trained leaves that do not.
      opt_state: the optimizer's whole state. Its integer leaves (step counts) are held where training left them, and
        leaves it hands on unchanged (injected hyper-parameters) are constants, or functions of `outer`.
      optimizer: the optimizer.
      moves: for each leaf of `opt_state`, whether it is part of z.
      rests: whether the optimizer is known to stop where the gradient is 0: what its state is does not matter there.
    """

    loss: MeanLoss
    division: Division
    held: PyTree
    opt_state: PyTree
    optimizer: Optimizer = dataclasses.field(metadata={"static": True})
    moves: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    rests: bool = dataclasses.field(metadata={"static": True})

    symmetric = False

    def residual(self, z: PyTree, rule: Rule) -> PyTree:
        """R(z) = z - U(z), a tree like z in `widened` precision."""
        trained = combine(self.division.pinned(z[0]), self.held)
        opt_state = optimizers.refresh(self.optimizer, self.loss.outer, trained, self._state(z))
        grad, value = self.loss.gradient(trained, rule)
        transform = optimizers.transformation(self.optimizer, self.loss.outer)
        updates, new_state = optimizers.update(transform, cast_like(grad, trained), opt_state, trained, value)
        moved = zip(self.moves, jax.tree.leaves(new_state), strict=True)
        moving, _ = self.division.split(optimizers.apply(trained, updates))
        image = moving, [x for m, x in moved if m]
        params, leaves = jax.tree.map(jnp.subtract, widened(z), cast_like(image, widened(z)))
        return self.division.rows(params, z[0]), leaves

    def unfinished(self, z: PyTree, left: PyTree) -> jax.Array:
        """How far the optimizer's state s is from rest, `left` being R(z), as a part of its size: about 1 far from it.

        For each kind of moment |R_s| / |(dR_s/ds) s|, which for an average over 1/(1 - b) steps is its distance from
        where it tends to. It counts as far as the step depends on it, |(dU_w/ds) s|, beside the step that is taken
        without any gradient, which it holds in balance.
        """
        if self.rests:
            return jnp.zeros(())
        trained = combine(z[0], self.held)
        opt_state = optimizers.refresh(self.optimizer, self.loss.outer, trained, self._state(z))
        grad, value = self.loss.gradient(trained, reverse_gradient)
        transform = optimizers.transformation(self.optimizer, self.loss.outer)
        structure = jax.tree.structure(opt_state)

        def step(moving, grad):
            given = iter(moving)
            leaves = [next(given) if m else x for m, x in zip(self.moves, jax.tree.leaves(opt_state), strict=True)]
            updates, state = optimizers.update(transform, grad, structure.unflatten(leaves), trained, value)
            return updates, [x for m, x in zip(self.moves, jax.tree.leaves(state), strict=True) if m]

        grad, zero = cast_like(grad, trained), jax.tree.map(jnp.zeros_like, trained)
        drift = global_norm(widened(step([jnp.zeros_like(x) for x in z[1]], zero)[0]))
        kinds = [kind for m, kind in zip(self.moves, _kinds(opt_state, trained), strict=True) if m]
        worst = jnp.zeros_like(drift)
        for kind in sorted(set(kinds)):
            tangents = [x if k == kind else jnp.zeros_like(x) for k, x in zip(kinds, z[1], strict=True)]
            by_step, by_state = jax.jvp(lambda moving: step(moving, grad), (z[1],), (tangents,))[1]
            rows = [(r, x - y) for k, r, x, y in zip(kinds, left[1], tangents, by_state, strict=True) if k == kind]
            distance, size = (global_norm(widened(list(column))) for column in zip(*rows, strict=True))
            part = jnp.minimum(distance / size, 1) * jnp.minimum(global_norm(widened(by_step)) / drift, 1)
            worst = jnp.where(part > worst, part, worst)  # 0 / 0 is no distance
        return worst

    def params(self, z: PyTree) -> PyTree:
        """The whole inner variable of z."""
        return combine(combine(z[0], self.held), self.loss.fixed)

    def state(self, z: PyTree, state: InnerState) -> InnerState:
        """`state` at z."""
        return state._replace(params=self.params(z), opt_state=self._state(z))

    def _state(self, z: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(self.opt_state)
        moving = iter(z[1])
        return jax.tree.unflatten(
            structure, [next(moving) if m else x for m, x in zip(self.moves, leaves, strict=True)]
        )


def _kinds(opt_state: PyTree, params: PyTree) -> list[str]:
    """For each leaf of an optimizer's state the name of the moment that it is a part of, for all parameters."""
    inside = sorted((jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)), key=len)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]
    return [name.removesuffix(next((x for x in reversed(inside) if name.endswith(x)), "")) for name in names]


def fixed_point_of(
    estimator: str, optimizer: Optimizer, loss: MeanLoss, state: InnerState
) -> tuple[FixedPointOf, PyTree]:
    """The condition that `state` is a fixed point of `optimizer`, and the z of `state`."""
    trained = split_inner(loss.problem, state.params)[0]
    tried = functools.cache(lambda: trial(optimizer, trained, loss.outer))
    _refuse_turns(estimator, state.opt_state, tried())
    division, moves, z = unknowns(estimator, loss.problem, optimizer, loss.outer, state, tried)
    _, held = division.split(split_inner(loss.problem, state.params)[0])
    update = traced(optimizers.transformation(optimizer, loss.outer), trained, state.opt_state)
    return FixedPointOf(loss, division, held, state.opt_state, optimizer, moves, update.rests()), z


def unknowns(
    estimator: str,
    problem: Problem,
    optimizer: Optimizer,
    outer: PyTree,
    state: InnerState,
    tried: Callable[[], Trial | None] | None = None,
) -> tuple[Division, tuple[bool, ...], PyTree]:
    """What of `state` moves in a fixed-point condition: of the inner variable, of the optimizer's state, and both as z.

    A leaf of the optimizer's state is moved if training changes it and a derivative can pass through it.
    """
    trained = split_inner(problem, state.params)[0]
    transform = optimizers.transformation(optimizer, outer)
    division = divide(estimator, traced(transform, trained, state.opt_state), tried)
    handed_on = optimizers.carried(transform, trained, state.opt_state)
    leaves = jax.tree.leaves(state.opt_state)
    moves = tuple(is_inexact(x) and not same for x, same in zip(leaves, handed_on, strict=True))
    return division, moves, (division.split(trained)[0], [x for m, x in zip(moves, leaves, strict=True) if m])


def _refuse_turns(estimator: str, opt_state: PyTree, tried: Trial | None) -> None:
    """Refuses optimizers that take turns: no single step of theirs has the trained point as its fixed point."""

    def named(node):
        return isinstance(node, optax.MultiStepsState | optax.ApplyEvery)

    if any(map(named, jax.tree.leaves(opt_state, is_leaf=named))) or (tried is not None and tried.turns):
        raise ValueError(
            f"{estimator}: the optimizer moves parameters at some steps only (optax.MultiSteps, optax.apply_every), so "
            "one of its steps has no fixed point to differentiate: give the optimizer inside it, and larger batches."
        )


def trained_part(
    estimator: str, problem: Problem, optimizer: Optimizer, outer: PyTree, state: InnerState
) -> tuple[Division, PyTree]:
    """What of the inner variable of `state` moves in the gradient form, and these leaves; nothing is said of it."""
    trained = split_inner(problem, state.params)[0]
    update = traced(optimizers.transformation(optimizer, outer), trained, state.opt_state)
    division = divide(estimator, update)
    return division, division.split(trained)[0]


def at_rest(estimator: str, problem: Problem, optimizer: Optimizer, outer: PyTree, state: InnerState) -> Division:
    """The division of `trained_part`, of an optimizer that stops at stationary points.

    Raises:
      ValueError: for one that does not; as `divide`.
    """
    trained = split_inner(problem, state.params)[0]
    update = traced(optimizers.transformation(optimizer, outer), trained, state.opt_state)
    tried = functools.cache(lambda: trial(optimizer, trained, outer))
    _require_stationary_limit(estimator, update, tried)
    return divide(estimator, update, tried)


def require_constant_held(estimator: str, problem: Problem, division: Division, outer: PyTree, key: jax.Array) -> None:
    """Refuses a start that makes leaves from `outer` which the optimizer then never moves.

    An implicit derivative does not see starts, and what is never moved is its start for ever.

    Raises:
      ValueError: names the leaves of `outer`.
    """
    moving, fixed = partition(outer)

    def held(moving):
        trained = split_inner(problem, problem.start_inner(key, combine(moving, fixed)))[0]
        return [x for kind, x in zip(division.kinds, jax.tree.leaves(trained), strict=True) if kind != "moving"]

    if set(division.kinds) == {"moving"}:
        return
    rows = dependence(held, moving)
    names = [name for name, *column in zip(leaf_names(moving), *rows, strict=True) if any(column)]
    if names:
        raise ValueError(
            f"{estimator}: init_inner makes leaves of the inner variable from {named('outer', *names)} that the "
            "optimizer never moves, and an implicit derivative does not see how training starts: read that leaf from "
            "`outer` in the losses, or use Unrolled."
        )


def _require_stationary_limit(estimator: str, update: Update, tried: Callable[[], Trial | None]) -> None:
    """Refuses an optimizer that moves parameters where the gradient is 0: it does not stop at a stationary point.

    Decided by the trace of its update, for all parameters and states that it may come to; where the trace does not
    tell, by trying it out.

    Raises:
      ValueError: naming the remedies.
    """
    if update.rests():
        return
    if (seen := tried()) is not None and seen.drifts:
        raise ValueError(
            f"{estimator}: the optimizer moves parameters where the gradient is 0 (decoupled weight decay as in adamw, "
            "a proximal step, a projection, added noise), so training does not end at a stationary point of "
            "inner_loss: use the fixed-point form, FixedPoint, or put the penalty into inner_loss and take it out of "
            "the optimizer."
        )

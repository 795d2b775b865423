"""Why a step failed or is out of proportion, found by replaying it: nothing of this runs unless something is odd."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import optimizers
from bilevel.chunks import batches, chunk, step, wanted_batches
from bilevel.data import resolve, slots
from bilevel.guards import SteepUpdateWarning
from bilevel.hypergradients.base import Trained, schedule
from bilevel.hypergradients.one_step import OneStep
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.problem import Problem
from bilevel.trees import PyTree, at_step, combine, is_inexact, leaf_names, named, partition

STEEP = 1e3
"""Norm from which a hypergradient is looked into; growth of a perturbation from which an update counts as steep."""

_AT_ZERO = "look for a root, norm, logarithm or division at 0"


def not_finite(root: str, tree: PyTree) -> list[str]:
    """Names of the leaves of `tree`, which is called `root`, that hold a NaN or an infinity."""
    return [name for name, leaf in _named(root, tree) if not np.isfinite(np.asarray(leaf)).all()]


def _nan(root: str, tree: PyTree) -> list[str]:
    return [name for name, leaf in _named(root, tree) if np.isnan(np.asarray(leaf)).any()]


def _named(root: str, tree: PyTree) -> Iterator[tuple[str, Any]]:
    for name, leaf in zip(leaf_names(tree, root), jax.tree.leaves(tree), strict=True):
        if is_inexact(leaf):
            yield name, leaf


def refuse_start(solver: Any, state: Any, holes: np.ndarray, number: int) -> None:
    """Refuses a state before step `number` that holds a NaN; `holes` counts what is not finite.

    Infinities may be meant (a mask): they must only not become more.
    """
    if not holes.any():
        return
    if names := _nan("outer", state.outer) + _nan("inner", _params(state)):
        raise FloatingPointError(
            f"{_where(solver, number)}the state it starts from is already not finite, in {', '.join(names)}; check the "
            f"start values (init_outer, init_inner).{_nan_weights(solver)}"
        )


def _where(solver: Any, number: int) -> str:
    return f"{'Training' if hasattr(solver, 'trained') else 'Outer'} step {number}: "


def _params(state: Any) -> PyTree:
    return getattr(state.inner, "params", state.inner)


def refuse_failed(solver, record, capacity, before, data, done, rows, holes, new_holes) -> None:
    """Raises FloatingPointError if a chunk of steps from state `before` made something that is not finite.

    Args:
      solver, record, capacity, data: what the chunk was given.
      before: the state.
      done: the number of its first step.
      rows: the metrics of the chunk.
      holes, new_holes: how many entries of each inexact leaf of the state are not finite: from the start, and now.
    """
    numbers = {n: v for n, v in rows.items() if np.issubdtype(v.dtype, np.inexact)}
    bad = [
        int(np.argmin(np.isfinite(v.reshape(len(v), -1)).all(1))) for v in numbers.values() if not np.isfinite(v).all()
    ]
    if not bad and not np.any(new_holes > holes):
        return
    # The state may have been lost in a step whose metrics, taken before its update, are still finite.
    count = len(next(iter(rows.values()))) if rows else capacity
    first, last = 0, min(bad, default=count - 1)
    while first < last:
        middle = (first + last) // 2
        if np.any(np.asarray(chunk(solver, record, capacity, before, data, middle + 1)[2]) > holes):
            last = middle
        else:
            first = middle + 1
    state, norms = before, ""
    if first:
        state = chunk(solver, record, capacity, before, data, first)[0]
        norms = ", ".join(f"{n} was {v[first - 1]:.3g}" for n, v in numbers.items() if v.ndim == 1)
    try:
        told = describe_failure(solver, state, data, done + first, norms)
    except Exception as error:  # a replay calls what is the user's by other ways than the run did
        names = ", ".join(n for n, v in numbers.items() if not np.isfinite(v[first]).all()) or "the state after it"
        told = f"{_where(solver, done + first)}{names} is not finite; lower the step sizes (not replayed: {error})."
    raise FloatingPointError(told)


class _Instead:
    """A hypergradient with another `estimate`."""

    def __init__(self, hypergradient: Any, estimate: Callable[..., Any]):
        self._hypergradient, self.estimate = hypergradient, estimate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hypergradient, name)


class _Asked(Exception):
    """Thrown by an `estimate` that only takes note of what it is asked."""


def _asked(solver: Any, state: Any, data: Any) -> tuple[Any, ...] | None:
    """The arguments of the estimate that a step from `state` asks for; None where the solver has no hypergradient."""
    if not hasattr(solver, "hypergradient"):
        return None

    def listen(*args):
        raise _Asked(*args)

    try:
        step(dataclasses.replace(solver, hypergradient=_Instead(solver.hypergradient, listen)), state, data)
    except _Asked as asked:
        return asked.args
    return None


def describe_failure(solver: Any, state: Any, data: Any, number: int, norms: str = "") -> str:
    """One sentence on why outer step `number`, taken from the finite `state`, makes something that is not finite.

    `norms` says how large the last finite metrics were.
    """
    where = _where(solver, number)
    if weights := _nan_weights(solver):
        return where + weights.strip()
    if said := _training(solver, state, data) or _losses(solver, state, data):
        return where + said
    kept: list[Any] = []
    replayed = solver
    if hasattr(solver, "hypergradient"):
        hypergradient = solver.hypergradient

        def recorded(*args):
            kept.append(hypergradient.estimate(*args))
            return kept[-1]

        replayed = dataclasses.replace(solver, hypergradient=_Instead(hypergradient, recorded))
    new, metrics = step(replayed, state, data)
    for estimate in kept:
        if said := _estimate(estimate):
            return where + said
    names = [name for name, value in metrics.items() if not np.isfinite(np.asarray(value)).all()]
    leaves = not_finite("outer", new.outer) + not_finite("inner", _params(new)) or _elsewhere(state, new)
    before = f"; before it {norms}" if norms else ""
    if not names:
        mover = "the outer optimizer" if kept else "the update"
        return where + (
            f"{mover} made {', '.join(leaves) or 'a part of the state'} not finite while losses and hypergradient are "
            f"finite{before}: lower the step sizes, and check that they are finite."
        )
    found = ", ".join(leaves) or "no leaf of the state"
    return where + (
        f"{', '.join(names)} is not finite (not finite after the step: {found}{before}); lower the step sizes."
    )


def _elsewhere(state: Any, new: Any) -> list[str]:
    was = set(not_finite("state", state))
    return [name for name in not_finite("state", new) if name not in was]


def _nan_weights(solver: Any) -> str:
    """A sentence on NaN among the arrays that are bound to the losses; empty if there is none."""
    for loss in ("inner_loss", "outer_loss"):
        if names := _nan(loss, getattr(solver.problem, loss)):
            return (
                f" the arrays bound to {loss} hold NaN, at {', '.join(names)}: the file or array they come from is "
                "damaged; load it again, or look for the NaN there."
            )
    return ""


@partial(jax.jit, static_argnums=(0,))
def _evaluated(name, problem, moving, rest, outer, batch, key):
    """A loss and its gradient by the moving leaves of the inner variable."""

    def loss(moving):
        value = problem.inner_value if name == "inner_loss" else problem.outer_value
        return value(combine(moving, rest), outer, batch, key)[0]

    return jax.value_and_grad(loss)(moving)


class _Looked(NamedTuple):
    """A loss at a finite point: its value and gradient, and a sentence if one of them is not finite."""

    value: jax.Array
    grad: PyTree
    said: str | None


def _look(name: str, problem: Problem, params: PyTree, outer: PyTree, batch: PyTree, key: Any, when: str = ""):
    moving, rest = problem.split(params)
    value, grad = _evaluated(name, problem, moving, rest, outer, batch, key)
    leaves, said = ", ".join(not_finite("inner", grad)), None
    if not np.isfinite(value):
        at = f" (its gradient not finite at {leaves})" if leaves else ""
        said = f"{name} is {value}{when} at a finite point{at}"
        if found := not_finite("the batch", resolve(batch)):
            said += f"; {', '.join(found)} holds values that are not finite: check the data."
        else:
            said += f": lower the step size if training diverges, and {_AT_ZERO} in {name}."
    elif leaves:
        said = (
            f"the gradient of {name} is not finite{when} at {leaves} while {name} is {value:.3g}: {_AT_ZERO} in {name} "
            "(the derivative of a norm at 0 is NaN, that of its square is not)."
        )
    return _Looked(value, grad, said)


def _training(solver: Any, state: Any, data: Any) -> str | None:
    """A sentence on the first inner step that fails, of an estimator that trains by an optimizer."""
    asked, alone = _asked(solver, state, data), getattr(solver, "trained", None)
    estimator = getattr(solver, "hypergradient", alone)
    if not isinstance(estimator, Trained):
        return None
    if asked is None:
        inner, _ = batches(solver, state, data)
        asked = solver.problem, state.inner, state.outer, inner, None, jax.random.split(state.key)[1]
    problem, inner_state, outer, inner_batches, outer_batch, key = asked
    keys = schedule(key, estimator.steps)
    inner_state = estimator.resume(problem, inner_state, outer, keys)
    xs, bind = slots(inner_batches, estimator.steps)
    transform = optimizers.transformation(estimator.optimizer, outer)
    change = jax.jit(lambda *args: optimizers.update(transform, *args))
    params, opt_state = inner_state.params, inner_state.opt_state
    at_inner = lambda t: "" if alone else f" at inner step {t}"  # noqa: E731
    for t in range(estimator.steps):
        batch, seen = bind(jax.tree.map(lambda x: x[t], xs)), at_step(outer, t)  # noqa: B023
        looked = _look("inner_loss", problem, params, seen, batch, keys.inner[t], at_inner(t))
        if looked.said:
            return looked.said
        moving, rest = problem.split(params)
        updates, opt_state = change(looked.grad, opt_state, moving, looked.value)
        moving = optimizers.apply(moving, updates)
        if found := not_finite("inner", moving):
            return (
                f"the inner optimizer made {', '.join(found)} not finite{at_inner(t)}, where inner_loss is "
                f"{looked.value:.3g} and its gradient is finite: lower the inner learning rate, and check that it is "
                "finite."
            )
        if problem.mutable:
            rest = rest | problem.inner_outcome(params, seen, batch, keys.inner[t])[1]
        params = combine(moving, rest)
    if alone is not None:
        return None
    return _look("outer_loss", problem, params, at_step(outer, estimator.steps), outer_batch, keys.outer).said


def _losses(solver: Any, state: Any, data: Any) -> str | None:
    """A sentence on a loss that is not finite where a solver without an estimator begins its step."""
    if hasattr(solver, "hypergradient") or hasattr(solver, "trained"):
        return None
    wanted = wanted_batches(solver)
    for name, given, count in zip(("inner_loss", "outer_loss"), batches(solver, state, data), wanted, strict=True):
        xs, bind = slots(given, count) if name == "inner_loss" or count > 1 else (None, lambda x: given)  # noqa: B023
        for t in range(count):
            batch = bind(jax.tree.map(lambda x: x[t], xs))  # noqa: B023
            if said := _look(name, solver.problem, _params(state), at_step(state.outer, t), batch, state.key).said:
                return said
    return None


def _estimate(estimate: Any) -> str | None:
    """A sentence on what in an `Estimate` is not finite; None if all is."""
    losses = np.asarray(estimate.aux.info.get("inner_loss", ()))
    remedy = "lower the inner learning rate, or check the data for values that are not finite."
    if not np.isfinite(losses).all():
        t = int(np.argmin(np.isfinite(losses.reshape(len(losses), -1)).all(1)))
        leaves = ", ".join(not_finite("inner", estimate.inner_state.params)) or "no leaf of the trained parameters"
        return f"inner_loss is {losses[t]} at inner step {t} (then not finite: {leaves}); " + remedy
    if names := not_finite("inner", estimate.inner_state.params):
        return f"the inner update made {', '.join(names)} not finite; " + remedy
    if not np.isfinite(estimate.value):
        return f"outer_loss is {estimate.value} at a finite point; check outer_loss and its data."
    if names := not_finite("", estimate.grad):
        return (
            f"the hypergradient is not finite at {named('outer', *names)} while both losses and the inner gradients "
            f"are finite; {_AT_ZERO} in a loss."
        )
    return None


def warn_if_steep(solver, record, capacity, before, data, rows) -> bool:
    """Whether a hypergradient of a chunk was so large that it was looked into; warns if it was for a steep update.

    Args, Warns:
      As for `refuse_failed`; SteepUpdateWarning, names the inner leaf.
    """
    norms = rows.get("hypergradient_norm", np.zeros(1))
    if not np.max(norms) > STEEP:
        return False
    at, state = int(np.argmax(norms > STEEP)), before
    if at:
        state = chunk(solver, record, capacity, before, data, at)[0]
    if names := steep_leaves(solver, state, data):
        warnings.warn(
            f"The hypergradient has norm {norms[at]:.2g}: the inner gradient of {', '.join(names)} is exactly 0 at the "
            "start but depends on outer, and there the optimizer's update has a slope of about 1 / eps; start training "
            "elsewhere, or give the optimizer a larger eps (as in optax.adam(rate, eps=1e-3)).",
            SteepUpdateWarning,
            stacklevel=3,
        )
    return True


def steep_leaves(solver: Any, state: Any, data: Any) -> list[str]:
    r"""Inner leaves whose first update, in the outer step taken from `state`, amplifies a change of `outer` enormously.

    Where a gradient entry is exactly 0 but its derivative by `outer` is not, Adam's update :math:`g / (|g| + \epsilon)`
    has the slope :math:`1 / \epsilon`: the derivative of the training that was run, and no direction to follow.
    """
    hypergradient = getattr(solver, "hypergradient", None)
    if isinstance(hypergradient, Unrolled | OneStep) and (asked := _asked(solver, state, data)):
        return _steep(hypergradient, *asked)
    return []


def _steep(hypergradient, problem, inner_state, outer, inner_batches, outer_batch, key) -> list[str]:
    keys = schedule(key, hypergradient.steps)
    state = hypergradient.resume(problem, inner_state, outer, keys)
    (params, rest), (moving, fixed) = problem.split(state.params), partition(outer)
    xs, bind = slots(inner_batches, hypergradient.steps)
    batch, inner_key = bind(jax.tree.map(lambda x: x[0], xs)), keys.inner[0]
    transform = optimizers.transformation(hypergradient.optimizer, outer)

    @jax.jit
    def amplified(moving, params, batch):
        def gradient(moving):
            seen = at_step(combine(moving, fixed), 0)
            loss = lambda params: problem.inner_value(combine(params, rest), seen, batch, inner_key)[0]  # noqa: E731
            value, grad = jax.value_and_grad(loss)(params)
            return grad, value

        leaves, structure = jax.tree.flatten(moving)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        direction = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        grad, slope, value = jax.jvp(gradient, (moving,), (structure.unflatten(direction),), has_aux=True)
        at_zero = jax.tree.map(lambda g, s: jnp.where(g == 0, s, jnp.zeros_like(s)), grad, slope)
        update = lambda grad: optimizers.update(transform, grad, state.opt_state, params, value)[0]  # noqa: E731
        moved = jax.jvp(update, (grad,), (at_zero,))[1]
        most = lambda x: jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)  # noqa: E731
        return jax.tree.map(lambda s, m: most(m) > STEEP * most(s), at_zero, moved)

    found = amplified(moving, params, batch)
    return [name for name, steep in zip(leaf_names(params, "inner"), jax.tree.leaves(found), strict=True) if steep]

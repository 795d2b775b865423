"""Why a step failed, found by replaying it: nothing of this runs unless something is not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import resolve, slots
from bilevel.differentiation import optimizers
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.query import Query, split_keys
from bilevel.problem.problem import Problem, inner_outcome, mutable_entries, split_inner
from bilevel.running.chunks import batches, step, wanted_batches
from bilevel.running.culprits import projection, steep_function
from bilevel.running.holes import holding_nan, named_leaves, newly, not_finite
from bilevel.running.replay import Instead, asked_for
from bilevel.running.steep import REMEDY, steep_leaves, why
from bilevel.sharding.processes import on_host
from bilevel.trees import PyTree, at_step, combine, global_norm, leaf_names, named

_AT_ZERO = "look for a root, norm, logarithm or division at 0"


def where_of(solver: Any, number: int) -> str:
    return f"{'Training' if hasattr(solver, 'trained') else 'Outer'} step {number}: "


def inner_of(state: Any) -> PyTree:
    return getattr(state.inner, "params", state.inner)


def describe_failure(
    solver: Any, state: Any, data: Any, number: int, norms: str, moved: str, metrics_at_fault: list[str]
) -> str:
    """Why outer step `number`, taken from the finite `state`, makes something that is not finite.

    Args:
      solver, state, data: as for a step.
      norms: how large the last finite metrics were.
      moved: what the move of `outer` before has to do with it, as `_moved` says.
      metrics_at_fault: names of the metrics, recorded ones among them, that are not finite.
    """
    where = where_of(solver, number)
    if weights := nan_weights(solver):
        return where + weights.strip()
    before = f"; before it {norms}" if norms else ""
    if said := _training(solver, state, data):
        return where + said.sentence(moved)
    if said := _losses(solver, state, data):
        return where + said._replace(what=said.what + before).sentence(moved)
    kept: list[Any] = []
    listening = solver
    if hasattr(solver, "hypergradient"):
        hypergradient = solver.hypergradient

        def recorded(*args):
            kept.append(hypergradient.estimate(*args))
            return kept[-1]

        listening = dataclasses.replace(solver, hypergradient=Instead(hypergradient, recorded))
    new, metrics = step(listening, state, data)
    for estimate in kept:
        if said := _estimate(estimate, steep_leaves(solver, state, data), lambda: steep_function(solver, state, data)):
            return where + said.sentence(moved)
    names = [name for name, value in metrics.items() if not np.isfinite(on_host(value)).all()]
    by_record = [name for name in metrics_at_fault if name not in metrics]
    leaves = newly("outer", state.outer, new.outer) + newly("inner", inner_of(state), inner_of(new))
    leaves = leaves or newly("state", state, new)
    if by_record and not names and not leaves:
        return where + (
            f"record returned {', '.join(by_record)} not finite, while all metrics are finite and nothing in the state "
            f"it was given has become infinite or NaN{_masked(state)}."
        )
    if not names and (said := projection(solver, state, data, leaves)):
        return where + said
    if not names:
        mover = "the outer optimizer" if kept else "the update"
        return where + (
            f"{mover} made {', '.join(leaves) or 'a part of the state'} not finite while losses and hypergradient are "
            f"finite{before}: lower the step sizes, and check that they are finite."
        )
    found = ", ".join(leaves) or "no leaf of the state"
    return where + (
        f"{', '.join(names)} is not finite (not finite after the step: {found}{before})"
        f"{moved or '; lower the step sizes'}."
    )


def _masked(state: Any) -> str:
    """Where infinities that were there from the start are, which `record` may have handed on; what to look for."""
    names = not_finite("state.outer", state.outer) + not_finite("state.inner", inner_of(state))
    if names:
        return f": {', '.join(names)} holds an infinity from the start, which record has to leave out"
    return ": look for a root, logarithm or division at 0 in record"


def nan_weights(solver: Any) -> str:
    """A sentence on NaN among the arrays that are bound to the losses; empty if there is none."""
    for loss in ("inner_loss", "outer_loss"):
        if names := holding_nan(loss, getattr(solver.problem, loss)):
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


class _Said(NamedTuple):
    """What is not finite, and what to do about it, which holds beside the move of `outer` or else where none did it."""

    what: str
    remedy: str
    beside: bool = False

    def sentence(self, moved: str) -> str:
        return self.what + (self.remedy + moved if self.beside else moved or self.remedy) + "."


class _Looked(NamedTuple):
    """A loss at a finite point: its value and gradient, and what to say if one of them is not finite."""

    value: jax.Array
    grad: PyTree
    said: _Said | None


def _range(tree: PyTree) -> str:
    """That infinite numbers of `tree` are of a type too short for them; empty where they are not."""
    infinite = {x.dtype for _, x in named_leaves("", tree) if np.isinf(on_host(x)).any()}
    short = any(float(jnp.finfo(dtype).max) < 1e5 for dtype in infinite)
    return " (float16 holds no number above 65504: compute in float32)" if short else ""


def _origin(name: str, value: jax.Array, batch: PyTree, fresh: bool) -> str:
    """Where to look for what makes the loss `name` not finite; `fresh` says that no step was taken before it.

    An index that is out of range, of a label too, gives NaN in JAX, and no error.
    """
    numbers = [
        leaf
        for leaf, x in zip(leaf_names(batch, "the batch"), jax.tree.leaves(batch), strict=True)
        if jnp.issubdtype(jnp.result_type(x), jnp.integer) and jnp.ndim(x)
    ]
    index = f", or for an index or a label out of range, as {' or '.join(numbers[:3])} may hold" if numbers else ""
    rate = "" if fresh else "lower the step size if training diverges, and "
    return f": {rate}{_AT_ZERO} in {name}{index if np.isnan(value) else ''}"


def _look(name: str, problem: Problem, params: PyTree, outer: PyTree, batch: PyTree, key: Any, when="", fresh=False):
    moving, rest = split_inner(problem, params)
    value, grad = _evaluated(name, problem, moving, rest, outer, batch, key)
    leaves, said = ", ".join(not_finite("inner", grad)), None
    if not np.isfinite(value):
        at = f" (its gradient not finite at {leaves})" if leaves else ""
        what = f"{name} is {value}{when} at a finite point{at}{_range(value)}"
        rows = resolve(batch)
        if found := not_finite("the batch", rows):
            said = _Said(f"{what}; {', '.join(found)} holds values that are not finite", ": check the data")
        else:
            said = _Said(what, _origin(name, value, rows, fresh))
    elif leaves:
        said = _Said(
            f"the gradient of {name} is not finite{when} at {leaves} while {name} is {value:.3g}{_range(grad)}",
            f": {_AT_ZERO} in {name} (the derivative of a norm at 0 is NaN, that of its square is not)",
            beside=True,
        )
    return _Looked(value, grad, said)


def _training(solver: Any, state: Any, data: Any) -> _Said | None:
    """The first inner step that fails, of an estimator that trains by an optimizer."""
    asked, alone = asked_for(solver, state, data), getattr(solver, "trained", None)
    estimator = getattr(solver, "hypergradient", alone)
    if not isinstance(estimator, Trained):
        return None
    if asked is None:
        inner, _ = batches(solver, state, data)
        asked = solver.problem, state.inner, state.outer, inner, None, jax.random.split(state.key)[1]
    problem, inner_state, outer, inner_batches, outer_batch, key = asked
    keys, warm = split_keys(key, estimator.steps), inner_state
    inner_state = estimator.resume(Query(problem, estimator.steps, inner_state, outer, inner_batches, None, keys))
    xs, bind = slots(inner_batches, estimator.steps)
    transform = optimizers.transformation(estimator.optimizer, outer)
    change = jax.jit(lambda *args: optimizers.update(transform, *args))
    params, opt_state = inner_state.params, inner_state.opt_state
    at_inner = lambda t: "" if alone else f" at inner step {t}"  # noqa: E731
    for t in range(estimator.steps):
        batch, seen = bind(jax.tree.map(lambda x: x[t], xs)), at_step(outer, t)  # noqa: B023
        fresh = t == 0 and (warm is None or int(state.step) == 0)
        looked = _look("inner_loss", problem, params, seen, batch, keys.inner[t], at_inner(t), fresh)
        if looked.said:
            began = not_finite("inner", params) if t == 0 and warm is None else []
            return _began(began) if began else looked.said
        moving, rest = split_inner(problem, params)
        updates, new_state = change(looked.grad, opt_state, moving, looked.value)
        moving = optimizers.apply(moving, updates)
        finite = f"{at_inner(t)}, where inner_loss is {looked.value:.3g} and its gradient is finite"
        rate = ": lower the inner learning rate, and check that it is finite"
        if found := not_finite("inner", moving):
            return _Said(f"the inner optimizer made {', '.join(found)} not finite{finite}{_range(moving)}", rate)
        # Before the state of the run itself, which would be blamed on whoever moves last.
        if found := newly("state.inner.opt_state", opt_state, new_state):
            return _Said(f"the update made {', '.join(found)} of the inner optimizer not finite{finite}", rate)
        opt_state = new_state
        if problem.mutable:
            carried = inner_outcome(problem, params, seen, batch, keys.inner[t])[1]
            if found := newly("inner", mutable_entries(problem, params), carried):
                what = f"inner_loss returned the mutable {', '.join(found)} not finite{finite}"
                return _Said(what, f": {_AT_ZERO} in what it computes of them")
            rest = rest | carried
        params = combine(moving, rest)
    if alone is not None:
        return None
    return _look("outer_loss", problem, params, at_step(outer, estimator.steps), outer_batch, keys.outer).said


def _began(leaves: list[str]) -> _Said:
    """What to say of a start that is not finite."""
    what = f"init_inner returned {', '.join(leaves)} not finite"
    return _Said(what, f": {_AT_ZERO} in init_inner", beside=True)


def _losses(solver: Any, state: Any, data: Any) -> _Said | None:
    """A loss that is not finite where a solver without an estimator begins its step."""
    if hasattr(solver, "hypergradient") or hasattr(solver, "trained"):
        return None
    wanted = wanted_batches(solver)
    for name, given, count in zip(("inner_loss", "outer_loss"), batches(solver, state, data), wanted, strict=True):
        xs, bind = slots(given, count) if name == "inner_loss" or count > 1 else (None, lambda x: given)  # noqa: B023
        for t in range(count):
            batch = bind(jax.tree.map(lambda x: x[t], xs))  # noqa: B023
            at = inner_of(state), at_step(state.outer, t), batch, state.key
            if said := _look(name, solver.problem, *at, fresh=int(state.step) == 0).said:
                return said
    return None


def _estimate(estimate: Any, steep: list[str], where: Callable[[], str]) -> _Said | None:
    """What in an `Estimate` is not finite; None if all is.

    Args:
      steep: leaves of which `bilevel.running.steep` tells.
      where: in which function a derivative that is not finite is.
    """
    losses = np.asarray(estimate.aux.info.get("inner_loss", ()))
    remedy = "; lower the inner learning rate, or check the data for values that are not finite"
    if not np.isfinite(losses).all():
        t = int(np.argmin(np.isfinite(losses.reshape(len(losses), -1)).all(1)))
        leaves = ", ".join(not_finite("inner", estimate.inner_state.params)) or "no leaf of the trained parameters"
        return _Said(f"inner_loss is {losses[t]} at inner step {t} (then not finite: {leaves})", remedy)
    if names := not_finite("inner", estimate.inner_state.params):
        return _Said(f"the inner update made {', '.join(names)} not finite", remedy)
    if not np.isfinite(estimate.value):
        return _Said(f"outer_loss is {estimate.value} at a finite point", "; check outer_loss and its data")
    finite = "while both losses and the inner gradients are finite"
    grads = [x for _, x in named_leaves("", estimate.grad)]
    names = not_finite("", estimate.grad)
    if steep and not (names or np.isfinite(np.asarray(global_norm(grads)))):
        return _Said(f"the hypergradient is too large for its norm to be finite: {why(steep)}", f"; {REMEDY}")
    if names and steep:
        largest = min(float(jnp.finfo(x.dtype).max) for x in grads + jax.tree.leaves(estimate.inner_state.params))
        what = f"the hypergradient is not finite at {named('outer', *names)} {finite}: {why(steep)}, which grows beyond"
        return _Said(f"{what} {largest:.5g}, the largest number of its type", f"; {REMEDY}, or compute in float32")
    if names:
        what = f"the hypergradient is not finite at {named('outer', *names)} {finite}{_range(estimate.grad)}"
        return _Said(what, f"; {_AT_ZERO} in {where()}")
    if names := not_finite("state.inner.extra", estimate.inner_state.extra):
        return _Said(
            f"what the estimator carries on, {', '.join(names)}, is not finite {finite}",
            "; raise damping, or use another linear solver",
        )
    return None

"""What a traced loss hands on beside its value: whether it is what was given, and whether its derivative is whole."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.differentiation.tracing import (
    called,
    fresh,
    is_cut,
    is_dropped,
    is_literal,
    is_loud,
    jaxprs,
    kept_for,
    operation,
    scan_counts,
    silent,
    used,
    while_counts,
)

_CALLS = ("jit", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
_BODIES = ("jaxpr", "call_jaxpr", "branches", "cond_jaxpr", "body_jaxpr")
_EDITED = ("jit", "checkpoint", "closed_call", "shard_map", "scan", "cond", "while")
_IDENTITIES = ("copy", "stop_gradient", "name", "sharding_constraint", "optimization_barrier")
_RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
_Origin = tuple[int, tuple[Any, ...]]
"""The number of an input, and how it is laid out: shapes and orders of axes, one after another."""


def handed_on(closed: Any) -> list[int | None]:
    """For each output of a closed jaxpr, the number of the input that it certainly is; None if it may be anything else.

    An input is followed through functions that are called, loops, branches that all hand on the same, and through being
    laid out in another way and back. All else is taken to be new: arithmetic, numbers, what was made from elsewhere.
    """
    found = [_origin(_producers(closed.jaxpr), closed.jaxpr, var) for var in closed.jaxpr.outvars]
    shapes = [var.aval.shape if hasattr(var.aval, "shape") else () for var in closed.jaxpr.invars]
    return [None if x is None or _in_short(x[1], shapes[x[0]]) else x[0] for x in found]


def _producers(jaxpr: Any) -> dict[Any, Any]:
    """What each variable of a jaxpr comes from: the number of an input, or an operation."""
    found: dict[Any, Any] = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    return found | {var: number for number, var in enumerate(jaxpr.invars)}


def _origin(producers: dict[Any, Any], jaxpr: Any, var: Any) -> _Origin | None:
    eqn = None if is_literal(var) else producers.get(var)
    if eqn is None or isinstance(eqn, int):
        return None if eqn is None else (eqn, ())
    at, name = eqn.outvars.index(var), operation(eqn)
    step = _layout(eqn, name, at)
    if step is not None:
        found = _origin(producers, jaxpr, eqn.invars[at])
        return None if found is None else (found[0], found[1] + step)
    inside = _through(eqn, name, at)
    if inside is None:
        return None
    found = _origin(producers, jaxpr, eqn.invars[inside[0]])
    return None if found is None else (found[0], found[1] + inside[1])


def _layout(eqn: Any, name: str, at: int) -> tuple[Any, ...] | None:
    """How an operation lays out its input; None for one that does anything else with it."""
    if name in _IDENTITIES:
        return ()
    if at >= len(eqn.invars):
        return None
    before, after = eqn.invars[at].aval, eqn.outvars[at].aval
    if name == "convert_element_type" and before.dtype == after.dtype:
        return ()
    if name == "transpose":
        order = tuple(eqn.params["permutation"])
        long = [axis for axis in order if before.shape[axis] != 1]
        return (("shape", tuple(after.shape)),) if long == sorted(long) else (("order", order),)
    if name in _RESHAPES and math.prod(before.shape) == math.prod(after.shape):
        return (("shape", tuple(after.shape)),) if eqn.params.get("dimensions") is None or name != "reshape" else None
    return None


def _through(eqn: Any, name: str, at: int) -> _Origin | None:
    """Which input of a call, a loop or a branch its output `at` is."""
    within = lambda body: _origin(_producers(body), body, body.outvars[at])  # noqa: E731
    if name == "cond":
        found = {within(branch.jaxpr) for branch in eqn.params["branches"]}
        one = found.pop()
        return None if found or one is None else (one[0] + 1, one[1])
    if name == "while":
        first = sum(while_counts(eqn))
        found = within(eqn.params["body_jaxpr"].jaxpr)
        number = while_counts(eqn)[1] + at
        return (first + at, ()) if found is not None and found == (number, ()) else None
    if name not in (*_CALLS, "scan"):
        return None
    body = called(eqn).jaxpr
    found = within(body)
    if name != "scan" or found is None:
        return found
    consts, carry = scan_counts(eqn)
    number, steps = found
    if at < carry:  # it has to come back as it was, from the same place
        is_kept = number == consts + at and not _in_short(steps, body.invars[number].aval.shape)
        return (number, ()) if is_kept else None
    if number < consts + carry:
        return None
    length = eqn.outvars[at].aval.shape[0]
    stacked = [(kind, (length, *x) if kind == "shape" else (0, *(axis + 1 for axis in x))) for kind, x in steps]
    return number, tuple(stacked)


def _in_short(steps: tuple[Any, ...], shape: tuple[int, ...]) -> list[Any]:
    """The same steps from `shape` without those that undo each other: none if the array is laid out as before."""
    short: list[Any] = []  # each with the shape before it
    for kind, x in steps:
        if short and short[-1][0] == kind:
            _, last, shape = short.pop()
            x = tuple(last[axis] for axis in x) if kind == "order" else x
        if x != (tuple(range(len(shape))) if kind == "order" else shape):
            short.append((kind, x, shape))
            shape = tuple(shape[axis] for axis in x) if kind == "order" else x
    return short


def undetached(closed: Any, honoured: list[bool]) -> Any:
    """A closed jaxpr that no `stop_gradient` cuts off from a part of the derivative of a training.

    The honoured output is a loss: what it hides from itself stays hidden from its gradient, for one derivative alone.
    That gradient depends on what was cut off as on anything else, as differences of whole trainings show. What is
    carried on has all of its derivative; where it is computed from a cut of the loss, it is from a copy without it.
    What cannot be edited is left as it is: `hidden_in` says where that matters.
    """
    edited = closed.replace(jaxpr=_walked(closed.jaxpr, honoured, _kept, _taken_out))
    if not _holds_a_cut(edited.jaxpr):
        return edited
    once = _walked(edited.jaxpr, honoured, _for_one_derivative, _kept)
    if _holds_a_cut(kept_for(silent(edited).jaxpr, [not x for x in honoured])):
        once = _copied(edited.jaxpr, once, honoured)
    return edited.replace(jaxpr=once)


def read_by_cuts(closed: Any) -> list[bool]:
    """For each input of a closed jaxpr, whether what a cut hides may be computed from it; all of them where a cut is
    inside of a function or a loop."""
    jaxpr = silent(closed).jaxpr
    if not _holds_a_cut(jaxpr):
        return [False] * len(jaxpr.invars)
    if any(any(map(_holds_a_cut, jaxprs(eqn.params))) for eqn in jaxpr.eqns):
        return [True] * len(jaxpr.invars)
    hidden = [eqn.invars[0] for eqn in jaxpr.eqns if is_cut(eqn) and not is_literal(eqn.invars[0])]
    return used(jaxpr.replace(outvars=hidden), [True] * len(hidden))


def hidden_in(closed: Any, output: int) -> str | None:
    """The name of an operation, from which this output is computed, that holds a `stop_gradient` and cannot be edited.

    Such are functions with a derivative of their own. None if there is none.
    """
    return _sealed(kept_for(silent(closed).jaxpr, [i == output for i in range(len(closed.jaxpr.outvars))]))


def _sealed(jaxpr: Any, around: str | None = None) -> str | None:
    for eqn in jaxpr.eqns:
        name = operation(eqn)
        if is_cut(eqn) and around:
            return around
        within = around or (None if name in _EDITED else name)
        if found := next(filter(None, (_sealed(inner, within) for inner in jaxprs(eqn.params))), None):
            return found
    return None


def _holds_a_cut(jaxpr: Any) -> bool:
    within = (inner for eqn in jaxpr.eqns for inner in jaxprs(eqn.params))
    return any(map(is_cut, jaxpr.eqns)) or any(map(_holds_a_cut, within))


def _copied(jaxpr: Any, own: Any, honoured: list[bool]) -> Any:
    """The program `own` of the outputs that are honoured, and of the others that of `jaxpr` without its cuts.

    Both have the same operations but for their cuts, which are computed once where no cut leads to them.
    """
    same: dict[Any, Any] = {}
    eqns = []
    for eqn, of_own in zip(jaxpr.eqns, own.eqns, strict=True):
        eqns.append(of_own)
        name, atoms = operation(eqn), [_renamed(atom, same) for atom in eqn.invars]
        if is_cut(eqn):
            same[eqn.outvars[0]] = atoms[0]
            continue
        bare = _bare(eqn) if name in _EDITED and any(map(_holds_a_cut, jaxprs(eqn.params))) else eqn
        is_as_before = bare is eqn and all(x is y for x, y in zip(atoms, eqn.invars, strict=True))
        if is_as_before or (eqn.effects and name not in _EDITED):
            continue
        outs = [var if is_dropped(var) else fresh(var) for var in eqn.outvars]
        eqns.append(bare.replace(invars=atoms, outvars=outs))
        same.update(zip(eqn.outvars, outs, strict=True))
    outvars = [x if is_own else _renamed(x, same) for x, is_own in zip(jaxpr.outvars, honoured, strict=True)]
    return kept_for(jaxpr.replace(eqns=eqns, outvars=outvars), [True] * len(outvars))


def _renamed(atom: Any, same: dict[Any, Any]) -> Any:
    return atom if is_literal(atom) else same.get(atom, atom)


def _kept(eqn: Any) -> Any:
    return eqn


def _taken_out(eqn: Any) -> Any:
    return eqn if is_literal(eqn.invars[0]) else None


def _for_one_derivative(eqn: Any) -> Any:
    """A cut for the innermost derivative alone, in place of one for all."""
    aval = eqn.invars[0].aval
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return eqn
    one = jax.make_jaxpr(stop_gradient_once)(jax.ShapeDtypeStruct(aval.shape, aval.dtype)).eqns[0]
    return one.replace(invars=eqn.invars, outvars=eqn.outvars)


@jax.custom_jvp
def stop_gradient_once(x: Any) -> Any:
    """`stop_gradient` for the innermost derivative alone: those of that derivative see through it."""
    return x


@stop_gradient_once.defjvp
def _(primals, tangents):
    # Zeros that JAX does not know to be zeros: what they go into is still reached by this derivative.
    return primals[0], _nothing_of(tangents[0])


def _nothing_of(tangent: Any) -> Any:
    return jnp.where(jnp.zeros((), bool), tangent, jnp.zeros_like(tangent))


@jax.custom_jvp
def beside(x: Any, variables: Any) -> Any:
    """`x`, for which JAX computes a derivative, of zeros, wherever one is taken with respect to `variables`.

    The innermost derivative of a `stop_gradient_once` is the innermost one that reaches it. A cut behind which nothing
    depends on the variables of a loss is not reached by its gradient, and would hide from the next derivative what it
    is to hide from the gradient alone: what it hides has to be computed from inputs that went through here.
    """
    del variables
    return x


@beside.defjvp
def _(primals, tangents):
    tangent, of_variables = tangents
    reached = [_nothing_of(jnp.sum(jnp.real(x))).astype(tangent.dtype) for x in jax.tree.leaves(of_variables)]
    return primals[0], sum(reached, tangent)


def _walked(jaxpr: Any, wanted: list[bool], if_read: Any, if_not: Any, *, is_copy: bool = False) -> Any:
    """`jaxpr` with another operation, or none, for each cut, by whether a wanted output is computed from it.

    A copy prints nothing again.
    """
    live = {var for var, is_live in zip(jaxpr.outvars, wanted, strict=True) if is_live and not is_literal(var)}
    eqns: list[tuple[Any, Any]] = []
    for eqn in reversed(jaxpr.eqns):
        outputs, inputs, new = [var in live for var in eqn.outvars], None, eqn
        if is_copy and is_loud(eqn):
            continue
        if operation(eqn) in _EDITED:
            outputs, inputs = _reading(eqn, outputs)
            change = functools.partial(_walked, if_read=if_read, if_not=if_not, is_copy=is_copy)
            new = _inside(eqn, lambda body, x=outputs, change=change: change(body, x[: len(body.outvars)]))
        elif is_cut(eqn):
            new = (if_read if any(outputs) else if_not)(eqn)
        eqns.append((eqn, new))
        inputs = inputs or [any(outputs)] * len(eqn.invars)
        live.update(var for var, is_live in zip(eqn.invars, inputs, strict=True) if is_live and not is_literal(var))
    same: dict[Any, Any] = {}
    left = []
    for eqn, new in reversed(eqns):
        if new is None:
            same[eqn.outvars[0]] = _renamed(eqn.invars[0], same)
        else:
            left.append(new.replace(invars=[_renamed(atom, same) for atom in new.invars]))
    return jaxpr.replace(eqns=left, outvars=[_renamed(atom, same) for atom in jaxpr.outvars])


def _bare(eqn: Any) -> Any:
    """The operation without any cut inside."""
    without = lambda body: _walked(body, [False] * len(body.outvars), _taken_out, _taken_out, is_copy=True)  # noqa: E731
    return _inside(eqn, without)


def _inside(eqn: Any, change: Any) -> Any:
    """The operation with all that it calls changed."""

    def changed(held):
        if isinstance(held, tuple | list):
            return type(held)(map(changed, held))
        body = getattr(held, "jaxpr", held)
        return held.replace(jaxpr=change(body)) if held is not body else change(body)

    return eqn.replace(params={k: changed(v) if k in _BODIES else v for k, v in eqn.params.items()})


def _reading(eqn: Any, outputs: list[bool]) -> tuple[list[bool], list[bool]]:
    """Which outputs of a body those that are wanted are computed from, in a loop; and from which inputs."""
    name = operation(eqn)
    if name == "while":
        return [any(outputs)] * len(outputs), [any(outputs)] * len(eqn.invars)
    if name == "cond":
        rows = [used(branch.jaxpr, outputs) for branch in eqn.params["branches"]]
        return outputs, [any(outputs), *map(any, zip(*rows, strict=True))]
    body = called(eqn).jaxpr
    inputs = used(body, outputs)
    if name == "scan":  # what is carried comes back as an input
        consts, carry = scan_counts(eqn)
        while any(extra := [x and not y for x, y in zip(inputs[consts : consts + carry], outputs, strict=False)]):
            outputs = [x or y for x, y in zip(outputs, extra, strict=False)] + outputs[carry:]
            inputs = used(body, outputs)
    return outputs, inputs

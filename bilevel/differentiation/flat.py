"""Where an influence meets an operation whose derivative is 0 everywhere (round, floor, sign, a comparison).

Such an influence is there and no derivative shows it: of that a user is told by the operation's name. Decided from the
trace of a function, and never from values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.differentiation.tracing import bind, is_literal, jaxprs, operation, scan_counts, used, while_counts
from bilevel.trees import PyTree

PASSES = ""
"""A mark: a derivative goes through."""

Mark = str | None
"""Of a value in a program: None if it does not depend on the argument, `PASSES`, or the operation that ends it."""


def marks(function: Callable[[PyTree], PyTree], argument: PyTree) -> list[Mark]:
    """For each leaf of `argument`, all of them inexact, how what `function` returns depends on it."""
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    found = []
    for var in jaxpr.invars:
        outputs = _through(jaxpr, [PASSES if other is var else None for other in jaxpr.invars])
        found.append(_joined(outputs))
    return found


def reason(operation: str) -> str:
    """Why a leaf that meets `operation` has a hypergradient of 0, and what to do."""
    return (
        f"its way into what is trained and evaluated runs through {operation}, whose derivative is 0 everywhere: use a "
        "smooth function in its place, give it a derivative by jax.custom_jvp (a straight-through estimator), or use "
        "EvolutionStrategies, which needs none"
    )


def of_loss(operation: str) -> str:
    """Why whatever acts on training has a hypergradient of 0 where `outer_loss` reads inner through `operation`."""
    return (
        f"outer_loss reads inner through {operation} alone, whose derivative is 0 everywhere: use a smooth loss in its "
        "place (a cross-entropy for an accuracy), give it a derivative by jax.custom_jvp, or use EvolutionStrategies, "
        "which needs none"
    )


def _joined(found: Sequence[Mark]) -> Mark:
    """The mark of what is computed from values of these marks, by an operation with a derivative."""
    there = [mark for mark in found if mark is not None]
    return None if not there else PASSES if PASSES in there else there[0]


def _through(jaxpr: Any, inputs: list[Mark]) -> list[Mark]:
    """Computes the marks of the outputs of `jaxpr` from the marks of its inputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return None if is_literal(atom) else known.get(atom)

    for eqn in jaxpr.eqns:
        before = [read(atom) for atom in eqn.invars]
        if any(mark is not None for mark in before):
            known.update(zip(eqn.outvars, _outputs(eqn, before), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn: Any, before: list[Mark]) -> list[Mark]:
    name, inner = operation(eqn), list(jaxprs(eqn.params))
    if name == "scan":
        consts, carry = scan_counts(eqn)
        return _loop(inner[0], before, consts, carry)
    if name == "while":
        of_cond, of_body = while_counts(eqn)
        condition, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
        carried = _loop(body, before[of_cond:], of_body, len(eqn.outvars))
        ends = _joined(_through(condition, [*before[:of_cond], *carried]))
        return [_joined([mark, ends]) for mark in carried]
    if name == "cond":
        ways = [_through(branch, before[1:]) for branch in inner]
        return [_joined([*column, before[0]]) for column in zip(*ways, strict=True)]
    if name in ("jit", "checkpoint", "closed_call"):
        return _through(inner[0], before)
    after = _alone(eqn, before)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        # Its rule decides; where that gives 0, the function that it belongs to says why, or that nothing is read.
        plain = _through(inner[0], before)
        return [_ruled(mark, own) for mark, own in zip(after, plain, strict=True)]
    return after


def _ruled(mark: Mark, plain: Mark) -> Mark:
    """The mark of an output of a function with a rule: by the rule, and by the function itself."""
    if mark == PASSES or plain is None:
        return mark if mark == PASSES else None
    return plain or mark


def _loop(body: Any, before: list[Mark], consts: int, carry: int) -> list[Mark]:
    """The outputs of a loop: what it carries, of which `body` returns the next values first, and stacks."""
    while True:
        after = _through(body, before)
        carried = [_joined(both) for both in zip(before[consts : consts + carry], after, strict=False)]
        if carried == before[consts : consts + carry]:
            return [*carried, *after[carry:]]
        before = [*before[:consts], *carried, *before[consts + carry :]]


def _alone(eqn: Any, before: list[Mark]) -> list[Mark]:
    """The marks of the outputs of an operation, by the derivative that JAX has for it."""
    moving = [i for i, mark in enumerate(before) if mark == PASSES]
    if not moving:
        return [_joined(before)] * len(eqn.outvars)
    avals = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
    floats = [i for i, out in enumerate(eqn.outvars) if jnp.issubdtype(out.aval.dtype, jnp.inexact)]
    cotangents = [jax.ShapeDtypeStruct(eqn.outvars[i].aval.shape, eqn.outvars[i].aval.dtype) for i in floats]

    def pulled(cotangents, values):
        def function(leaves):
            given = dict(zip(moving, leaves, strict=True))
            outputs = bind(eqn, *(given.get(i, value) for i, value in enumerate(values)))
            return [outputs[i] for i in floats]

        return jax.vjp(function, [values[i] for i in moving])[1](cotangents)[0]

    try:
        program = jax.make_jaxpr(pulled)(cotangents, avals).jaxpr
        rows = [used(program, [j == i for j in range(len(moving))]) for i in range(len(moving))]
        passing = {i for at, i in enumerate(floats) if any(row[at] for row in rows)}
    except Exception:  # an operation that JAX cannot differentiate backwards: nothing is said of it
        passing = set(floats)
    return [PASSES if i in passing else _called(eqn, out) for i, out in enumerate(eqn.outvars)]


def _called(eqn: Any, out: Any) -> str:
    name = operation(eqn)
    if name == "convert_element_type":
        return f"a conversion to {out.aval.dtype}"
    if name in ("eq", "ne", "lt", "le", "gt", "ge"):
        return f"a comparison (`{name}`)"
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return "a function with a derivative of its own"
    return f"`{name}`"

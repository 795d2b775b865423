"""A traced computation by what it is made of: operations, numbers, captured arrays."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.differentiation.code import code_hash
from bilevel.differentiation.described import shortest
from bilevel.differentiation.tracing import is_jaxpr, is_literal, operation
from bilevel.trees import is_key


class Parts(NamedTuple):
    """A jaxpr in three parts: operations, as text without addresses, the numbers among them, and other constants."""

    operations: list[str]
    numbers: list[str]
    arrays: list[Any]


def parts(closed: Any) -> Parts:
    """The parts of a jaxpr with its constants; equal for two traces of the same computation."""
    found = Parts([], [], [])
    _walk(closed.jaxpr, *found)
    _add_constants(closed.consts, found.numbers, found.arrays)
    return found


def _add_constants(consts: list[Any], numbers: list[str], arrays: list[Any]) -> None:
    for value in consts:
        if np.ndim(value) == 0 and not is_key(value):
            numbers.append(shortest(value))
        else:
            arrays.append(value)


def _walk(jaxpr: Any, lines: list[str], numbers: list[str], arrays: list[Any]) -> None:
    names: dict[Any, int] = {}

    def name(atom: Any) -> str:
        if is_literal(atom):
            _add_constants([atom.val], numbers, arrays)
            return str(atom.aval)
        return f"{names.setdefault(atom, len(names))}:{atom.aval}"

    lines.append(f"in {[name(v) for v in (*jaxpr.constvars, *jaxpr.invars)]}")
    for eqn in jaxpr.eqns:
        lines.append(f"{operation(eqn)} {[name(v) for v in eqn.invars]} {[name(v) for v in eqn.outvars]}")
        for at in sorted(eqn.params):
            if at == "callback":  # a function of the host's
                lines.append(code_hash(eqn.params[at]))
            elif at != "name":
                lines.append(f"{at}=")
                _walk_parameter(eqn.params[at], lines, numbers, arrays)
    lines.append(f"out {[name(v) for v in jaxpr.outvars]}")


def _walk_parameter(value: Any, lines: list[str], numbers: list[str], arrays: list[Any]) -> None:
    if is_jaxpr(value):
        _add_constants(getattr(value, "consts", []), numbers, arrays)
        _walk(getattr(value, "jaxpr", value), lines, numbers, arrays)
    elif isinstance(value, dict):
        for at in sorted(value, key=str):
            lines.append(f"{at}:")
            _walk_parameter(value[at], lines, numbers, arrays)
    elif isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        for item in value:
            _walk_parameter(item, lines, numbers, arrays)
    elif isinstance(value, set | frozenset):
        lines.append(str(sorted(map(str, value))))
    elif isinstance(value, np.ndarray | jax.Array):
        _add_constants([value], numbers, arrays)
    elif isinstance(value, jax.sharding.Sharding):
        lines.append("None")  # where a result lies is no part of what it is: a run goes on on another mesh
    elif callable(value) and not isinstance(value, type):
        lines.append("function")  # a rule, whose results are elsewhere in the trace
    else:
        lines.append(re.sub(r" at 0x[0-9a-f]+", "", str(value)))

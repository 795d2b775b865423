"""Where the outputs of a traced program are known to be 0, whatever those of its inputs are of which nothing is known.

A value that is not 0 by what the trace says may still be 0 by its numbers; nothing here looks at numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.differentiation.tracing import (
    bind,
    called,
    detached,
    is_literal,
    operation,
    scan_counts,
    while_counts,
)

# An abstract value is a NumPy array or scalar that is known (`_Known`), a boolean array or scalar that says where the
# value is known to be 0, or None.


class _Known:
    """A value that does not depend on the arguments."""

    def __init__(self, value: Any):
        self.value = value


def _zero_of(value: Any) -> Any:
    if isinstance(value, _Known):
        return np.asarray(value.value) == 0
    return value


def zeros_of(closed: Any, inputs: list[Any], lost: set[str] | None = None) -> list[Any]:
    """Where the outputs of a closed jaxpr are known to be 0; None where nothing is known.

    The names of operations behind which a 0 may be lost, since nothing is known of them, are added to `lost`.
    """
    return [_zero_of(value) for value in _interpret(closed, inputs, set() if lost is None else lost)]


def _interpret(closed: Any, inputs: list[Any], lost: set[str]) -> list[Any]:
    jaxpr = detached(closed)
    known = [None if isinstance(c, Tracer) or not hasattr(c, "dtype") else _Known(c) for c in closed.consts]
    values: dict[Any, Any] = dict(zip(jaxpr.invars, [*known, *inputs], strict=True))

    def read(atom):
        return _Known(atom.val) if is_literal(atom) else values[atom]

    for eqn in jaxpr.eqns:
        outputs = _outputs(eqn, [read(atom) for atom in eqn.invars], lost)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn: Any, inputs: list[Any], lost: set[str]) -> list[Any]:
    name, unknown = operation(eqn), [None] * len(eqn.outvars)
    if name == "broadcast_in_dim":  # by hand: a constant of the size of the parameters is not made
        return [_broadcast(eqn, inputs[0])]
    if all(isinstance(x, _Known) for x in inputs) and (inputs or name == "iota") and not _is_random(eqn):
        try:
            with jax.ensure_compile_time_eval():
                return [_Known(np.asarray(out)) for out in bind(eqn, *(jnp.asarray(x.value) for x in inputs))]
        except Exception:  # an operation that cannot be done now is an operation whose result is not known
            return unknown
    if name in _CALLS:
        return _interpret(called(eqn), inputs, lost)
    if name == "cond":
        branches = [zeros_of(branch, inputs[1:], lost) for branch in eqn.params["branches"]]
        return [_both(list(zeros)) for zeros in zip(*branches, strict=True)]
    if name in ("scan", "while"):
        return (_scan if name == "scan" else _while)(eqn, inputs, lost)
    zeros = [_zero_of(x) for x in inputs]
    if name in _KEEPS_ZERO:
        return [zeros[0]]
    if name == "integer_pow":
        return [zeros[0] if eqn.params["y"] > 0 else None]
    if name == "sub" and eqn.invars[0] is eqn.invars[1]:
        return [np.bool_(True)]
    if name == "mul":
        return [_either(zeros)]
    if name in ("add", "sub", "add_any"):
        return [_both(zeros)]
    if name in ("max", "min"):
        return [_extreme(inputs, zeros, np.less_equal if name == "max" else np.greater_equal)]
    if name == "clamp":
        low, high = (x.value if isinstance(x, _Known) else np.nan for x in (inputs[0], inputs[2]))
        return [None if zeros[1] is None else zeros[1] & np.less_equal(low, 0) & np.greater_equal(high, 0)]
    if name == "select_n":
        return [_selected(inputs[0], zeros[1:])]
    if name in _SPREADS and any(z is not None and np.any(z) for z in zeros):
        spread = _spread(eqn, inputs, zeros)
        if spread is None:
            lost.add(name)
        return [spread]
    if name not in _NEVER_ZERO and any(z is not None and np.any(z) for z in zeros):
        lost.add(name)
    return unknown


_CALLS = ("jit", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
"""Operations that only evaluate the jaxpr which they hold."""

_KEEPS_ZERO = ("neg", "convert_element_type", "copy", "real", "conj", "stop_gradient", "sign", "abs", "div")
_KEEPS_ZERO += ("sqrt", "square", "cbrt", "tanh", "sin", "tan", "asinh", "atan", "expm1", "log1p", "floor", "ceil")
_KEEPS_ZERO += ("round", "imag", "sinh", "asin", "atanh", "erf", "erf_inv", "reduce_precision", "optimization_barrier")
"""Functions of their first argument that are 0 where it is."""

_SPREADS = ("reshape", "squeeze", "transpose", "expand_dims", "slice", "rev", "concatenate", "pad", "reduce_sum")
_SPREADS += ("dot_general", "conv_general_dilated", "cumsum", "reduce_max", "cummax", "gather", "dynamic_slice")
_SPREADS += ("scatter", "scatter-add", "dynamic_update_slice", "cumlogsumexp")
"""Operations that move, choose or add up products of their floating-point inputs."""

_NEVER_ZERO = ("exp", "exp2", "cos", "cosh", "logistic", "rsqrt", "log", "acos", "acosh", "eq", "ne", "lt", "le", "gt")
_NEVER_ZERO += ("ge", "is_finite", "pow", "erfc", "lgamma", "digamma", "not", "and", "or")
"""Operations whose result is no 0 because an input is one; truth values are looked at by what chooses with them."""


def _spread(eqn: Any, inputs: list[Any], zeros: list[Any]) -> Any:
    """Where an operation of `_SPREADS` is 0, found by doing it to what may not be 0: 1 there, and 0 elsewhere.

    Nothing cancels in a sum of products of numbers that are 0 or 1, so that it is 0 only if each product is.
    """
    arguments = []
    for value, zero, atom in zip(inputs, zeros, eqn.invars, strict=True):
        if jnp.issubdtype(atom.aval.dtype, jnp.inexact):
            maybe = np.broadcast_to(True if zero is None else np.logical_not(zero), atom.aval.shape)
            arguments.append(maybe.astype(atom.aval.dtype))
        elif isinstance(value, _Known):
            arguments.append(value.value)
        else:  # a place that is not known
            return None
    try:
        with jax.ensure_compile_time_eval():
            return np.asarray(bind(eqn, *map(jnp.asarray, arguments))[0]) == 0
    except Exception:  # as for an operation on constants
        return None


def _is_random(eqn: Any) -> bool:
    return operation(eqn).startswith("random_")


def _broadcast(eqn: Any, value: Any) -> Any:
    def spread(x):
        if np.ndim(x) == 0:
            return x if isinstance(x, np.bool_ | bool) else np.broadcast_to(x, eqn.params["shape"])
        shape = [1] * len(eqn.params["shape"])
        for axis, size in zip(eqn.params["broadcast_dimensions"], np.shape(x), strict=True):
            shape[axis] = size
        return np.broadcast_to(np.reshape(x, shape), eqn.params["shape"])

    if value is None:
        return None
    return _Known(spread(np.asarray(value.value))) if isinstance(value, _Known) else spread(value)


def _either(zeros: list[Any]) -> Any:
    known = [z for z in zeros if z is not None]
    return np.logical_or.reduce(np.broadcast_arrays(*known)) if known else None


def lasting(
    closed: Any, inputs: list[Any], first: int, output: int, count: int, lost: set[str] | None = None
) -> tuple[list[Any], list[Any]]:
    """What is 0 and stays so when a program is repeated that hands on some of its inputs.

    Args:
      closed: the program.
      inputs: what is known of its inputs before the first time, as for `zeros_of`.
      first, count: the first of the inputs that are handed on, and how many follow each other.
      output: the first of the outputs that take their place.
      lost: as for `zeros_of`.

    Returns:
      `(handed, zeros)`: where what is handed on is 0 for ever, and where the outputs are then.
    """
    handed = [_zero_of(x) for x in inputs[first : first + count]]
    while True:
        seen: set[str] = set()
        zeros = zeros_of(closed, [*inputs[:first], *handed, *inputs[first + count :]], seen)
        kept = [_where_both(a, z) for a, z in zip(handed, zeros[output : output + count], strict=True)]
        if all(_same(a, k) for a, k in zip(handed, kept, strict=True)):
            if lost is not None:
                lost |= seen
            return handed, zeros
        handed = kept


def _where_both(assumed: Any, found: Any) -> Any:
    """Where both analyses say that a value is 0; None where one of them knows nothing."""
    if assumed is None or found is None:
        return None
    both = np.logical_and(assumed, found)
    return both if np.any(both) else None


def _same(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or bool(np.all(a == b)))


def _scan(eqn: Any, inputs: list[Any], lost: set[str]) -> list[Any]:
    consts, carried = scan_counts(eqn)
    rows = [None if z is None else np.all(z, axis=0) if np.ndim(z) else z for z in map(_zero_of, inputs)]
    _, zeros = lasting(called(eqn), [*inputs[: consts + carried], *rows[consts + carried :]], consts, 0, carried, lost)
    begun = [_zero_of(x) for x in inputs[consts : consts + carried]]
    zeros = [*map(_where_both, begun, zeros[:carried]), *zeros[carried:]]
    shapes = [out.aval.shape for out in eqn.outvars]
    return [None if z is None else np.broadcast_to(z, shape) for z, shape in zip(zeros, shapes, strict=True)]


def _while(eqn: Any, inputs: list[Any], lost: set[str]) -> list[Any]:
    of_condition, consts = while_counts(eqn)
    inputs = inputs[of_condition:]
    return lasting(eqn.params["body_jaxpr"], inputs, consts, 0, len(inputs) - consts, lost)[0]


def _both(zeros: list[Any]) -> Any:
    return None if any(z is None for z in zeros) else np.logical_and.reduce(np.broadcast_arrays(*zeros))


def _extreme(inputs: list[Any], zeros: list[Any], passes: Any) -> Any:
    """Of the larger or smaller of two: 0 where both are, and where one is and the other is known to lose or to be 0."""
    found = [_both(zeros)]
    for zero, other in zip(zeros, inputs[::-1], strict=True):
        if zero is not None and isinstance(other, _Known):
            found.append(np.logical_and(zero, passes(other.value, 0)))
    return _either(found)


def _selected(which: Any, zeros: list[Any]) -> Any:
    if isinstance(which, _Known):
        masks = [np.zeros((), bool) if z is None else z for z in zeros]
        choose = np.asarray(which.value).astype(int)
        *masks, choose = np.broadcast_arrays(*masks, choose)
        return np.choose(choose, masks)
    return _both(zeros)

"""Which lower precision a traced program rounds what it computes from one of its inputs to."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.tracing import is_literal, jaxprs, kept_for, operation, scan_counts, while_counts


def lowered(jaxpr: Any, given: int) -> str | None:
    """The coarsest dtype that what is computed from the input number `given` of a program is cast down to, or None."""
    kept = kept_for(jaxpr, [True] * len(jaxpr.outvars))
    casts: set[Any] = set()
    _through(kept, [i == given for i in range(len(kept.invars))], casts)
    return str(max(casts, key=lambda dtype: jnp.finfo(dtype).eps)) if casts else None


def _through(jaxpr: Any, inputs: list[bool], casts: set[Any]) -> list[bool]:
    """Which outputs of a program are computed from the `inputs`; adds the dtypes that those are cast down to."""
    reached = {var for var, is_reached in zip(jaxpr.invars, inputs, strict=True) if is_reached}

    def is_reached(atom):
        return not is_literal(atom) and atom in reached

    for eqn in jaxpr.eqns:
        before = [is_reached(atom) for atom in eqn.invars]
        if any(before):
            after = _outputs(eqn, before, casts)
            reached.update(var for var, does in zip(eqn.outvars, after, strict=True) if does)
    return [is_reached(atom) for atom in jaxpr.outvars]


def _outputs(eqn: Any, before: list[bool], casts: set[Any]) -> list[bool]:
    name, inner = operation(eqn), list(jaxprs(eqn.params))
    if name == "scan":
        consts, carry = scan_counts(eqn)
        return _loop(inner[0], before, consts, carry, casts)
    if name == "while":
        of_cond, of_body = while_counts(eqn)
        return _loop(eqn.params["body_jaxpr"].jaxpr, before[of_cond:], of_body, len(eqn.outvars), casts)
    if name == "cond":
        ways = [_through(branch, before[1:], casts) for branch in inner]
        return [before[0] or any(column) for column in zip(*ways, strict=True)]
    if inner and len(inner[0].invars) == len(before) and len(inner[0].outvars) == len(eqn.outvars):
        return _through(inner[0], before, casts)
    for jaxpr in inner:  # of a kind that is not known: whatever it holds is reached
        _through(jaxpr, [True] * len(jaxpr.invars), casts)
    if not inner:
        widest = [_eps(atom.aval) for atom, does in zip(eqn.invars, before, strict=True) if does]
        finest = min((eps for eps in widest if eps), default=np.inf)
        casts.update(out.aval.dtype for out in eqn.outvars if _eps(out.aval) > finest)
        if name == "reduce_precision":
            casts.update(_reduced(eqn.params["mantissa_bits"], finest))
    return [True] * len(eqn.outvars)


def _loop(body: Any, before: list[bool], consts: int, carry: int, casts: set[Any]) -> list[bool]:
    while True:
        after = _through(body, before, casts)
        now = before[consts : consts + carry]
        carried = [a or b for a, b in zip(now, after, strict=False)]
        if carried == now:
            return [*carried, *after[carry:]]
        before = [*before[:consts], *carried, *before[consts + carry :]]


def _eps(aval: Any) -> float:
    dtype = getattr(aval, "dtype", None)
    return float(jnp.finfo(dtype).eps) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _reduced(bits: int, finest: float) -> list[Any]:
    """The dtype that holds no more than so many bits of a mantissa."""
    kept = [dtype for dtype in (jnp.bfloat16, jnp.float16, jnp.float32) if jnp.finfo(dtype).nmant >= bits]
    return [jnp.dtype(kept[0])] if kept and 2.0**-bits > finest else []

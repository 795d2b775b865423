"""What a traced loss hands on beside its value: whether it is new, and whether its derivative is whole."""

from __future__ import annotations

from typing import Any

from bilevel.differentiation.tracing import called, is_literal, jaxprs, operation, scan_counts, used

_COMPUTED = object()
_CALLS = ("jit", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
_EDITED = ("jit", "checkpoint", "closed_call", "scan")
_LAYOUT = ("copy", "transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "sharding_constraint")


def computed(closed: Any) -> list[bool]:
    """For each output of a closed jaxpr, whether it is known to be new numbers.

    It is not where an input is handed on as it is, through functions that are called and loops, or is laid out anew.
    """
    return [_origin(closed.jaxpr, var) is _COMPUTED for var in closed.jaxpr.outvars]


def _origin(jaxpr: Any, var: Any) -> Any:
    """The number of the input that a variable of `jaxpr` is; `_COMPUTED` if it is new, None if that is not known."""
    if is_literal(var):
        return _COMPUTED
    if var in jaxpr.invars:
        return jaxpr.invars.index(var)
    eqn = next((eqn for eqn in jaxpr.eqns if var in eqn.outvars), None)
    if eqn is None or operation(eqn) in _LAYOUT:
        return None
    at, name = eqn.outvars.index(var), operation(eqn)
    if name not in (*_CALLS, "scan"):
        return None if any(jaxprs(eqn.params)) else _COMPUTED
    body = called(eqn).jaxpr
    found = _origin(body, body.outvars[at])
    if found is None or found is _COMPUTED:
        return found
    if name == "scan":
        consts, carry = scan_counts(eqn)
        if found != consts + at if at < carry else found < consts + carry:
            return None
    return _origin(jaxpr, eqn.invars[found])


def undetached(closed: Any, honoured: list[bool]) -> Any:
    """A closed jaxpr without its `stop_gradient`s, but for those from which an output that is `honoured` is computed.

    So what a loss hides from itself stays hidden, and what it carries on, and merely cut off from its derivative on the
    way out, has all of that. Not looked into are branches, while loops, and functions with a derivative of their own.
    """
    return closed.replace(jaxpr=_undetached(closed.jaxpr, honoured))


def _undetached(jaxpr: Any, honoured: list[bool]) -> Any:
    live = {var for var, is_live in zip(jaxpr.outvars, honoured, strict=True) if is_live and not is_literal(var)}
    eqns: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        outputs, name = [var in live for var in eqn.outvars], operation(eqn)
        inputs = [any(outputs)] * len(eqn.invars)
        if name in _EDITED:
            eqn, inputs = _edited(eqn, outputs)
        if name != "stop_gradient" or any(outputs) or is_literal(eqn.invars[0]):
            eqns.append(eqn)
        else:
            eqns.append((eqn.outvars[0], eqn.invars[0]))
        live.update(var for var, is_live in zip(eqn.invars, inputs, strict=True) if is_live and not is_literal(var))
    same: dict[Any, Any] = {}
    kept = []
    renamed = lambda atom: atom if is_literal(atom) else same.get(atom, atom)  # noqa: E731
    for eqn in reversed(eqns):
        if isinstance(eqn, tuple):
            same[eqn[0]] = renamed(eqn[1])
        else:
            kept.append(eqn.replace(invars=[renamed(atom) for atom in eqn.invars]))
    return jaxpr.replace(eqns=kept, outvars=[renamed(atom) for atom in jaxpr.outvars])


def _edited(eqn: Any, outputs: list[bool]) -> tuple[Any, list[bool]]:
    """The operation with its body edited, and which of its inputs the outputs that are honoured are computed from."""
    name = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
    held = eqn.params[name]
    body = getattr(held, "jaxpr", held)
    inputs = used(body, outputs)
    if operation(eqn) == "scan":  # what is carried comes back as an input
        consts, carry = scan_counts(eqn)
        while any(extra := [x and not y for x, y in zip(inputs[consts : consts + carry], outputs, strict=False)]):
            outputs = [x or y for x, y in zip(outputs, extra, strict=False)] + outputs[carry:]
            inputs = used(body, outputs)
    new = _undetached(body, outputs)
    return eqn.replace(params=eqn.params | {name: held.replace(jaxpr=new) if held is not body else new}), inputs

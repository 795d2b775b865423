"""What a run is of, as text by name: two runs with the same fingerprint may share checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bilevel.differentiation.code import code_hash
from bilevel.differentiation.computation import parts
from bilevel.differentiation.custom_rules import RULES
from bilevel.differentiation.described import described
from bilevel.differentiation.tracing import evaluate_closed, jaxprs, operation
from bilevel.problem.problem import Problem
from bilevel.running.feeds import Feed
from bilevel.running.programs import programs
from bilevel.sharding.processes import digest
from bilevel.trees import PyTree, is_inexact, leaf_names

if TYPE_CHECKING:
    from bilevel.differentiation.loss_checks import TracedLoss

_CODE = ", code"
"""Ends the names of functions that are known by their byte code, which differs between versions of Python."""
_VERSIONS = "jax", "bilevel"


def fingerprint(
    solver: Any, key: jax.Array, state: Any, losses: list[TracedLoss], feeds: tuple[Feed, ...], record: Any = None
) -> dict[str, str]:
    """Settings, arrays, computations, data, key and versions of a run.

    Args:
      solver: the solver. Its settings and arrays are looked at by name; losses, optimizers, starts, projection, domain
        and `record` as what they compute (their jaxpr, and that of their derivatives where a function has a rule of its
        own), so that the learning rate in an optimizer is seen; other functions, and those that JAX cannot trace, as
        code, with what they hold.
        The rematerialisation schedule changes no number and is left out.
      key: of the run.
      state: what `solver.init` returned.
      losses: both, traced.
      feeds: the data.
      record: as for `run`.
    """
    items = {
        "bilevel": _version(),
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        "key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
    }
    for feed in feeds:
        items |= feed.fingerprint()
    _settings("solver", solver, items)
    for program in programs(solver, state, record):
        if program.name in items or f"{program.name}{_CODE}" in items:
            continue
        if (closed := program.traced()) is not None:
            _computation(program.name, closed, items)
        else:
            items[f"{program.name}{_CODE}"] = code_hash(program.source)
    for name, leaf in zip(leaf_names(solver, "solver"), jax.tree.leaves(solver), strict=True):
        items[name] = described(leaf)
    for loss in losses:
        _computation(loss.name, loss.closed, items)
    return items


def _version() -> str:
    try:
        return importlib.metadata.version("bilevel")
    except importlib.metadata.PackageNotFoundError:  # a folder of sources that is not installed
        return "not installed"


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs, in words, with the old and the new value of each."""
    apart = [name for name in _VERSIONS if old.get(name) != new[name]]
    found = []
    for name in {**old, **new}:
        before, after = old.get(name, "none"), new.get(name, "none")
        # Byte code is that of one Python, a jaxpr that of one JAX.
        if name.endswith(_CODE) and old.get("python") != new["python"]:
            continue
        if name == "python" or before == after or (apart and " computation" in name):
            continue
        found.append(f"{name}: {_change(before, after)}")
    return found


def _change(before: str, after: str) -> str:
    if before.startswith("[") and after.startswith("["):
        one, other = json.loads(before), json.loads(after)
        if len(one) == len(other):
            pairs = dict.fromkeys((a, b) for a, b in zip(one, other, strict=True) if a != b)
            return ", ".join(f"{a} -> {b}" for a, b in list(pairs)[:5])
        before, after = f"{len(one)} numbers", f"{len(other)} numbers"
    return f"{before} -> {after}"


def _settings(name: str, value: Any, items: dict[str, str]) -> None:
    """Adds the settings of `value`; its arrays, optimizers and the functions of a problem come apart."""
    if isinstance(value, Problem):
        what = f"has_aux={value.has_aux}, mutable={value.mutable}, domain={_structure(value.domain)}"
        items["problem"] = what
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items[name] = type(value).__qualname__
        if not type(value).__module__.startswith("bilevel."):
            items[f"{name}{_CODE}"] = code_hash(type(value))
        for field in dataclasses.fields(value):
            inside = getattr(value, field.name)
            if field.name == "checkpoint" or field.name.endswith("optimizer"):
                continue
            if field.metadata.get("static") or not jax.tree_util.all_leaves([inside]):
                _settings(f"{name}.{field.name}", inside, items)
    elif value is None or isinstance(value, bool | int | float | str | np.generic):
        items[name] = repr(value)
    elif isinstance(value, tuple | list | dict):
        for at, inside in value.items() if isinstance(value, dict) else enumerate(value):
            _settings(f"{name}[{at!r}]", inside, items)
    elif callable(value):
        items[f"{name}{_CODE}"] = code_hash(value)
    else:
        items[name] = type(value).__qualname__
        items[f"{name}{_CODE}"] = code_hash(value)


def _computation(name: str, closed: Any, items: dict[str, str]) -> None:
    """Adds a jaxpr in three parts: operations, the numbers among them, and arrays captured from outside.

    What a `custom_jvp` or `custom_vjp` does is seen in the derivatives alone, which are then added likewise.
    """
    _add(name, closed, items)
    for order in ("first", "second"):
        if not _has_rules(closed.jaxpr):
            return
        try:
            closed = jax.make_jaxpr(_derivative(closed))(*_arguments(closed))
        except Exception:  # what has no derivative is not differentiated by the run either, which will say so
            return
        _add(f"{name} {order} derivative", closed, items)


def _has_rules(jaxpr: Any) -> bool:
    return any(operation(eqn) in RULES or any(map(_has_rules, jaxprs(eqn.params))) for eqn in jaxpr.eqns)


def _arguments(closed: Any) -> list[Any]:
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]


def _derivative(closed: Any) -> Callable[..., Any]:
    """The gradient of the sum of what `closed` returns, by its inexact arguments."""

    def function(*arguments):
        moving = [i for i, x in enumerate(arguments) if is_inexact(x)]

        def total(leaves):
            given = dict(zip(moving, leaves, strict=True))
            outputs = evaluate_closed(closed, *(given.get(i, x) for i, x in enumerate(arguments)))
            return sum(jax.numpy.sum(jax.numpy.real(x)) for x in outputs if is_inexact(x))

        with jax.numpy_dtype_promotion("standard"):
            return jax.grad(total)([arguments[i] for i in moving])

    return function


def _add(name: str, closed: Any, items: dict[str, str]) -> None:
    found = parts(closed)
    items[f"{name} computation"] = hashlib.sha256("\n".join(found.operations).encode()).hexdigest()[:16]
    items[f"{name} computation, numbers"] = json.dumps(found.numbers)
    items[f"{name} computation, captured arrays"] = digest(found.arrays) if found.arrays else "none"


def _structure(tree: PyTree) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree)))

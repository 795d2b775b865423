"""What a run is of, as text by name: two runs with the same fingerprint may share checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend import core as jex

from bilevel import optimizers
from bilevel.feeds import Feed, described, digest
from bilevel.problem import Problem
from bilevel.trees import PyTree, is_key, leaf_names, partition

if TYPE_CHECKING:
    from bilevel.refusals import TracedLoss

_CODE = ", code"
"""Ends the names of functions that are known by their byte code, which differs between versions of Python."""
_VERSIONS = "jax", "bilevel"


def fingerprint(
    solver: Any, key: jax.Array, state: Any, losses: list[TracedLoss], feeds: tuple[Feed, ...]
) -> dict[str, str]:
    """Settings, arrays, computations, data, key and versions of a run.

    Args:
      solver: the solver. Its settings and arrays are looked at by name; losses, optimizers, start and projection as
        what they compute (their jaxpr), so that the learning rate in an optimizer is seen; other functions as code.
        The rematerialisation schedule changes no number and is left out.
      key: of the run.
      state: what `solver.init` returned.
      losses: both, traced.
      feeds: the data.
    """
    items = {
        "bilevel": _version(),
        "jax": jax.__version__,
        "python": ".".join(map(str, sys.version_info[:2])),
        "key": f"{jax.random.key_impl(key)} {np.asarray(jax.random.key_data(key)).tolist()}",
    }
    for feed in feeds:
        items |= feed.fingerprint()
    _settings("solver", solver, items, state)
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


def _settings(name: str, value: Any, items: dict[str, str], state: Any) -> None:
    """Adds the settings of `value`, and what the functions in it compute; its arrays come apart."""
    if isinstance(value, Problem):
        _problem(value, items, state)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items[name] = type(value).__qualname__
        if not type(value).__module__.startswith("bilevel."):
            items[f"{name}{_CODE}"] = _code_hash(type(value))
        for field in dataclasses.fields(value):
            if field.name == "checkpoint":
                continue
            inside = getattr(value, field.name)
            if field.name.endswith("optimizer"):
                _optimizer(f"{name}.{field.name}", inside, items, state)
            elif field.metadata.get("static") or not jax.tree_util.all_leaves([inside]):
                _settings(f"{name}.{field.name}", inside, items, state)
    elif value is None or isinstance(value, bool | int | float | str | np.generic):
        items[name] = repr(value)
    elif isinstance(value, tuple | list | dict):
        for at, inside in value.items() if isinstance(value, dict) else enumerate(value):
            _settings(f"{name}[{at!r}]", inside, items, state)
    elif callable(value):
        items[f"{name}{_CODE}"] = _code_hash(value)
    else:
        items[name] = type(value).__qualname__
        items[f"{name}{_CODE}"] = _code_hash(type(value))


def _problem(problem: Problem, items: dict[str, str], state: Any) -> None:
    items["problem"] = f"has_aux={problem.has_aux}, mutable={problem.mutable}, domain={_structure(problem.domain)}"
    _trace("init_outer", lambda p, key: p.init_outer(key), (problem, state.key), items)
    _trace("init_inner", lambda p, key, outer: p.init_inner(key, outer), (problem, state.key, state.outer), items)
    if problem.project:
        _trace("project", lambda p, outer: p.project(outer), (problem, state.outer), items)


def _optimizer(name: str, optimizer: Any, items: dict[str, str], state: Any) -> None:
    """An optimizer by one update from its start."""
    params = partition(state.outer if "outer" in name.rpartition(".")[2] else getattr(state.inner, "params", ()))[0]

    def program(outer, params):
        transform = optimizers.transformation(optimizer, outer)
        value = jax.numpy.zeros(())
        return transform.update(params, transform.init(params), params, value=value, grad=params)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _trace(name, program, (state.outer, params), items)


def _trace(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], items: dict[str, str]) -> None:
    try:
        closed = jax.make_jaxpr(function)(*arguments)
    except Exception:  # whatever a function of the user's may raise where it is traced; the run will say so, or not
        items[f"{name}{_CODE}"] = _code_hash(function)
        return
    _computation(name, closed, items)


def _computation(name: str, closed: Any, items: dict[str, str]) -> None:
    """Adds a jaxpr in three parts: operations, the numbers among them, and arrays captured from outside."""
    found = parts(closed)
    items[f"{name} computation"] = hashlib.sha256("\n".join(found.operations).encode()).hexdigest()[:16]
    items[f"{name} computation, numbers"] = json.dumps(found.numbers)
    items[f"{name} computation, captured arrays"] = digest(found.arrays) if found.arrays else "none"


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
            numbers.append(repr(np.asarray(value).item()))
        else:
            arrays.append(value)


def _walk(jaxpr: Any, lines: list[str], numbers: list[str], arrays: list[Any]) -> None:
    names: dict[Any, int] = {}

    def name(atom: Any) -> str:
        if isinstance(atom, jex.Literal):
            _add_constants([atom.val], numbers, arrays)
            return str(atom.aval)
        return f"{names.setdefault(atom, len(names))}:{atom.aval}"

    lines.append(f"in {[name(v) for v in (*jaxpr.constvars, *jaxpr.invars)]}")
    for eqn in jaxpr.eqns:
        lines.append(f"{eqn.primitive.name} {[name(v) for v in eqn.invars]} {[name(v) for v in eqn.outvars]}")
        for at in sorted(eqn.params):
            if at != "name":
                lines.append(f"{at}=")
                _walk_parameter(eqn.params[at], lines, numbers, arrays)
    lines.append(f"out {[name(v) for v in jaxpr.outvars]}")


def _walk_parameter(value: Any, lines: list[str], numbers: list[str], arrays: list[Any]) -> None:
    if isinstance(value, jex.ClosedJaxpr):
        _add_constants(value.consts, numbers, arrays)
        _walk(value.jaxpr, lines, numbers, arrays)
    elif isinstance(value, jex.Jaxpr):
        _walk(value, lines, numbers, arrays)
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
    elif callable(value) and not isinstance(value, type):
        lines.append("function")  # a rule, whose results are elsewhere in the trace
    else:
        lines.append(re.sub(r" at 0x[0-9a-f]+", "", str(value)))


def _structure(tree: PyTree) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree)))


def _code_hash(value: Any) -> str:
    found: list[str] = []
    _code(value, found, set())
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _code(value: Any, found: list[str], seen: set[int]) -> None:
    """Adds what a function is made of: its code, defaults, what it closed over, and functions of its module."""
    if id(value) in seen:
        return
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial | type):
        seen.add(id(value))
    if isinstance(value, types.MethodType):
        _code(value.__func__, found, seen)
    elif isinstance(value, functools.partial):  # jax.tree_util.Partial too, whose arrays come apart
        _code(value.func, found, seen)
    elif isinstance(value, types.FunctionType):
        _code(value.__code__, found, seen)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        used = [value.__globals__[n] for n in value.__code__.co_names if n in value.__globals__]
        own = value.__module__
        near = [x for x in used if getattr(x, "__module__", None) == own or isinstance(x, bool | int | float)]
        for inside in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *cells, *near):
            _code(inside, found, seen)
    elif isinstance(value, types.CodeType):
        found.append(f"{value.co_code.hex()} {value.co_names}")
        for constant in value.co_consts:
            _code(constant, found, seen)
    elif isinstance(value, type):
        for at, inside in sorted(vars(value).items()):
            if isinstance(inside, types.FunctionType):
                found.append(at)
                _code(inside, found, seen)
    elif isinstance(value, optax.GradientTransformation | tuple | list):
        for inside in value:
            _code(inside, found, seen)
    elif isinstance(value, np.ndarray | jax.Array):
        found.append(described(value))
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | frozenset):
        found.append(str(sorted(map(str, value))) if isinstance(value, frozenset) else repr(value))
    else:
        found.append(type(value).__qualname__)

"""A function by what it is made of, where no trace shows it: its code, and the values it holds."""

from __future__ import annotations

import functools
import hashlib
import re
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bilevel.differentiation.described import described


def code_hash(value: Any) -> str:
    """A hash of a function, a class or an object with settings: the same for the same code with the same values.

    Followed are defaults, what a function closed over, bound arguments, what it decorates, values and functions of its
    module that it uses, and the entries and attributes of all these. Code of other modules goes by its name.
    """
    found: list[str] = []
    _add(value, found, {})
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


_NUMBERS = bool, int, float, complex, str, bytes, np.generic


def _add(value: Any, found: list[str], seen: dict[int, Any]) -> None:
    if value is None or isinstance(value, _NUMBERS):
        found.append(repr(value))
        return
    if id(value) in seen:
        found.append("again")
        return
    seen[id(value)] = value  # held, so that nothing else gets its id
    if isinstance(value, np.ndarray | jax.Array):
        found.append(described(value))
    elif isinstance(value, types.CodeType):
        found.append(f"{value.co_code.hex()} {value.co_names}")
        _all(value.co_consts, found, seen)
    elif isinstance(value, dict | types.MappingProxyType):
        for at, inside in sorted(value.items(), key=lambda item: repr(item[0])):
            found.append(f"{at!r}:")
            _add(inside, found, seen)
    elif isinstance(value, set | frozenset):
        _all(sorted(value, key=repr), found, seen)
    elif isinstance(value, tuple | list):
        found.append(f"{len(value)} items")
        _all(value, found, seen)
    elif isinstance(value, types.FunctionType):
        _all(_parts(value), found, seen)
    elif isinstance(value, types.MethodType):
        _all((value.__func__, value.__self__), found, seen)
    elif isinstance(value, jax.tree_util.Partial):  # its arguments are arrays of the solver, which come apart
        _add(value.func, found, seen)
    elif isinstance(value, functools.partial):
        _all((value.func, value.args, value.keywords), found, seen)
    elif isinstance(value, staticmethod | classmethod):
        _add(value.__func__, found, seen)
    elif isinstance(value, property):
        _all((value.fget, value.fset), found, seen)
    elif isinstance(value, type):
        _class(value, found, seen)
    elif callable(wrapped := getattr(value, "__wrapped__", None)):  # jax.jit, functools.lru_cache
        found.append(type(value).__qualname__)
        _add(wrapped, found, seen)
    elif isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        found.append(value.__name__)
    else:
        _object(value, found, seen)


def _all(values: Any, found: list[str], seen: dict[int, Any]) -> None:
    for value in values:
        _add(value, found, seen)


def _parts(function: types.FunctionType) -> Iterator[Any]:
    yield function.__code__
    yield from function.__defaults__ or ()
    yield function.__kwdefaults__
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not given a value yet
            yield None
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            inside = function.__globals__[name]
            yield inside if _is_near(inside, function.__module__) else getattr(inside, "__name__", name)


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_near(value: Any, module: str) -> bool:
    """Whether a global name stands for a value, or for code of this module."""
    if isinstance(value, types.ModuleType):
        return False
    return getattr(value, "__module__", None) == module or not (callable(value) or isinstance(value, type))


def _class(value: type, found: list[str], seen: dict[int, Any]) -> None:
    found.append(value.__qualname__)
    if value.__module__ in ("builtins", "typing"):
        return
    for at, inside in sorted(vars(value).items()):
        if not (at.startswith("__") and at != "__call__" and at != "__init__"):
            found.append(at)
            _add(inside, found, seen)
    _all((base for base in value.__bases__ if base.__module__ == value.__module__), found, seen)


def _object(value: Any, found: list[str], seen: dict[int, Any]) -> None:
    cls = type(value)
    found.append(cls.__qualname__)
    slots = [name for base in cls.__mro__ for name in _slots(base) if hasattr(value, name)]
    attributes = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    if callable(value) or not attributes:
        _add(cls, found, seen)
    # What ends with an underscore is found by fitting (scikit-learn), and no setting.
    _add({name: inside for name, inside in attributes.items() if not name.endswith("_")}, found, seen)
    if not attributes:
        found.append(re.sub(r" at 0x[0-9a-f]+", "", repr(value)))


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)

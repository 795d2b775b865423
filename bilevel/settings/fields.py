"""The fields of a frozen dataclass: which of them are children of a pytree, and the rules that check them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Rule = Callable[[Any], Any]
Class = TypeVar("Class", bound=type)


class Unfit(Exception):
    """Raised by a rule: its message says what a value must be, and is not."""


def register(cls: Class) -> Class:
    """Registers a dataclass as a pytree: fields made with `setting` are its structure, all others its children.

    A field of plain `int`, `bool` or `str` must be made with `setting` or `child`: as a child it is a traced array
    inside a compiled function, which no loop of Python can count by.

    Unlike `jax.tree_util.register_dataclass`, a tree transformation does not call `__init__`: what it puts into the
    fields (placeholders, axes, labels) is not what a user has written, and is not checked.

    Examples:
      >>> import dataclasses, jax
      >>> from bilevel.extend import child, integer, real, register, setting
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class Penalty:
      ...     weight: float = dataclasses.field(metadata=child(real(low=0.0)))
      ...     power: int = dataclasses.field(metadata=setting(integer(1)))
      >>> jax.tree.map(lambda x: 10 * x, Penalty(weight=0.5, power=2))  # what `setting` marks is no leaf
      Penalty(weight=5.0, power=2)
    """
    if not hasattr(cls, "__dataclass_fields__"):
        raise TypeError(f"register: {cls.__name__} is no dataclass: put @dataclasses.dataclass(frozen=True) below it.")
    fields = dataclasses.fields(cls)
    for field in fields:
        if not field.metadata and _is_fixed(field.type):
            raise TypeError(
                f"{cls.__name__}.{field.name}: a field of {getattr(field.type, '__name__', field.type)} must say "
                "what it is inside a compiled function: dataclasses.field(metadata=setting(rule)) for a constant of "
                "the program, or child(rule) for an array."
            )
    children = [field.name for field in fields if not field.metadata.get("static")]
    rest = [field.name for field in fields if field.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in children]

    def flatten(of):
        return [getattr(of, name) for name in children], tuple(getattr(of, name) for name in rest)

    def flatten_with_keys(of):
        values, structure = flatten(of)
        return list(zip(keys, values, strict=True)), structure

    def unflatten(structure, values):
        new = object.__new__(cls)
        for names, given in ((children, values), (rest, structure)):
            for name, value in zip(names, given, strict=True):
                object.__setattr__(new, name, value)
        return new

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    if "__init__" in vars(cls):
        cls.__init__ = _with_signature(cls, cls.__init__)
    return cls


def _is_fixed(kind: Any) -> bool:
    """Whether the annotation of a field, a type or its text, is of integers, booleans or texts alone."""
    names = (kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))).split("|")
    return {name.strip() for name in names} <= {"int", "bool", "str", "None"}


def _with_signature(cls: type, init: Callable[..., None]) -> Callable[..., None]:
    """`init`, whose error for arguments that are missing, unknown or too many says how to call it.

    A class may add to the sentence by `_hint`.
    """

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:  # from inside it
                raise
            said, hint = _unbound(cls, args, kwargs), getattr(cls, "_hint", "")
            raise TypeError(f"{cls.__name__}(...): {said}; it is {signature(cls)}{hint}.") from None

    return __init__


def _unbound(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why arguments are not those of a class."""
    try:
        inspect.signature(cls).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return "the arguments do not fit"


def signature(cls: type) -> str:
    """How a class is called: its name, its arguments and their defaults."""
    parameters = inspect.signature(cls).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return f"{cls.__name__}{inspect.Signature(bare)}"


def setting(rule: Rule | None = None) -> dict[str, Any]:
    """Metadata of a dataclass field that is part of the structure of the object as a pytree, checked by `rule`.

    Examples:
      >>> import dataclasses, jax
      >>> from bilevel.extend import integer, register, setting
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class Penalty:
      ...     power: int = dataclasses.field(metadata=setting(integer(1)))
      >>> jax.tree.leaves(Penalty(power=2))  # part of the structure, so that jit compiles anew for another power
      []
    """
    return {"static": True, "check": rule}


def child(rule: Rule) -> dict[str, Any]:
    """Metadata of a dataclass field that is a child of the object as a pytree, checked by `rule`.

    Examples:
      >>> import dataclasses, jax
      >>> from bilevel.extend import child, real, register
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class Penalty:
      ...     weight: float = dataclasses.field(metadata=child(real(low=0.0)))
      >>> jax.tree.leaves(Penalty(weight=0.5))  # an argument of a compiled function
      [0.5]
    """
    return {"check": rule}


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass that has a rule, and keeps what the rule returns.

    Raises:
      ValueError: one sentence with the class, the field and the value.
    """
    for field in dataclasses.fields(settings):
        if rule := field.metadata.get("check"):
            value = checked(type(settings).__name__, field.name, getattr(settings, field.name), rule)
            object.__setattr__(settings, field.name, value)


def check_arguments(function: str, rules: dict[str, Rule], /, **given: Any) -> None:
    """Checks arguments of `function` by the rules of their names; those without a rule are passed over.

    Raises:
      ValueError: as `check_fields`.
    """
    for name, value in given.items():
        if name in rules:
            checked(function, name, value, rules[name])


def checked(owner: str, name: str, value: Any, rule: Rule) -> Any:
    """`rule(value)`.

    Raises:
      ValueError: in one sentence, where the value is unfit.
    """
    try:
        return rule(value)
    except Unfit as reason:
        raise ValueError(f"{owner}({name}={shown(value)}): {reason}.") from None


_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 60


def shown(value: Any) -> str:
    """`value` in a few words of one line."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if isinstance(value, (jax.Array, np.ndarray, Tracer)):
        if is_known_number(value):
            return f"{np.asarray(value)}"
        return f"{'traced ' * isinstance(value, Tracer)}{value.dtype}{list(value.shape)}"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    return " ".join(_SHORT.repr(value).split())


def is_known_number(array: Any) -> bool:
    """Whether `array` is one number whose value is known: no random key, and not traced."""
    number = np.ndim(array) == 0 and not jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return number and not isinstance(array, Tracer)

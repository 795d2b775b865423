"""Rules of settings that are no numbers: words, functions, objects, folders, random keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.settings.fields import Rule, Unfit


def boolean(value: Any) -> bool:
    """The rule of a setting that is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise Unfit("must be True or False")
    return bool(value)


def one_of(*choices: str) -> Rule:
    """The rule of a setting that is one of a few words."""

    def rule(value):
        if not (isinstance(value, str) and value in choices):
            raise Unfit(f"must be one of {', '.join(map(repr, choices))}")
        return value

    return rule


def optional(rule: Rule) -> Rule:
    """The rule of a setting that is None, or what `rule` takes."""

    def either(value):
        if value is None:
            return None
        try:
            return rule(value)
        except Unfit as reason:
            raise Unfit(f"{reason}, or None") from None

    either.number = getattr(rule, "number", None)
    return either


def instance(cls: type | tuple[type, ...], words: str) -> Rule:
    """An instance of `cls`, which `words` describe."""

    def rule(value):
        if not isinstance(value, cls) or isinstance(value, type):
            raise Unfit(f"must be {words}")
        return value

    return rule


def having(words: str, *names: str) -> Rule:
    """An object with attributes of these names, which `words` describe; not the class of such objects."""

    def rule(value):
        missing = [name for name in names if not hasattr(value, name)]
        if isinstance(value, type) and len(missing) < len(names):
            raise Unfit(f"must be {words}: call the class, {value.__name__}(...)")
        if isinstance(value, type) or len(missing) == len(names):
            raise Unfit(f"must be {words}")
        if missing:
            raise Unfit(f"must be {words}, but has no {', '.join(missing)}")
        return value

    return rule


def pytree(rule: Rule) -> Rule:
    """What `rule` takes, if it is a pytree of arrays all the way down, so that a compiled function can be given it."""

    def whole(value):
        value = rule(value)
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            if not isinstance(leaf, (bool, int, float, complex)) and not hasattr(leaf, "dtype"):
                where = f" in {jax.tree_util.keystr(path)}" if path else ""
                raise Unfit(
                    f"holds a {type(leaf).__name__}{where}, which is neither an array nor a pytree: make its class a "
                    "frozen dataclass with bilevel.extend.register above it, and what is no array a field by setting()"
                )
        return value

    return whole


def is_folder(value: Any) -> Any:
    """The rule of a setting that names a folder: a text or a `Path`, and not the empty text, which would be here."""
    if not isinstance(value, (str, Path)) or value == "":
        raise Unfit("must be the name of a folder ('.' for this one)")
    return value


def function(*arguments: str, result: str = "") -> Rule:
    """A function of these arguments, by position; it becomes a pytree (`as_pytree`)."""
    wanted = f"must be a function ({', '.join(arguments)})" + (f" -> {result}" if result else "")

    def rule(value):
        if isinstance(value, type) or not callable(value):
            raise Unfit(wanted)
        if (taken := misfit(value, len(arguments))) is not None:
            raise Unfit(f"{wanted}, but takes {taken}")
        return as_pytree(value)

    return rule


def misfit(value: Callable[..., Any], count: int) -> str | None:
    """The arguments that a callable takes, where it cannot be called with `count` of them; None where it can."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # written in C: nobody knows
        return None
    try:
        signature.bind(*range(count))
    except TypeError:
        return str(signature.replace(return_annotation=inspect.Signature.empty))
    return None


def as_pytree(function: Any) -> Any:
    """`function` as something that can be an argument of a compiled function.

    Pytrees that are callable (`jax.tree_util.Partial`, registered dataclasses) stay as they are: their arrays
    are arguments. A plain function becomes a `Partial` without leaves, compared by identity.

    Examples:
      >>> import jax
      >>> from bilevel.extend import as_pytree
      >>> loss = as_pytree(lambda w: (w - 1) ** 2)
      >>> float(jax.jit(lambda loss, w: loss(w))(loss, 3.0))  # jit takes no plain function as an argument
      4.0
    """
    if callable(function) and jax.tree_util.all_leaves([function]):
        return jax.tree_util.Partial(function)
    return function


def random_key(value: Any) -> Any:
    """A random key: typed, or the two words of `jax.random.PRNGKey`."""
    if not _are_keys(value, 0):
        raise Unfit("must be a random key, as jax.random.key(0) is")
    return value


def random_keys(value: Any) -> Any:
    """A random key, or a stack of some."""
    if not _are_keys(value, 0) and not (_are_keys(value, 1) and len(value)):
        raise Unfit("must be a random key, as jax.random.key(0) is, or a stack of some, as jax.random.split(key, 5) is")
    return value


def _are_keys(value: Any, axes: int) -> bool:
    """Whether `value` is an array of random keys with so many axes; in words, it has one more."""
    kind = getattr(value, "dtype", None)
    if kind == np.uint32:
        return np.ndim(value) == axes + 1
    typed = kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key)
    return typed and np.ndim(value) == axes and not isinstance(value, np.ndarray)

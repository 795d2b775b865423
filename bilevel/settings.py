"""Settings: what a frozen dataclass is given, checked by a rule that stands beside the field.

A rule is a function `value -> value`: it returns the value as it is kept (an `int` of NumPy becomes one of Python, a
function becomes a pytree) or raises `Unfit` with what it must be. `check_fields`, called in `__post_init__`, makes one
sentence of that, with the class, the field and the value. Booleans are never numbers, classes never their instances.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
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
        if _is_known_number(value):
            return f"{np.asarray(value)}"
        return f"{'traced ' * isinstance(value, Tracer)}{value.dtype}{list(value.shape)}"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    return " ".join(_SHORT.repr(value).split())


def _is_known_number(array: Any) -> bool:
    number = np.ndim(array) == 0 and not jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return number and not isinstance(array, Tracer)


# Numbers.


def integer(low: int = 1) -> Rule:
    """An integer of at least `low`.

    Examples:
      >>> import numpy as np
      >>> from bilevel.extend import integer
      >>> integer(1)(np.int64(3))
      3
      >>> try:
      ...     integer(1)(0)
      ... except Exception as reason:
      ...     print(reason)
      must be an integer >= 1
    """

    def rule(value):
        value = _number(value)
        if value is None or not isinstance(value, (int, np.integer)) or value < low:
            raise Unfit(f"must be an integer >= {low}")
        return int(value)

    return rule


def real(
    *,
    above: float | None = None,
    low: float | None = None,
    below: float | None = None,
    high: float | None = None,
    infinite: bool = False,
) -> Rule:
    """A number that is > `above`, >= `low`, < `below` and <= `high`; finite unless `infinite`.

    Examples:
      >>> from bilevel.extend import real
      >>> real(above=0.0)(0.5)
      0.5
      >>> try:
      ...     real(above=0.0)(-1.0)
      ... except Exception as reason:
      ...     print(reason)
      must be a finite number > 0
    """
    signs = (">", float.__gt__), (">=", float.__ge__), ("<", float.__lt__), ("<=", float.__le__)
    given = zip((above, low, below, high), signs, strict=True)
    bounds = [(float(bound), *sign) for bound, sign in given if bound is not None]
    words = " and ".join(f"{sign} {bound:g}" for bound, sign, _ in bounds)
    wanted = f"must be a {'' if infinite else 'finite '}number {words}".rstrip()

    def rule(value):
        value = _number(value)
        if value is None or math.isnan(value) or not (infinite or math.isfinite(value)):
            raise Unfit(wanted)
        if not all(holds(float(value), bound) for bound, _, holds in bounds):
            raise Unfit(wanted)
        return value if type(value) in (int, float) else float(value)

    return rule


def _number(value: Any) -> Any:
    """`value` as a real number of Python or NumPy; None where it is not one, and where it is traced."""
    if isinstance(value, (np.ndarray, jax.Array)):
        value = np.asarray(value)[()] if _is_known_number(value) else None
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    return value


def scalar(**bounds: Any) -> Rule:
    """A `real` number that may be an array of the program, and traced; where its value is known, it is checked.

    Examples:
      >>> import jax
      >>> from bilevel.extend import scalar
      >>> rule = scalar(low=0.0)
      >>> rule(0.5), float(jax.jit(rule)(0.5))  # a value that is traced is let through
      (0.5, 0.5)
      >>> try:
      ...     rule(jax.numpy.array(-1.0))
      ... except Exception as reason:
      ...     print(reason)
      must be a finite number >= 0
    """
    number = real(**bounds)

    def rule(value):
        kind = getattr(value, "dtype", None)
        if kind is None or not hasattr(value, "shape"):
            return number(value)
        if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
            raise Unfit("must be a real number")
        if not isinstance(value, Tracer):
            for x in np.asarray(value, np.float64).ravel():
                number(float(x))
        return value

    return rule


def step_size(**bounds: float) -> Rule:
    """A `scalar`, or a schedule `step -> scalar`.

    Examples:
      >>> import bilevel
      >>> from bilevel.extend import step_size
      >>> rule = step_size()
      >>> rule(0.1), float(rule(bilevel.Power(1.0, 0.5))(3))
      (0.1, 0.5)
      >>> try:
      ...     rule(-0.1)
      ... except Exception as reason:
      ...     print(reason)
      must be a finite number >= 0, or a schedule step -> number
    """
    number = scalar(**bounds or {"low": 0.0})

    def rule(value):
        if callable(value) and not isinstance(value, type):
            schedule = function("step", result="number")(value)
            if (returned := _not_a_number(schedule)) is not None:
                raise Unfit(f"must be a number or a schedule step -> number, but returns {returned} for a step")
            return schedule
        try:
            return number(value)
        except Unfit as reason:
            raise Unfit(f"{reason}, or a schedule step -> number") from None

    rule.number = number
    return rule


LOOKED_AT = 2**16
"""Steps of a schedule that are looked at, at most: half of them the first, the others evenly over a longer run."""


def check_schedules(settings: Any, first: int, last: int) -> None:
    """Checks what the schedules among the fields of a dataclass give for the steps from `first` to `last` - 1.

    Of more than `LOOKED_AT` steps only so many are looked at, the last among them. Steps are counted in 32 bits.

    Raises:
      ValueError: names the field, the step and the value.
    """
    for field in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
        last = min(last, jnp.iinfo(jnp.int32).max)
        number, schedule = getattr(field.metadata.get("check"), "number", None), getattr(settings, field.name)
        if number is None or not callable(schedule) or first >= last:
            continue
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # a schedule is the user's
            steps = np.arange(first, min(last, first + LOOKED_AT))
            if last - first > LOOKED_AT:
                spread = np.linspace(first, last - 1, LOOKED_AT // 2).astype(int)
                steps = np.unique(np.concatenate([steps[: LOOKED_AT // 2], spread]))
            looked = jnp.asarray(steps, jnp.int32)
            values = np.asarray(jax.lax.map(lambda step: jnp.asarray(schedule(step), float), looked))  # noqa: B023
        for at, value in sorted(zip(*np.unique(values, return_index=True)[::-1], strict=True)):
            try:
                number(float(value))
            except Unfit as reason:
                what = shown(getattr(schedule, "func", schedule))
                raise ValueError(
                    f"{type(settings).__name__}({field.name}={what}): the schedule gives {value:g} for step "
                    f"{steps[at]}, but a value {reason}."
                ) from None


def _not_a_number(schedule: Callable[..., Any]) -> str | None:
    """What `schedule(step)` is, if it is no real number; it is traced, and not computed."""
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            result = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    except TypeError:  # of eval_shape, for what is no array: a maker of schedules or optimizers returns a function
        return "no number"
    single = isinstance(result, jax.ShapeDtypeStruct) and not result.shape
    return None if single and not jnp.issubdtype(result.dtype, jnp.complexfloating) else "no single real number"


# Everything else.


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
    kind = getattr(value, "dtype", None)
    typed = kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key) and np.shape(value) == ()
    words = kind == np.uint32 and np.ndim(value) == 1
    if not (typed or words) or (isinstance(value, np.ndarray) and not words):
        raise Unfit("must be a random key, as jax.random.key(0) is")
    return value

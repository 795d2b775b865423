"""What values an option can have, declared beside its type and checked before anything is loaded.

    rate: Annotated[float, Range(0, 1)] = 0.1
    name: Annotated[str, one_of(BASELINES)] = "uniform"

A number of a settings class without a range fails a test.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
import typing
from collections.abc import Collection, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The methods need tyro, which is not installed: pip install 'bilevel[lora]'.", name=error.name
    ) from None

LARGEST = 2**31 - 1
"""Of a count: steps, rows and seeds are int32 on the device."""
SMALLEST_NORMAL, LARGEST_FLOAT = 2.0**-126, 2.0**127 * (2 - 2.0**-23)
"""Of float32, in which options enter a computation: what is below is 0 there, what is above is infinite."""


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
      low, high: its ends.
      above, below: whether the lower, the upper end is no part of it.
      empty: whether an option that takes several numbers may have none.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    empty: bool = False

    def __contains__(self, value: Any) -> bool:
        # Written so that NaN, which no comparison holds for, is outside.
        low = value > self.low if self.above else value >= self.low
        return bool(low and (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"


Seed = Annotated[int, Range(0, LARGEST)]
Count = Annotated[int, Range(1, LARGEST)]
"""A count of at least 1."""
CountOrNone = Annotated[int, Range(0, LARGEST)]
"""A count for which 0 means none, or all."""
Kept = Annotated[int, Range(1, 100_000)]
"""Steps whose states are kept to differentiate through them."""
Repeats = Annotated[int, Range(1, 1_000)]
RepeatsOrNone = Annotated[int, Range(0, 1_000)]
Positive = Annotated[float, Range(0, LARGEST_FLOAT, above=True)]
"""A number above 0."""
NotNegative = Annotated[float, Range(0, LARGEST_FLOAT)]
"""A number of at least 0."""
Share = Annotated[float, Range(0, 1, above=True)]
"""A share of a whole, some of which there must be."""


class AtMost(int):
    """A number of rows that nobody has asked for, but a preset gives: where there are fewer, it is these."""


@dataclasses.dataclass(frozen=True, eq=False)  # a dict has no hash
class Names:
    """The names in a registry, read each time they are asked for: what is registered is a choice from then on."""

    registry: Collection[str]
    optional: bool = False

    def __call__(self) -> Any:
        """The type of which they are the values."""
        known: Any = Literal[tuple(self.registry)]
        return known | None if self.optional else known

    def __contains__(self, value: Any) -> bool:
        return (value is None and self.optional) or (isinstance(value, str) and value in self.registry)


@dataclasses.dataclass(frozen=True, eq=False)
class Listed:
    """Names that a help lists, of an option that takes others too; read each time they are asked for."""

    registries: tuple[Collection[str], ...]

    def __init__(self, *registries: Collection[str]):
        object.__setattr__(self, "registries", registries)

    def __str__(self) -> str:
        return ", ".join(name for registry in self.registries for name in registry)


def one_of(registry: Collection[str], *, optional: bool = False, metavar: str | None = None) -> Any:
    """What a text is annotated with that is a name in `registry`, a dict or another collection.

    Args:
      registry: the names.
      optional: whether None is one of the values, which is then not shown as a default.
      metavar: what the help shows in place of all the names.
    """
    # Without the hint the help shows a default in the brackets and quotes of a list.
    hint = lambda shown: "" if (name := shown.strip("[']")) == "None" else f"(default: {name})"  # noqa: E731
    return tyro.conf.arg(constructor_factory=Names(registry, optional), help_behavior_hint=hint, metavar=metavar)


def check(settings: Any) -> None:
    """Every option of a settings dataclass.

    Raises:
      ValueError: for a number outside its range, or of another kind than its type says, for a name that is in no
        registry, and for a text that no file can be called: an empty one, one with a NUL, or with bytes that were not
        UTF-8.
    """
    for name, hint in hints(type(settings)).items():
        value, option = getattr(settings, name), f"--{name.replace('_', '-')}"
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, (str, Path)):
                _check_text(option, str(text))
        if (known := names(hint)) is not None and value not in known:
            raise ValueError(f"{option} {value!r} is unknown: choose from {', '.join(known.registry)}.")
        kind, allowed = numeric(hint), declared(hint)
        if kind is None or allowed is None or value is None:
            continue
        if isinstance(value, (tuple, list)) and not value and not allowed.empty:
            raise ValueError(f"{option} names no number: give one or more, {allowed}.")
        for number in value if isinstance(value, (tuple, list)) else (value,):
            _check_number(option, kind, allowed, number)


def _check_number(option: str, kind: type, allowed: Range, given: Any) -> None:
    of_kind = numbers.Integral if kind is int else numbers.Real
    if isinstance(given, bool) or not isinstance(given, of_kind):
        raise ValueError(f"{option} {given!r} must be {'an integer' if kind is int else 'a number'}.")
    value: Any = given
    shown = f"{value}" if kind is int and abs(value) < 10**30 else f"{value:g}" if kind is float else "of that size"
    if value not in allowed:
        raise ValueError(f"{option} {shown} must be {allowed}.")
    if kind is float and value and not SMALLEST_NORMAL <= abs(value) <= LARGEST_FLOAT:
        raise ValueError(f"{option} {shown} must be a number that float32 holds: at least {SMALLEST_NORMAL:.3g}.")


def _check_text(option: str, text: str) -> None:
    if not text:
        raise ValueError(f"{option} is empty.")
    if "\0" in text:
        raise ValueError(f"{option} has a NUL character in it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{option} {text!a} is not valid UTF-8.") from None


def hints(settings: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, with what they are annotated with."""
    found = typing.get_type_hints(settings, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(settings)}


def numeric(hint: Any) -> type | None:
    """`int` or `float` if an option of that type is a number, or several."""
    kinds = [kind for kind in _leaves(hint) if kind in (int, float)]
    return kinds[0] if kinds else None


def declared(hint: Any) -> Range | None:
    """The range that a type is annotated with."""
    return next((leaf for leaf in _leaves(hint) if isinstance(leaf, Range)), None)


def optional(hint: Any) -> bool:
    """Whether None is one of the values of a type."""
    return type(None) in _leaves(hint)


def names(hint: Any) -> Names | None:
    """The registry that a type is annotated with."""
    made_by = (getattr(leaf, "constructor_factory", None) for leaf in _leaves(hint))
    return next((factory for factory in made_by if isinstance(factory, Names)), None)


def listed(hint: Any) -> Listed | None:
    """The names that a type is annotated with, of which an option takes others too."""
    return next((leaf for leaf in _leaves(hint) if isinstance(leaf, Listed)), None)


def _leaves(hint: Any) -> Iterator[Any]:
    """The types that a type is made of, and its annotations; what a Literal lists is no type."""
    if typing.get_origin(hint) is typing.Literal:
        return
    if typing.get_origin(hint) is Annotated:
        yield from hint.__metadata__
        hint = hint.__origin__
    if parts := typing.get_args(hint):
        for part in parts:
            yield from _leaves(part)
    else:
        yield hint


def part(share: float, count: float) -> int:
    """The whole number that a share of `count` holds: 63 of 90 for 0.7, whose product in binary is a little less."""
    return math.floor(Fraction(str(share)) * Fraction(str(count)))


def finite(value: Any) -> bool:
    """Whether something read from a file is a finite number, and no integer that is more than a float can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= sys.float_info.max

"""Rules of settings that are numbers, or schedules of numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.settings.fields import Rule, Unfit, is_known_number, shown
from bilevel.settings.rules import function


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
        value = np.asarray(value)[()] if is_known_number(value) else None
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

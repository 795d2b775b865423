"""A function is known by its code and by every value that it holds, wherever it holds it."""

import collections
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.differentiation.code import code_hash
from bilevel.differentiation.described import shortest

TABLE = {"rate": 1.0}


@dataclasses.dataclass
class Settings:
    rate: float
    deep: dict


class Holder:
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate * step

    def method(self, step):
        return self.rate * step


class Slotted:
    __slots__ = ("rate",)

    def __init__(self, rate):
        self.rate = rate


class Constant:
    def of(self, step):
        return step


def closing(value):
    return lambda step: value


def default(rate):
    def schedule(step, rate=rate):
        return rate

    return schedule


def using(rate):
    """A function that reads a global name."""
    globals_ = {"TABLE": {"rate": rate}, "__name__": __name__}
    return types.FunctionType((lambda step: TABLE["rate"]).__code__, globals_)


def nested(rate):
    """A function whose inner function reads a global name."""
    globals_ = {"TABLE": {"rate": rate}, "__name__": __name__}
    return types.FunctionType((lambda step: (lambda: TABLE["rate"])()).__code__, globals_)


def constant(rate):
    """An object of a class with a setting of its own."""
    return type("Constant", (Constant,), {"rate": rate, "__call__": lambda self, step: self.rate})()


HOLDERS = {
    "a number": closing,
    "a dict": lambda x: closing({"a": {"rate": x}}),
    "a list": lambda x: closing([1, [x]]),
    "a set": lambda x: closing({x, "a"}),
    "an ordered dict": lambda x: closing(collections.OrderedDict(a=x)),
    "a mapping proxy": lambda x: closing(types.MappingProxyType({"a": x})),
    "a dataclass": lambda x: closing(Settings(1.0, {"rate": x})),
    "a namespace": lambda x: closing(types.SimpleNamespace(rate=x)),
    "an object": lambda x: closing(Holder(x)),
    "slots": lambda x: closing(Slotted(x)),
    "a callable object": Holder,
    "a method": lambda x: Holder(x).method,
    "an array": lambda x: closing({"a": np.full(2, x)}),
    "a jax array": lambda x: closing([jnp.full(2, x)]),
    "a number of numpy": lambda x: closing(np.float32(x)),
    "a partial": lambda x: functools.partial(lambda rate, step: rate, x),
    "a keyword of a partial": lambda x: functools.partial(lambda step, rate: rate, rate=x),
    "a compiled function": lambda x: jax.jit(closing(x)),
    "a cached function": lambda x: functools.lru_cache(closing(x)),
    "a default": default,
    "a global name": using,
    "a global name of an inner function": nested,
    "an attribute of a class": constant,
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_value_that_is_held_is_seen_and_the_same_value_is_the_same(name):
    make = HOLDERS[name]
    assert code_hash(make(0.5)) == code_hash(make(0.5)) != code_hash(make(0.25))


def test_what_holds_itself_ends():
    loop = {"rate": 1.0}
    loop["self"] = loop
    other = {"rate": 2.0}
    other["self"] = other
    assert code_hash(closing(loop)) != code_hash(closing(other))


def test_what_was_fitted_is_no_setting():
    fitted = Holder(1.0)
    fitted.coef_ = np.ones(3)
    assert code_hash(closing(fitted)) == code_hash(closing(Holder(1.0)))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (np.float32(-0.01), "-0.01"),
        (np.float16(0.1), "0.1"),
        (jnp.asarray(0.01, jnp.bfloat16), "0.01"),
        (np.float64(0.1 + 0.2), "0.30000000000000004"),
        (np.float32(1 / 3), "0.33333334"),
        (np.float32(1e30), "1e+30"),
        (np.float32(np.nan), "nan"),
        (-np.inf, "-inf"),
        (1.0, "1.0"),
        (3, "3"),
    ],
)
def test_numbers_are_written_by_their_own_digits(number, text):
    assert shortest(number) == text
    assert np.asarray(float(text)).astype(np.asarray(number).dtype) == number or text == "nan"

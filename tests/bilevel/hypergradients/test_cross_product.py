"""Ways to differentiate x optimizers x problems, each against central differences of what it is meant to be.

Closed forms are in `test_unrolled`, `test_schedules`, `test_implicit` and `test_cheap`; every optimizer under one way
in `test_optimizers`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Binomial, Levels, OneStep, Problem, Reversible, Unrolled
from bilevel.data import narrow
from bilevel.testing import central_differences
from tests.bilevel.helpers import KEY, NETWORK, ROWS, assert_close, estimate, network_batches

STEPS, LAST = 5, 2
WAYS = {
    "mixed none": {"checkpoint": "none"},
    "mixed step": {"checkpoint": "step"},
    "mixed sqrt": {"checkpoint": "sqrt"},
    "mixed levels": {"checkpoint": Levels(3)},
    "mixed binomial": {"checkpoint": Binomial(2)},
    "reverse none": {"mode": "reverse", "checkpoint": "none"},
    "reverse sqrt": {"mode": "reverse", "checkpoint": "sqrt"},
    "reverse binomial": {"mode": "reverse", "checkpoint": Binomial(3)},
    "forward": {"mode": "forward"},
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, 0.9, nesterov=True),
    "clipped adamw": optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(0.05, weight_decay=0.1)),
    "adam of outer": lambda outer: optax.adam(jnp.exp(outer["log_rate"])),
}


def robust(inner, outer, batch, key):
    """A linear model, its residuals weighed by the data's rows, with a penalty for each weight."""
    residual = batch["x"] @ inner - batch["y"][:, 0]
    fit = jnp.mean(outer["weight"][batch["row"]] ** 2 * (jnp.sqrt(1.0 + residual**2) - 1.0))
    return fit + jnp.sum(jnp.exp(outer["decay"]) * inner**2)


ROBUST = Problem(
    robust,
    lambda inner, outer, batch, key: jnp.mean((batch["x"] @ inner - batch["y"][:, 0]) ** 2),
    lambda key, outer: outer["start"] ** 3,
    lambda key: {
        "weight": jnp.linspace(0.5, 1.5, 12),
        "decay": jnp.array([-3.0, -2.0, -1.0]),
        "start": jnp.array([0.5, 0.8, -0.6]),
    },
)
PROBLEMS = {"network": NETWORK, "robust": ROBUST}
BATCHES, VALIDATION = network_batches(STEPS), jax.tree.map(jnp.asarray, ROWS)


def point(problem, optimizer):
    outer = PROBLEMS[problem].start_outer(KEY)
    return outer | {"log_rate": jnp.asarray(-3.0)} if optimizer == "adam of outer" else outer


@functools.cache
def expected(problem, optimizer):
    hypergradient = Unrolled(OPTIMIZERS[optimizer], STEPS)
    return central_differences(
        PROBLEMS[problem], hypergradient, None, point(problem, optimizer), BATCHES, VALIDATION, KEY
    )


# Every way with every optimizer; the problems take turns, so that every way and every optimizer meets both.
CASES = [
    (way, optimizer, sorted(PROBLEMS)[(i + j) % 2])
    for i, way in enumerate(WAYS)
    for j, optimizer in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize(("way", "optimizer", "problem"), CASES)
def test_the_whole_training(way, optimizer, problem):
    hypergradient = Unrolled(OPTIMIZERS[optimizer], STEPS, **WAYS[way])
    found = estimate(PROBLEMS[problem], hypergradient, None, point(problem, optimizer), BATCHES, VALIDATION, KEY)
    assert_close(found.grad, expected(problem, optimizer), 1e-7)


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")  # the start acts before the last steps
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("last", [1, LAST])
def test_the_last_steps(last, optimizer):
    """Truncated estimates are those of a training of the last steps alone, from where the others ended."""
    outer = point("robust", optimizer)
    before = Unrolled(OPTIMIZERS[optimizer], STEPS - last).solve(
        ROBUST, None, outer, narrow(BATCHES, 0, STEPS - last), KEY
    )
    tail = narrow(BATCHES, STEPS - last, STEPS)
    wanted = central_differences(ROBUST, Unrolled(OPTIMIZERS[optimizer], last), before, outer, tail, VALIDATION, KEY)
    ways = [Unrolled(OPTIMIZERS[optimizer], STEPS, truncate=last, **WAYS[w]) for w in ("mixed sqrt", "forward")]
    for hypergradient in ways + ([OneStep(OPTIMIZERS[optimizer], STEPS)] if last == 1 else []):
        found = estimate(ROBUST, hypergradient, None, outer, BATCHES, VALIDATION, KEY).grad
        np.testing.assert_array_equal(found["start"], 0.0)
        names = [name for name in outer if name != "start"]
        assert_close({n: found[n] for n in names}, {n: wanted[n] for n in names}, 1e-7)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_reversed_momentum(problem):
    outer = point(problem, "momentum")
    arguments = None, outer, BATCHES, VALIDATION, KEY
    wanted = central_differences(PROBLEMS[problem], Unrolled(optax.sgd(0.05, 0.9), STEPS), *arguments)
    assert_close(estimate(PROBLEMS[problem], Reversible(0.05, 0.9, STEPS), *arguments).grad, wanted, 1e-7)


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("optimizer", ["sgd", "clipped adamw"])
def test_differences_of_gradients_are_one_step(problem, optimizer):
    outer, transform = point(problem, optimizer), OPTIMIZERS[optimizer]
    arguments = None, outer, BATCHES, VALIDATION, KEY
    wanted = estimate(PROBLEMS[problem], OneStep(transform, STEPS), *arguments).grad
    found = bilevel.FiniteDifference(transform, STEPS, radius=1e-3).estimate(PROBLEMS[problem], *arguments).grad
    assert_close(found, wanted, 1e-5)

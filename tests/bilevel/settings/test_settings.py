"""Every field of every public dataclass has a rule, and refuses what is none of its values in a sentence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.settings import numeric, rules
from bilevel.settings.fields import Unfit
from tests.bilevel.helpers import LINE

SGD = optax.sgd(0.1)
STEPS = {"inner_step": 0.1, "outer_step": 0.1, "problem": LINE}
GIVEN = {
    "Problem": {name: getattr(LINE, name) for name in ("inner_loss", "outer_loss", "init_inner", "init_outer")},
    "Nested": {"problem": LINE, "hypergradient": bilevel.Unrolled(SGD, 2), "outer_optimizer": SGD},
    "PerTask": {"hypergradient": bilevel.Unrolled(SGD, 2)},
    "ImplicitSolve": {"minimise": lambda problem, outer, batch, key: outer},
    "Reversible": {"learning_rate": 0.1, "momentum": 0.9, "steps": 2},
    "MicroBatches": {"loss": LINE.inner_loss, "parts": 2},
    "Levels": {"n": 2},
    "Binomial": {"c": 2},
    "Offload": {},
    "Auto": {"bytes": 1e6},
    "Interval": {"low": 0.0, "high": 1.0},
    "Compose": {"first": bilevel.Positive(), "then": bilevel.Softplus()},
    "Sharding": {"mesh": jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])},
    "Batches": {"arrays": np.ones((4, 2)), "size": 2},
    "Indexed": {"arrays": np.ones((4, 2)), "index": np.zeros(2, int)},
    "FullBatch": {"arrays": np.ones((4, 2))},
    "Power": {"value": 0.1, "exponent": 0.5},
    "F2SA": STEPS | {"penalty": 1.0},
    "SABA": STEPS | {"inner_blocks": 1, "outer_blocks": 1},
    "SRBA": STEPS | {"period": 2},
    "VRBO": STEPS | {"period": 2},
}
RESULTS = {"Comparison", "Plan", "Smoothness", "Variance"}  # what functions return, which nobody fills in
TREES = {("Batches", "arrays"), ("Indexed", "arrays"), ("FullBatch", "arrays"), ("Indexed", "index")}


def arguments(cls):
    if cls.__name__ in GIVEN:
        return GIVEN[cls.__name__]
    names = {field.name for field in dataclasses.fields(cls)}
    return STEPS if "inner_step" in names else {"optimizer": SGD, "steps": 2} if "optimizer" in names else {}


CLASSES = [
    cls
    for name, cls in sorted(vars(bilevel).items())
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and name not in RESULTS
]
FIELDS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)]


class Nothing:
    """No value of any setting."""


@pytest.mark.parametrize("cls", CLASSES)
def test_the_values_that_are_meant_are_taken(cls):
    made = cls(**arguments(cls))
    leaves, structure = jax.tree.flatten(made)
    assert jax.tree.structure(jax.tree.unflatten(structure, leaves)) == structure
    assert hash(structure) == hash(jax.tree.structure(cls(**arguments(cls))))


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_no_field_takes_what_is_none_of_its_values(cls, name):
    refused = 0
    for wrong in ("1e-3", "", Nothing, Nothing(), [], 1j, np.nan, -1, True, 1.5):
        try:
            cls(**(arguments(cls) | {name: wrong}))
        except (TypeError, ValueError) as error:
            assert any(word in str(error) for word in (cls.__name__, name, "data set")), str(error)
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
    # Texts, foreign objects and classes are never a setting; a data set may hold any numbers, and a domain none.
    assert refused >= (3 if (cls.__name__, name) in TREES or name in ("domain", "mutable") else 5)


def fields(*types):
    """The fields of all classes whose type begins so."""
    return [(cls, f.name) for cls in CLASSES for f in dataclasses.fields(cls) if str(f.type).startswith(types)]


def refuses(cls, name, *values):
    for wrong in values:
        with pytest.raises(ValueError, match=rf"{cls.__name__}\({name}="):
            cls(**(arguments(cls) | {name: wrong}))


@pytest.mark.parametrize(("cls", "name"), fields("int"))
def test_counts_are_integers_and_never_booleans(cls, name):
    refuses(cls, name, True, 1.5, 2.0, 0, -1, "2", np.nan, np.ones(2), np.bool_(True))


@pytest.mark.parametrize(("cls", "name"), fields("StepSize"))
def test_step_sizes_are_numbers_or_schedules(cls, name):
    refuses(cls, name, "0.1", np.nan, np.inf, -0.1, True, [0.1], jnp.asarray(np.nan), jnp.asarray(1j))
    refuses(cls, name, SGD, optax.adam, optax.constant_schedule, lambda: 0.1, lambda step: "0.1", lambda step: (0.1,))


def test_integers_of_numpy_become_those_of_python():
    unrolled = bilevel.Unrolled(SGD, np.int64(3), truncate=np.int32(2))
    assert type(unrolled.steps) is int and type(unrolled.truncate) is int
    assert unrolled == bilevel.Unrolled(SGD, 3, truncate=2)


@pytest.mark.parametrize("cls", CLASSES)
def test_tree_transformations_are_not_checked(cls):
    made = cls(**arguments(cls))
    for placeholder in (object(), "label", None, True):
        changed = jax.tree.map(lambda _, placeholder=placeholder: placeholder, made)
        assert all(leaf is placeholder for leaf in jax.tree.leaves(changed))


def test_a_step_size_may_be_traced():
    @jax.jit
    def rate(x):
        return bilevel.SOBA(LINE, x, jnp.asarray(0.1)).inner_step

    assert rate(0.3) == 0.3
    solvers = jax.vmap(lambda x: bilevel.SOBA(LINE, x, 0.1))(jnp.asarray([0.1, 0.2]))
    np.testing.assert_array_equal(solvers.inner_step, [0.1, 0.2])


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (numeric.real(low=0.0), [0, 0.5, np.float32(1), jnp.asarray(2.0)], [-1, np.inf, np.nan, "1", True, None]),
        (numeric.real(above=0.0, infinite=True), [np.inf, 1e-300], [0, -np.inf, np.nan]),
        (rules.optional(numeric.integer(2)), [None, 2], [1, False, 2.0]),
        (
            rules.random_key,
            [jax.random.key(0), jax.random.PRNGKey(0)],
            [0, jax.random.split(jax.random.key(0)), None],
        ),
        (
            rules.function("a", "b"),
            [lambda a, b: a, functools.partial(max, 1), print],
            [lambda a: a, max.__class__, 3],
        ),
        (rules.boolean, [True, np.bool_(False)], [0, 1, "yes", None]),
    ],
)
def test_rules(rule, good, bad):
    for value in good:
        rule(value)
    for value in bad:
        with pytest.raises(Unfit):
            rule(value)


def test_the_schedules_of_a_run_without_an_end_are_looked_at_here_and_there():
    problem = bilevel.Problem(lambda *a: a[0], lambda *a: a[0], lambda key, outer: 1.0, lambda key: 1.0)
    for wrong_from, step in ((7, 7), (2**31 - 3, 2**31 - 2)):
        rate = lambda step, wrong_from=wrong_from: jnp.where(step < wrong_from, 0.1, -1.0)  # noqa: E731
        with pytest.raises(ValueError, match=f"the schedule gives -1 for step {step}, but a value"):
            numeric.check_schedules(bilevel.SOBA(problem, rate, 0.1), 0, 2**31 - 1)


def test_schedules_of_more_steps_than_are_counted_are_looked_at_as_far_as_they_are():
    """Steps are integers of 32 bits: a number beyond them would be taken for a negative one."""
    problem = bilevel.Problem(lambda *a: a[0], lambda *a: a[0], lambda key, outer: 1.0, lambda key: 1.0)
    numeric.check_schedules(bilevel.SOBA(problem, bilevel.Power(0.1, 0.5), 0.1), 0, 10**12)
    numeric.check_schedules(bilevel.SOBA(problem, bilevel.Power(0.1, 0.5), 0.1), 10**12, 10**13)


def test_a_function_that_is_none_is_told_what_it_should_take_and_return():
    with pytest.raises(Unfit, match=r"^must be a function \(a, b\)$"):
        rules.function("a", "b")(3)
    with pytest.raises(Unfit, match=r"^must be a function \(step\) -> number, but takes \(\)$"):
        rules.function("step", result="number")(lambda: 0.1)

"""What was not meant is refused in one sentence that names it: losses, starts, optimizers, data, states, keys."""

import dataclasses
import functools

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
import bilevel.extend
from bilevel import Problem, Unrolled
from bilevel.problem.problem import projected
from bilevel.testing import check_hypergradient
from tests.bilevel.helpers import KEY, LINE, LINE_SOLVER

SGD = optax.sgd(0.1)
OUTER = jnp.full(2, 0.3)
IMPLICIT = bilevel.Implicit(SGD, 2)


def inner(w, o, b, k):
    return jnp.sum((w - o) ** 2)


def outer(w, o, b, k):
    return jnp.sum((w - 1.0) ** 2)


def problem(**changes):
    return dataclasses.replace(LINE, **changes)


def start_inner(value):
    return problem(init_inner=lambda key, outer: value).start_inner(KEY, OUTER)


def start_outer(value):
    """The start of a solver, which has something to learn."""
    return dataclasses.replace(LINE_SOLVER, problem=problem(init_outer=lambda key: value)).init(KEY)


def estimate(*args, using=IMPLICIT):
    """`using.estimate` with good arguments, the first of them changed by `args`."""
    good = (LINE, None, OUTER, None, None, KEY)
    return using.estimate(*args, *good[len(args) :])


def run(solver=LINE_SOLVER, **changes):
    return bilevel.run(solver, **({"steps": 1, "progress": False} | changes))


def recording(value):
    return run(record=lambda state: value)


ROWS = bilevel.Batches(np.ones(4), 2)
SHAPE = jax.ShapeDtypeStruct((2,), jnp.float64)
SPLITS = datasets.DatasetDict({name: datasets.Dataset.from_dict({"x": [1.0, 2.0]}) for name in ("train", "test")})


def writes(w, o, b, k):
    w["a"] = w["a"] + 1.0
    return jnp.sum(w["a"] ** 2 * o)


class Counted(nnx.Module):
    def __init__(self):
        self.w, self.rngs = nnx.Param(jnp.zeros(2)), nnx.Rngs(0)


MODULE = Counted()
LIST = [{"x": np.ones((2, 3))}, {"x": np.ones((2, 3))}]

MISUSE = {
    # Problem
    "a loss of three arguments": (
        lambda: problem(inner_loss=lambda w, o, b: 0.0),
        r"inner_loss.*\(inner, outer, batch, key\).*takes \(w, o, b\)",
    ),
    "a loss of five arguments": (
        lambda: problem(outer_loss=lambda w, o, b, k, x: 0.0),
        r"outer_loss.*takes \(w, o, b, k, x\)",
    ),
    "a loss that wants a keyword": (lambda: problem(outer_loss=lambda w, o, b, k, *, x: 0.0), r"outer_loss.*takes"),
    "a bound loss of one too many": (lambda: problem(inner_loss=jax.tree_util.Partial(inner, 1)), "inner_loss.*takes"),
    "a loss that is a number": (lambda: problem(inner_loss=0.0), r"Problem\(inner_loss=0.0\): must be a function"),
    "a loss that is a class": (lambda: problem(outer_loss=Counted), "outer_loss=the class Counted"),
    "a start that is an array": (lambda: problem(init_inner=jnp.zeros(2)), r"init_inner=float64\[2\]"),
    "a start of the key alone": (lambda: problem(init_inner=lambda key: 0.0), r"init_inner.*takes \(key\)"),
    "an outer start of two": (lambda: problem(init_outer=lambda key, outer: 0.0), "init_outer.*takes"),
    "a projection without argument": (lambda: problem(project=lambda: 0.0), "project.*takes"),
    "has_aux as a word": (lambda: problem(has_aux="yes"), "has_aux='yes'.*True or False"),
    "a domain without parentheses": (
        lambda: problem(domain=bilevel.Positive),
        r"domain=the class Positive.*Positive\(...\)",
    ),
    "a domain by name": (lambda: problem(domain={"a": "positive"}), "domain=.*bijector"),
    # What starts return
    "an integer outer variable": (lambda: start_outer(3), "init_outer returned nothing that can be learned.*int64"),
    "boolean gates": (lambda: start_outer(jnp.asarray([True])), "nothing that can be learned.*bool"),
    "no outer variable": (lambda: start_outer({}), "nothing that can be learned.*no leaf"),
    "an empty outer array": (lambda: start_outer(jnp.zeros(0)), "nothing that can be learned"),
    "a key alone": (lambda: start_outer(jax.random.key(0)), "nothing that can be learned"),
    "a text among outer": (lambda: start_outer({"a": 1.0, "b": "x"}), r"init_outer returned a str.*\['b'\]"),
    "nothing to train": (lambda: start_inner({}), "init_inner returned nothing that can be trained"),
    "integers to train": (lambda: start_inner({"n": 3}), "nothing that can be trained.*'n'"),
    "a function among inner": (lambda: start_inner({"f": jnp.tanh, "w": 1.0}), r"init_inner returned .*tanh.*\['f'\]"),
    "a module of nnx": (lambda: start_inner({"net": MODULE}), r"nnx object \(Counted\) in leaf \['net'\].*nnx.split"),
    "counters of nnx": (lambda: start_inner(nnx.split(MODULE)[1]), "nnx Rng.* no parameter.*mutable"),
    "a loss that writes into inner": (
        lambda: estimate(problem(inner_loss=writes, init_inner=lambda k, o: {"a": o * 0.0})),
        "inner_loss changed inner in place",
    ),
    "a single array outside": (
        lambda: problem(domain=bilevel.Positive(), init_outer=lambda key: -jnp.ones(2)).start_outer(KEY),
        "in outer, which is outside",
    ),
    "a single array that was captured": (
        lambda: estimate(problem(inner_loss=lambda w, o, b, k: jnp.sum((w - OUTER) ** 2))),
        "inner_loss holds outer as a constant",
    ),
    "a single array of texts": (lambda: start_outer(np.asarray(["a"])), r"returned values of type <U1, .* numbers\.$"),
    "an array for a dict": (
        lambda: projected(problem(project=lambda o: {"a": o}), OUTER),
        r"project returned \['a'\] float64\[2\] for an outer variable that is float64\[2\]: ",
    ),
    "gates that are one array": (
        lambda: bilevel.allocate(1, key=KEY).init(jnp.ones(2, int)),
        "the gates are int64, but must be floating",
    ),
    # Optimizers
    "adam without parentheses": (lambda: Unrolled(optax.adam, 2), r"optimizer=the function adam.*optax.adam\(...\)"),
    "a partial of adam": (lambda: Unrolled(functools.partial(optax.adam, b1=0.5), 2), "makes one"),
    "injected adam": (lambda: Unrolled(optax.inject_hyperparams(optax.adam), 2), "makes one"),
    "a schedule as optimizer": (
        lambda: Unrolled(optax.cosine_decay_schedule(0.1, 5), 2),
        r"must be an optimizer, and not a schedule step -> number: .* as in optax.adam\(schedule\)",
    ),
    "a maker of schedules": (
        lambda: Unrolled(optax.linear_schedule, 2),
        r"what makes a schedule: .* as in optax.adam\(optax.linear_schedule\(...\)\)",
    ),
    "a loss of optax": (lambda: Unrolled(optax.l2_loss, 2), r"must be an optimizer: call l2_loss\(...\) .*if"),
    "a type of optax": (lambda: Unrolled(optax.OptState, 2), "must be an optax.GradientTransformation or a function"),
    "a maker, in words": (lambda: Unrolled(optax.adam, 2), r"adam\): must be an optimizer, and not what makes one"),
    "an outer optimizer's class": (
        lambda: bilevel.Nested(LINE, IMPLICIT, optax.MultiSteps),
        "outer_optimizer=the class",
    ),
    "an optimizer of two arguments": (lambda: Unrolled(lambda a, b: SGD, 2), "takes"),
    "a learning rate for an optimizer": (lambda: Unrolled(0.1, 2), "optimizer=0.1"),
    "sophia": (
        lambda: Unrolled(optax.contrib.sophia(0.1), 2).solve(LINE, None, OUTER, None, KEY),
        "more than value and grad",
    ),
    # Nested and its parts
    "swapped parts": (lambda: bilevel.Nested(IMPLICIT, LINE, SGD), r"Nested\(problem=.*must be a bilevel.Problem"),
    "an estimator's class": (lambda: bilevel.Nested(LINE, Unrolled, SGD), r"hypergradient=.*Unrolled\(...\)"),
    "no estimator": (lambda: bilevel.Nested(LINE, None, SGD), "hypergradient=None"),
    "CG without parentheses": (
        lambda: bilevel.Implicit(SGD, 2, linear_solver=bilevel.CG),
        r"linear_solver=.*CG\(...\)",
    ),
    "no linear solver": (lambda: bilevel.Implicit(SGD, 2, linear_solver=None), "linear_solver=None"),
    "an infinite radius": (lambda: bilevel.FiniteDifference(SGD, 2, radius=np.inf), "radius=inf.*finite"),
    "too many truncated steps": (lambda: Unrolled(SGD, 2, truncate=3), "truncate=3"),
    # estimate
    "swapped arguments": (
        lambda: estimate(None, LINE),
        r"Implicit.estimate\(problem=None\): must be a bilevel.Problem",
    ),
    "a seed for a key": (lambda: estimate(LINE, None, OUTER, None, None, 0), r"key=0\): must be a random key"),
    "parameters for a state": (lambda: estimate(LINE, jnp.zeros(2)), "inner_state=.*InnerState"),
    "a state of another optimizer": (
        lambda: estimate(LINE, Unrolled(optax.adam(0.1), 2).init(LINE, OUTER, KEY)),
        "not one of this optimizer",
    ),
    "an integer point": (lambda: estimate(LINE, None, jnp.asarray(3)), "nothing that can be learned"),
    "a list of batches": (lambda: estimate(LINE, None, OUTER, LIST), "list of 2 batches"),
    "a source of batches": (lambda: estimate(LINE, None, OUTER, bilevel.Batches(np.ones((4, 1)), 2)), "draw them"),
    "an iterator of batches": (lambda: estimate(LINE, None, OUTER, iter([1])), "iterator"),
    "no batch where one is read": (
        lambda: estimate(problem(inner_loss=lambda w, o, b, k: jnp.sum((w - o - b["x"]) ** 2))),
        "inner_loss was called with batch=None.*inner_data",
    ),
    "no outer batch where one is read": (
        lambda: estimate(problem(outer_loss=lambda w, o, b, k: jnp.sum(w @ b))),
        "outer_loss was called with batch=None.*outer_data",
    ),
    "a problem that is none": (lambda: bilevel.value_and_hypergrad(IMPLICIT, LINE), "problem="),
    # Data
    "half a row": (lambda: bilevel.Batches(np.ones(4), 1.5), r"Batches\(size=1.5\)"),
    "a truth for a size": (lambda: bilevel.Batches(np.ones(4), True), r"Batches\(size=True\)"),
    "another order": (lambda: bilevel.Batches(np.ones(4), 2, order="row"), "order='row'.*'rows', 'blocks'"),
    "texts": (lambda: bilevel.Batches({"t": np.asarray(["a", "b"])}, 1), r"values of type <U1.*\['t'\]"),
    "numbers that are no arrays": (lambda: bilevel.Batches([[1, 2], [3, 4]], 1), r"single number 1.*\[0\]\[0\]"),
    "batches to draw from": (lambda: bilevel.Batches(LIST, 1), "list of 2 batches"),
    "a row that is not there": (lambda: bilevel.Indexed(np.ones((3, 1)), np.asarray([0, 3])), "row 3.*3 rows"),
    "a float among row numbers": (lambda: bilevel.Indexed(np.ones((3, 1)), np.asarray([0.0, 1.0])), "integers"),
    # run and what is like it
    "no solver": (lambda: run(None), r"run\(solver=None\)"),
    "a solver's class": (lambda: run(bilevel.SOBA), r"solver=.*SOBA\(...\)"),
    "a problem for a solver": (lambda: run(LINE), r"run\(solver=Problem"),
    "a truth for steps": (lambda: run(steps=True), r"run\(steps=True\)"),
    "a seed for a run": (lambda: run(key=0), r"run\(key=0\)"),
    "a callback that is no list": (lambda: run(callbacks=print), "callbacks=.*sequence"),
    "a callback of one argument": (lambda: run(callbacks=[lambda step: None]), r"callbacks=.*takes \(step\)"),
    "a list of batches in a run": (
        lambda: run(inner_data=LIST),
        r"inner_data was given a list of 2 batches",
    ),
    "data by name": (lambda: run(outer_data="rows"), "outer_data.*'rows'"),
    "no repeats": (lambda: bilevel.compare(LINE, {"a": IMPLICIT}, reference="a", repeats=0), "repeats=0"),
    "one estimator for many": (lambda: bilevel.compare(LINE, IMPLICIT, reference="a"), "hypergradients="),
    "a class to compare": (lambda: bilevel.compare(LINE, {"a": Unrolled}, reference="a"), r"hypergradients\['a'\]"),
    "one sample": (lambda: bilevel.variance(LINE, IMPLICIT, samples=1), "samples=1"),
    "an iterator for the variance": (lambda: bilevel.variance(LINE, IMPLICIT, inner_data=iter([1])), "iterator"),
    "directions of truth": (lambda: check_hypergradient(LINE, IMPLICIT, directions=True), "directions=True"),
    # Records, folders, sources of sources
    "a folder without a name": (lambda: run(checkpoint_dir=""), "checkpoint_dir=''.*name of a folder"),
    "a number for a folder": (lambda: bilevel.extend.Checkpoints(3), r"Checkpoints\(folder=3\).*name of a folder"),
    "a record that is a list": (lambda: recording([1.0]), "record returned a list, but must return {name: array}"),
    "a record that is an array": (lambda: recording(jnp.ones(2)), "record returned a .*, but must return {name"),
    "a record that is nothing": (lambda: recording(None), "record returned a NoneType, but must"),
    "a record of nothing": (lambda: recording({"a": None}), "record returned None as 'a', but must"),
    "a record of a dict": (lambda: recording({"a": {"b": 1.0}}), "record returned a dict as 'a', but must"),
    "a record of a text": (lambda: recording({"a": "x"}), "record returned a str as 'a', but must"),
    "a record of a key": (lambda: recording({"a": KEY}), "record returned random keys as 'a'.*key_data"),
    "a record of a state": (lambda: run(record=lambda state: {"a": state.inner}), "a InnerState as 'a', but must"),
    "a record by a number": (lambda: recording({1: 1.0}), "record returned a dict, but must return {name: array}"),
    "a callback of many answers": (
        lambda: run(callbacks=[lambda *_: np.array([True, False])]),
        r"callbacks=.*returned bool\[2\], but must return True",
    ),
    "batches of batches": (lambda: bilevel.Batches(ROWS, 1), "Batches was given Batches.*arrays themselves"),
    "batches of full batches": (lambda: bilevel.Batches(bilevel.FullBatch(np.ones(4)), 1), "was given FullBatch"),
    "a full batch of batches": (lambda: bilevel.FullBatch((ROWS, ROWS)), "FullBatch was given Batches"),
    "data in sources": (lambda: run(inner_data={"a": ROWS}), "inner_data was given Batches"),
    "several data sets": (lambda: run(inner_data=SPLITS), r"DatasetDict of 'train', 'test'.*data\['train'\]"),
    "a data set in a dict": (lambda: bilevel.Batches({"a": SPLITS["train"]}, 1), r"dict of 'a' is several data sets"),
    "no numbers to look at": (lambda: bilevel.warn_if_inexact(3), "info=3.*numbers by name"),
    "nothing to look at": (lambda: bilevel.warn_if_inexact(None), "info=None.*numbers by name"),
    "a shape for a start": (lambda: start_outer(SHAPE), "init_outer returned a ShapeDtypeStruct"),
    "a shape for outer": (lambda: estimate(LINE, None, SHAPE), r"outer=.*ShapeDtypeStruct.*give the array"),
    "a text for a rate": (
        lambda: estimate(using=Unrolled(optax.sgd("0.1"), 2)),
        r"optimizer cannot update .*\(a learning rate and the like are numbers",
    ),
    # Outer transformations
    "a budget that is NaN": (lambda: bilevel.allocate(np.nan, key=KEY), "budget=nan"),
    "a seed for ties": (lambda: bilevel.allocate(1, key=0), "key=0"),
    "integer gates": (
        lambda: bilevel.allocate(1, key=KEY).init({"a": jnp.ones(2, int)}),
        r"gates in leaf \['a'\] are int64",
    ),
    "an option of another set": (lambda: bilevel.project("simplex", lower=0.0), "lower"),
    "a set of NaN": (lambda: bilevel.project("box", lower=0.0, upper=np.nan), "upper=nan"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_refused_in_one_sentence(name):
    call, message = MISUSE[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_python_are_recorded_as_they_are():
    found = run(record=lambda state: {"float": 0.5, "integer": 3, "numpy": np.float32(2)}, steps=2).history
    for name, value in {"float": 0.5, "integer": 3, "numpy": 2}.items():
        np.testing.assert_array_equal(found[name], [value, value])


def test_a_raw_random_key_in_outer_is_told_to_be_a_constant():
    raw = {"a": OUTER, "key": jax.random.PRNGKey(0)}
    with pytest.warns(UserWarning, match=r"init_outer returned uint32\[2\] in leaf \['key'\], a constant"):
        start_outer(raw)


def test_scores_that_are_nan_are_refused_or_told():
    transform = bilevel.allocate(1, key=KEY)
    gates, scores = {"a": jnp.ones(2)}, {"a": jnp.asarray([1.0, np.nan])}
    state = transform.init(gates)
    with pytest.raises(ValueError, match=r"scores in leaf \['a'\] hold a NaN"):
        transform.update(scores, state, gates)
    updates, _ = jax.jit(transform.update)(scores, state, gates)
    assert np.isnan(updates["a"]).all()


@pytest.mark.parametrize("array", [np.asarray([1, 2**40]), np.asarray([-(2**33)]), np.asarray([1e300])])
def test_numbers_that_narrow_types_would_lose_are_refused(array):
    bilevel.Batches(array, 1)
    with jax.enable_x64(False):
        for call in (
            lambda: bilevel.Batches({"y": array}, 1),
            lambda: bilevel.FullBatch({"y": array}),
            lambda: run(inner_data={"y": array}),
            lambda: start_outer({"y": array, "x": 1.0}),
        ):
            with pytest.raises(ValueError, match=r"too large for .*\['y'\]"):
                call()
        assert bilevel.Batches(np.asarray([1, 2**31 - 1]), 1).arrays[1] == 2**31 - 1


def test_a_function_of_outer_is_still_an_optimizer():
    for optimizer in (
        lambda outer: optax.sgd(outer),
        lambda outer, rate=0.1: optax.sgd(rate),
        optax.MultiSteps(SGD, 2),
    ):
        assert Unrolled(optimizer, 2).optimizer is optimizer


def test_parameters_of_a_split_module_are_trained():
    params = nnx.split(MODULE, nnx.Param, ...)[1]
    found = start_inner({"params": params})
    assert jax.tree.leaves(found)[0].shape == (2,)


# Complex variables.

COMPLEX = Problem(
    lambda w, o, b, k: jnp.sum(jnp.abs(w - (1 + 2j) * o) ** 2),
    lambda w, o, b, k: jnp.sum(jnp.abs(w - 1j) ** 2),
    lambda key, o: jnp.full(2, 0.1 + 0.2j),
    lambda key: jnp.asarray(0.3),
)
REAL = Problem(
    lambda v, o, b, k: COMPLEX.inner_loss(jax.lax.complex(v[0], v[1]), o, b, k),
    lambda v, o, b, k: COMPLEX.outer_loss(jax.lax.complex(v[0], v[1]), o, b, k),
    lambda key, o: jnp.asarray([[0.1, 0.1], [0.2, 0.2]]),
    COMPLEX.init_outer,
)


@pytest.mark.parametrize("make", [Unrolled, functools.partial(Unrolled, mode="forward"), bilevel.OneStep])
def test_complex_inner_variables_are_those_of_their_parts(make):
    found, wanted = (make(SGD, 3).estimate(p, None, jnp.asarray(0.3), None, None, KEY).grad for p in (COMPLEX, REAL))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "estimator",
    [
        IMPLICIT,
        bilevel.FixedPoint(SGD, 2),
        bilevel.ImplicitSolve(lambda problem, outer, batch, key: jnp.zeros(2, complex)),
        bilevel.FiniteDifference(SGD, 2),
        bilevel.SAMA(SGD, 2),
        bilevel.EvolutionStrategies(SGD, 2, population=2),
        bilevel.PersistentES(SGD, 2, population=2),
        bilevel.Reversible(0.1, 0.9, 2),
    ],
)
def test_other_estimators_refuse_complex_variables(estimator):
    with pytest.raises(ValueError, match="does not take complex variables"):
        estimator.estimate(COMPLEX, None, jnp.asarray(0.3), None, None, KEY)
    with pytest.raises(ValueError, match="does not take complex variables"):
        estimator.estimate(LINE, None, jnp.full(2, 0.3 + 0j), None, None, KEY)


def test_solvers_with_steps_of_their_own_refuse_complex_variables():
    for solver in (bilevel.SOBA(COMPLEX, 0.1, 0.1), bilevel.BOME(COMPLEX, 0.1, 0.1), bilevel.PZOBO(COMPLEX, 0.1, 0.1)):
        with pytest.raises(ValueError, match=f"{type(solver).__name__} does not take complex variables"):
            solver.init(KEY)
    with pytest.raises(ValueError, match="complex"):
        IMPLICIT.solve(COMPLEX, None, jnp.asarray(0.3), None, KEY)
    with pytest.raises(ValueError, match="domain of real numbers"):
        problem(init_outer=lambda key: 1j, domain=bilevel.Positive()).start_outer(KEY)


def test_a_domain_of_a_constant_is_refused():
    start = lambda key: {"a": 0.5, "b": 1, "c": {"d": 2.0, "steps": 3}}  # noqa: E731
    with pytest.raises(ValueError, match="Positive is the domain of a leaf of dtype int64, a constant"):
        problem(init_outer=start, domain={"a": None, "b": bilevel.Positive(), "c": None}).start_outer(KEY)
    # Of a subtree what is learned is mapped, as ever, and the rest is not.
    problem(init_outer=start, domain={"a": None, "b": None, "c": bilevel.Positive()}).start_outer(KEY)


# Half precision.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("which", ["inner", "outer"])
def test_adam_in_half_precision_moves_as_in_single(dtype, which):
    def outcome(dtype):
        kinds = {"inner": jnp.float32, "outer": jnp.float32} | {which: dtype}
        single = Problem(
            lambda w, o, b, k: jnp.sum((w.astype(jnp.float32) - o.astype(jnp.float32)) ** 2),
            lambda w, o, b, k: 1e-3 * jnp.sum((w.astype(jnp.float32) - 1.0) ** 2),
            lambda key, o: jnp.zeros(2, kinds["inner"]),
            lambda key: jnp.full(2, 0.5, kinds["outer"]),
        )
        solver = bilevel.Nested(single, Unrolled(optax.adam(0.01), 2), optax.adam(0.01))
        state = solver.init(KEY)
        for _ in range(2):
            state, metrics = solver.step(state, None, None)
        assert metrics["hypergradient_norm"] > 0
        return np.asarray(state.outer, np.float32)

    np.testing.assert_allclose(outcome(dtype), outcome(jnp.float32), atol=2e-2)


# Third levels.


def test_a_hypergradient_by_conjugate_gradients_is_not_differentiated_backwards():
    grad = lambda o: IMPLICIT.estimate(LINE, None, o, None, None, KEY).grad  # noqa: E731
    with pytest.raises(ValueError, match=r"iterative linear solver.*cannot be differentiated in reverse mode"):
        jax.jacrev(grad)(OUTER)


def test_training_in_mixed_mode_inside_a_loss_is_what_forward_mode_blames():
    def validation(w, o, b, k):
        return jnp.sum(Unrolled(SGD, 2).solve(LINE, None, w, None, k).params ** 2)

    nested = problem(outer_loss=validation)
    with pytest.raises(ValueError, match=r"outer_loss.*the training inside it has a gradient with a rule.*'reverse'"):
        Unrolled(SGD, 2, mode="forward").estimate(nested, None, OUTER, None, None, KEY)


# Empty leaves.


def test_empty_leaves_are_passed_over():
    empty = Problem(
        lambda w, o, b, k: jnp.sum((w["a"] - o["a"]) ** 2) + jnp.sum(w["b"]),
        lambda w, o, b, k: jnp.sum((w["a"] - 1.0) ** 2) + jnp.sum(o["b"]),
        lambda key, o: {"a": jnp.zeros(2), "b": jnp.zeros(0)},
        lambda key: {"a": OUTER, "b": jnp.zeros(0)},
    )
    assert check_hypergradient(empty, Unrolled(SGD, 2)).verdict == "exact"
    found = bilevel.Reversible(0.1, 0.5, 2).estimate(empty, None, empty.start_outer(KEY), None, None, KEY)
    assert found.grad["b"].shape == (0,) and np.isfinite(found.grad["a"]).all()


def test_a_hypergradient_over_tasks_is_checked():
    tasks = Problem(
        lambda w, o, b, k: jnp.sum((w - o - b) ** 2),
        lambda w, o, b, k: jnp.sum((w - b) ** 2),
        LINE.init_inner,
        LINE.init_outer,
    )
    data = bilevel.Batches((jnp.asarray([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), jnp.ones((3, 2))), 3)
    assert check_hypergradient(tasks, bilevel.PerTask(Unrolled(SGD, 2)), inner_data=data).verdict == "exact"

"""Problems of nnx modules against the same problems of plain trees, and what modules may and may not do."""

import contextlib
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
import bilevel.nnx
from bilevel import Binomial, Levels, Problem, Unrolled
from bilevel.nnx import Outer
from bilevel.testing import check_hypergradient
from tests.bilevel.helpers import KEY, assert_close, assert_equal, estimate, without_keys

X = np.asarray(jax.random.normal(jax.random.key(1), (12, 3)))
Y = np.asarray(jax.random.normal(jax.random.key(2), (12,)))
BATCHES = (jnp.asarray(X.reshape(3, 4, 3)), jnp.asarray(Y.reshape(3, 4)))
VALIDATION = (jnp.asarray(X), jnp.asarray(Y))
ROWS = bilevel.Batches((X, Y), 4)
RATE = 0.25


@contextlib.contextmanager
def rules_of_flax():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def under(rules):
    """A decorator: flax calls functions that are not strict about dtypes."""

    def decorate(function):
        @functools.wraps(function)
        def inside(*args, **kwargs):
            with rules():
                return function(*args, **kwargs)

        return inside

    return decorate


class Network(nnx.Module):
    """Two layers with batch normalisation and dropout, weights of the rows of a batch, and a decay."""

    @under(rules_of_flax)
    def __init__(self, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=float, rngs=rngs)
        self.layers = nnx.List([linear(3, 4), linear(4, 1)])
        self.norm = nnx.BatchNorm(4, momentum=0.6, param_dtype=float, rngs=rngs)
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))
        self.drop = nnx.Dropout(RATE, rngs=rngs)
        self.weight, self.decay = Outer(jnp.linspace(0.5, 1.5, 4)), Outer(jnp.asarray(-3.0))

    @under(rules_of_flax)
    def __call__(self, x):
        hidden = self.norm(self.layers[0](x))
        return self.layers[1](self.drop(hidden / (1.0 + hidden**2)))[:, 0]


def training_loss(model, batch, key):
    x, y = batch
    fit = jnp.mean(model.weight[...] * (model(x) - y) ** 2)
    return fit + jnp.exp(model.decay[...]) * jnp.sum(model.layers[0].kernel[...] ** 2)


def validation_loss(model, batch, key):
    model.eval()
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


MODULE = bilevel.nnx.problem(Network, training_loss, validation_loss)

# The same by hand: dicts of arrays, and a mask from the key of the step.


def forward(inner, x, mask):
    params, stats = inner["params"], inner["mutable"]["norm"]
    hidden = x @ params["layers"][0]["kernel"]
    if mask is not None:
        mean = jnp.mean(hidden, 0)
        var = jnp.maximum(0.0, jnp.mean(hidden**2, 0) - mean**2)
        new = {"mean": 0.6 * stats["mean"] + 0.4 * mean, "var": 0.6 * stats["var"] + 0.4 * var}
    else:
        mean, var, new = stats["mean"], stats["var"], stats
    scale = params["norm"]["scale"] * jax.lax.rsqrt(var + 1e-5)
    hidden = (hidden - mean[None]) * scale[None] + params["norm"]["bias"][None]
    hidden = hidden / (1.0 + hidden**2)
    if mask is not None:
        hidden = jnp.where(mask, hidden / (1 - RATE), 0.0)
    return (hidden @ params["layers"][1]["kernel"])[:, 0], {"mutable": {"norm": new}}


def training_by_hand(inner, outer, batch, key):
    x, y = batch
    stream = jax.random.fold_in(jax.random.split(key)[1], 0)
    mask = jax.random.bernoulli(jax.random.fold_in(stream, 0), 1 - RATE, (4, 4))
    prediction, updates = forward(inner, x, mask)
    fit = jnp.mean(outer["weight"] * (prediction - y) ** 2)
    return fit + jnp.exp(outer["decay"]) * jnp.sum(inner["params"]["layers"][0]["kernel"] ** 2), updates


def validation_by_hand(inner, outer, batch, key):
    return jnp.mean((forward(inner, batch[0], None)[0] - batch[1]) ** 2)


def start_by_hand(key, outer):
    return MODULE.init_inner(key, outer)


BY_HAND = Problem(training_by_hand, validation_by_hand, start_by_hand, MODULE.init_outer, mutable=("mutable",))
OUTER = MODULE.start_outer(KEY)
ARGUMENTS = None, OUTER, BATCHES, VALIDATION, KEY
SGD = optax.sgd(0.1, 0.9)
EQUAL = [
    Unrolled(SGD, 3),
    Unrolled(SGD, 3, checkpoint="step"),
    Unrolled(SGD, 3, checkpoint=Levels(2), mode="reverse"),
    Unrolled(SGD, 3, checkpoint=Binomial(2)),
    Unrolled(SGD, 3, mode="forward"),
    Unrolled(SGD, 3, truncate=2),
    bilevel.Replay(SGD, 3, segment=2),
    bilevel.Implicit(SGD, 3),
    bilevel.FixedPoint(SGD, 3),
    bilevel.FirstOrder(SGD, 3),
    bilevel.OneStep(SGD, 3),
    bilevel.FiniteDifference(SGD, 3),
    bilevel.PersistentES(SGD, 3, population=4),
]


def named(hypergradient):
    """The same in every process: a representation would tell where its functions lie."""
    return f"{type(hypergradient).__name__}-{getattr(hypergradient, 'checkpoint', '')}"


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
@pytest.mark.parametrize("hypergradient", EQUAL, ids=named)
def test_a_module_is_the_same_problem_by_hand(hypergradient):
    found, expected = (estimate(problem, hypergradient, *ARGUMENTS) for problem in (MODULE, BY_HAND))
    assert_close(found.value, expected.value, 1e-12)
    assert_close(without_keys(found.inner_state.params), without_keys(expected.inner_state.params), 1e-12)
    assert_close(found.grad, expected.grad, 1e-12)
    if not isinstance(hypergradient, bilevel.FirstOrder):
        assert np.linalg.norm(found.grad["weight"]) > 0
    assert np.linalg.norm(found.inner_state.params["mutable"]["norm"]["mean"]) > 1e-3


def test_trees_are_nested_as_the_module_is():
    inner = MODULE.start_inner(KEY, OUTER)
    assert jax.tree.map(jnp.shape, OUTER) == {"weight": (4,), "decay": ()}
    assert {*inner} == {"params", "mutable"} and inner["params"]["layers"][1]["kernel"].shape == (4, 1)
    assert {*inner["mutable"]["norm"]} == {"mean", "var"}
    # Another key, another module.
    assert not np.array_equal(
        MODULE.start_inner(jax.random.key(8), OUTER)["params"]["layers"][0]["kernel"],
        inner["params"]["layers"][0]["kernel"],
    )


def test_the_contract_passes():
    checked = check_hypergradient(
        MODULE, Unrolled(SGD, 3), outer=OUTER, inner_data=ROWS, outer_data=VALIDATION, key=KEY
    )
    assert checked.verdict == "exact", str(checked)


class Found(NamedTuple):
    outer: object
    inner: object


class Start(NamedTuple):
    params: object


class Line(nnx.Module):
    """A linear function of rows of which dropout takes some."""

    @under(rules_of_flax)
    def __init__(self, rngs):
        self.w, self.shift = nnx.Param(jnp.full(3, 0.5)), Outer(jnp.zeros(3))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.rngs = nnx.Rngs(noise=rngs.noise())

    @under(rules_of_flax)
    def __call__(self, x):
        return self.drop(x) @ (self.w[...] + self.shift[...])


def noisy(model, batch, key):
    ones = jnp.ones((8, 8))
    with rules_of_flax():
        masks = model.drop(ones) + model.drop(ones), model.rngs.noise.normal((8,))
    return jnp.mean((model(batch[0]) - batch[1]) ** 2), (masks, jax.random.key_data(key))


def quiet(model, batch, key):
    return validation_loss(model, batch, key), None


NOISY = bilevel.nnx.problem(Line, noisy, quiet, has_aux=True)
REPEATED = [Unrolled(SGD, 3, checkpoint=c) for c in ("none", "step", "sqrt", Levels(2), Binomial(2))]


@pytest.mark.parametrize("hypergradient", [*REPEATED, bilevel.Replay(SGD, 3, segment=1)], ids=named)
def test_masks_differ_from_step_to_step_and_are_the_same_when_a_step_is_repeated(hypergradient):
    arguments = None, NOISY.start_outer(KEY), BATCHES, VALIDATION, KEY
    found, expected = (estimate(NOISY, h, *arguments) for h in (hypergradient, REPEATED[0]))
    (masks, noise), _ = found.aux.inner
    for rows in (masks, noise):
        assert not any(np.array_equal(rows[i], rows[j]) for i in range(3) for j in range(i))
    # Two calls of one layer draw two masks: the sum of their entries, 0 or 2 each, is 2 for some.
    assert {*np.unique(masks)} == {0.0, 2.0, 4.0}
    assert_equal(found.aux, expected.aux)
    assert_close(found.grad, expected.grad, 1e-13)


def test_training_is_undone_bit_by_bit_through_dropout():
    problem = bilevel.nnx.problem(Line, lambda *a: noisy(*a)[0], validation_loss)
    arguments = None, problem.start_outer(KEY), BATCHES, VALIDATION, KEY
    found = estimate(problem, bilevel.Reversible(0.1, 0.9, 3), *arguments)
    assert found.aux.info["reversed"]
    assert_close(found.grad, estimate(problem, Unrolled(SGD, 3), *arguments).grad, 1e-9)


def test_counters_may_be_carried_as_in_a_loop_of_flax():
    kinds = {"mutable": (nnx.BatchStat, nnx.RngState)}
    problem = bilevel.nnx.problem(Network, training_loss, validation_loss, **kinds)
    result = estimate(problem, Unrolled(optax.adam(0.05), 3), None, OUTER, BATCHES, VALIDATION, KEY)
    model = Network(nnx.Rngs(jax.random.split(KEY, 5)[0]))
    with rules_of_flax():
        optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    for t in range(3):
        batch = BATCHES[0][t], BATCHES[1][t]
        grads = nnx.grad(lambda m, batch=batch: training_loss(m, batch, None))(model)
        with rules_of_flax():
            optimizer.update(model, grads)
    trained = bilevel.nnx.merge(problem, Found(OUTER, result.inner_state))
    of = lambda m: jax.tree.map(np.asarray, without_keys(nnx.to_pure_dict(nnx.state(m))))  # noqa: E731
    assert_close(of(trained), of(model), 1e-12)
    assert trained.drop.rngs.count[...] == 3
    # A given module starts with streams of the key of its start, at 0.
    given = bilevel.nnx.problem(model, training_loss, validation_loss, **kinds)
    streams = [given.start_inner(key, OUTER)["mutable"]["drop"]["rngs"] for key in jax.random.split(KEY)]
    assert streams[0]["key"] != streams[1]["key"] and streams[0]["count"] == 0


# What is frozen, what is shared, what is given.


class LowRank(nnx.Module):
    """A linear layer that is frozen, beside one of rank 1 that is trained; a table that is no variable."""

    def __init__(self, rngs):
        self.base = nnx.Param(jax.random.normal(rngs.params(), (3, 3)))
        self.table = jnp.arange(3.0)
        self.a, self.b = nnx.LoRAParam(jax.random.normal(rngs.params(), (3,))), nnx.LoRAParam(jnp.zeros(3))
        self.gate = Outer(jnp.asarray(0.5))

    def __call__(self, x):
        low = (x @ self.a[...])[:, None] * self.b[...][None]
        return jnp.sum(x @ self.base[...] + self.table[None] + self.gate[...] * low, 1)


def squares(model, batch, key):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


def test_a_frozen_base_is_an_argument_and_a_given_module_the_start():
    module = LowRank(nnx.Rngs(4))
    problem = bilevel.nnx.problem(module, squares, squares, inner=nnx.LoRAParam, frozen=nnx.Param)
    inner = problem.start_inner(KEY, None)
    assert_equal(inner, {"params": {"a": module.a[...], "b": module.b[...]}})
    outer = problem.start_outer(KEY)
    hypergradient = Unrolled(SGD, 3)
    function = lambda problem, outer: hypergradient.estimate(problem, None, outer, BATCHES, VALIDATION, KEY).grad  # noqa: E731
    consts = jax.make_jaxpr(function)(problem, outer).consts
    assert all(np.size(x) != 9 for x in consts)
    before = function(problem, outer)
    module.base[...] = jnp.zeros((3, 3))  # the module is the user's again
    assert_equal(function(problem, outer), before)

    def loss(inner, outer, batch, key):
        x, y = batch
        low = (x @ inner["a"])[:, None] * inner["b"][None]
        return jnp.mean((jnp.sum(x @ base + jnp.arange(3.0)[None] + outer * low, 1) - y) ** 2)

    base = LowRank(nnx.Rngs(4)).base[...]
    by_hand = Problem(loss, loss, lambda key, outer: inner["params"], lambda key: outer["gate"])
    expected = estimate(by_hand, hypergradient, None, outer["gate"], BATCHES, VALIDATION, KEY).grad
    assert_close(before, {"gate": expected}, 1e-12)


def test_what_is_frozen_in_a_new_module_is_that_of_a_fixed_key():
    make = lambda rngs: LowRank(rngs)  # noqa: E731
    problem = bilevel.nnx.problem(make, squares, squares, inner=nnx.LoRAParam, frozen=...)
    outer = problem.start_outer(KEY)
    fitted = bilevel.fit(problem, outer, optimizer=SGD, steps=1, data=VALIDATION, progress=False)
    module = bilevel.nnx.merge(problem, fitted)
    assert_equal(module.base[...], LowRank(nnx.Rngs(0)).base[...])
    a = [problem.start_inner(key, None)["params"]["a"] for key in jax.random.split(KEY)]
    assert not np.array_equal(*a)


class Penalty(nnx.Module):
    """A learned penalty: a network of a number."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Param(jax.random.normal(rngs.params(), (4,))), nnx.Param(jnp.full(4, 0.1))

    def __call__(self, x):
        return jnp.sum(self.down[...][None] * (x[:, None] * self.up[...][None]) ** 2)


class Slope(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.full(3, 0.5))


def penalised(parts, batch, key):
    return jnp.mean((batch[0] @ parts["net"].w[...] - batch[1]) ** 2) + parts["penalty"](parts["net"].w[...])


def unpenalised(parts, batch, key):
    return jnp.mean((batch[0] @ parts["net"].w[...] - batch[1]) ** 2)


def test_an_outer_module_beside_the_trained_one():
    make = lambda rngs: {"net": Slope(), "penalty": Penalty(rngs), "log_rate": Outer(jnp.asarray(-2.0))}  # noqa: E731
    where = (nnx.PathContains("penalty"), Outer)
    problem = bilevel.nnx.problem(make, penalised, unpenalised, outer=where)
    outer = problem.start_outer(KEY)
    assert {*outer} == {"penalty", "log_rate"} and {*outer["penalty"]} == {"up", "down"}
    assert jax.tree.map(jnp.shape, problem.start_inner(KEY, outer)) == {"params": {"net": {"w": (3,)}}}
    optimizer = lambda outer: optax.sgd(jnp.exp(outer["log_rate"]))  # noqa: E731
    checked = check_hypergradient(
        problem, Unrolled(optimizer, 3), outer=outer, inner_data=ROWS, outer_data=VALIDATION, key=KEY
    )
    assert checked.verdict == "exact", str(checked)
    solver = bilevel.Nested(problem, Unrolled(optimizer, 3), optax.adam(0.05))
    result = bilevel.run(solver, inner_data=VALIDATION, outer_data=VALIDATION, steps=3, progress=False)
    parts = bilevel.nnx.merge(problem, result)
    assert isinstance(parts["penalty"], Penalty)
    assert_equal(parts["penalty"].up[...], result.outer["penalty"]["up"])


class Shared(nnx.Module):
    """Two layers with one matrix, as an embedding is used twice."""

    def __init__(self, rngs):
        self.first = self.second = nnx.Param(jnp.eye(3))
        self.scale = Outer(jnp.asarray(0.7))

    def __call__(self, x):
        return jnp.sum((x @ self.first[...] * self.scale[...]) @ self.second[...], 1)


def test_a_variable_that_is_used_twice_is_one():
    problem = bilevel.nnx.problem(Shared, squares, squares)
    assert len(jax.tree.leaves(problem.start_inner(KEY, None))) == 1
    result = bilevel.run(
        bilevel.Nested(problem, Unrolled(SGD, 3), optax.adam(0.05)),
        inner_data=VALIDATION, outer_data=VALIDATION, steps=2, progress=False,
    )  # fmt: skip
    module = bilevel.nnx.merge(problem, result)
    assert module.first is module.second


class Held(nnx.Module):
    """A weight of a penalty on a network that it holds as well."""

    def __init__(self, net):
        self.net, self.weight = net, nnx.Param(jnp.asarray(-1.0))


def holding(name):
    def make(rngs):
        net = Slope()
        return {"net": net, name: Held(net)}

    return make


@pytest.mark.parametrize("name", ["penalty", "loss"])  # before and after "net"
def test_a_variable_is_found_by_all_of_its_paths(name):
    def loss(parts, batch, key):
        return unpenalised(parts, batch, key) + jnp.exp(parts[name].weight[...]) * jnp.sum(parts[name].net.w[...] ** 2)

    both = sorted(["net.w", f"{name}.net.w"])
    with pytest.raises(ValueError, match=rf"{both[0]} and {both[1]} are one variable, which is (inner|outer) by .*Not"):
        bilevel.nnx.problem(holding(name), loss, unpenalised, outer=nnx.PathContains(name))
    alone = nnx.All(nnx.PathContains(name), nnx.Not(nnx.PathContains("net")))
    by_type = bilevel.nnx.problem(holding(name), loss, unpenalised, outer=alone)
    # A path that no filter takes says nothing.
    by_path = bilevel.nnx.problem(holding(name), loss, unpenalised, inner=nnx.PathContains("net"), outer=alone)
    for problem in (by_type, by_path):
        assert jax.tree.map(jnp.shape, problem.start_outer(KEY)) == {name: {"weight": ()}}
        assert [x.shape for x in jax.tree.leaves(problem.start_inner(KEY, None))] == [(3,)]


def test_a_module_that_holds_itself_has_paths_without_end_of_which_some_are_seen():
    class Child(nnx.Module):
        def __init__(self, parent):
            self.parent, self.w = parent, nnx.Param(jnp.ones(3))

    class Parent(nnx.Module):
        def __init__(self, rngs):
            self.child, self.scale = Child(self), Outer(jnp.asarray(1.0))

        def __call__(self, x):
            return x @ self.child.w[...] * self.child.parent.scale[...]

    problem = bilevel.nnx.problem(Parent, squares, squares)
    assert jax.tree.map(jnp.shape, problem.start_outer(KEY)) == {"scale": ()}
    with pytest.raises(ValueError, match=r"scale and child\.parent\.scale are one variable"):
        apart = nnx.PathContains("child")
        bilevel.nnx.problem(Parent, squares, squares, outer=nnx.All(Outer, nnx.Not(apart)), inner=apart)


def test_linen_says_the_same():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4, use_bias=False, param_dtype=float, name="first")(x)
            norm = functools.partial(nn.BatchNorm, momentum=0.6, param_dtype=x.dtype, dtype=x.dtype, name="norm")
            x = norm(use_running_average=not train)(x)
            return nn.Dense(1, use_bias=False, param_dtype=float, name="second")(x / (1.0 + x**2))[:, 0]

    def renamed(inner):
        params, stats = inner["params"], inner["mutable"]
        layers = {"first": params["layers"][0], "second": params["layers"][1], "norm": params["norm"]}
        return {"params": layers, "batch_stats": stats}

    @under(rules_of_flax)
    def training(variables, outer, batch, key):
        prediction, updates = Linen().apply(variables, batch[0], train=True, mutable=["batch_stats"])
        fit = jnp.mean(outer["weight"] * (prediction - batch[1]) ** 2)
        return fit + jnp.exp(outer["decay"]) * jnp.sum(variables["params"]["first"]["kernel"] ** 2), updates

    @under(rules_of_flax)
    def validation(variables, outer, batch, key):
        return jnp.mean((Linen().apply(variables, batch[0], train=False) - batch[1]) ** 2)

    def make(rngs):
        module = Network(rngs)
        module.drop.rate = 0.0
        return module

    module = bilevel.nnx.problem(make, training_loss, validation_loss)
    start = lambda key, outer: renamed(module.init_inner(key, outer))  # noqa: E731
    linen = Problem(training, validation, start, module.init_outer, mutable=("batch_stats",))
    found, expected = (estimate(problem, Unrolled(SGD, 3), *ARGUMENTS) for problem in (module, linen))
    assert_close(found.grad, expected.grad, 1e-12)


# Runs: resumed, trained at the end, given to other solvers.


def test_a_run_is_resumed_bit_by_bit_and_fit_carries_statistics(tmp_path):
    solver = bilevel.Nested(MODULE, Unrolled(SGD, 3), optax.adam(0.05))
    data = {"inner_data": bilevel.Batches((X, Y), 4), "outer_data": (X, Y), "progress": False}
    whole = bilevel.run(solver, steps=4, **data)
    bilevel.run(solver, steps=2, checkpoint_dir=tmp_path, **data)
    again = bilevel.Nested(
        bilevel.nnx.problem(Network, training_loss, validation_loss), Unrolled(SGD, 3), optax.adam(0.05)
    )
    resumed = bilevel.run(again, steps=4, checkpoint_dir=tmp_path, **data)
    assert_equal((resumed.outer, resumed.inner), (whole.outer, whole.inner))
    other = bilevel.nnx.problem(Network, lambda *a: 2 * training_loss(*a), validation_loss)
    with pytest.raises(ValueError, match="inner_loss"):
        bilevel.run(
            bilevel.Nested(other, Unrolled(SGD, 3), optax.adam(0.05)), steps=5, checkpoint_dir=tmp_path, **data
        )
    fitted = bilevel.fit(MODULE, whole.outer, optimizer=SGD, data=bilevel.Batches((X, Y), 4), steps=5, progress=False)
    model = bilevel.nnx.merge(MODULE, fitted)
    assert isinstance(model, Network) and not model.norm.use_running_average
    assert_equal(model.norm.mean[...], fitted.inner.params["mutable"]["norm"]["mean"])
    assert_equal(model.weight[...], whole.outer["weight"])
    expected = validation_by_hand(fitted.inner.params, whole.outer, VALIDATION, None)
    assert_close(validation_loss(model, VALIDATION, None), expected, 1e-12)


def test_equal_problems_share_a_program():
    one, other = (bilevel.nnx.problem(Network, training_loss, validation_loss) for _ in range(2))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(other))
    third = bilevel.nnx.problem(Network, training_loss, validation_loss, outer=(Outer, nnx.PathContains("norm")))
    assert jax.tree.structure(one) != jax.tree.structure(third)


def test_tasks_and_stochastic_solvers_draw_masks_too():
    problem = bilevel.nnx.problem(Line, lambda *a: noisy(*a)[0], validation_loss)
    solver = bilevel.SOBA(problem, inner_step=0.1, outer_step=0.1)
    data = {"outer_data": bilevel.Batches((X, Y), 4), "progress": False}
    result = bilevel.run(solver, inner_data=bilevel.Batches((X, Y), 4), steps=5, **data)
    assert np.isfinite(result.history["outer_loss"]).all()

    def support(model, task, key):
        return noisy(model, (task[0], task[1]), key)[0]

    def query(model, task, key):
        return validation_loss(model, (task[0], task[1]), key)

    tasks = bilevel.nnx.problem(Line, support, query)
    rows = jax.tree.map(lambda x: x[None, :, :2], BATCHES), jax.tree.map(lambda x: x[None, :, 2:], BATCHES)
    each = bilevel.PerTask(Unrolled(SGD, 2))
    found = each.estimate(tasks, None, tasks.start_outer(KEY), rows, None, KEY)
    assert np.linalg.norm(found.grad["shift"]) > 0


FACTOR = 1.0


class Reading(nnx.Module):
    def __init__(self, rngs):
        self.w, self.goal = nnx.Param(jnp.zeros(2)), Outer(jnp.ones(2))

    def __call__(self, batch):
        return FACTOR * jnp.sum((self.w[...] - self.goal[...]) ** 2)


def called(model, batch, key):
    return model(batch)


def test_a_global_name_that_a_module_reads_is_looked_at_again(monkeypatch):
    problem = bilevel.nnx.problem(Reading, called, called)
    fit = lambda: bilevel.fit(problem, {"goal": jnp.ones(2)}, optimizer=optax.sgd(0.1), steps=1, progress=False)  # noqa: E731
    before = fit().inner.params["params"]["w"][0]
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    np.testing.assert_allclose(fit().inner.params["params"]["w"][0], 2 * before)


# What a module may do inside a loss, and what is refused.


class Wrapped(nnx.Module):
    """A block behind a transformation of nnx, which hands all of its variables on as new arrays."""

    @under(rules_of_flax)
    def __init__(self, rngs, how):
        self.block, self.how, self.scale = Network(rngs), how, Outer(jnp.asarray(1.0))

    def __call__(self, x):
        if self.how == "plain":
            return self.block(x) * self.scale[...]
        through = {"remat": nnx.remat, "jit": nnx.jit}[self.how]
        return through(lambda block, x: block(x))(self.block, x) * self.scale[...]


class Scanned(nnx.Module):
    """Layers in a stack, each with a stream of its own."""

    @under(rules_of_flax)
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(3, 3, param_dtype=float, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        self.layers, self.drops = stack(rngs)
        self.scale = Outer(jnp.asarray(1.0))

    @under(rules_of_flax)
    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        def each(x, layer, drop):
            return drop(layer(x))

        return jnp.sum(each(x, self.layers, self.drops), 1) * self.scale[...]


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")  # the block has outer variables that are not used
@pytest.mark.parametrize("how", ["remat", "jit", "scan"])
def test_transformations_of_nnx_inside_a_module(how):
    make = Scanned if how == "scan" else functools.partial(Wrapped, how=how)
    problem = bilevel.nnx.problem(make, squares, squares)
    outer = problem.start_outer(KEY)
    found = estimate(problem, Unrolled(SGD, 3, mode="reverse"), None, outer, BATCHES, VALIDATION, KEY)
    assert np.isfinite(found.value)
    if how != "scan":
        plain = bilevel.nnx.problem(functools.partial(Wrapped, how="plain"), squares, squares)
        expected = estimate(plain, Unrolled(SGD, 3, mode="reverse"), None, outer, BATCHES, VALIDATION, KEY)
        assert_close(found.grad, expected.grad, 1e-11)


# Statistics that the loss itself reads, against differences of trainings by a loop of flax.


class Average(nnx.Variable):
    """A running mean of what is trained."""


class Averaged(nnx.Module):
    """Two weights a row, batch normalisation, and an average of the weights."""

    @under(rules_of_flax)
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.array([[0.3, -0.5], [0.8, 0.2], [-0.4, 0.6]]))
        self.norm = nnx.BatchNorm(2, momentum=0.6, param_dtype=float, rngs=rngs)
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(2)), nnx.BatchStat(jnp.ones(2))
        self.mean, self.decay = Average(jnp.zeros((3, 2))), Outer(jnp.asarray(-1.0))

    @under(rules_of_flax)
    def __call__(self, x):
        return jnp.sum(jnp.tanh(self.norm(x @ self.w[...])), 1)

    def average(self):
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * jax.lax.stop_gradient(self.w[...])


def decayed(model, batch, key):
    return squares(model, batch, key) + jnp.exp(model.decay[...]) * jnp.sum(model.w[...] ** 2)


def of_mean(model, batch, key):
    return decayed(model, batch, key) + 0.3 * jnp.sum(model.norm.mean[...] ** 2)


def evaluated_too(model, batch, key):
    value = decayed(model, batch, key)
    model.eval()
    return value + 0.5 * squares(model, batch, key)


def drawn_to_its_average(model, batch, key):
    model.average()
    return decayed(model, batch, key) + jnp.sum((model.w[...] - model.mean[...]) ** 2)


def drawn_to_what_it_hides(model, batch, key):
    goal = jax.lax.stop_gradient(jnp.exp(model.decay[...]) * model.w[...])  # read by no statistic
    return decayed(model, batch, key) + jnp.sum((model.w[...] - 2.0 * goal) ** 2)


def noting_what_it_hides(model, batch, key):
    goal = jax.lax.stop_gradient(jnp.exp(model.decay[...]) * model.w[...])
    model.mean[...] = goal
    return decayed(model, batch, key) + jnp.sum((model.w[...] - 2.0 * goal) ** 2)


def taught_by_its_average(model, batch, key):
    apart = batch[0] @ model.w[...] - jax.lax.stop_gradient(batch[0] @ model.mean[...])
    value = decayed(model, batch, key) + jnp.mean(apart**2)
    model.average()
    return value


def taught_in_a_loop(model, batch, key):
    stop = jax.lax.stop_gradient
    w, mean, decay = model.w[...], model.mean[...], model.decay[...]

    def step(total, x):  # what is hidden is computed from what is hidden, and from nothing that is trained
        return total + jnp.mean((x @ w - stop(stop(jnp.exp(decay)) * (x @ mean))) ** 2), None

    value = decayed(model, batch, key) + jax.lax.scan(step, jnp.zeros(()), batch[0])[0]
    model.average()
    return value


def in_a_branch(model, batch, key):
    choice = jnp.sum(batch[0]) > -1e9
    return nnx.cond(choice, lambda m: decayed(m, batch, key), lambda m: 2.0 * decayed(m, batch, key), model)


def in_a_switch(model, batch, key):
    number = jnp.sum(batch[0] > -1e9) // 1000
    parts = [lambda m: decayed(m, batch, key), lambda m: 2.0 * decayed(m, batch, key)]
    return nnx.switch(number, parts, model)


def averaged_in_a_branch(model, batch, key):
    value = decayed(model, batch, key)
    nnx.cond(jnp.sum(batch[0]) > -1e9, lambda m: m.average(), lambda m: None, model)
    return value


def rematerialised(model, batch, key):
    return nnx.remat(lambda m: of_mean(m, batch, key))(model)


def after_training(model, batch, key):
    model.eval()
    return squares(model, batch, key) + jnp.mean((jnp.sum(batch[0] @ model.mean[...], 1) - batch[1]) ** 2)


def trained_by_flax(loss, decay):
    """What `after_training` is after three steps, as flax trains."""
    model = Averaged(nnx.Rngs(0))
    model.decay[...] = jnp.asarray(decay)
    filters = nnx.Param, (nnx.BatchStat, Average), ...
    for t in range(3):
        batch = BATCHES[0][t], BATCHES[1][t]
        graphdef, params, stats, rest = nnx.split(model, *filters)

        def value(params, stats, graphdef=graphdef, rest=rest, batch=batch):
            model = nnx.merge(graphdef, params, stats, rest, copy=True)
            return loss(model, batch, None), nnx.split(model, *filters)[2]

        grads, stats = jax.grad(value, has_aux=True)(params, stats)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        model = nnx.merge(graphdef, params, stats, rest, copy=True)
        model.train()
    return after_training(model, VALIDATION, None)


READING = [
    decayed,
    of_mean,
    evaluated_too,
    drawn_to_its_average,
    drawn_to_what_it_hides,
    noting_what_it_hides,
    taught_by_its_average,
    taught_in_a_loop,
    in_a_branch,
    in_a_switch,
    averaged_in_a_branch,
    rematerialised,
]


@pytest.mark.filterwarnings("ignore::bilevel.CustomDerivativeWarning")  # a cut of what is carried is one
@pytest.mark.parametrize("mode", ["mixed", "forward"])
@pytest.mark.parametrize("loss", READING)
def test_statistics_that_a_loss_reads_have_their_whole_derivative(loss, mode):
    problem = bilevel.nnx.problem(Averaged, loss, after_training, mutable=(nnx.BatchStat, Average))
    found = estimate(
        problem, Unrolled(optax.sgd(0.1), 3, mode=mode), None, {"decay": jnp.asarray(-1.0)}, BATCHES, VALIDATION, KEY
    )
    h = 1e-4
    ahead, behind = (trained_by_flax(loss, -1.0 + step) for step in (h, -h))
    assert_close(found.value, trained_by_flax(loss, -1.0), 1e-12)
    assert_close(found.grad, {"decay": (ahead - behind) / (2 * h)}, 1e-6)


class Bare(nnx.Module):
    """A line and the weight of a term, and nothing that is carried."""

    def __init__(self, rngs):
        self.w, self.weight = nnx.Param(jnp.array([0.3, -0.5, 0.8])), Outer(jnp.asarray(-1.0))

    def __call__(self, x):
        return x @ self.w[...]


def of_a_goal(model, batch, key):
    """Outer acts only through what the gradient does not see."""
    goal = jax.lax.stop_gradient(jnp.exp(model.weight[...]) * jnp.sin(model.w[...]))
    return squares(model, batch, key) + jnp.sum((model.w[...] - goal) ** 2)


@pytest.mark.filterwarnings("ignore::bilevel.CustomDerivativeWarning")
@pytest.mark.parametrize("has_aux", [False, True])
def test_a_loss_that_hides_is_followed_where_nothing_is_carried(has_aux):
    inner = (lambda *a: (of_a_goal(*a), {"note": a[0].w[...]})) if has_aux else of_a_goal
    outer = (lambda *a: (squares(*a), None)) if has_aux else squares
    problem = bilevel.nnx.problem(Bare, inner, outer, has_aux=has_aux)

    def trained(weight):
        w = jnp.array([0.3, -0.5, 0.8])
        for t in range(3):
            x, y = BATCHES[0][t], BATCHES[1][t]
            goal = np.exp(weight) * jnp.sin(w)
            w = w - 0.1 * (jax.grad(lambda w, x=x, y=y: jnp.mean((x @ w - y) ** 2))(w) + 2 * (w - goal))
        return jnp.mean((VALIDATION[0] @ w - VALIDATION[1]) ** 2)

    estimator = Unrolled(optax.sgd(0.1), 3)
    found = estimate(problem, estimator, None, {"weight": jnp.asarray(-1.0)}, BATCHES, VALIDATION, KEY)
    h = 1e-5
    slope = (trained(-1.0 + h) - trained(-1.0 - h)) / (2 * h)
    assert_close(found.value, trained(-1.0), 1e-12)
    assert_close(found.grad, {"weight": slope}, 1e-7)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("hypergradient", [Unrolled(SGD, 3), bilevel.Replay(SGD, 3), Unrolled(SGD, 3, truncate=2)])
def test_what_is_logged_changes_no_derivative(hypergradient):
    def logged(model, batch, key):
        value = decayed(model, batch, key)
        return value, (model.norm.mean[...], jnp.sum(model.norm.var[...]), value)

    kinds = {"mutable": (nnx.BatchStat, Average)}
    plain = bilevel.nnx.problem(Averaged, decayed, after_training, **kinds)
    noting = bilevel.nnx.problem(Averaged, logged, lambda *a: (after_training(*a), None), has_aux=True, **kinds)
    arguments = None, {"decay": jnp.asarray(-1.0)}, BATCHES, VALIDATION, KEY
    found, expected = (estimate(problem, hypergradient, *arguments) for problem in (noting, plain))
    assert_close(found.grad, expected.grad, 1e-13)
    assert abs(found.grad["decay"]) > 1e-3


def cut_by_a_rule(model, batch, key):
    value = decayed(model, batch, key)
    held = jax.custom_jvp(jax.lax.stop_gradient)
    held.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    model.mean[...] = held(model.w[...])
    return value


class Counter(nnx.Variable):
    pass


class Counting(nnx.Module):
    """A module with all that may be wrong with one."""

    def __init__(self, rngs, fault=""):
        self.w, self.goal, self.fault, self.calls = nnx.Param(jnp.zeros(2)), Outer(jnp.ones(2)), fault, 0
        self.count = Counter(jnp.zeros(()))
        if fault == "settings":
            self.sizes = nnx.static([1, 2])

    def __call__(self):
        if self.fault == "attribute":
            self.calls += 1
        if self.fault == "sown":
            self.seen = nnx.Intermediate(self.w[...])
        if self.fault == "new":
            self.more = nnx.Param(jnp.zeros(2))
        if self.fault == "type":
            self.count = nnx.BatchStat(jnp.zeros(()))
        if self.fault == "gone":
            del self.count
        if self.fault == "written":
            self.count[...] += 1.0
        if self.fault == "written inside":
            nnx.jit(lambda m: m.count.set_value(m.count[...] + 1.0))(self)
        return jnp.sum((self.w[...] - self.goal[...]) ** 2)


def counted(model, batch, key):
    return model()


def counting(fault="", loss=counted, **settings):
    make = functools.partial(Counting, fault=fault)
    return bilevel.nnx.problem(make, loss, counted, **({"frozen": Counter} | settings))


def trained(problem):
    return Unrolled(SGD, 2).estimate(problem, None, problem.start_outer(KEY), None, None, KEY)


def test_what_is_written_into_a_mutable_variable_is_carried():
    problem = counting("written", mutable=Counter)
    assert trained(problem).inner_state.params["mutable"]["count"] == 2
    # An inner loss may choose its mode, and the outer loss may do as it likes.
    chosen = counting(loss=lambda m, batch, key: (m.train(), m())[1])
    assert np.isfinite(trained(chosen).value)
    # What is taken out again, or was never put in, changes nothing.
    popped = counting("sown", lambda m, batch, key: (m(), nnx.pop(m, nnx.Intermediate))[0])
    assert np.isfinite(trained(popped).value)
    noting = nnx.capture(lambda m: (m.sow(nnx.Intermediate, "w", m.w[...]), m())[1], nnx.Intermediate)
    noted = counting(loss=lambda m, batch, key: noting(m)[0])
    assert np.isfinite(trained(noted).value)


class Changing(nnx.Module):
    made = 0

    def __init__(self, rngs):
        Changing.made += 1
        self.w, self.goal = nnx.Param(jnp.zeros(Changing.made)), Outer(jnp.ones(2))


OUTSIDE = Counting(nnx.Rngs(0))


def outside(model, batch, key):
    OUTSIDE.count[...] += 1.0
    return counted(model, batch, key)


def of_counting():
    problem = counting()
    outer = problem.start_outer(KEY)
    return Found(outer, Start(problem.start_inner(KEY, outer)))


def halved(model, batch, key):
    value = model()
    model.w[...] = jax.lax.cond(value > 0, lambda w: 0.5 * w, lambda w: w, model.w[...])
    return value


WRONG = {
    "an unknown kind": (lambda: counting(frozen=None), r"no kind takes count \(Counter\): give the type"),
    "no outer variable": (
        lambda: counting(outer=nnx.Cache, frozen=...),
        r"outer=the class Cache\): takes none of .* Param, Counter, Outer: make .* bilevel.nnx.Outer",
    ),
    "no inner variable": (lambda: counting(inner=None, frozen=...), r"inner=None\): takes none of the module's"),
    "a filter that is none": (lambda: counting(inner=3.0), r"problem\(inner=3.0\): must be a filter"),
    "no module": (lambda: bilevel.nnx.problem(jnp.ones(2), counted, counted), "must be a module of flax nnx"),
    "a variable": (lambda: bilevel.nnx.problem(nnx.Param(1.0), counted, counted), "must be a module"),
    "a dict of numbers": (lambda: bilevel.nnx.problem({"w": 1.0}, counted, counted), "must be a module"),
    "a function of no module": (lambda: bilevel.nnx.problem(lambda r: 3, counted, counted), "returned a int"),
    "a function of nothing": (lambda: bilevel.nnx.problem(lambda: 3, counted, counted), r"but takes \(\)"),
    "a loss of four": (lambda: counting(loss=lambda w, o, b, k: 0.0), r"inner_loss=.*\(model, batch, key\)"),
    "a setting that is a list": (lambda: counting("settings"), "cannot be hashed.*list.*tuple"),
    "another module each time": (
        lambda: trained(bilevel.nnx.problem(Changing, lambda m, b, k: jnp.sum(m.w[...]), lambda m, b, k: 0.0)),
        "made another module than before: w of another",
    ),
    "a new attribute": (lambda: trained(counting("attribute")), r"with other attributes \(calls\), which would be"),
    "an intermediate": (lambda: trained(counting("sown")), r"with new variables: seen \(Intermediate\)"),
    "a new variable": (lambda: trained(counting("new")), r"with new variables: more \(Param\)"),
    "a variable of another type": (lambda: trained(counting("type")), r"of another type: count \(BatchStat\)"),
    "a variable that is gone": (lambda: trained(counting("gone")), r"without variables: count \(Counter\)"),
    "a frozen variable": (lambda: trained(counting("written")), r"wrote into .* count \(Counter\); compute"),
    "the same in a transformation": (lambda: trained(counting("written inside")), r"wrote into .* count \(Counter\)"),
    "a parameter": (
        lambda: trained(counting(loss=lambda m, b, k: (m.w.set_value(m.w[...] * 0.5), m())[1])),
        r"wrote into .* w \(Param\)",
    ),
    "a copy of another": (
        lambda: trained(counting(loss=lambda m, b, k: (m(), m.w.set_value(m.goal[...]))[0])),
        r"wrote into .* w \(Param\).*put the value that was trained back before the loss returns",
    ),
    "an outer variable": (
        lambda: trained(counting(loss=lambda m, b, k: (m(), m.goal.set_value(jnp.zeros(2)))[0])),
        r"wrote into .* goal \(Outer\); compute with a new value, or give their type as problem\(mutable",
    ),
    "in a branch": (
        lambda: trained(counting(loss=halved)),
        r"wrote into .* w \(Param\)",
    ),
    "statistics behind a rule of its own": (
        lambda: Unrolled(SGD, 3).estimate(
            bilevel.nnx.problem(Averaged, cut_by_a_rule, after_training, mutable=(nnx.BatchStat, Average)),
            None, {"decay": jnp.asarray(-1.0)}, BATCHES, VALIDATION, KEY,
        ),
        r"inside a custom_jvp_call that has a stop_gradient: mean \(Average\) would be carried on without a part",
    ),
    "a module outside": (
        lambda: trained(counting(loss=outside)),
        "nnx object captured from outside.*give the module to bilevel.nnx.problem",
    ),
    "no scalar": (lambda: trained(counting(loss=lambda m, b, k: m.w[...])), r"shape \(2,\).*a loss is a real"),
    "no scalar beside statistics": (
        lambda: trained(counting(loss=lambda m, b, k: (m(), m()), mutable=Counter)),
        "returned a tuple, but must return a scalar; set has_aux",
    ),
    "no pair": (
        lambda: trained(counting(has_aux=True, mutable=Counter)),
        r"returned a .*, but must return a pair \(scalar, aux\)",
    ),
    "others than outer": (
        lambda: Unrolled(SGD, 2).estimate(counting(), None, {"aim": jnp.ones(2)}, None, None, KEY),
        r"outer variables of the module are goal; given was a tree of \['aim'\]",
    ),
    "a stack of modules": (
        lambda: bilevel.nnx.merge(counting(), jax.tree.map(lambda x: jnp.stack([x, x]), of_counting())),
        r"merge\(found=...\): goal is float64\[2,2\], but float64\[2\] in the module of this problem.*x\[0\]",
    ),
    "another dtype": (
        lambda: bilevel.nnx.merge(counting(), jax.tree.map(lambda x: x.astype(jnp.bfloat16), of_counting())),
        r"goal is bfloat16\[2\], but float64\[2\]",
    ),
    "a problem of no module": (lambda: bilevel.nnx.merge(BY_HAND, None), "merge.problem=.*what bilevel.nnx.problem"),
    "nothing found": (lambda: bilevel.nnx.merge(counting(), {"outer": 1}), r"merge\(found=.*what run or fit returned"),
    "no key": (lambda: NOISY.inner_value(NOISY.start_inner(KEY, None), {"shift": 0.0}, None, None), "one, not None"),
}


def swapped(model, batch, key):
    weights = model.w[...]
    model.w.set_value(0.5 * weights)
    value = model()
    model.w.set_value(jax.lax.cond(value > 0, lambda w: w, lambda w: w, weights))
    return value


def test_what_is_put_back_was_not_written():
    found = trained(counting(loss=swapped)).inner_state.params["params"]["w"]
    by_hand = counting(loss=lambda m, b, k: jnp.sum((0.5 * m.w[...] - m.goal[...]) ** 2))
    assert_close(found, trained(by_hand).inner_state.params["params"]["w"], 1e-13)


class Bounded(nnx.Module):
    """A matrix that is trained, of norm 1 where it is used."""

    @under(rules_of_flax)
    def __init__(self, rngs):
        self.norm = nnx.SpectralNorm(nnx.Linear(3, 2, param_dtype=float, rngs=rngs), param_dtype=float, rngs=rngs)
        self.decay = Outer(jnp.asarray(-1.0))

    @under(rules_of_flax)
    def __call__(self, x):
        return jnp.sum(self.norm(x, update_stats=True), 1)


def put_back(model, batch, key):
    kernel = model.norm.layer_instance.kernel
    weights = kernel[...]
    value = squares(model, batch, key) + jnp.exp(model.decay[...]) * jnp.sum(weights**2)
    kernel[...] = weights
    return value


def of_weights(model, batch, key):
    weights = model.norm.layer_instance.kernel[...]
    return jnp.mean((jnp.sum(batch[0] @ weights, 1) - batch[1]) ** 2)


@pytest.mark.filterwarnings("ignore::bilevel.CustomDerivativeWarning")
def test_a_layer_that_writes_its_own_kernel_needs_it_put_back():
    refused = bilevel.nnx.problem(Bounded, squares, squares)
    message = r"layer_instance.kernel \(Param\).*back .* as nnx.SpectralNorm and nnx.WeightNorm need"
    with pytest.raises(ValueError, match=message):
        Unrolled(SGD, 3).estimate(refused, None, {"decay": jnp.asarray(-1.0)}, BATCHES, VALIDATION, KEY)
    problem = bilevel.nnx.problem(Bounded, put_back, of_weights)
    checked = check_hypergradient(problem, Unrolled(SGD, 3), inner_data=ROWS, outer_data=VALIDATION, key=KEY)
    assert checked.verdict == "exact", str(checked)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(name):
    build, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)


class Single(nnx.Module):
    """A module as a newcomer writes it: of the dtypes that JAX has by itself."""

    @under(rules_of_flax)
    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 1, rngs=rngs)
        self.norm = nnx.BatchNorm(1, rngs=rngs)
        self.decay, self.number = Outer(jnp.asarray(0.5)), nnx.BatchStat(jnp.asarray(3))

    @under(rules_of_flax)
    def __call__(self, x):
        return self.norm(self.layer(x))[:, 0]


def test_a_module_that_was_made_in_float32_is_checked_in_float64():
    def loss(model, batch, key):
        return squares(model, batch, key) + model.decay[...] * jnp.sum(model.layer.kernel[...] ** 2)

    with jax.enable_x64(False), rules_of_flax():
        problem = bilevel.nnx.problem(Single, loss, validation_loss)
        assert problem.start_outer(KEY)["decay"].dtype == jnp.float32
        batch = tuple(np.asarray(x, np.float32) for x in (X, Y))
        checked = check_hypergradient(problem, Unrolled(SGD, 3), inner_data=batch, outer_data=batch)
        assert checked.verdict == "exact", str(checked)


def test_a_key_of_two_words_seeds_streams_too():
    inner = NOISY.start_inner(jax.random.PRNGKey(0), None)
    value = NOISY.inner_value(inner, NOISY.start_outer(KEY), VALIDATION, jax.random.PRNGKey(3))[0]
    assert value == NOISY.inner_value(inner, NOISY.start_outer(KEY), VALIDATION, jax.random.key(3))[0]

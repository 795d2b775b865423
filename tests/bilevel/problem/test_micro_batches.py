"""A loss over micro-batches: the value and the derivatives of the whole batch, in the memory of a part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.extend import flops

ROWS, STEPS = 12, 3
KEY = jax.random.key(0)


def forward(w, x):
    hidden, _ = jax.lax.scan(lambda x, a: (x + jnp.tanh(x @ a), None), x @ w["in"], w["hidden"])
    return hidden @ w["out"]


def weighted(w, batch):
    """A mean over the entries that count, of which rows have different numbers."""
    x, y, mask = batch
    return jnp.where(mask, (forward(w, x) - y) ** 2, 0).sum() / mask.sum().astype(x.dtype)


def problem(width=8, depth=3):
    def inner_loss(w, outer, batch, key):
        decay = sum(jnp.sum(a**2) for a in jax.tree.leaves(w))
        return weighted(w, batch) + jnp.exp(outer["decay"]) * decay + jnp.sum(outer["shift"][None] * w["out"])

    def init_inner(key, outer):
        a, b, c = jax.random.split(key, 3)
        shapes = {"in": (a, (4, width)), "hidden": (b, (depth, width, width)), "out": (c, (width, 4))}
        return {name: jax.random.normal(key, shape) / 4 for name, (key, shape) in shapes.items()}

    outer_loss = lambda w, outer, batch, key: weighted(w, batch)  # noqa: E731
    return bilevel.Problem(
        inner_loss, outer_loss, init_inner, lambda key: {"decay": jnp.asarray(-3.0), "shift": jnp.zeros(4)}
    )


def data(rows=ROWS, *lead):
    rng = np.random.default_rng(0)
    shape = (*lead, rows, 4)
    arrays = rng.normal(size=shape), rng.normal(size=shape), rng.random(shape) < 0.6
    return jax.tree.map(jnp.asarray, arrays)


def count(batch):
    return batch[2].sum()


def in_parts(of, parts, weight=count):
    losses = {
        name: bilevel.MicroBatches(getattr(of, name), parts, weight=weight) for name in ("inner_loss", "outer_loss")
    }
    return dataclasses.replace(of, **losses)


ESTIMATORS = {
    "mixed": bilevel.Unrolled(optax.adam(0.1), STEPS),
    "sqrt": bilevel.Unrolled(optax.adam(0.1), STEPS, checkpoint="sqrt"),
    "reverse": bilevel.Unrolled(optax.adam(0.1), STEPS, mode="reverse"),
    "forward": bilevel.Unrolled(optax.adam(0.1), STEPS, mode="forward"),
    "implicit": bilevel.Implicit(optax.adam(0.1), STEPS, linear_solver=bilevel.Dense(), damping=10.0),
    "one step": bilevel.OneStep(optax.sgd(0.1), STEPS),
    "finite difference": bilevel.FiniteDifference(optax.sgd(0.1), STEPS),
}


def estimate(of, estimator):
    function = jax.jit(lambda of, outer, inner, last: estimator.estimate(of, None, outer, inner, last, KEY)[:3])
    return function(of, of.start_outer(KEY), data(ROWS, STEPS), data())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_values_and_hypergradients_are_those_of_the_whole_batch(name):
    whole, parts = (estimate(of, ESTIMATORS[name]) for of in (problem(), in_parts(problem(), 4)))
    # Quotients of differences amplify rounding.
    tolerance = 1e-6 if name == "finite difference" else 1e-12
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), parts, whole)


@pytest.mark.parametrize("solver", [bilevel.SOBA, bilevel.StocBiO])
def test_stochastic_solvers_take_the_same_steps(solver):
    def outer(of):
        made = solver(of, inner_step=0.1, outer_step=0.1)
        batches = bilevel.Batches(data(), ROWS)
        return bilevel.run(made, inner_data=batches, outer_data=batches, steps=3, progress=False).outer

    whole, parts = outer(problem()), outer(in_parts(problem(), 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), parts, whole)


def test_without_weights_parts_count_the_same():
    loss = in_parts(problem(), 3, weight=None).outer_loss
    w, batch = problem().start_inner(KEY, problem().start_outer(KEY)), data()
    each = [weighted(w, jax.tree.map(lambda x, i=i: x[i::3], batch)) for i in range(3)]
    np.testing.assert_allclose(loss(w, None, batch, KEY), sum(each) / 3, rtol=1e-12)
    assert abs(sum(each) / 3 - weighted(w, batch)) > 1e-3


@pytest.mark.parametrize("name", ["mixed", "reverse", "implicit"])
def test_a_part_that_counts_nothing_is_left_out(name):
    def arrays(*lead):
        x, y, mask = data(ROWS, *lead)
        return x, y, mask.at[..., 1::3, :].set(False)  # the second of three parts

    whole = problem()
    results = []
    for of in (whole, in_parts(whole, 3)):
        function = jax.jit(lambda of, outer, *batches: ESTIMATORS[name].estimate(of, None, outer, *batches, KEY)[:3])
        results.append(function(of, of.start_outer(KEY), arrays(STEPS), arrays()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *results)


def test_a_loss_that_draws_nothing_needs_no_key():
    loss = bilevel.MicroBatches(lambda w, outer, batch, key: jnp.mean(batch), 3)
    np.testing.assert_allclose(loss(None, None, jnp.arange(6.0), None), 2.5, rtol=1e-12)


def test_each_part_has_a_key_of_its_own_and_aux_comes_out_by_part():
    def loss(inner, outer, batch, key):
        noise = jax.random.normal(key)
        return jnp.mean(batch) * inner + noise, {"noise": noise, "rows": batch}

    rows = jnp.arange(6.0)
    value, aux = bilevel.MicroBatches(loss, 3)(jnp.asarray(2.0), None, rows, KEY)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(KEY, part)) for part in range(3)])
    np.testing.assert_array_equal(aux["noise"], noise)
    np.testing.assert_array_equal(aux["rows"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_allclose(value, 2 * rows.mean() + noise.mean(), rtol=1e-12)


def test_a_derivative_of_its_own_is_taken_in_reverse_by_parts_too():
    @jax.custom_vjp
    def straight(x):
        return jnp.round(x)

    straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (2 * g,))

    def through(w, outer, batch, key):
        return jnp.sum(straight(3 * w["out"]) * outer["shift"][None]) * jnp.exp(outer["decay"]) + weighted(w, batch)

    whole = dataclasses.replace(problem(), inner_loss=through)
    with pytest.warns(bilevel.CustomDerivativeWarning):
        one = estimate(whole, ESTIMATORS["mixed"])
    with pytest.warns(bilevel.CustomDerivativeWarning):
        parts = estimate(in_parts(whole, 4), ESTIMATORS["mixed"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), parts, one)


def test_memory_is_that_of_a_part_and_operations_are_those_of_the_whole():
    def cost(rows, parts):
        of = problem(width=64, depth=8)
        of = of if parts == 1 else in_parts(of, parts)
        arguments = of, of.start_outer(KEY), data(rows, STEPS), data(rows)

        def function(of, outer, inner, last):
            return ESTIMATORS["mixed"].estimate(of, None, outer, inner, last, KEY)[:2]

        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes, flops(function, *arguments)

    whole, parts, small = cost(4096, 1), cost(4096, 16), cost(4096 // 16, 1)
    # The rows of one step are laid out by parts.
    assert parts[0] - sum(x.nbytes for x in data(4096)) <= 1.1 * small[0] < 0.2 * whole[0]
    assert parts[1] <= 1.06 * whole[1]


@pytest.mark.parametrize(
    ("batch", "weight", "sentence"),
    [
        (jnp.zeros((7, 2)), None, r"MicroBatches\(parts=3\): a batch of 7 rows cannot be divided into 3 equal parts"),
        (None, None, "the batch holds no array that could be divided"),
        ((jnp.zeros((6, 2)), jnp.zeros(())), None, "must lead with one number of rows"),
        ((jnp.zeros((6, 2)), jnp.zeros(3)), None, "must lead with one number of rows"),
        (jnp.zeros((0, 2)), None, "a batch of 0 rows cannot be divided"),
        (jnp.zeros((6, 2)), lambda batch: None, r"weight\(batch\) returned a NoneType, but must return a scalar"),
        (jnp.zeros((6, 2)), lambda batch: batch.sum(axis=0), r"weight\(batch\) returned float64\[2\], but must return"),
    ],
)
def test_what_cannot_be_divided_is_one_sentence(batch, weight, sentence):
    loss = bilevel.MicroBatches(lambda w, outer, batch, key: jnp.mean(batch), 3, weight=weight)
    with pytest.raises(ValueError, match=sentence):
        loss(None, None, batch, KEY)


def test_a_loss_that_is_no_scalar_is_told_as_without_parts():
    of = dataclasses.replace(problem(), inner_loss=bilevel.MicroBatches(lambda w, outer, batch, key: batch[0], 3))
    with pytest.raises(ValueError, match="inner_loss"):
        estimate(of, ESTIMATORS["mixed"])


def test_entries_that_are_carried_are_refused():
    with pytest.raises(ValueError, match=r"Problem\(mutable=\('mean',\)\) with an inner loss of MicroBatches"):
        dataclasses.replace(in_parts(problem(), 3), mutable=("mean",))

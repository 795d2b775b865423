"""Stochastic solvers: one row each in the table, one test a property, on a quadratic finite sum with closed forms."""

import dataclasses
from collections import Counter
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Batches, Indexed, Power, Problem
from bilevel.data import resolve
from bilevel.solvers import stochastic
from bilevel.solvers.stochastic import Calls
from bilevel.trees import advance_keys
from tests.bilevel.solvers.finite_sum import (
    DATA,
    FULL,
    KEY,
    OUTER_DATA,
    OUTER_ROWS,
    PROBLEM,
    ROWS,
    SMALL,
    distance,
    inner_loss,
    outer_loss,
)
from tests.bilevel.solvers.rules import Q
from tests.bilevel.solvers.table import TABLE, each


def indices(solver, data, steps):
    """Row numbers of the batches of `steps` iterations: fresh permutations, cut as `Batches` does."""
    rng = np.random.default_rng(0)

    def stream(batches, count):
        rows = len(jax.tree.leaves(batches.arrays)[0])
        kept, epochs = rows // batches.size * batches.size, 1 + steps * count * batches.size // rows * 2
        order = np.concatenate([rng.permutation(rows)[:kept] for _ in range(epochs)])
        return jnp.asarray(order[: steps * count * batches.size].reshape(steps, count, batches.size), jnp.int32)

    return stream(data[0], solver.inner_batches_per_step), stream(data[1], solver.outer_batches_per_step)


def one_step(solver, state, data, index):
    inner, outer = (Indexed(batches.arrays, i) for batches, i in zip(data, index, strict=True))
    if solver.outer_batches_per_step == 1:
        outer = Indexed(outer.arrays, outer.index[0])
    return solver.step(state, inner, outer)


def _train(solver, data, key, index):
    def body(state, index):
        state, _ = one_step(solver, state, data, index)
        return state, state.outer

    return jax.lax.scan(body, solver.init(key), index)


_train_jit = jax.jit(_train)
_train_seeds = jax.jit(jax.vmap(_train, in_axes=(None, None, 0, None)))
_train_steps = jax.jit(jax.vmap(_train, in_axes=(0, None, None, None)))


def train(solver, data, steps):
    """Final state, and the outer variable after each step."""
    return _train_jit(solver, data, KEY, indices(solver, data, steps))


@each(lambda row: row.exact)
def test_reaches_the_solution_with_exact_oracles(row):
    steps = 200 if row.cls is bilevel.VRBO else 600
    state, _ = train(row.make(), FULL, steps)
    assert distance(state.outer) <= 1e-6


@each(lambda row: row.floor)
def test_bias_shrinks_with_its_parameter(row):
    name, *settings = row.floor
    steps, seeds = (400, 1) if row.exact or row.cls in (bilevel.F2SA, bilevel.BOME) else (1000, 8)

    def floor(value):
        solver = row.make(step=0.25 if row.cls is bilevel.BOME else 0.5, **{name: value})
        _, path = _train_seeds(solver, FULL, jax.random.split(KEY, seeds), indices(solver, FULL, steps))
        return distance(path[:, steps // 2 :].mean((0, 1)))

    coarse, fine = (floor(value) for value in settings)
    assert 1e-7 < coarse, "this is not where the bias shows"
    assert fine < coarse / 4


def test_smoothing_bias_of_pzobo_shrinks():
    """The training map has to curve for this: the inner Hessian is a sigmoid of the outer variable."""
    problem = Problem(
        lambda w, lam, batch, key: 0.5 * w**2 * (0.3 + jax.nn.sigmoid(lam)) - w,
        lambda w, lam, batch, key: 0.5 * (w - 1.0) ** 2 + 0.1 * lam**2,
        lambda key, lam: jnp.ones(()),
        lambda key: jnp.zeros(()),
    )
    slope = jax.grad(lambda lam: 0.5 * (1 / (0.3 + jax.nn.sigmoid(lam)) - 1.0) ** 2 + 0.1 * lam**2)

    @jax.jit
    def floor(smoothing):
        solver = bilevel.PZOBO(problem, 0.7, 0.05, smoothing=smoothing, directions=40, inner_steps=20)

        def path(key):
            def body(state, _):
                state, _ = solver.step(state, None, None)
                return state, state.outer

            return jax.lax.scan(body, solver.init(key), None, length=800)[1]

        return slope(jax.vmap(path)(jax.random.split(KEY, 8))[:, 400:].mean()) ** 2 / slope(0.0) ** 2

    assert floor(0.2) < floor(2.0) / 10


@each(lambda row: row.noise == "vanishes")
def test_variance_reduction_converges_linearly(row):
    steps = 500 if row.cls is bilevel.VRBO else 1500
    _, path = train(row.make(step=0.25, data=SMALL), SMALL, steps)
    decades = [jnp.log10(distance(path[i])) for i in (steps // 5, 2 * steps // 5, 3 * steps // 5)]
    assert decades[1] - decades[0] < -1 and decades[2] - decades[1] < -1
    assert distance(path[-1]) < 1e-9


@each(lambda row: row.noise == "plateau")
def test_noise_leaves_a_plateau_that_shrinks_with_the_step(row):
    steps = 2000
    both = jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), row.make(step=0.4), row.make(step=0.1))
    _, path = _train_steps(both, SMALL, KEY, indices(row.make(), SMALL, steps))  # step sizes are leaves of a solver
    coarse, fine = path[:, steps // 2 :].var(1).sum(1)
    assert 1e-8 < fine < coarse / 2


class Recorded:
    """Six iterations of a solver on `PROBLEM` with pytrees inside and outside, and with flat arrays."""

    def __init__(self, row):
        self.calls, counts = [], Counter()
        tree = tree_problem(counts, split=row.cls is not bilevel.PZOBO)
        settings = row.small
        for name, problem in (("tree", tree), ("flat", dataclasses.replace(PROBLEM, project=_box))):
            chex.clear_trace_counter()
            step = jax.jit(chex.assert_max_traces(one_step, 1))
            solver = row.make(problem, data=SMALL, **settings)
            state = jax.jit(lambda solver: solver.init(KEY))(solver)
            self.__dict__[name] = [state]
            for index in zip(*indices(solver, SMALL, 6), strict=True):
                counts.clear()
                with pytest.MonkeyPatch.context() as patch:
                    # The rule that counts asks the host, so nobody can know that it is true; it is.
                    patch.setattr(stochastic, "own_rule", lambda point: None)
                    state, metrics = jax.block_until_ready(step(solver, state, SMALL, index))
                self.__dict__[name].append(state)
                if name == "tree":
                    self.calls.append((dict(counts), {k: int(metrics[k]) for k in Calls._fields}))


recorded = cache(Recorded)


def _box(lam):
    return jnp.clip(lam, -1.9, -1.6)


def tree_problem(counts, split):
    """`PROBLEM` on pytrees with a key and integers among the leaves; its derivatives are counted on the host."""

    def host(name, weight, *leaves):
        counts[name] += weight
        return leaves

    def call(name, weight, tree):
        leaves, structure = jax.tree.flatten(tree)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        # Pure, so that a derivative that nobody uses is dropped with its count.
        leaves = jax.pure_callback(partial(host, name, weight), tuple(shapes), *leaves, vmap_method="sequential")
        return jax.tree.unflatten(structure, leaves)

    def tapped(gradients, loss, size):
        @partial(jax.custom_jvp, nondiff_argnums=(1,))
        def mark(pair, weight):
            return call(gradients, weight, pair)

        @mark.defjvp
        def _(weight, primals, tangents):
            w, lam = tangents[0]
            return mark(*primals, weight), (call("hvps", weight, w), call("mixed_products", weight, lam))

        @partial(jax.custom_vjp, nondiff_argnums=(1,))
        def tap(pair, weight):
            return pair

        tap.defvjp(lambda pair, weight: (pair, None), lambda weight, _, ct: (mark(ct, weight),))

        def function(w, lam, batch, key):
            assert jnp.issubdtype(lam["key"].dtype, jax.dtypes.prng_key) and lam["n"].dtype == w["n"].dtype == jnp.int32
            flat = jnp.concatenate([w["a"], *w["b"]]), jnp.concatenate(lam["x"])
            rows = jax.tree.leaves(batch)[0].shape[0]
            return loss(*tap(flat, -(-rows // size)), batch, key)

        return function

    def init_outer(key):
        lam = PROBLEM.init_outer(key)
        return {"x": (lam[:1], lam[1:]) if split else (lam,), "key": jax.random.key(7), "n": jnp.int32(3)}

    def init_inner(key, lam):
        w = PROBLEM.init_inner(key, lam)
        return {"a": w[:2], "b": (w[2:],), "n": jnp.int32(5)}

    return Problem(
        tapped("inner_gradients", inner_loss, SMALL[0].size),
        tapped("outer_gradients", outer_loss, SMALL[1].size),
        init_inner,
        init_outer,
        project=lambda lam: lam | {"x": jax.tree.map(_box, lam["x"])},
    )


@each()
def test_oracle_calls_equal_those_made_and_a_hand_count(row):
    for k, (made, reported) in enumerate(recorded(row).calls):
        assert {name: n for name, n in reported.items() if n} == made
        products = reported["hvps"] // max(row.random, 1)
        assert tuple(reported.values()) == row.calls(k, products)
        if row.random:
            assert 0 <= products < Q


@each()
def test_pytrees_equal_flat_arrays(row):
    for tree, flat in zip(recorded(row).tree, recorded(row).flat, strict=True):
        w, lam = tree.inner.params, tree.outer
        np.testing.assert_allclose(jnp.concatenate([w["a"], *w["b"]]), flat.inner.params, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(jnp.concatenate(lam["x"]), flat.outer, rtol=1e-12, atol=1e-14)
        assert (w["n"], lam["n"]) == (5, 3)
        assert (tree.inner.step, tree.step) == (flat.step, flat.step)


@each()
def test_random_keys_in_outer_advance_as_in_nested(row):
    key = jax.random.key(7)
    for state in recorded(row).tree:
        assert state.outer["key"] == key
        key = advance_keys(key)


@each()
def test_outer_stays_in_the_feasible_set(row):
    path = jnp.stack([state.outer for state in recorded(row).flat[1:]])
    assert path.min() >= -1.9 and path.max() <= -1.6
    assert not jnp.allclose(path[0], path[-1])


@each(lambda row: row.cls in (bilevel.SOBA, bilevel.SABA, bilevel.FSLA))  # the last wants two outer batches
def test_run_takes_any_solver_and_traces_it_once(row):
    traces = Counter()

    def loss(*args):
        traces["outer_loss"] += 1
        return outer_loss(*args)

    problem = dataclasses.replace(PROBLEM, outer_loss=loss)
    data = {"inner_data": SMALL[0], "outer_data": SMALL[1], "progress": False}
    result = bilevel.run(row.make(problem, data=SMALL, **row.small), steps=3, **data)
    assert set(result.history) == {"outer_loss", "inner_loss", "direction_norm", *Calls._fields}
    assert result.history["hvps"].shape == (3,)
    before = traces["outer_loss"]
    bilevel.run(row.make(problem, step=0.2, data=SMALL, **row.small), steps=3, **data)
    assert traces["outer_loss"] == before, "another step size is not another program"


@pytest.mark.parametrize("size", [4, 5])  # 12 rows in equal blocks, and with a smaller last one
def test_saba_averages_are_those_of_its_tables(size):
    data = Batches(DATA, size), Batches(OUTER_DATA, size)
    row = next(row for row in TABLE if row.cls is bilevel.SABA)
    state, _ = train(row.make(data=data), data, 50)
    for table, count in zip(state.memory[1:], (ROWS, OUTER_ROWS), strict=True):
        blocks = -(-count // size)
        shares = np.minimum(size, count - size * np.arange(blocks)) / count
        assert shares.sum() == pytest.approx(1)
        for kept, average in zip(jax.tree.leaves(table.rows), jax.tree.leaves(table.average), strict=True):
            assert jnp.abs(kept).min(1).all(), "every block was drawn"
            np.testing.assert_allclose(average, shares @ np.asarray(kept), rtol=1e-12, atol=1e-14)


def test_saba_converges_with_a_smaller_last_block():
    data = Batches(DATA, 5), Batches(OUTER_DATA, 4)
    row = next(row for row in TABLE if row.cls is bilevel.SABA)
    state, _ = train(row.make(step=0.25, data=data), data, 1500)
    assert distance(state.outer) < 1e-9


@pytest.mark.parametrize("size", [3, 5])
def test_blocks_are_slices_of_fixed_rows_each_once_an_epoch(size):
    data = Batches(DATA, size, order="blocks")
    blocks = -(-ROWS // size)
    drawn = [data.take(KEY, epoch * blocks, blocks) for epoch in range(4)]
    starts = [tuple(batches.index[:, 0].tolist()) for batches in drawn]
    assert {tuple(sorted(s)) for s in starts} == {tuple(min(j * size, ROWS - size) for j in range(blocks))}
    assert len(set(starts)) > 1, "the order is shuffled"
    assert drawn[0].contiguous and (jnp.diff(drawn[0].index, axis=1) == 1).all()
    batch = drawn[0].batch(0)
    for sliced, gathered in zip(resolve(batch)["H"], DATA["H"][batch.index], strict=True):
        np.testing.assert_array_equal(sliced, gathered)
    with pytest.raises(ValueError, match="'rows', 'blocks'"):
        Batches(DATA, size, order="sorted")


def test_schedules_and_numbers_are_step_sizes():
    constant, _ = train(bilevel.SOBA(PROBLEM, 0.5, 0.1), SMALL, 3)
    scheduled, _ = train(bilevel.SOBA(PROBLEM, Power(0.5, 0.0), lambda step: 0.1), SMALL, 3)
    np.testing.assert_array_equal(constant.outer, scheduled.outer)
    assert Power(0.5, 0.5)(jnp.int32(3)) == 0.25


@each(lambda row: row.needs_data)
def test_solvers_that_need_the_data_refuse_anything_else(row):
    solver = row.make(data=SMALL)
    with pytest.raises(ValueError, match=rf"{row.name} needs the whole inner data set .* give inner_data as Batches"):
        bilevel.run(solver, inner_data=DATA, outer_data=SMALL[1], steps=1, progress=False)


def test_bad_input_ends_in_one_sentence():
    soba = bilevel.SOBA(PROBLEM, 0.5, 0.1)
    state = soba.init(KEY)
    with pytest.raises(ValueError, match=r"AmIGO\(inner_steps=0\): must be an integer >= 1"):
        bilevel.AmIGO(PROBLEM, 0.5, 0.1, inner_steps=0)
    with pytest.raises(ValueError, match=r"inner_batches leaf \['C'\] has shape \(12, 4, 5\), but 1 inner calls need"):
        soba.step(state, DATA, OUTER_DATA)
    with pytest.raises(ValueError, match=r"outer_batches leaf .* but 2 outer calls need a leading axis of 2"):
        fsla = bilevel.FSLA(PROBLEM, 0.5, 0.1)
        fsla.step(fsla.init(KEY), SMALL[0].take(KEY, 0, 3), SMALL[1].take(KEY, 0, 3))
    with pytest.raises(ValueError, match=r"SABA\(inner_blocks=7\), but 12 rows of inner data .* give inner_blocks=4"):
        saba = bilevel.SABA(PROBLEM, 0.5, 0.1, inner_blocks=7, outer_blocks=3)
        bilevel.run(saba, inner_data=SMALL[0], outer_data=SMALL[1], steps=1, progress=False)
    vector = dataclasses.replace(PROBLEM, inner_loss=lambda w, lam, batch, key: w)
    with pytest.raises(ValueError, match=r"inner_loss returned an array of shape \(5,\) .* reduce it"):
        bilevel.SOBA(vector, 0.5, 0.1).step(state, SMALL[0].take(KEY, 0, 1), OUTER_DATA)
    with pytest.raises(ValueError, match="The data set is empty"):
        Batches({"x": jnp.zeros((0, 3))}, 1)


def test_a_step_size_that_diverges_stops_the_run_with_the_step_and_the_norm():
    with pytest.raises(FloatingPointError, match=r"Outer step \d+: .*direction_norm was .*lower the step size"):
        bilevel.run(
            bilevel.SOBA(PROBLEM, 50.0, 0.1), inner_data=DATA, outer_data=OUTER_DATA, steps=2000, progress=False
        )

"""A state may be given away to the compiled step: no two of its leaves are one buffer, and none is the user's."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel.hypergradients.base import Trained
from bilevel.running.fit import _Training
from tests.bilevel.helpers import assert_equal
from tests.bilevel.solvers.finite_sum import DATA, KEY, OUTER_DATA, PROBLEM
from tests.bilevel.solvers.table import TABLE, each

MINE = jnp.full(4, -2.0)
# MAML's problem: training starts at the outer variable, which is an array of the user's.
SHARED = bilevel.Problem(
    lambda w, lam, batch, key: jnp.sum((w - lam) ** 2),
    lambda w, lam, batch, key: jnp.sum(w**2),
    lambda key, lam: lam,
    lambda key: MINE,
)
OPTIMIZERS = {"adam": optax.adam(0.1), "lookback": optax.contrib.dog(1.0), "average": optax.ema(0.9)}
SOLVERS = {row.name: row.make(SHARED) for row in TABLE} | {
    f"Nested, {name}": bilevel.Nested(SHARED, bilevel.Unrolled(optimizer, 2), optimizer)
    for name, optimizer in OPTIMIZERS.items()
}
SOLVERS["fit"] = _Training(SHARED, Trained(optax.contrib.dog(1.0), 1), MINE)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_fresh_state_can_be_donated(name):
    state = SOLVERS[name].init(KEY)
    same = jax.jit(lambda state: jax.tree.map(lambda x: x, state), keep_unused=True, donate_argnums=0)
    expected = SOLVERS[name].init(KEY)
    assert_equal(same(state), expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not MINE.is_deleted()


@each(lambda row: row.name in ("SABA", "SUSTAIN"))
def test_steps_that_are_given_their_state_are_the_same_steps(row):
    solver = row.make(PROBLEM)
    batches = bilevel.Batches(DATA, 12).take(KEY, 0, solver.inner_batches_per_step)
    outer = bilevel.Batches(OUTER_DATA, 9).take(KEY, 0, 1).batch(0)
    step = jax.jit(lambda solver, state: solver.step(state, batches, outer))
    giving = jax.jit(lambda solver, state: solver.step(state, batches, outer), donate_argnums=1)
    kept, given = solver.init(KEY), solver.init(KEY)
    for _ in range(3):
        kept, given = step(solver, kept)[0], giving(solver, given)[0]
    assert_equal(given, kept)

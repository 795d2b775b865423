"""Every stochastic solver, step by step beside its paper's update rule in NumPy.

Each call of a loss has rows of its own, so that it shows which batch it is given.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
import bilevel.testing
from bilevel import Indexed, Power
from bilevel.solvers.stochastic import Stochastic
from tests.bilevel.helpers import step
from tests.bilevel.solvers.rules import (
    DATA,
    INNER,
    LAM,
    OUTER,
    OUTER_DATA,
    OUTER_ROWS,
    OUTER_SIZE,
    PROBLEM,
    ROWS,
    SIZE,
    Inner,
    J,
    Now,
    Outer,
    W,
)
from tests.bilevel.solvers.table import TABLE, each

STEPS = 4
RHO, RHO_V, GAMMA = Power(0.3, 0.5), Power(0.2, 0.25), Power(0.1, 0.75)


def test_every_solver_has_a_row():
    public = [x for x in vars(bilevel).values() if isinstance(x, type)]
    assert {x for x in public if issubclass(x, Stochastic)} - {Stochastic} == {row.cls for row in TABLE}
    assert len({row.name for row in TABLE}) == len(TABLE)


@each()
def test_steps_are_those_of_the_paper(row):
    linear = {"linear_step": RHO_V} if "linear_step" in row.fields else {}
    blocks = -(-ROWS // SIZE), -(-OUTER_ROWS // OUTER_SIZE)
    solver = row.make(PROBLEM, RHO, GAMMA, blocks=blocks, **row.small | row.by_hand | linear)
    rng = np.random.default_rng(1)
    inner = rng.integers(ROWS, size=(STEPS, solver.inner_batches_per_step, SIZE))
    outer = rng.integers(OUTER_ROWS, size=(STEPS, solver.outer_batches_per_step, OUTER_SIZE))
    inner[2], outer[2] = inner[0], outer[0]  # SABA's tables are read where a mini-batch comes again
    state = solver.init(jax.random.key(3))
    s = SimpleNamespace(w=W, lam=LAM, v=np.zeros(INNER), y=W, d_lam=np.zeros(OUTER), tables={})
    products, before, start = set(), (None, None), (W, LAM)
    for k in range(STEPS):
        index = jnp.asarray(outer[k] if solver.outer_batches_per_step > 1 else outer[k, 0])
        batches = Indexed(DATA, jnp.asarray(inner[k])), Indexed(OUTER_DATA, index)
        own = jax.random.split(jax.random.fold_in(state.key, k))[1]
        u = np.array([optax.tree.random_like(key, jnp.asarray(LAM)) for key in jax.random.split(own, J)])
        state, metrics = step(solver, state, *batches)
        p = int(metrics["hvps"]) // max(row.random, 1)
        products.add(p)
        f, F = [Inner(rows) for rows in inner[k]], [Outer(rows) for rows in outer[k]]
        sizes = (schedule.value / (k + 1) ** schedule.exponent for schedule in (RHO, RHO_V, GAMMA))
        now = Now(k, f, F, Inner(slice(None)), Outer(slice(None)), *sizes, p, u, inner[k], outer[k])
        row.rule(s, now)
        np.testing.assert_allclose(state.inner.params, s.w, rtol=1e-12, err_msg=f"w after step {k}")
        np.testing.assert_allclose(state.outer, s.lam, rtol=1e-12, err_msg=f"lambda after step {k}")
        # What the step reports: the length of lambda's direction, and losses where they were differentiated, on this
        # step's batches and not at the point before.
        norm = np.linalg.norm(start[1] - s.lam) / now.gamma
        np.testing.assert_allclose(metrics["direction_norm"], norm, rtol=1e-10)
        for name, losses in (("inner_loss", [*f, now.all_f]), ("outer_loss", [*F, now.all_F])):
            here = [g.value(*at) for g in losses for at in g.seen if not all(map(np.array_equal, at, before))]
            assert np.isclose(here, metrics[name], rtol=1e-12).any(), f"{name} of step {k}"
        before, start = start, (s.w, s.lam)
    assert not row.random or len(products) > 1, "one number of products is not a random number"


def test_the_unit_of_the_inner_loss_does_not_matter_to_bome():
    """Without a demanded decrease its direction depends on the direction of the gap alone, whose square would be 0."""
    problem, train, val = bilevel.testing.ridge()
    found = []
    for unit in (1.0, 2.0**-600):
        scaled = dataclasses.replace(problem, inner_loss=lambda *args, unit=unit: unit * problem.inner_loss(*args))
        solver = bilevel.BOME(scaled, inner_step=0.3, gap_step=0.3 / unit, outer_step=0.3, eta=0.0)
        found.append(bilevel.run(solver, inner_data=train, outer_data=val, steps=20, progress=False).outer)
    assert found[0] == found[1] != 0

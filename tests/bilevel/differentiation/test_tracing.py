"""What is known of jaxprs, on programs whose answers are plain; and what stands on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import bilevel
from bilevel.differentiation import tracing
from bilevel.measuring.flops import flops
from tests.bilevel.helpers import KEY, LINE, NETWORK, ROWS, estimate, network_batches


def equation(function, *arguments, name):
    (found,) = [e for e in jax.make_jaxpr(function)(*arguments).jaxpr.eqns if e.primitive.name == name]
    return found


def test_a_scan_says_what_is_constant_and_what_is_carried():
    def loop(a, b, x, y, zs):
        def body(carry, z):
            u, v = carry
            return (u + a * z, v * b + u), (u, v, z)

        return jax.lax.scan(body, (x, y), zs)

    eqn = equation(loop, 1.0, 2.0, 3.0, 4.0, jnp.ones(5), name="scan")
    assert tracing.scan_counts(eqn) == (2, 2) and len(eqn.invars) == 5
    outputs = tracing.bind(eqn, 1.0, 2.0, 3.0, 4.0, jnp.ones(5))
    assert [jnp.shape(x) for x in outputs[:2]] == [(), ()] and {jnp.shape(x) for x in outputs[2:]} == {(5,)}


def test_a_while_says_what_is_constant():
    def loop(limit, step, x):
        return jax.lax.while_loop(lambda x: x < limit, lambda x: x + step, x)

    assert tracing.while_counts(equation(loop, 3.0, 1.0, 0.0, name="while")) == (1, 1)


def test_programs_inside_programs_are_found():
    def function(x):
        return jax.lax.cond(x > 0, jnp.sin, jnp.cos, x) + jax.jit(jnp.exp)(x)

    inside = [tracing.jaxprs(e.params) for e in jax.make_jaxpr(function)(1.0).jaxpr.eqns]
    names = sorted(e.primitive.name for jaxprs in inside for jaxpr in jaxprs for e in jaxpr.eqns)
    assert names == ["cos", "exp", "sin"]


def test_a_detached_program_takes_its_constants_as_inputs():
    captured = jnp.arange(3.0)
    closed = jax.make_jaxpr(lambda x, y: (captured * x, y))(2.0, 5.0)
    jaxpr = tracing.detached(closed)
    assert len(jaxpr.constvars) == 0 and len(jaxpr.invars) == 3
    np.testing.assert_array_equal(tracing.evaluate(jaxpr, 10 * captured, 2.0, 5.0)[0], [0.0, 20.0, 40.0])
    assert tracing.used(jaxpr, [True, False]) == [True, True, False]
    assert tracing.used(jaxpr, [False, True]) == [False, False, True]


def test_what_nobody_reads_is_dropped():
    def function(x):
        (_, kept), _ = jax.lax.scan(lambda c, _: ((c[0] * 2, c[1] + c[0]), c[0]), (x, x), None, length=3)
        return kept

    jaxpr = jax.make_jaxpr(function)(1.0).jaxpr
    (eqn,) = jaxpr.eqns
    assert [v in tracing.read(jaxpr) for v in eqn.outvars] == [False, True, False]
    assert set(jaxpr.invars) < tracing.read(jaxpr)
    assert tracing.is_literal(equation(lambda x: 2.0 * x, 1.0, name="mul").invars[0])


@pytest.mark.parametrize(
    "optimizer", [contrib.muon(0.05), optax.lbfgs(0.1, linesearch=None)], ids=["muon", "l-bfgs"]
)
def test_optimizers_with_loops_inside_are_differentiated(optimizer):
    """One direction against a central difference; every optimizer is in `test_optimizers`."""
    outer, batches, validation = NETWORK.start_outer(KEY), network_batches(3), jax.tree.map(jnp.asarray, ROWS)
    hypergradient = bilevel.Unrolled(optimizer, 3, checkpoint="none")

    def at(size):
        moved = outer | {"decay": outer["decay"] + size}
        return estimate(NETWORK, hypergradient, None, moved, batches, validation, KEY)

    h = 1e-4
    sides = [float(at(i * h).value) for i in (-2, -1, 1, 2)]
    expected = (8 * (sides[2] - sides[1]) - (sides[3] - sides[0])) / (12 * h)
    np.testing.assert_allclose(at(0.0).grad["decay"], expected, rtol=1e-6)


def test_a_plan_counts_the_loops():
    hypergradient = bilevel.Unrolled(optax.sgd(0.1), 12)
    # Of a quadratic no iterate is kept, so nothing would be recomputed.
    curved = dataclasses.replace(LINE, inner_loss=lambda w, outer, batch, key: jnp.sum((w - outer) ** 4))
    planned = bilevel.plan(curved, hypergradient)
    rows = {row.checkpoint: row for row in planned.rows if row.mode == "reverse"}
    assert rows["none"].flops < rows["step"].flops < rows["sqrt"].flops
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c * x, c), x, None, length=7)[0], 1.0) == 7

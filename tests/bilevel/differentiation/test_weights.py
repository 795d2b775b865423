"""Frozen weights bound with `Partial`: arguments of the program, kept once, and without a cotangent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import bilevel
from bilevel import Unrolled

SHAPE = (67, 131)  # of nothing else in the program


def loss(weights, inner, outer, batch, key):
    hidden = jnp.tanh(batch @ weights) * inner["gate"]
    return jnp.mean((hidden @ inner["head"]) ** 2 * outer) + jnp.sum(outer**2)


def problem():
    bound = jax.tree_util.Partial(loss, jax.random.normal(jax.random.key(1), SHAPE))
    return bilevel.Problem(
        bound,
        bound,
        lambda key, outer: {"gate": jnp.ones((1, SHAPE[1])), "head": jnp.full((SHAPE[1], 1), 0.1)},
        lambda key: jnp.asarray(0.5),
    )


def solver(mode, checkpoint):
    return bilevel.Nested(problem(), Unrolled(optax.adam(0.01), 8, mode=mode, checkpoint=checkpoint), optax.adam(0.1))


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def lower(solver):
    state = solver.init(jax.random.key(0))
    data = jnp.ones((8, 5, SHAPE[0])), jnp.ones((5, SHAPE[0]))
    return jax.jit(lambda solver, *args: solver.step(*args)).trace(solver, state, *data)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
@pytest.mark.parametrize("checkpoint", ["none", "sqrt"])
def test_no_operation_makes_an_array_of_the_size_of_the_weights(mode, checkpoint):
    traced = lower(solver(mode, checkpoint))
    size = SHAPE[0] * SHAPE[1]
    passed_on = {"jit", "pjit", "scan", "checkpoint", "remat2", "custom_vjp_call", "while", "cond"}
    made = [
        eqn.primitive.name
        for eqn in equations(traced.jaxpr.jaxpr)
        for out in eqn.outvars
        if getattr(out.aval, "size", 0) >= size and eqn.primitive.name not in passed_on
    ]
    assert made == []
    # A scan that handed them on would hand them on stacked: more than their size.
    assert all(getattr(out.aval, "size", 0) <= size for eqn in equations(traced.jaxpr.jaxpr) for out in eqn.outvars)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_weights_are_an_argument_and_temporary_memory_does_not_hold_a_copy_for_each_step(mode):
    lowered = lower(solver(mode, "none")).lower()
    text = lowered.as_text()
    shape = "x".join(map(str, SHAPE))
    assert f"tensor<{shape}xf64>" in text
    assert not [line for line in text.splitlines() if "constant" in line and shape in line]
    weights = 8 * SHAPE[0] * SHAPE[1]
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * weights  # 8 steps


def test_data_is_not_copied_for_each_step():
    # 8 steps on batches that are gathered from one array, and on one full batch.
    rows = {"x": jnp.ones((4000, 3)), "y": jnp.ones(4000)}
    size = sum(leaf.size * 8 for leaf in rows.values())

    def fit(inner, outer, batch, key):
        return jnp.mean((batch["x"] @ inner - batch["y"]) ** 2) * outer + jnp.sum(outer**2)

    case = bilevel.Problem(fit, fit, lambda key, outer: jnp.zeros(3), lambda key: jnp.asarray(0.5))
    hypergradient = Unrolled(optax.sgd(0.1), 8, checkpoint="none")
    step = jax.jit(lambda *args: hypergradient.estimate(case, None, *args))
    gathered = bilevel.Indexed(rows, jnp.zeros((8, 2), int))
    last = bilevel.Indexed(rows, jnp.zeros(2, int))
    for batches, limit in ((gathered, 0.5), (bilevel.FullBatch(rows), 4.0)):
        lowered = step.lower(jnp.asarray(0.5), batches, last, jax.random.key(0))
        assert lowered.compile().memory_analysis().temp_size_in_bytes < limit * size


def test_weights_of_another_value_need_no_other_trace():
    traces = 0

    def counted(weights, inner, outer, batch, key):
        nonlocal traces
        traces += 1
        return jnp.sum((inner - weights * outer) ** 2)

    zeros, halves = (lambda key, outer: jnp.zeros(3)), (lambda key: jnp.full(3, 0.5))
    hypergradient, optimizer = Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1)
    step = jax.jit(lambda solver, state: solver.step(state, None, None)[0].outer)
    found, counts = [], []
    for scale in (1.0, 2.0, 2.0):
        bound = jax.tree_util.Partial(counted, jnp.full(3, scale))
        nested = bilevel.Nested(bilevel.Problem(bound, bound, zeros, halves), hypergradient, optimizer)
        found.append(step(nested, nested.init(jax.random.key(0))))
        counts.append(traces)
    assert counts[0] == counts[1] == counts[2]
    assert not np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])

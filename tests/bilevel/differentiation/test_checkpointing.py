"""Rematerialisation schedules and modes: the same hypergradient from all, with the memory each promises."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Auto, Binomial, Levels, Offload, Unrolled
from bilevel.differentiation import binomial, schedules
from bilevel.differentiation.tracing import is_on_host, jaxprs, operation, scan_counts, without_unused
from bilevel.measuring.planning import planned, temp_bytes
from tests.bilevel.helpers import KEY
from tests.bilevel.quadratic import Quadratic, error

STEPS = (1, 2, 5, 7, 16, 64)
SCHEDULES = ("none", "step", "sqrt", Levels(3), Binomial(1), Binomial(3), Offload())
# Every schedule in mixed mode, those that differ in kind in reverse mode, and the only one of forward mode.
WAYS = [("mixed", c) for c in SCHEDULES]
WAYS += [("reverse", c) for c in ("none", "sqrt", Binomial(2), Offload())] + [("forward", "auto")]


@jax.jit
def estimate(hypergradient, problem, outer, inner_batches, outer_batch):
    return hypergradient.estimate(problem, None, outer, inner_batches, outer_batch, jax.random.key(3))


def close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-16 + tolerance * float(jnp.max(jnp.abs(b))))


# --- the quadratic family ---

QUADRATIC = Quadratic.random()
SGD = optax.sgd(QUADRATIC.eta)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("mode", "checkpoint"), WAYS, ids=str)
def test_quadratic_has_its_closed_form(mode, checkpoint, steps):
    unrolled = Unrolled(SGD, steps, mode=mode, checkpoint=checkpoint)
    found = estimate(unrolled, QUADRATIC.problem(), jnp.asarray(QUADRATIC.outer), None, None)
    assert error(found.grad, QUADRATIC.unrolled(QUADRATIC.trained(steps), steps)) < 1e-10


# --- an MLP with Adam, dropout, and outer leaves of every kind ---


def mlp():
    def init(key, outer):
        keys = jax.random.split(key, 2)
        return {
            "w": jax.random.normal(keys[0], (3, 4)) * outer["scale"],
            "v": jax.random.normal(keys[1], (4,)),
            "seen": jnp.int32(0),
        }

    def loss(params, outer, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["w"])
        for k, rate in ((outer["key"], 0.8), (key, 0.9)):
            hidden = hidden * jax.random.bernoulli(k, rate, hidden.shape).astype(hidden.dtype)
        return jnp.mean((hidden @ params["v"] - batch["y"]) ** 2)

    def inner_loss(params, outer, batch, key):
        return loss(params, outer, batch, key) + jnp.exp(outer["l2"]) * jnp.sum(params["w"] ** 2)

    outer = {
        "l2": jnp.float64(-2.0),
        "rate": jnp.log(jnp.float64(0.02)),
        "scale": jnp.ones((3, 1)),
        "key": jax.random.key(7),
        "flag": jnp.int32(2),
    }
    return bilevel.Problem(inner_loss, loss, init, lambda key: outer), outer


def adam(outer):
    return optax.adam(jnp.exp(outer["rate"]))


def mlp_batches(steps):
    keys = jax.random.split(jax.random.key(1))
    return {"x": jax.random.normal(keys[0], (steps, 6, 3)), "y": jax.random.normal(keys[1], (steps, 6))}


PROBLEM, OUTER = mlp()


@functools.cache
def reference(steps, truncate):
    unrolled = Unrolled(adam, steps, mode="reverse", checkpoint="none", truncate=truncate)
    batches = mlp_batches(steps)
    return estimate(unrolled, PROBLEM, OUTER, batches, jax.tree.map(lambda x: x[0], batches))


# Every way at K = 7, which is prime, a way of each mode truncated; at other lengths the ways whose loops depend on it.
MLP_CASES = [(7, *way, None) for way in WAYS]
MLP_CASES += [(7, *way, 3) for way in (("mixed", "sqrt"), ("reverse", "none"), ("forward", "auto"))]
MLP_CASES += [(steps, "mixed", c, None) for steps in (2, 16) for c in ("sqrt", Binomial(3))]


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")  # truncated, it does not see the start
@pytest.mark.parametrize(("steps", "mode", "checkpoint", "truncate"), MLP_CASES, ids=str)
def test_every_way_is_the_same_with_adam_and_dropout(steps, mode, checkpoint, truncate):
    batches = mlp_batches(steps)
    unrolled = Unrolled(adam, steps, mode=mode, checkpoint=checkpoint, truncate=truncate)
    found = estimate(unrolled, PROBLEM, OUTER, batches, jax.tree.map(lambda x: x[0], batches))
    expected = reference(steps, truncate)
    # The first step of Adam does not depend on the scale of the gradient: derivatives that cancel are rounding noise.
    close(found.grad, expected.grad, 1e-12)
    close(found.value, expected.value, 1e-14)
    close(found.inner_state.params, expected.inner_state.params, 1e-14)
    assert found.grad["key"] is None and found.grad["flag"] is None


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_forward_mode_in_chunks_of_any_size(chunk):
    batches = mlp_batches(7)
    unrolled = Unrolled(adam, 7, mode="forward", chunk=chunk)
    found = estimate(unrolled, PROBLEM, OUTER, batches, jax.tree.map(lambda x: x[0], batches))
    close(found.grad, reference(7, None).grad, 1e-12)


def test_forward_mode_of_complex_leaves():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w - jnp.real(outer)) ** 2 + jnp.sin(jnp.imag(outer) * w)),
        lambda w, outer, batch, key: jnp.sum(w**2) + jnp.sum(jnp.real(outer * jnp.conj(outer))),
        lambda key, outer: jnp.ones(2),
        lambda key: jnp.asarray([1 + 2j, -1 + 0.5j]),
    )
    outer = problem.start_outer(jax.random.key(0))
    grads = [
        estimate(Unrolled(optax.sgd(0.1), 3, mode=mode), problem, outer, None, None).grad
        for mode in ("mixed", "forward")
    ]
    close(grads[1], grads[0], 1e-12)


def test_forward_mode_names_leaves_without_influence():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w - outer["a"]) ** 2),
        lambda w, outer, batch, key: jnp.sum(w**2),
        lambda key, outer: jnp.ones(()),
        lambda key: {"a": jnp.ones(()), "b": jnp.ones(())},
    )
    unrolled = Unrolled(optax.sgd(0.1), 2, mode="forward")
    outer = problem.start_outer(jax.random.key(0))
    with pytest.warns(bilevel.StructuralZeroWarning, match=r"'b'"):
        found = estimate(unrolled, problem, outer, None, None)
    assert found.grad["b"] == 0 and found.grad["a"] != 0
    nothing = dataclasses.replace(problem, inner_loss=lambda w, outer, batch, key: jnp.sum(w**2))
    with pytest.raises(ValueError, match="Neither loss depends on outer"):
        estimate(unrolled, nothing, outer, None, None)


# --- the schedules themselves ---


def test_binomial_schedules_are_the_shortest_possible_and_reach_every_state():
    @functools.cache
    def least(length, slots):  # evaluations to reverse `length` steps with `slots` states, the first among them
        if length == 1:
            return 0
        if slots == 1:
            return length * (length - 1) // 2
        return min(j + least(length - j, slots - 1) + least(j, slots) for j in range(1, length))

    for length in (1, 2, 3, 5, 7, 16, 31, 64):
        for slots in (1, 2, 3, 5, 9):
            groups = binomial.schedule(length, slots)
            states, cost = {0: 0}, 0
            assert len(groups) == length
            for t, group in zip(reversed(range(length)), groups, strict=True):
                for move in group:
                    assert states[move.source] == move.start
                    states[move.target] = move.start + move.count
                    cost += move.count
                assert states[slots] == t
            assert cost == least(length, slots)
            assert cost <= length * binomial.repetitions(length, slots)


def test_nested_loops_fit_their_length():
    for length in (1, 2, 3, 5, 7, 16, 17, 61, 64, 97, 1009):
        for depth in (1, 2, 3, 4):
            sizes = schedules.chunks(length, depth)
            # Skipped steps are few, and no loop is much longer than the others.
            assert length <= math.prod(sizes) <= 1.5 * length
            assert max(sizes) <= 2 * length ** (1 / len(sizes)) + 1


@pytest.mark.parametrize("checkpoint", ["sqrt", Levels(3), Binomial(3)], ids=str)
def test_a_prime_number_of_steps_compiles_no_step_twice(checkpoint):
    def steps_compiled(steps):
        unrolled = Unrolled(SGD, steps, checkpoint=checkpoint)
        text = estimate.lower(unrolled, QUADRATIC.problem(), jnp.asarray(QUADRATIC.outer), None, None).as_text()
        return text.count("dot_general")

    assert steps_compiled(61) == steps_compiled(64)


def test_one_trace_for_all_values():
    traced = jax.jit(chex.assert_max_traces(estimate.__wrapped__, n=1))
    problem = QUADRATIC.problem()
    for scale in (1.0, 2.0):
        unrolled = Unrolled(SGD, 7, checkpoint=Binomial(2))
        traced(unrolled, problem, scale * jnp.asarray(QUADRATIC.outer), None, None)


# --- memory ---

LARGE = 50_000


def memory(steps, mode, checkpoint):
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum(jnp.cos(w * outer)),
        lambda w, outer, batch, key: jnp.sum(jnp.sin(w)),
        lambda key, outer: jnp.ones(LARGE),
        lambda key: jnp.ones(()),
    )
    unrolled = Unrolled(optax.sgd(0.1), steps, mode=mode, checkpoint=checkpoint)
    arguments = (unrolled, problem, None, jnp.ones(()), None, None, jax.random.key(0))
    return temp_bytes(lambda u, *rest: u.estimate(*rest), *arguments) / (8 * LARGE)  # in states


@pytest.mark.parametrize(
    ("mode", "checkpoint", "growth"),
    [
        ("mixed", "none", lambda k: k),
        ("mixed", "sqrt", lambda k: 2.5 * k**0.5),
        ("mixed", Binomial(4), lambda k: 0),
        ("forward", "auto", lambda k: 0),
    ],
    ids=["none", "sqrt", "binomial", "forward"],
)
def test_memory_grows_as_promised(mode, checkpoint, growth):
    small, large = (memory(steps, mode, checkpoint) for steps in (16, 144))
    assert large - small <= 1.1 * (growth(144) - growth(16)) + 0.5
    if checkpoint == "none":
        assert large - small >= 100  # what the others are compared with
    if isinstance(checkpoint, Binomial):
        assert large <= checkpoint.c + 10
        # Every kept state costs one state.
        assert 3.5 <= memory(144, mode, Binomial(8)) - large <= 4.5


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_what_steps_keep_goes_to_the_host(mode):
    """On the device there is no stack of states, and no stack of gradients, whatever the number of steps."""
    batches = mlp_batches(16)
    held_out = jax.tree.map(lambda x: x[0], batches)

    def stacks(checkpoint):
        unrolled = Unrolled(adam, 16, mode=mode, checkpoint=checkpoint)
        arguments = unrolled, PROBLEM, None, OUTER, batches, held_out, KEY
        traced = jax.make_jaxpr(lambda unrolled, *rest: unrolled.estimate(*rest))(*arguments)
        return [v for v in stacked_by_loops(without_unused(traced.jaxpr)) if v.dtype == float and v.ndim > 1]

    kept, there = stacks(Offload()), stacks("step")
    assert kept and all(map(is_on_host, kept))
    assert not any(map(is_on_host, there)) and sorted(v.shape for v in there) == sorted(v.shape for v in kept)
    unrolled = Unrolled(adam, 16, mode=mode, checkpoint=Offload())
    plan = planned(unrolled, PROBLEM, None, OUTER, batches, held_out, KEY)
    step = plan.row(mode, "step")
    assert plan.chosen.temp_bytes <= step.temp_bytes - sum(8 * v.size for v in kept)
    assert plan.chosen.evaluations == pytest.approx(step.evaluations, rel=0.01)


def stacked_by_loops(jaxpr):
    for eqn in jaxpr.eqns:
        if operation(eqn) == "scan":
            yield from (v.aval for v in eqn.outvars[scan_counts(eqn)[1] :] if type(v).__name__ != "DropVar")
        for inner in jaxprs(eqn.params):
            yield from stacked_by_loops(inner)


def test_a_device_without_memory_of_the_host_beside_its_own_is_told(monkeypatch):
    class Device:
        platform = "abacus"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    unrolled = Unrolled(SGD, 4, checkpoint=Offload())
    with pytest.raises(ValueError, match=r"^checkpoint=Offload\(\): a device of the abacus backend has no"):
        unrolled.estimate(QUADRATIC.problem(), None, jnp.asarray(QUADRATIC.outer), None, None, KEY)


def test_auto_takes_the_fastest_schedule_within_its_budget():
    sizes = schedules.StepBytes(state=10, gradient=5, residual=30)

    def choice(budget):
        return schedules.choose(Auto(budget), lambda: sizes, 64)

    assert choice(64 * 30) == "none"
    assert choice(64 * 30 - 1) == "step"
    assert choice(64 * 15 + 29) == Levels(2)
    assert choice(16 * 10 + 8 * 5 + 30) == Levels(2)
    assert choice(16 * 10 + 8 * 5 + 29) == Levels(3)
    with pytest.warns(UserWarning, match="keeps least"):
        choice(1)
    assert schedules.choose("auto", lambda: sizes, 64) == "none"


def test_auto_counts_what_a_step_keeps():
    def sizes(mode):
        probe = schedules.Probe([])
        unrolled = Unrolled(adam, 4, mode=mode, checkpoint=probe)
        key = jax.random.key(0)
        jax.eval_shape(lambda: unrolled.solve(PROBLEM, None, OUTER, mlp_batches(4), key))
        return probe.found[0]

    mixed, reverse = sizes("mixed"), sizes("reverse")
    params = 8 * (3 * 4 + 4)
    assert mixed.state == reverse.state == 3 * params + 4  # the parameters, two moments and Adam's count
    assert mixed.gradient == params and reverse.gradient == 0  # keeping it would spare nothing
    assert mixed.residual < reverse.residual


# --- refusals ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Unrolled(adam, 4, checkpoint="all"), "not a schedule"),
        (lambda: Unrolled(adam, 4, mode="forward", checkpoint="sqrt"), "forward mode keeps no states"),
        (lambda: Unrolled(adam, 4, mode="forward", checkpoint=Binomial(2)), "forward mode keeps no states"),
        (lambda: Unrolled(adam, 4, mode="backward"), "mode='backward'"),
        (lambda: Unrolled(adam, 4, mode="forward", chunk=0), "chunk"),
        (lambda: Levels(0), "n=0"),
        (lambda: Binomial(0), "c=0"),
        (lambda: Auto(0), "> 0"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("checkpoint", [Binomial(2), Offload()], ids=str)
def test_some_schedules_allow_no_forward_mode_and_no_third_level(checkpoint):
    problem, outer = QUADRATIC.problem(), jnp.asarray(QUADRATIC.outer)
    unrolled = Unrolled(SGD, 5, mode="reverse", checkpoint=checkpoint)

    def trained(outer):
        return unrolled.solve(problem, None, outer, None, jax.random.key(0)).params

    with pytest.raises(ValueError, match="no forward-mode derivative"):
        jax.jvp(trained, (outer,), (outer,))

    def hypergradient(outer):
        return jnp.sum(unrolled.estimate(problem, None, outer, None, None, jax.random.key(0)).grad)

    with pytest.raises(ValueError, match="no third level"):
        jax.grad(hypergradient)(outer)

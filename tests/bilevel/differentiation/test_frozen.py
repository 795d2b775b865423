"""Parts of the inner variable that the optimizer freezes are constants of an implicit system, and no unknowns."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.differentiation.frozen import divide, traced
from bilevel.differentiation.trials import trial
from tests.bilevel.helpers import KEY, estimate
from tests.bilevel.quadratic import error

# f = w'Hw/2 - (b + C lam)'w over w = (u, z), F = |w - c|^2 / 2. With z frozen, u* = Huu^-1 (b + C lam - Huz z)_u and
# dF/dlam = Cu' Huu^-1 (u* - cu).
N, M = 6, 3
rng = np.random.default_rng(0)
root = rng.normal(size=(N, N))
H, B, C = root @ root.T / N + np.eye(N), rng.normal(size=N), rng.normal(size=(N, 2))
TARGET, LAM = rng.normal(size=N), np.array([0.3, -0.7])


def join(w):
    return jnp.concatenate([w["u"], w["z"]])


def problem(z, merged=False):
    whole = (lambda w: w) if merged else join

    def inner(w, lam, batch, key):
        return 0.5 * whole(w) @ jnp.asarray(H) @ whole(w) - (jnp.asarray(B) + jnp.asarray(C) @ lam) @ whole(w)

    def outer(w, lam, batch, key):
        return 0.5 * jnp.sum((whole(w) - jnp.asarray(TARGET)) ** 2)

    def start(key, lam):
        pieces = jnp.zeros(M), jnp.asarray(z)
        return jnp.concatenate(pieces) if merged else dict(zip("uz", pieces, strict=True))

    return bilevel.Problem(inner, outer, start, lambda key: jnp.asarray(LAM))


def expected(z):
    u = np.linalg.solve(H[:M, :M], (B + C @ LAM)[:M] - H[:M, M:] @ z)
    return C[:M].T @ np.linalg.solve(H[:M, :M], u - TARGET[:M])


JOINT = np.linalg.solve(H, B + C @ LAM)[M:]  # where a gradient is 0 that nobody follows
PLACES = {"at 0": np.zeros(M), "at a stationary place": JOINT}
SGD = optax.sgd(0.25)
LABELS, MASK = {"u": "train", "z": "freeze"}, {"u": False, "z": True}
KEEP = jnp.asarray([1.0] * M + [0.0] * (N - M))
OPTIMIZERS = {
    "partition": optax.partition({"train": SGD, "freeze": optax.set_to_zero()}, LABELS),
    "freeze": optax.chain(SGD, optax.transforms.freeze(MASK)),
    "masked": optax.chain(SGD, optax.masked(optax.set_to_zero(), MASK)),
    "clipped": optax.chain(optax.clip_by_global_norm(1e6), SGD, optax.transforms.freeze(MASK)),
    "before momentum": optax.chain(optax.masked(optax.set_to_zero(), MASK), optax.sgd(0.1, 0.5)),
    "momentum": optax.chain(optax.sgd(0.1, 0.5), optax.transforms.freeze(MASK)),
}
BY_ENTRY = {
    "a mask of entries": optax.chain(SGD, optax.stateless(lambda updates, params: updates * KEEP)),
    "a product with a matrix": optax.chain(SGD, optax.stateless(lambda updates, params: jnp.diag(KEEP) @ updates)),
    "entries that are set": optax.chain(SGD, optax.stateless(lambda updates, params: updates.at[M:].set(0.0))),
    "entries that are taken and put back": optax.chain(
        SGD, optax.stateless(lambda updates, params: jnp.zeros(N).at[jnp.arange(M)].add(updates[jnp.arange(M)]))
    ),
    "a slice that is written": optax.chain(
        SGD, optax.stateless(lambda updates, params: jax.lax.dynamic_update_slice(updates, jnp.zeros(N - M), (M,)))
    ),
    "a pad": optax.chain(SGD, optax.stateless(lambda updates, params: jnp.pad(updates[:M], (0, N - M)))),
    "a mask inside of a checkpoint": optax.chain(
        SGD, optax.stateless(lambda updates, params: jax.checkpoint(lambda u: u * KEEP)(updates))
    ),
    "a choice of entries": optax.chain(SGD, optax.stateless(lambda updates, params: jnp.where(KEEP > 0, updates, 0.0))),
}
IMPLICIT = {
    "CG": lambda optimizer: bilevel.Implicit(optimizer, 400),
    "Dense": lambda optimizer: bilevel.Implicit(optimizer, 400, linear_solver=bilevel.Dense()),
    "fixed point": lambda optimizer: bilevel.FixedPoint(optimizer, 400, linear_solver=bilevel.GMRES(tol=1e-13)),
    "Neumann": lambda optimizer: bilevel.FixedPoint(optimizer, 400, linear_solver=bilevel.Neumann(200)),
}


def found(case, hypergradient):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = estimate(case, hypergradient, None, jnp.asarray(LAM), None, None, KEY)
        bilevel.warn_if_inexact(result.aux.info)
    return result.grad


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", IMPLICIT)
def test_the_system_is_over_the_leaves_that_move(name, place):
    z = PLACES[place]
    assert error(found(problem(z), IMPLICIT[name](OPTIMIZERS["partition"])), expected(z)) < 1e-9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_however_they_are_frozen(name):
    assert error(found(problem(JOINT), IMPLICIT["CG"](OPTIMIZERS[name])), expected(JOINT)) < 1e-9


@pytest.mark.parametrize("optimizer", BY_ENTRY)
@pytest.mark.parametrize("name", ["CG", "fixed point"])
def test_and_over_the_entries_that_move(name, optimizer):
    z = PLACES["at a stationary place"]
    assert error(found(problem(z, merged=True), IMPLICIT[name](BY_ENTRY[optimizer])), expected(z)) < 1e-9


@pytest.mark.parametrize("name", ["CG", "fixed point"])
def test_the_trained_point_as_a_function_has_the_same_derivative(name):
    hypergradient, case = IMPLICIT[name](OPTIMIZERS["partition"]), problem(JOINT)

    def value(lam):
        return case.outer_value(hypergradient.solve(case, None, lam, None, KEY).params, lam, None, None)[0]

    assert error(jax.jit(jax.grad(value))(jnp.asarray(LAM)), expected(JOINT)) < 1e-9


def test_warm_starts_keep_their_adjoint():
    hypergradient, case = IMPLICIT["CG"](OPTIMIZERS["partition"]), problem(JOINT)
    state = hypergradient.init(case, jnp.asarray(LAM), KEY)
    assert jax.tree.map(jnp.shape, state.extra) == {"u": (M,), "z": None}
    first = estimate(case, hypergradient, state, jnp.asarray(LAM), None, None, KEY)
    again = estimate(case, hypergradient, first.inner_state, jnp.asarray(LAM), None, None, KEY)
    assert error(again.grad, expected(JOINT)) < 1e-9
    assert again.aux.info["linear_iterations"] <= 1


KINDS = {
    "warm-up": (optax.sgd(optax.linear_schedule(0.0, 0.1, 5)), ("moving", "moving")),
    "a mask that passes gradients on": (optax.masked(SGD, {"u": True, "z": False}), ("moving", "moving")),
    "trust ratios": (optax.lamb(0.1), ("moving", "moving")),
    "accumulation": (
        optax.MultiSteps(OPTIMIZERS["partition"], 2).gradient_transformation(),
        ("moving", "held"),
    ),
    "unless it is not finite": (optax.apply_if_finite(OPTIMIZERS["freeze"], 3), ("moving", "held")),
    "adam behind a mask": (optax.chain(optax.masked(optax.set_to_zero(), MASK), optax.adam(0.1)), ("moving", "held")),
    "momentum behind a mask": (
        optax.chain(optax.masked(optax.set_to_zero(), MASK), optax.sgd(0.1, 0.5)),
        ("moving", "held"),
    ),
    "an average of updates": (optax.chain(OPTIMIZERS["partition"], optax.ema(0.3)), ("moving", "held")),
    "an injected rate of 0": (
        optax.partition({"train": SGD, "freeze": optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)}, LABELS),
        ("moving", "held"),
    ),
    "an injected rate that starts at 0": (
        optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.0, 0.1, 5)),
        ("moving", "moving"),
    ),
    "adam": (optax.chain(optax.adam(0.1), optax.transforms.freeze(MASK)), ("moving", "held")),
    "a product in a loop": (
        optax.chain(
            SGD,
            optax.stateless(lambda u, p: u | {"z": jax.lax.scan(lambda c, x: (c, 0.0 * x), 0.0, u["z"])[1]}),
        ),
        ("moving", "held"),
    ),
    "some entries": (
        optax.chain(SGD, optax.stateless(lambda u, p: {"u": u["u"] * jnp.asarray([1.0, 0.0, 1.0]), "z": u["z"]})),
        ("mixed", "moving"),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_frozen_is_read_from_the_trace_of_an_update(name):
    transform, kinds = KINDS[name]
    transform = optax.with_extra_args_support(transform)
    params = {"u": jnp.ones(M), "z": jnp.ones(M)}
    update = traced(transform, params, transform.init(params))
    division = divide("Implicit", update, lambda: trial(transform, params, ()))
    assert division.kinds == kinds
    if "mixed" in kinds:
        np.testing.assert_array_equal(division.masks[0], [True, False, True])


def test_what_cannot_be_read_but_stands_still_is_said():
    sorts = optax.stateless(lambda updates, params: {"u": updates["u"], "z": jnp.sort(0.0 * updates["z"])})
    divides = optax.stateless(lambda updates, params: updates | {"z": jax.lax.rem(0.0 * updates["z"], params["z"])})
    for frozen, operation in ((sorts, "sort"), (divides, "rem")):
        with pytest.warns(UserWarning, match=rf"seems to leave \['z'\] of the inner variable .* uses .*{operation}"):
            estimate(
                problem(JOINT), bilevel.Implicit(optax.chain(SGD, frozen), 3), None, jnp.asarray(LAM), None, None, KEY
            )
    params = {"u": jnp.ones(M), "z": jnp.ones(M)}
    moves = optax.with_extra_args_support(
        optax.stateless(
            lambda updates, params: {"u": updates["u"] * 0.0, "z": jnp.sort(updates["z"] * jnp.arange(3.0))}
        )
    )
    update = traced(moves, params, moves.init(params))
    assert divide("Implicit", update, lambda: trial(moves, params, ())).kinds == ("held", "moving")  # without a word


def test_an_optimizer_that_moves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"Implicit: the optimizer never moves any leaf .*\['u'\], \['z'\]"):
        found(problem(JOINT), bilevel.Implicit(optax.set_to_zero(), 3))


@pytest.mark.parametrize("kind", [bilevel.Implicit, bilevel.FixedPoint])
def test_a_frozen_part_that_starts_from_outer_is_refused(kind):
    case = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w["u"] - w["z"]) ** 2),
        lambda w, o, b, k: jnp.sum(w["u"] ** 2) + jnp.sum(o),
        lambda key, o: {"u": jnp.zeros(2), "z": o},
        lambda key: jnp.ones(2),
    )
    with pytest.raises(ValueError, match="init_inner makes leaves of the inner variable from outer"):
        kind(OPTIMIZERS["partition"], 3).estimate(case, None, jnp.ones(2), None, None, KEY)

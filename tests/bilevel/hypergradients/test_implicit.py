"""Implicit differentiation: closed forms, batches, leaf kinds, refusals."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, GMRES, BiCGStab, Dense, FixedPoint, Implicit, ImplicitSolve, Neumann, NormalCG, Nystrom
from tests.bilevel.implicit import SGD, Q, estimate, newton
from tests.bilevel.quadratic import KEY, error


def through_solve(hypergradient, problem, outer, batches=None, key=KEY):
    """The hypergradient by differentiating `solve`, and the derivative along `outer` in forward mode."""

    @jax.jit
    def both(outer):
        def loss(outer):
            state = hypergradient.solve(problem, None, outer, batches, key)
            return problem.outer_value(state.params, outer, None, None)[0]

        return jax.grad(loss)(outer), jax.jvp(loss, (outer,), (outer,))[1]

    return both(outer)


@pytest.mark.parametrize(
    "solver", [CG(), NormalCG(), GMRES(), BiCGStab(), Dense(), Neumann(800, Q.eta), CG(preconditioner=Nystrom(3, 1.0))]
)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_implicit_closed_form(solver, damping):
    outer, hypergradient = jnp.asarray(Q.outer), Implicit(SGD, 7, linear_solver=solver, damping=damping)
    result = estimate(hypergradient, Q.problem(), None, outer)
    wanted = Q.implicit(Q.trained(7), damping)
    assert error(result.grad, wanted) < 1e-10
    assert error(result.inner_state.params, Q.trained(7)) < 1e-12
    assert result.aux.info["linear_residual"] < 1e-10
    if damping:
        reverse, forward = through_solve(hypergradient, Q.problem(), outer)
        assert error(reverse, wanted) < 1e-10
        assert forward == pytest.approx(wanted @ Q.outer, rel=1e-9)


@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_nystrom_closed_form(sketch):
    rho = 1e-3
    result = estimate(Implicit(SGD, 7, linear_solver=Nystrom(6, rho, sketch)), Q.problem(), None, jnp.asarray(Q.outer))
    assert error(result.grad, Q.implicit(Q.trained(7), rho)) < 1e-10


@pytest.mark.parametrize("terms", [1, 3])
def test_neumann_is_the_truncated_unroll(terms):
    wanted = Q.unrolled(Q.trained(7), terms)
    for hypergradient in (
        Implicit(SGD, 7, linear_solver=Neumann(terms, Q.eta), warm_start=False),
        FixedPoint(SGD, 7, linear_solver=Neumann(terms), warm_start=False),
    ):
        result = estimate(hypergradient, Q.problem(), None, jnp.asarray(Q.outer))
        assert error(result.grad, wanted) < 1e-12
        assert result.aux.info["hvps"] == terms + 1


@pytest.mark.parametrize("solver", [GMRES(restart=12), BiCGStab(), NormalCG(), Dense()], ids=repr)
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_fixed_point_closed_form(solver, momentum):
    # with momentum, the state is part of the fixed point; on a quadratic the derivative is that of the minimiser
    hypergradient = FixedPoint(optax.sgd(Q.eta, momentum=momentum), 50, linear_solver=solver)
    result = estimate(hypergradient, Q.problem(), None, jnp.asarray(Q.outer))
    wanted = Q.implicit(np.asarray(result.inner_state.params))
    assert error(result.grad, wanted) < 1e-9
    reverse, forward = through_solve(hypergradient, Q.problem(), jnp.asarray(Q.outer))
    assert error(reverse, wanted) < 1e-9
    assert forward == pytest.approx(wanted @ Q.outer, rel=1e-8)


def test_info_and_its_warnings():
    outer = jnp.asarray(Q.outer)
    result = estimate(Implicit(SGD, 7), Q.problem(), None, outer)
    info, w = result.aux.info, Q.trained(7)
    gradient = Q.H @ w - Q.b - Q.C @ Q.outer
    assert info["stationarity"] == pytest.approx(np.linalg.norm(gradient), rel=1e-12)
    assert info["stationarity_relative"] == pytest.approx(np.linalg.norm(gradient) / np.linalg.norm(Q.H @ w), rel=1e-12)
    points = [Q.trained(t) for t in range(7)]
    losses = [w @ (Q.H @ w / 2 - Q.b - Q.C @ Q.outer) for w in points]
    np.testing.assert_allclose(info["inner_loss"], losses, rtol=1e-12)
    with pytest.warns(bilevel.InexactHypergradientWarning, match="train more steps"):
        bilevel.warn_if_inexact(info)
    trained = estimate(Implicit(SGD, 5000), Q.problem(), None, outer)
    bilevel.warn_if_inexact(trained.aux.info)
    unsolved = estimate(Implicit(SGD, 5000, linear_solver=CG(max_steps=1)), Q.problem(), None, outer)
    with pytest.warns(bilevel.InexactHypergradientWarning, match="more iterations"):
        bilevel.warn_if_inexact(unsolved.aux.info)


def test_info_tells_how_far_the_system_is_solved_and_what_that_took():
    outer, b = jnp.asarray(Q.outer), Q.toward(Q.trained(7))
    for solver, adjoint, products in (
        (Dense(), np.linalg.solve(Q.H, b), len(b)),
        (Neumann(1, 0.1), 0.1 * b, 1),
        (Neumann(3, 0.1), 0.1 * (3 * b - 0.3 * Q.H @ b + 0.01 * Q.H @ Q.H @ b), 3),
    ):
        result = estimate(Implicit(SGD, 7, linear_solver=solver), Q.problem(), None, outer)
        left = np.linalg.norm(b - Q.H @ adjoint) / np.linalg.norm(b)
        np.testing.assert_allclose(result.aux.info["linear_residual"], left, rtol=1e-9, atol=1e-12)
        # one more gives the cross term, and one the scale of the gradient
        assert result.aux.info["hvps"] == products + 2
        assert error(result.inner_state.extra, adjoint) < 1e-10  # the start of the next solve


def test_warm_start_saves_iterations():
    outer, problem = jnp.asarray(Q.outer), Q.problem()
    hypergradient = Implicit(SGD, 2000)
    state = hypergradient.init(problem, outer, KEY)
    first = estimate(hypergradient, problem, state, outer)
    again = estimate(hypergradient, problem, first.inner_state, outer)
    assert jax.tree.structure(first.inner_state) == jax.tree.structure(state)
    assert again.aux.info["linear_iterations"] < first.aux.info["linear_iterations"]
    assert error(again.grad, first.grad) < 1e-10
    # a state of another estimator is taken, without its extra
    foreign = bilevel.FirstOrder(SGD, 1).init(problem, outer, KEY)
    assert error(estimate(hypergradient, problem, foreign, outer).grad, first.grad) < 1e-10
    cold = Implicit(SGD, 3, warm_start=False)
    assert estimate(cold, problem, None, outer).inner_state.extra is None


@pytest.mark.filterwarnings("ignore::bilevel.InexactHypergradientWarning")  # three steps train nothing
def test_runs_as_part_of_a_solver():
    for hypergradient in (Implicit(SGD, 3), FixedPoint(optax.adamw(0.1), 3), ImplicitSolve(newton)):
        solver = bilevel.Nested(Q.problem(), hypergradient, optax.sgd(1e-2))
        assert np.isfinite(bilevel.run(solver, steps=3, progress=False).history["outer_loss"]).all()


# What the Hessian is of.


def random_problem():
    """A loss that reads its batch, its key, and a key inside `outer`."""

    def inner_loss(w, outer, batch, key):
        noise = jax.random.uniform(key, (3,)) + jax.random.uniform(outer["key"], (3,))
        residual = jnp.tanh(batch @ (w["a"] * noise)) + w["b"] - outer["target"]
        return jnp.sum(residual**2) + jnp.exp(outer["decay"]) * (jnp.sum(w["a"] ** 2) + w["b"] ** 2) * w["count"]

    return bilevel.Problem(
        inner_loss,
        lambda w, outer, batch, key: (
            jnp.sum((w["a"] - 1) ** 2) + w["b"] ** 2 * jnp.float64(outer["n"]) + outer["target"] ** 2
        ),
        lambda key, outer: {"a": jnp.full(3, 0.1), "b": jnp.array(0.2), "count": jnp.array(1.0), "n": 3, "key": key},
        lambda key: {"target": jnp.array(0.5), "decay": jnp.array(-1.0), "key": jax.random.key(7), "n": 2},
    )


def test_mean_over_batches_with_the_keys_of_the_schedule():
    problem, steps = random_problem(), 4
    outer = problem.start_outer(KEY)
    batches = jnp.asarray(np.random.default_rng(0).normal(size=(steps, 6, 3)))
    result = estimate(Implicit(optax.sgd(1e-2), steps), problem, None, outer, batches)
    keys = jax.random.split(KEY, steps + 2)[1:]
    w = result.inner_state.params
    assert result.grad["key"] is None and result.grad["n"] is None

    def mean(a, b, count, target, decay):
        inner, seen = {"a": a, "b": b, "count": count, "n": 3, "key": KEY}, {"target": target, "decay": decay, "n": 2}
        terms = [
            problem.inner_loss(inner, seen | {"key": jax.random.fold_in(outer["key"], t)}, batches[t], keys[t])
            for t in range(steps)
        ]
        return sum(terms) / steps

    point = w["a"], w["b"], w["count"], outer["target"], outer["decay"]
    blocks = jax.hessian(mean, argnums=range(5))(*point)

    def flat(rows, columns):
        return np.block(
            [[np.asarray(blocks[i][j]).reshape(np.size(point[i]), np.size(point[j])) for j in columns] for i in rows]
        )

    toward = np.concatenate([2 * np.asarray(w["a"] - 1), [2 * w["b"] * 2], [0.0]])
    adjoint = np.linalg.solve(flat([0, 1, 2], [0, 1, 2]), toward)
    wanted = np.array([2 * outer["target"], 0.0]) - flat([3, 4], [0, 1, 2]) @ adjoint
    solver = Dense()  # this Hessian is not positive definite
    result = estimate(Implicit(optax.sgd(1e-2), steps, linear_solver=solver), problem, None, outer, batches)
    assert error([result.grad["target"], result.grad["decay"]], wanted) < 1e-10
    assert result.aux.info["hvps"] == steps * (5 + 2)


def test_keys_are_noticed_with_full_batches():
    problem = random_problem()
    outer, data = problem.start_outer(KEY), bilevel.FullBatch(jnp.ones((6, 3)))
    same = estimate(Implicit(optax.sgd(1e-2), 3, linear_solver=Dense()), problem, None, outer, data)
    stacked = jnp.ones((3, 6, 3))
    wanted = estimate(Implicit(optax.sgd(1e-2), 3, linear_solver=Dense()), problem, None, outer, stacked)
    assert same.aux.info["hvps"] == 3 * 7
    assert error(same.grad["decay"], wanted.grad["decay"]) < 1e-12


@pytest.mark.parametrize("solver", [CG(), GMRES(), BiCGStab(), NormalCG(), Dense()], ids=repr)
def test_float32(solver):
    outer = jnp.asarray(Q.outer, jnp.float32)
    hypergradient = Implicit(SGD, 7, linear_solver=solver)
    result = estimate(hypergradient, Q.problem(jnp.float32), None, outer)
    assert result.grad.dtype == jnp.float32
    assert error(result.grad, Q.implicit(Q.trained(7))) < 1e-3


def test_mixed_precision():
    problem = bilevel.Problem(
        lambda w, lam, batch, key: jnp.sum((w["a"].astype(jnp.float32) - lam) ** 2) + jnp.sum((w["b"] - lam) ** 2),
        lambda w, lam, batch, key: jnp.sum(w["a"].astype(jnp.float32)) + jnp.sum(w["b"]),
        lambda key, lam: {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.float32)},
        lambda key: jnp.float32(1.0),
    )
    lam = problem.start_outer(KEY)
    for hypergradient in (Implicit(optax.sgd(0.3), 20), FixedPoint(optax.sgd(0.3), 20, linear_solver=Neumann(50))):
        assert estimate(hypergradient, problem, None, lam).grad == pytest.approx(5.0, rel=1e-2)
        reverse, forward = through_solve(hypergradient, problem, lam)
        assert reverse == pytest.approx(5.0, rel=1e-2) and forward == pytest.approx(5.0, rel=1e-2)


def test_vmap_over_tasks():
    problem, hypergradient = Q.problem(), Implicit(SGD, 7)
    outers = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    found = jax.jit(jax.vmap(lambda lam: hypergradient.estimate(problem, None, lam, None, None, KEY).grad))(outers)
    for lam, grad in zip(outers, found, strict=True):
        assert error(grad, estimate(hypergradient, problem, None, lam).grad) < 1e-11


def test_vmap_over_step_sizes():
    outer, sizes = jnp.asarray(Q.outer), jnp.asarray([0.05, 0.1])

    def grad(size):
        return Implicit(optax.sgd(size), 7).estimate(Q.problem(), None, outer, None, None, KEY).grad

    np.testing.assert_allclose(jax.jit(jax.vmap(grad))(sizes), jnp.stack([grad(0.05), grad(0.1)]), rtol=1e-9)


# What is refused, and what is said.


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.lion(1e-3),
        lambda outer: optax.adamw(1e-3, weight_decay=outer[0]),
        bilevel.proximal_gradient(0.1, bilevel.soft_threshold),
    ],
    ids=["adamw", "lion", "outer-decay", "proximal"],
)
def test_optimizers_without_a_stationary_limit_are_refused(optimizer):
    outer = jnp.asarray(Q.outer)
    for call in ("estimate", "solve"):
        args = (None, KEY) if call == "estimate" else (KEY,)
        with pytest.raises(ValueError, match="FixedPoint"):
            jax.jit(getattr(Implicit(optimizer, 2), call))(Q.problem(), None, outer, None, *args)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.adamw(1e-3, weight_decay=0.0),
        optax.lamb(1e-3),
        optax.rmsprop(1e-3),
        optax.adafactor(1e-3),
    ],
)
def test_optimizers_with_a_stationary_limit_are_taken(optimizer):
    assert np.isfinite(estimate(Implicit(optimizer, 2), Q.problem(), None, jnp.asarray(Q.outer)).grad).all()


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="CG does not apply"):
        FixedPoint(SGD, 2, linear_solver=CG())
    with pytest.raises(ValueError, match="CG does not apply"):
        ImplicitSolve(newton, rest=SGD)
    with pytest.raises(ValueError, match="damping"):
        Implicit(SGD, 2, damping=-1.0)
    with pytest.raises(ValueError, match="steps"):
        Implicit(SGD, 0)
    with pytest.raises(ValueError, match="init_inner gives"):
        ImplicitSolve(lambda *args: jnp.zeros(3)).estimate(Q.problem(), None, jnp.asarray(Q.outer), None, None, KEY)


def test_leaves_it_cannot_see_are_named():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - outer["goal"]) ** 2),
        lambda w, outer, batch, key: jnp.sum(w**2),
        lambda key, outer: outer["start"] * jnp.ones(2),
        lambda key: {"goal": jnp.array(1.0), "rate": jnp.array(0.1), "start": jnp.array(0.0)},
    )
    outer = problem.start_outer(KEY)

    def optimizer(outer):
        return optax.sgd(outer["rate"])

    with pytest.warns(bilevel.StructuralZeroWarning, match=r"\['rate'\], \['start'\].*Unrolled"):
        result = estimate(Implicit(optimizer, 3), problem, None, outer)
    assert result.grad["rate"] == result.grad["start"] == 0
    with pytest.warns(bilevel.StructuralZeroWarning, match=r"leaf \['start'\] is"):
        estimate(FixedPoint(optimizer, 3), problem, None, outer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(Implicit(SGD, 3), Q.problem(), None, jnp.asarray(Q.outer))


def test_injected_learning_rate_is_a_function_of_outer():
    def inject(outer):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=0.01 * jnp.exp(outer[0]))

    outer, plain = jnp.asarray(Q.outer), lambda outer: optax.sgd(0.01 * jnp.exp(outer[0]))
    found, wanted = (
        estimate(FixedPoint(optimizer, 40, linear_solver=Neumann(5)), Q.problem(), None, outer).grad
        for optimizer in (inject, plain)
    )
    assert error(found, wanted) < 1e-12


FLAT = bilevel.Problem(
    lambda w, o, b, k: jnp.sum((w["a"] - o) ** 2) + 0.0 * jnp.sum(w["free"]),
    lambda w, o, b, k: jnp.sum((w["a"] - 1) ** 2) + jnp.sum(w["free"]),
    lambda k, o: {"a": jnp.zeros(2), "free": jnp.ones(2)},
    lambda k: jnp.full(2, 0.3),
)
ROUND = bilevel.Problem(  # regular, but nothing that two terms of a series solve
    lambda w, o, b, k: jnp.sum(jnp.array([1.0, 1e-2]) * (w - o) ** 2),
    lambda w, o, b, k: jnp.sum((w - 1) ** 2),
    lambda k, o: jnp.full(2, 0.3),
    lambda k: jnp.full(2, 0.3),
)


@pytest.mark.parametrize("make", [bilevel.FixedPoint, bilevel.Implicit])
def test_a_singular_system_is_told_from_one_that_is_not_solved(make):
    def said(problem, linear_solver):
        solver = bilevel.Nested(problem, make(optax.sgd(0.1), 40, linear_solver=linear_solver), optax.sgd(0.0))
        with pytest.warns(bilevel.InexactHypergradientWarning) as caught:
            bilevel.run(solver, steps=1, progress=False)
        (message,) = [str(w.message) for w in caught]
        return message

    singular = said(FLAT, bilevel.Dense())
    assert "is singular" in singular and "inner['free']" in singular and "inner['a']" not in singular
    assert "more iterations do not help" in singular
    assert "allow more iterations" in said(ROUND, bilevel.Neumann(2, 1.0))

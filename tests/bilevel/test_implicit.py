"""Implicit differentiation: closed forms, converged problems, batches, leaf kinds, further levels, refusals."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from sklearn.linear_model import Lasso, Ridge

import bilevel
from bilevel import CG, GMRES, BiCGStab, Dense, FixedPoint, Implicit, ImplicitSolve, Neumann, NormalCG, Nystrom
from tests.bilevel.quadratic import KEY, Quadratic, central_difference, error

Q = Quadratic.random()
SGD = optax.sgd(Q.eta)


@jax.jit
def estimate(hypergradient, problem, state, outer, batches=None, outer_batch=None, key=KEY):
    return hypergradient.estimate(problem, state, outer, batches, outer_batch, key)


@jax.jit
def trained_derivative(hypergradient, problem, outer):
    return jax.jacrev(lambda outer: hypergradient.solve(problem, None, outer, None, KEY).params)(outer)


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
    assert info["inner_loss"].shape == (7,)
    with pytest.warns(bilevel.InexactHypergradientWarning, match="train more steps"):
        bilevel.warn_if_inexact(info)
    trained = estimate(Implicit(SGD, 5000), Q.problem(), None, outer)
    bilevel.warn_if_inexact(trained.aux.info)
    unsolved = estimate(Implicit(SGD, 5000, linear_solver=CG(max_steps=1)), Q.problem(), None, outer)
    with pytest.warns(bilevel.InexactHypergradientWarning, match="more iterations"):
        bilevel.warn_if_inexact(unsolved.aux.info)


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


# Problems without a closed form: logistic regression with ridge penalties as outer variable, and the lasso.


def logistic_data(rows=40, columns=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * rows, columns))
    y = np.sign(x @ rng.normal(size=columns) + rng.normal(size=2 * rows))
    return (jnp.asarray(x[:rows]), jnp.asarray(y[:rows])), (jnp.asarray(x[rows:]), jnp.asarray(y[rows:]))


def cross_entropy(w, data):
    x, y = data
    return jnp.mean(jax.nn.softplus(-y * (x @ w)))


def ridge(w, lam, batch, key):
    return cross_entropy(w, batch) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)


LOGISTIC = bilevel.Problem(
    ridge,
    lambda w, lam, batch, key: cross_entropy(w, batch) + 1e-3 * jnp.sum(lam**2),
    lambda key, lam: jnp.zeros_like(lam),
    lambda key: jnp.linspace(-3.0, -1.0, 5),
)


def newton(problem, outer, batch, key, tol=1e-13):
    """Minimises the inner loss, to a tolerance."""

    def loss(w):
        return problem.inner_value(w, outer, batch, key)[0]

    def going(w):
        return jnp.linalg.norm(jax.grad(loss)(w)) > tol

    def step(w):
        return w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w))

    return jax.lax.while_loop(going, step, problem.init_inner(key, outer))


def lbfgs(problem, outer, batch, key, tol=1e-12):
    """The same, by optax's L-BFGS with its line search."""

    def loss(w):
        return problem.inner_value(w, outer, batch, key)[0]

    optimizer, evaluate = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def going(carry):
        norm = optax.tree.norm(optax.tree_utils.tree_get(carry[1], "grad"))
        return (carry[2] == 0) | ((norm > tol) & (carry[2] < 200))

    def step(carry):
        w, state, count = carry
        value, grad = evaluate(w, state=state)
        updates, state = optimizer.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(w, updates), state, count + 1

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start = problem.init_inner(key, outer)
        return jax.lax.while_loop(going, step, (start, optimizer.init(start), jnp.int32(0)))[0]


def scipy_minimum(problem, outer, batch, key):
    """The same, on the host: a function of arrays in NumPy, as scikit-learn's are."""

    def minimise(lam, x, y):
        lam, x, y = map(np.asarray, (lam, x, y))

        def value_and_grad(w):
            margin = -y * (x @ w)
            slope = -y / (1 + np.exp(-margin)) / len(y)
            return np.mean(np.logaddexp(0, margin)) + 0.5 * np.sum(np.exp(lam) * w**2), slope @ x + np.exp(lam) * w

        options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 500}
        return scipy.optimize.minimize(value_and_grad, np.zeros(5), jac=True, method="L-BFGS-B", options=options).x

    return jax.pure_callback(minimise, jax.ShapeDtypeStruct((5,), outer.dtype), outer, *batch)


def ridge_of_sklearn(problem, outer, batch, key):
    """Ridge regression by scikit-learn, whose penalty is not divided by the number of rows."""

    def fit(lam, x, y):
        lam, x, y = map(np.asarray, (lam, x, y))
        return Ridge(alpha=float(np.exp(lam)) * len(y), fit_intercept=False, solver="cholesky").fit(x, y).coef_

    return jax.pure_callback(fit, jax.ShapeDtypeStruct((4,), outer.dtype), outer, *batch)


def test_ridge_regression_by_scikit_learn_has_its_closed_form():
    rng = np.random.default_rng(7)
    x, y, x_new, y_new = (rng.normal(size=s) for s in ((30, 4), 30, (20, 4), 20))

    def squares(w, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)

    problem = bilevel.Problem(
        lambda w, lam, batch, key: squares(w, batch) + 0.5 * jnp.exp(lam) * jnp.sum(w**2),
        lambda w, lam, batch, key: squares(w, batch),
        lambda key, lam: jnp.zeros(4),
        lambda key: jnp.array(-1.0),
    )
    hessian = x.T @ x / 30 + np.exp(-1.0) * np.eye(4)
    w = np.linalg.solve(hessian, x.T @ y / 30)
    wanted = -(x_new.T @ (x_new @ w - y_new) / 20) @ np.linalg.solve(hessian, np.exp(-1.0) * w)
    train, held_out = (bilevel.FullBatch(jax.tree.map(jnp.asarray, d)) for d in ((x, y), (x_new, y_new)))
    way = ImplicitSolve(ridge_of_sklearn)
    result = estimate(way, problem, None, jnp.array(-1.0), train, held_out)
    np.testing.assert_allclose(result.inner_state.params, w, rtol=1e-10)
    np.testing.assert_allclose(result.grad, wanted, rtol=1e-8)
    # as part of a run, whose steps are compiled
    found = bilevel.run(
        bilevel.Nested(problem, way, optax.adam(0.3)), inner_data=train, outer_data=held_out, steps=30, progress=False
    )
    assert found.history["outer_loss"][-1] < found.history["outer_loss"][0]


def lasso_of_sklearn(problem, outer, batch, key):
    """The lasso of `lasso_problem` by scikit-learn."""

    def fit(lam):
        x, y = (np.asarray(a[:30]) for a in lasso_data())
        return Lasso(alpha=float(np.exp(lam)), fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y).coef_

    return jax.pure_callback(fit, jax.ShapeDtypeStruct((8,), outer.dtype), outer, vmap_method="sequential")


def converged(train, validation):
    """`lam -> F(w*(lam), lam)`."""

    @jax.jit
    def value(lam):
        w = newton(LOGISTIC, lam, train, KEY)
        return LOGISTIC.outer_loss(w, lam, validation, KEY)

    return lambda lam: float(value(jnp.asarray(lam)))


@pytest.mark.parametrize(
    "hypergradient",
    [
        Implicit(optax.sgd(1.0), 3000),
        Implicit(optax.adam(1e-2), 5000, linear_solver=Dense()),
        FixedPoint(optax.sgd(1.0), 3000, linear_solver=Neumann(3000)),
        FixedPoint(optax.sgd(0.5, momentum=0.9, nesterov=True), 1000, linear_solver=GMRES()),
        ImplicitSolve(newton),
        ImplicitSolve(newton, rest=optax.sgd(1.0), linear_solver=BiCGStab()),
        ImplicitSolve(lbfgs),
        ImplicitSolve(scipy_minimum),
    ],
    ids=["sgd", "adam", "fixed-point", "momentum", "newton", "newton-fixed-point", "l-bfgs", "scipy"],
)
def test_converged_logistic_regression(hypergradient):
    train, validation = logistic_data()
    lam = LOGISTIC.start_outer(KEY)
    wanted = central_difference(converged(train, validation), lam)
    data, held_out = bilevel.FullBatch(train), bilevel.FullBatch(validation)
    result = estimate(hypergradient, LOGISTIC, None, lam, data, held_out)
    assert error(result.grad, wanted) < 1e-6
    # one Hessian is enough where all batches are the same and no loss is random
    assert result.aux.info["hvps"] <= 3010


def test_a_solver_that_stops_early_errs_in_proportion():
    train, validation = logistic_data()
    lam = LOGISTIC.start_outer(KEY)
    data, held_out = bilevel.FullBatch(train), bilevel.FullBatch(validation)

    def slow(problem, outer, batch, key, tol):
        return jax.lax.while_loop(
            lambda w: jnp.linalg.norm(jax.grad(problem.inner_loss)(w, outer, batch, key)) > tol,
            lambda w: w - jax.grad(problem.inner_loss)(w, outer, batch, key),
            jnp.zeros_like(outer),
        )

    wanted = estimate(ImplicitSolve(newton), LOGISTIC, None, lam, data, held_out).grad
    errors = []
    for tol in (1e-2, 1e-4, 1e-6):
        result = estimate(ImplicitSolve(partial(slow, tol=tol)), LOGISTIC, None, lam, data, held_out)
        assert result.aux.info["stationarity"] <= tol
        errors.append(error(result.grad, wanted))
    assert errors[0] > 30 * errors[1] > 900 * errors[2] > 0


def test_adamw_through_its_fixed_point():
    # eps is large so that training comes to rest; at rest the gradient is not 0
    def optimizer(lam):
        return optax.adamw(0.05, b2=0.9, eps=0.5, weight_decay=jnp.exp(lam[0]))

    problem = bilevel.Problem(
        lambda w, lam, batch, key: 0.5 * jnp.sum(w**2 * jnp.arange(1.0, 4.0)) - jnp.sum(w * lam[1:]),
        lambda w, lam, batch, key: 0.5 * jnp.sum((w - 1) ** 2),
        lambda key, lam: jnp.ones(3),
        lambda key: jnp.array([-1.0, 1.0, -2.0, 3.0]),
    )
    lam = problem.start_outer(KEY)
    solve = jax.jit(lambda lam: bilevel.Unrolled(optimizer, 1500).solve(problem, None, lam, None, KEY).params)

    def value(lam):
        return float(problem.outer_loss(solve(jnp.asarray(lam)), lam, None, None))

    wanted = central_difference(value, lam)
    for solver in (Dense(), Neumann(2000)):
        result = estimate(FixedPoint(optimizer, 1500, linear_solver=solver), problem, None, lam)
        assert error(result.grad, wanted) < 1e-6
    assert float(jnp.linalg.norm(jax.grad(problem.inner_loss)(result.inner_state.params, lam, None, None))) > 0.1


def lasso_data():
    rng = np.random.default_rng(3)
    x, truth = rng.normal(size=(60, 8)), np.array([2.0, -1.5, 1.0, 0, 0, 0, 0, 0])
    return x, x @ truth + 0.3 * rng.normal(size=60)


def lasso_problem():
    x, y = map(jnp.asarray, lasso_data())

    def squares(w, rows):
        return 0.5 * jnp.mean((x[rows] @ w - y[rows]) ** 2)

    problem = bilevel.Problem(
        lambda w, lam, batch, key: squares(w, slice(0, 30)),
        lambda w, lam, batch, key: squares(w, slice(30, 60)),
        lambda key, lam: jnp.zeros(8),
        lambda key: jnp.array(-2.0),
    )
    step = 1 / float(jnp.linalg.eigvalsh(x[:30].T @ x[:30] / 30)[-1])

    def prox(lam):
        return lambda w, eta: bilevel.soft_threshold(w, eta * jnp.exp(lam))

    return problem, lambda lam: bilevel.proximal_gradient(step, prox(lam))


def test_lasso():
    problem, optimizer = lasso_problem()
    train = jax.jit(lambda lam: bilevel.Unrolled(optimizer, 3000).solve(problem, None, lam, None, KEY).params)
    lam = jnp.array(-2.0)
    wanted = central_difference(lambda lam: float(problem.outer_loss(train(jnp.asarray(lam)), lam, None, None)), -2.0)
    support = train(lam) != 0
    assert 0 < support.sum() < 8

    def on_the_host(problem, outer, batch, key):
        shape = jax.ShapeDtypeStruct((8,), jnp.float64)
        return jax.pure_callback(lambda lam: np.asarray(train(lam)), shape, outer, vmap_method="sequential")

    for hypergradient in (
        FixedPoint(optimizer, 3000, linear_solver=Neumann(1000)),
        FixedPoint(optimizer, 3000, linear_solver=GMRES()),
        ImplicitSolve(on_the_host, rest=optimizer, linear_solver=Dense()),
        ImplicitSolve(lasso_of_sklearn, rest=optimizer, linear_solver=Dense()),
    ):
        result = estimate(hypergradient, problem, None, lam)
        assert result.grad == pytest.approx(wanted[()], rel=1e-6)
        # the derivative of the trained point stays on its support
        assert np.array_equal(trained_derivative(hypergradient, problem, lam) != 0, support)


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
    keys = jax.random.split(KEY, steps + 1)
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


# Further levels.


def three_levels(captured):
    """min_mu G(lam*(mu)), lam* = argmin F(w*(lam, mu), lam, mu), w* = argmin f(w, lam, mu)."""
    A = jnp.asarray(Q.A)

    def low_loss(w, seen, batch, key):
        return 0.5 * jnp.sum(jnp.exp(0.2 * seen["mu"][0]) * w**2) + jnp.sum(jnp.cosh(w - jnp.pad(seen["lam"], (0, 2))))

    def top(mu, hypergradient, low_hypergradient):
        def middle_loss(lam, seen, batch, key):
            known = mu if captured else seen
            low = bilevel.Problem(low_loss, low_loss, lambda key, outer: jnp.zeros(6), lambda key: None)
            state = low_hypergradient.solve(low, None, {"lam": lam, "mu": known}, None, key)
            w = state.params
            return 0.5 * (w - 1) @ A @ (w - 1) / 30 + 0.5 * jnp.sum((lam - known[1]) ** 2)

        def outer_loss(lam, seen, batch, key):
            return jnp.sum(lam**3) + (0.0 if captured else jnp.sum(seen**2))

        middle = bilevel.Problem(middle_loss, outer_loss, lambda key, mu: jnp.zeros(4), lambda key: None)
        if captured:
            state = hypergradient.solve(middle, None, mu, None, KEY)
            return outer_loss(state.params, mu, None, None), None
        result = hypergradient.estimate(middle, None, mu, None, None, KEY)
        return result.value, result.grad

    return top


LOW = Implicit(optax.sgd(0.4), 60)


@pytest.mark.parametrize(
    "middle",
    [bilevel.Unrolled(optax.sgd(0.4), 60), Implicit(optax.sgd(0.4), 60), Implicit(optax.adam(0.05), 600)],
    ids=["unrolled", "implicit", "implicit-adam"],
)
def test_three_levels(middle):
    top, mu = three_levels(captured=False), jnp.array([0.3, -0.4])
    found = jax.jit(lambda mu: top(mu, middle, LOW)[1])(mu)
    value = jax.jit(lambda mu: top(mu, bilevel.FirstOrder(optax.sgd(0.4), 60), LOW)[0])
    wanted = central_difference(lambda mu: float(value(jnp.asarray(mu))), mu)
    assert error(found, wanted) < 1e-6


def test_three_levels_with_a_captured_variable():
    top, mu = three_levels(captured=True), jnp.array([0.3, -0.4])
    middle = Implicit(optax.sgd(0.4), 60)
    value = jax.jit(lambda mu: top(mu, middle, LOW)[0])
    wanted = central_difference(lambda mu: float(value(jnp.asarray(mu))), mu)
    assert error(jax.jit(jax.grad(lambda mu: top(mu, middle, LOW)[0]))(mu), wanted) < 1e-6


def test_second_derivatives_of_solve():
    # w* = lam^3, so d2/dlam2 of w*^2 = 30 lam^4; by forward over reverse and reverse over reverse
    problem = bilevel.Problem(
        lambda w, lam, batch, key: 0.5 * (w - lam**3) ** 2,
        lambda w, lam, batch, key: w**2,
        lambda key, lam: jnp.zeros(()),
        lambda key: jnp.array(1.2),
    )
    hypergradient = Implicit(optax.sgd(0.5), 60)

    def loss(lam):
        return hypergradient.solve(problem, None, lam, None, KEY).params ** 2

    lam = jnp.array(1.2)
    assert jax.jit(jax.grad(loss))(lam) == pytest.approx(6 * 1.2**5, rel=1e-10)
    assert jax.jit(jax.hessian(loss))(lam) == pytest.approx(30 * 1.2**4, rel=1e-9)
    assert jax.jit(jax.grad(jax.grad(loss)))(lam) == pytest.approx(30 * 1.2**4, rel=1e-9)


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

"""Implicit differentiation of converged problems, and of solvers of the user's, against central differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from sklearn.linear_model import Lasso, Ridge

import bilevel
from bilevel import GMRES, BiCGStab, Dense, FixedPoint, Implicit, ImplicitSolve, Neumann
from tests.bilevel.implicit import estimate, newton
from tests.bilevel.quadratic import KEY, central_difference, error


@jax.jit
def trained_derivative(hypergradient, problem, outer):
    return jax.jacrev(lambda outer: hypergradient.solve(problem, None, outer, None, KEY).params)(outer)


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

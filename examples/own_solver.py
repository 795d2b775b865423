# %% [markdown]
# # Differentiating through a solver of one's own
#
# The lasso in scikit-learn is coordinate descent in Cython; nothing can differentiate its steps. Yet the strength
# $\alpha$ of its penalty can be chosen by gradient descent on the five-fold cross-validation error,
#
# $$\min_{\alpha} \; \frac15 \sum_{k=1}^{5} \mathrm{MSE}_k(w_k(\alpha)), \qquad
# w_k(\alpha) = \arg\min_w \; \frac{1}{2n} \lVert X_k w - y_k \rVert^2 + \alpha \lVert w \rVert_1 .$$
#
# The published number is that of scikit-learn's own documentation: `LassoLarsCV`, which follows the path of all
# solutions, finds $\alpha = 0.3972$ on `make_regression(noise=4.0, random_state=0)`.

# %%
import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
from sklearn.datasets import make_regression
from sklearn.linear_model import Lasso, LassoLarsCV

import bilevel

size = gallery.sizes(short={"seeds": 5, "grid": 60}, full={"seeds": 30}, smoke={"seeds": 2, "grid": 3})
jax.config.update("jax_enable_x64", True)
assert "0.3972" in LassoLarsCV.__doc__
EXACTLY = {"fit_intercept": False, "tol": 1e-10, "max_iter": 100_000}


def folds(seed):
    """Five pairs (support, query), centred by the means of the support: the intercept."""
    x, y = make_regression(noise=4.0, random_state=seed)
    pairs = []
    for k in range(5):
        held = np.arange(100) // 20 == k
        centre = x[~held].mean(0), y[~held].mean()
        pairs.append(((x[~held] - centre[0], y[~held] - centre[1]),
                      (x[held] - centre[0], y[held] - centre[1])))
    return jax.tree.map(lambda *rows: jnp.stack(rows), *pairs), (x, y)


# %% [markdown]
# **Which hypergradient.** `ImplicitSolve` takes the solver as it is. What its solution satisfies is not a vanishing
# gradient, since the penalty has a kink, but that it stays where it is under a proximal gradient step, $w =
# \mathrm{soft}_{\eta \alpha}(w - \eta \nabla f(w))$. That is what `rest` says; its derivative is that of the active
# set by itself (Bertrand et al. 2020). `PerTask` makes the five folds one problem.

# %%
def squares(w, log_alpha, batch, key):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2


def scikit_learn(problem, log_alpha, batch, key):
    def solve(x, y, alpha):
        return Lasso(alpha=float(alpha), **EXACTLY).fit(x, y).coef_

    shape = jax.ShapeDtypeStruct((100,), jnp.float64)
    return jax.pure_callback(solve, shape, *batch, jnp.exp(log_alpha), vmap_method="sequential")


def at_rest(log_alpha):
    strength = jnp.exp(log_alpha)
    return bilevel.proximal_gradient(0.1, lambda w, eta: bilevel.soft_threshold(w, eta * strength))


problem = bilevel.Problem(squares, lambda *a: 2 * squares(*a), lambda key, outer: jnp.zeros(100),
                          lambda key: 0.0)
lasso = bilevel.ImplicitSolve(scikit_learn, rest=at_rest, linear_solver=bilevel.Dense())
function = jax.jit(bilevel.value_and_hypergrad(problem, bilevel.PerTask(lasso)))


def cross_validation(log_alpha, tasks):
    batches = jax.tree.map(lambda rows: rows[None], tasks)  # one batch, of five tasks
    value, grad = function(jnp.asarray(log_alpha), None, batches, None, jax.random.key(0))
    return float(value), float(grad)


# %% [markdown]
# Is it right? On the active set $A$ the derivative is known in closed form, $dw_A / d\alpha = -n (X_A^\top X_A)^{-1}
# \mathrm{sign}(w_A)$.

# %%
def closed_form(log_alpha, tasks):
    total = 0.0
    for k in range(5):
        (x, y), (x_val, y_val) = jax.tree.map(lambda rows: np.asarray(rows[k]), tasks)  # noqa: B023
        w = Lasso(alpha=np.exp(log_alpha), **EXACTLY).fit(x, y).coef_
        active = w != 0
        slope = -80 * np.linalg.solve(x[:, active].T @ x[:, active],
                                      np.sign(w[active])) * np.exp(log_alpha)
        total += 2 * np.mean((x_val @ w - y_val) * (x_val[:, active] @ slope)) / 5
    return total


errors = []
for seed in range(size.seeds):
    tasks = folds(seed)[0]
    exact = closed_form(0.5, tasks)
    errors.append(abs(cross_validation(0.5, tasks)[1] - exact) / abs(exact))
print(f"relative errors of the hypergradient: {', '.join(f'{e:.1e}' for e in errors)}")

# %% [markdown]
# `value_and_hypergrad` is a plain function, so that any other method can take it from here: scipy's L-BFGS-B.

# %%
tasks, rows = folds(0)
calls = []
found = scipy.optimize.minimize(
    lambda z: (calls.append((z[0], *cross_validation(z[0], tasks))), calls[-1][1:])[1], [1.0], jac=True,
    method="L-BFGS-B", bounds=[(-3, 4)])
path = LassoLarsCV(cv=5).fit(*rows)
print(f"ours: alpha {np.exp(found.x[0]):.4f}, error {found.fun:.4f}, {len(calls)} evaluations")
print(f"LassoLarsCV: alpha {path.alpha_:.4f}, error {path.mse_path_.mean(1).min():.4f}, "
      f"{len(path.cv_alphas_)} knots")

# %%
figure, axis = plt.subplots()
grid = np.linspace(-2.5, 1.2, size.grid)
axis.plot(np.exp(grid), [cross_validation(z, tasks)[0] for z in grid], label="cross-validation error")
axis.plot(np.exp([c[0] for c in calls]), [c[1] for c in calls], "o", label="evaluations of L-BFGS-B")
axis.axvline(path.alpha_, color="black", linestyle=":", label="LassoLarsCV")
axis.set(xlabel=r"$\alpha$", ylabel="mean squared error", xscale="log", xlim=(0.05, 4), ylim=(20, 80))
axis.legend()
gallery.show(figure)

# %% [markdown]
# The minimum lies in a kink of the curve, where a feature leaves the active set, and the derivative jumps from
# negative to positive. L-BFGS-B comes close in a few evaluations and spends the others on finding that no step goes
# further down.

# %%
gallery.record(
    "own_solver",
    "Differentiating through a solver of one's own",
    [gallery.Row("penalty of the lasso, five-fold cross-validation", 0.3972,
                 "documentation of scikit-learn, LassoLarsCV", np.exp(found.x[0]), tolerance=5e-5),
     gallery.Row("relative error of the hypergradient against the closed form", 0.0,
                 "Bertrand et al. 2020, eq. of the "
                 "active set", errors, tolerance=1e-6)],
    gradients=len(calls) * 5,
)

# %% [markdown]
# # Three levels: a weight decay chosen against an attacker
#
# Ridge regression is trained on targets that an attacker may move a little, so as to do most harm on the validation
# rows. The weight decay is chosen knowing that. Three decisions, each made knowing how the next ones answer:
#
# $$\min_\lambda \; V(w^*) , \qquad
# p^*(\lambda) = \arg\max_p \; V\big(w^*(\lambda, p)\big) - c \lVert p \rVert^2 / n, \qquad
# w^*(\lambda, p) = \arg\min_w \; \lVert X w - y - p \rVert^2 / n + e^\lambda \lVert w \rVert^2 ,$$
#
# where $V$ is the mean squared error of the validation rows. Sato, Tanaka and Takeda (2021) posed weight decay with
# data poisoning as a problem of three levels. With a linear model every level has a closed form, so that every
# derivative, and the answer, can be checked to the last digit.

# %%
import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.optimize
from sklearn.datasets import load_diabetes

import bilevel

size = gallery.sizes(short={"steps": 150, "seeds": 5, "grid": 60}, full={"steps": 300, "seeds": 30},
                     smoke={"steps": 2, "seeds": 2, "grid": 3})
jax.config.update("jax_enable_x64", True)
COST = 4.0
x, y = load_diabetes(return_X_y=True)
x, y = x / x.std(0), (y - y.mean()) / y.std()


def rows(seed):
    """60 rows to train on, 60 for validation, the rest to test."""
    order = np.random.default_rng(seed).permutation(len(x))
    return [(x[part], y[part]) for part in np.split(order, [60, 120])]


# %% [markdown]
# **Which hypergradient.** An estimator's `solve` is training as a differentiable function. The loss of the middle
# level calls it, and that is all there is to a third level: `Unrolled` above differentiates `Implicit` below. Ten
# weights are trained to their minimum at the bottom, so `Implicit` needs no more than its solution and a linear
# system.

# %%
def fit_loss(w, choice, batch, key):
    inputs, targets = batch
    error = jnp.mean((inputs @ w - targets - choice["poison"]) ** 2)
    return error + jnp.exp(choice["decay"]) * jnp.sum(w**2)


bottom = bilevel.Problem(fit_loss, None, lambda key, choice: jnp.zeros(10), lambda key: None)
training = bilevel.Implicit(optax.sgd(0.1, momentum=0.9), steps=400,
                            linear_solver=bilevel.CG(tol=1e-12))


def harm(poison, decay, batch, key):
    train, (inputs, targets) = batch
    choice = {"poison": poison, "decay": decay}
    w = training.solve(bottom, None, choice, bilevel.FullBatch(train), key).params
    return jnp.mean((inputs @ w - targets) ** 2)


def attack_loss(poison, decay, batch, key):
    return COST * jnp.mean(poison**2) - harm(poison, decay, batch, key)


middle = bilevel.Problem(attack_loss, harm, lambda key, decay: jnp.zeros(60),
                         lambda key: jnp.asarray(0.0))
attack = bilevel.Unrolled(optax.sgd(8.0), steps=25, mode="reverse")
solver = bilevel.Nested(middle, attack, optax.adam(0.1), inner_start="cold")


# %% [markdown]
# The closed form, in numpy: the trained weights are linear in the targets, $w^* = M (y + p)$, so the attack is the
# solution of a linear system.

# %%
def closed_form(decay, seed, cost=COST):
    """Validation and test error of the attacked ridge regression; without an attacker for cost=None."""
    (a, b), (a_val, b_val), (a_test, b_test) = rows(seed)
    m = np.linalg.solve(a.T @ a / 60 + np.exp(decay) * np.eye(10), a.T / 60)
    poison = np.zeros(60)
    if cost is not None:
        effect = a_val @ m
        poison = np.linalg.solve(cost * np.eye(60) - effect.T @ effect, effect.T @ (effect @ b - b_val))
    w = m @ (b + poison)
    return np.mean((a_val @ w - b_val) ** 2), np.mean((a_test @ w - b_test) ** 2)


def best(seed, cost):
    return scipy.optimize.minimize_scalar(lambda z: closed_form(z, seed, cost)[0], bounds=(-4, 5),
                                          method="bounded",
                                          options={"xatol": 1e-8}).x


# %%
found, errors = [], []
for seed in range(size.seeds):
    train, val, _ = rows(seed)
    both = bilevel.FullBatch((train, val))
    through = bilevel.value_and_hypergrad(middle, attack)
    _, grad = through(jnp.asarray(-1.0), None, both, (train, val), jax.random.key(0))
    exact = (closed_form(-1 + 1e-5, seed)[0] - closed_form(-1 - 1e-5, seed)[0]) / 2e-5
    errors.append(abs(float(grad) - exact) / abs(exact))
    found.append(bilevel.run(solver, inner_data=(train, val), outer_data=(train, val),
                             steps=size.steps, progress=False,
                             checkpoint_dir=gallery.checkpoints(f"three_levels-{seed}")))
robust = [best(seed, COST) for seed in range(size.seeds)]
blind = [best(seed, None) for seed in range(size.seeds)]
print(f"relative errors of the hypergradient: {', '.join(f'{e:.1e}' for e in errors)}")
print(f"log decay, ours {[round(float(r.outer), 3) for r in found]}, closed form {np.round(robust, 3)}")

# %%
figure, (left, right) = plt.subplots(1, 2)
grid = np.linspace(-4, 3, size.grid)
left.plot(grid, [closed_form(z, 0)[0] for z in grid], label="with the attacker")
left.plot(grid, [closed_form(z, 0, None)[0] for z in grid], label="without")
left.plot(found[0].outer, closed_form(float(found[0].outer), 0)[0], "ko", label="found by three levels")
left.set(xlabel=r"$\lambda$, log weight decay", ylabel="validation error", ylim=(0.45, 0.65))
left.legend()
right.plot(blind, robust, "o")
right.plot([-4, 3], [-4, 3], "k:")
right.set(xlabel=r"best $\lambda$ without attacker", ylabel=r"best $\lambda$ with attacker")
gallery.show(figure)

# %% [markdown]
# Each point on the right is a draw of rows. For the one at the left edge no decay at all would be best without an
# attacker: the search for it ends at its bound, $\lambda = -4$.

# %%
gap = [abs(float(r.outer) - z) for r, z in zip(found, robust, strict=True)]
gallery.record(
    "three_levels",
    "Three levels: a weight decay chosen against an attacker",
    [gallery.Row("distance of log weight decay from its optimum", 0.0, "closed form of the problem",
                 gap,
                 tolerance=0.01),
     gallery.Row("relative error of the hypergradient through three levels", 0.0,
                 "closed form, central differences",
                 errors, tolerance=1e-6)],
    gradients=size.seeds * (size.steps + 1) * 25 * 400,
)

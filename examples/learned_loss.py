# %% [markdown]
# # A loss function that is learned, as an `nnx` module
#
# Which loss should a regression use? Statistics answers: minus the log-likelihood of the noise, if that is known.
# Least squares is best for Gaussian noise; for Laplace noise it is absolute errors, and least squares then has
# *twice* the variance: the relative efficiency of the two is 1/2, a classical number. Here nobody says what the noise
# is. The loss is a sum of eight pseudo-Huber functions with learned weights and widths,
#
# $$\rho_\lambda(r) = \sum_{k=1}^{8} e^{a_k} \Big(\sqrt{r^2 + e^{2 s_k}} - e^{s_k}\Big), \qquad
# \min_{\lambda = (a, s)} \; \mathbb{E} \, \lVert w^*(\lambda) - w_{\mathrm{true}} \rVert^2, \qquad
# w^*(\lambda) = \arg\min_w \tfrac1n \sum_i \rho_\lambda(y_i - x_i^\top w),$$
#
# quadratic near 0 and linear far out, so that absolute errors and squares are both within reach.

# %%
import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import bilevel
import bilevel.nnx

size = gallery.sizes(short={"rows": 200, "tasks": 2000, "batch": 32, "steps": 100, "meta": 150,
                            "seeds": 3},
                     full={"tasks": 20_000, "meta": 2000, "seeds": 10},
                     smoke={"rows": 20, "tasks": 8, "batch": 2, "steps": 3, "meta": 2, "seeds": 2})
NOISES = {"Laplace": (lambda rng, shape: rng.laplace(size=shape) / 2**0.5, 0.5),
          "Gaussian": (lambda rng, shape: rng.standard_normal(shape), 1.0)}


def tasks(noise, count, seed):
    """`((x, y), w)` of so many regressions with ten weights and noise of variance 1."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((count, 10))
    x = rng.standard_normal((count, size.rows, 10))
    y = np.einsum("trd,td->tr", x, w) + noise(rng, (count, size.rows))
    return (x.astype("float32"), y.astype("float32")), w.astype("float32")


# %% [markdown]
# **The module.** `bilevel.nnx.problem` reads off the types of variables who learns what: `nnx.Param` is trained
# inside, `bilevel.nnx.Outer` is learned outside. The two losses are functions of the module.

# %%
class Regression(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.zeros(10))
        self.log_weight = bilevel.nnx.Outer(jnp.full(8, -2.0))
        self.log_width = bilevel.nnx.Outer(jnp.linspace(-4.0, 3.0, 8))

    def penalty(self, residual):
        width = jnp.exp(self.log_width[...])
        huber = jnp.sqrt(residual[..., None] ** 2 + width**2) - width
        return huber @ jnp.exp(self.log_weight[...])


def inner_loss(model, batch, key):
    x, y = batch
    return jnp.mean(model.penalty(y - x @ model.w[...]))


def outer_loss(model, batch, key):
    return jnp.sum((model.w[...] - batch) ** 2)


# %% [markdown]
# **Which hypergradient.** Each task is a small training, and the same loss serves all of them: `PerTask`. The
# training is a hundred steps of Adam, which `Unrolled` differentiates.

# %%
problem = bilevel.nnx.problem(Regression, inner_loss, outer_loss)
estimator = bilevel.Unrolled(optax.adam(0.1), steps=size.steps)
solver = bilevel.Nested(problem, bilevel.PerTask(estimator), optax.adam(0.1))


@jax.jit
def errors(outer, support, true):
    def error(task, w):
        state = estimator.solve(problem, None, outer, bilevel.FullBatch(task), jax.random.key(0))
        return jnp.sum((state.params["params"]["w"] - w) ** 2)

    return jnp.mean(jax.vmap(error)(support, true))


ABSOLUTE = {"log_weight": jnp.where(jnp.arange(8) == 0, 0.0, -30.0), "log_width": jnp.full(8, -4.0)}
rows, found = [], {}
for name, (noise, theory) in NOISES.items():
    ratios, absolute = [], []
    for seed in range(size.seeds):
        result = bilevel.run(solver, inner_data=bilevel.Batches(tasks(noise, size.tasks, seed),
                                                                size.batch),
                             steps=size.meta, key=jax.random.key(seed), progress=False,
                             checkpoint_dir=gallery.checkpoints(f"learned_loss-{name}-{seed}"))
        (x, y), true = tasks(noise, max(8, size.tasks // 4), 1000 + seed)
        squares = np.linalg.solve(np.einsum("trd,tre->tde", x, x),
                                  np.einsum("trd,tr->td", x, y)[..., None])
        least = np.mean(np.sum((squares[..., 0] - true) ** 2, axis=1))
        ratios.append(float(errors(result.outer, (x, y), true)) / least)
        absolute.append(float(errors(ABSOLUTE, (x, y), true)) / least)
    found[name] = bilevel.nnx.merge(problem, result)
    why = f"{size.rows} rows are not infinitely many: absolute errors reach {np.mean(absolute):.2f}"
    rows.append(gallery.Row(f"{name} noise: squared error, relative to least squares", theory,
                            "asymptotic relative efficiency, a classical result", ratios,
                            better="lower", tolerance=0.02, why=why))

# %%
figure, axes = plt.subplots(1, 2)
residual = jnp.linspace(-4, 4, 201)
slope = jax.vmap(jax.grad(lambda r, model: model.penalty(r)), in_axes=(0, None))
for axis, (name, model) in zip(axes, found.items(), strict=True):
    learned = slope(residual, model)
    axis.plot(residual, learned / jnp.max(learned), label="learned")
    best = jnp.sign(residual) if name == "Laplace" else residual / 4
    axis.plot(residual, best, "k:", label="minus log-likelihood")
    axis.set(xlabel="residual", ylabel="slope of the loss, scaled", title=f"{name} noise")
    axis.legend(loc="upper left")
gallery.show(figure)

# %% [markdown]
# From the same start the module bends towards absolute errors under one noise and stays close to squares under the
# other. With ten weights and 200 rows the efficiency is not yet the asymptotic one: a jump at 0 is worth its price
# only where many residuals are small.

# %%
gallery.record("learned_loss", "A loss function that is learned, as an nnx module", rows,
               gradients=2 * size.seeds * size.meta * size.batch * size.steps)

# %% [markdown]
# # A learning rate for every step and layer
#
# A network with three hidden layers of 50 units is trained for 100 steps on MNIST. Every step has a learning rate and
# a momentum of its own for the weights and for the biases of each of the four layers, and each of these eight groups
# has a scale of its random start: 1,608 hyper-parameters, all learned from the loss at the end,
#
# $$\min_{\alpha, \beta, \sigma} L(w_{100}), \qquad
# v_{t+1} = \beta_t v_t - (1 - \beta_t) \nabla L_{B_t}(w_t), \qquad
# w_{t+1} = w_t + \alpha_t v_{t+1}, \qquad w_0 \sim N(0, \sigma^2).$$
#
# It is the first experiment of Maclaurin, Duvenaud and Adams (2015): batches of 200 out of 10,000 images, $\alpha =
# e^{-1}$, $\beta = 1/2$ and $\sigma = e^{-3}$ to begin with, 50 outer steps with rate 0.04, a new random start and
# new batches in each. Their Adam is that of its first preprint: its momentum has faded after one step, and is
# corrected as if it had not; `optax.rmsprop` with a schedule is the same.

# %%
import itertools

import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel

size = gallery.sizes(short={"rows": 10_000, "steps": 100, "meta": 50, "seeds": 3}, full={"seeds": 10},
                     smoke={"rows": 400, "steps": 5, "meta": 2, "seeds": 2})
arrays = gallery.data("mnist")
x, y = arrays["x_train"].reshape(-1, 784).astype("float32") / 255, arrays["y_train"].astype("int32")
x = x - x.mean(0)
train = x[: size.rows], y[: size.rows]
WIDTHS = (784, 50, 50, 50, 10)
GROUPS = [f"{kind}{layer}" for layer in range(4) for kind in "Wb"]


# %% [markdown]
# **Which hypergradient.** A learning rate does not move the minimum, so that an implicit hypergradient of it is 0;
# the first-order one is 0 too, and says so with a `StructuralZeroWarning`. `Unrolled` differentiates the training
# itself. Maclaurin et al. reverse the steps to save memory (`bilevel.Reversible`); a hundred states of 45,000 numbers
# fit as they are. The optimizer is any function of `outer` that returns an optax transformation, here one of six
# lines:

# %%
def scheduled(outer):
    def update(grads, state, params=None):
        velocity, t = state
        beta = {name: jax.nn.sigmoid(outer["logit_momentum"][t, i]) for i, name in enumerate(GROUPS)}
        rate = {name: jnp.exp(outer["log_rate"][t, i]) for i, name in enumerate(GROUPS)}
        velocity = {name: beta[name] * velocity[name] - (1 - beta[name]) * grads[name]
                    for name in GROUPS}
        return {name: rate[name] * velocity[name] for name in GROUPS}, (velocity, t + 1)

    return optax.GradientTransformation(
        lambda params: (jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)), update
    )


def loss(w, outer, batch, key):
    h, labels = batch
    for layer in range(4):
        h = (jnp.tanh(h) if layer else h) @ w[f"W{layer}"] + w[f"b{layer}"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h, labels))


def init_inner(key, outer):
    shapes = [shape for a, b in itertools.pairwise(WIDTHS) for shape in ((a, b), (b,))]
    keys = jax.random.split(key, 8)
    scale = jnp.exp(outer["log_scale"])
    return {name: scale[i] * jax.random.normal(keys[i], shapes[i]) for i, name in enumerate(GROUPS)}


def init_outer(key):
    return {"log_rate": jnp.full((size.steps, 8), -1.0), "logit_momentum": jnp.zeros((size.steps, 8)),
            "log_scale": jnp.full(8, -3.0)}


problem = bilevel.Problem(loss, loss, init_inner, init_outer)
adam = optax.rmsprop(lambda t: 0.04 / jnp.where(t == 0, 1.0, 1 - 0.9 ** (t + 1.0)), decay=0.99,
                     eps=1e-4,
                     eps_in_sqrt=False, bias_correction=True)
solver = bilevel.Nested(problem, bilevel.Unrolled(scheduled, steps=size.steps), adam,
                        inner_start="cold")

# %%
results = [
    bilevel.run(solver, inner_data=bilevel.Batches(train, 200), outer_data=train, steps=size.meta,
                progress=False,
                key=jax.random.key(seed), checkpoint_dir=gallery.checkpoints(f"schedule-{seed}"))
    for seed in range(size.seeds)
]
curves = np.array([result.history["outer_loss"] for result in results])

# %% [markdown]
# The mean of the last five outer steps is compared, since each has its own start and batches. What the learned
# schedule is worth beside the best *constant* rate says a grid with everything else as at the beginning:

# %%
def after_training(outer, key):
    return bilevel.fit(problem, outer, optimizer=scheduled, data=bilevel.Batches(train, 200),
                       steps=size.steps, key=key,
                       progress=False).inner.params

keys = jax.random.split(jax.random.key(99), size.seeds)
grid = np.linspace(-1, 2, 7 if size.steps > 5 else 2)
start = init_outer(None)
constant = [np.mean([loss(after_training(start | {"log_rate": jnp.full((size.steps, 8), r)}, k), None,
                          train, None)
                     for k in keys]) for r in grid]
learned = [float(loss(after_training(r.outer, k), None, train, None)) for r,
           k in zip(results, keys, strict=True)]
best = np.exp(grid[np.argmin(constant)])
print(f"best constant rate {best:.2f}: {min(constant):.3f}; learned: {np.mean(learned):.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2)
left.plot(curves.T, color="tab:blue", alpha=0.5)
left.plot([0, size.meta - 1], [0.531, 0.123], "ko", label="Maclaurin et al.")
left.axhline(min(constant), color="black", linestyle=":", label="best constant rate")
left.set(xlabel="outer step", ylabel="training loss after 100 steps", ylim=(0, 0.8))
left.legend()
for layer in range(4):
    right.plot(np.exp(np.mean([r.outer["log_rate"][:, 2 * layer] for r in results], 0)),
               label=f"weights {layer + 1}")
right.set(xlabel="inner step", ylabel="learning rate")
right.legend(fontsize=9)
gallery.show(figure)

# %% [markdown]
# The learned schedule shows what they describe: large steps in the topmost layer first, then in the first layer, and
# smaller ones everywhere at the end.

# %%
source = "vector figure of the meta-learning curve in github.com/HIPS/hypergrad (Maclaurin et al. 2015)"
gallery.record(
    "schedule",
    "A learning rate for every step and layer",
    [gallery.Row("training loss after 50 outer steps, mean of the last 5", 0.1225, source,
                 curves[:, -5:].mean(1),
                 better="lower"),
     gallery.Row("training loss at the first outer step", 0.531, source, curves[:, 0])],
    gradients=size.seeds * (size.meta + len(grid) + 1) * size.steps,
)

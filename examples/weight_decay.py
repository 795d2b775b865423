# %% [markdown]
# # A weight decay for every weight
#
# Softmax regression on MNIST has 7,840 weights. Here each gets a weight decay of its own, so that there are as many
# hyper-parameters as parameters. With $\mathrm{CE}$ the cross-entropy,
#
# $$\min_{\lambda \in \mathbb{R}^{7840}} \mathrm{CE}_{\mathrm{val}}(w_{50}(\lambda)) + 0.01 \sum_j e^{2 \lambda_j},
# \qquad w_{50}(\lambda) \text{: 50 steps of descent on }
# \mathrm{CE}_{\mathrm{train}}(w) + \sum_j e^{\lambda_j} w_j^2 .$$
#
# This is the experiment on *richly parameterised regularisation* of Maclaurin, Duvenaud and Adams (2015): 10,000 rows
# to train on, the next 10,000 for validation, the next 1,000 to test, all of them centred; batches of 200, momentum
# 0.9. Lorraine et al. (2020) do the same for millions of weights, with the implicit function theorem in place of the
# unrolled training.

# %%
import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel

size = gallery.sizes(short={"rows": 10_000, "meta": 50, "seeds": 5}, full={"meta": 1000},
                     smoke={"rows": 400, "meta": 2, "seeds": 2})
arrays = gallery.data("mnist")
x, y = arrays["x_train"].reshape(-1, 784).astype("float32") / 255, arrays["y_train"].astype("int32")
x = x - x.mean(0)
train, val, test = [(x[i:j], y[i:j]) for i, j in ((0, size.rows), (10_000, 10_000 + size.rows),
                                                  (20_000, 21_000))]


# %%
def cross_entropy(w, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(batch[0] @ w["W"] + w["b"],
                                                                    batch[1]))


def inner_loss(w, log_decay, batch, key):
    return cross_entropy(w, batch) + jnp.sum(jnp.exp(log_decay) * w["W"] ** 2)


def outer_loss(w, log_decay, batch, key):
    return cross_entropy(w, batch) + 0.01 * jnp.sum(jnp.exp(2 * log_decay))


problem = bilevel.Problem(
    inner_loss,
    outer_loss,
    init_inner=lambda key, log_decay: {"W": jnp.exp(-4.0) * jax.random.normal(key, (784, 10)),
                                       "b": jnp.zeros(10)},
    init_outer=lambda key: jnp.full((784, 10), jnp.log(0.01) + 1.0),
)

# %% [markdown]
# **Which hypergradient.** Fifty steps do not train to the minimum, so the implicit function theorem would
# differentiate a point that training never reaches. `Unrolled` differentiates the fifty steps themselves; `compare`
# shows how far apart the two are here, and what the cheap `OneStep` would give.

# %%
descent = optax.sgd(0.1, momentum=0.9)
comparison = bilevel.compare(
    problem,
    {
        "unrolled": bilevel.Unrolled(descent, steps=50),
        "implicit": bilevel.Implicit(descent, steps=50, linear_solver=bilevel.CG(max_steps=20)),
        "one step": bilevel.OneStep(descent, steps=50),
    },
    reference="unrolled",
    inner_data=bilevel.Batches(train, min(200, size.rows)),
    outer_data=val,
)
for row in comparison.rows:
    print(f"{row.name}: cosine {row.cosine:.3f}, cost {row.gradients:.0f} inner gradients")

# %% [markdown]
# All seeds run side by side in one program: `run` takes a stack of keys.

# %%
solver = bilevel.Nested(problem, bilevel.Unrolled(descent, steps=50), optax.sgd(1000.0),
                        inner_start="cold")
result = bilevel.run(
    solver,
    inner_data=bilevel.Batches(train, min(200, size.rows)),
    outer_data=val,
    steps=size.meta,
    key=jax.random.split(jax.random.key(0), size.seeds),
    record=lambda state: {"test": cross_entropy(state.inner.params, test)},
    progress=False,
    checkpoint_dir=gallery.checkpoints("weight_decay"),
)
curves = result.history

# %%
figure, axes = plt.subplots(1, 2, gridspec_kw={"width_ratios": [1.2, 1]})
axes[0].plot(curves["outer_loss"].mean(1), label="validation, with the prior")
axes[0].plot(curves["test"].mean(1), label="test")
axes[0].plot([0, 49], [0.704, 0.449], "k.", label="test, Maclaurin et al.")
axes[0].set(xlabel="outer step", ylabel="loss after 50 steps")
axes[0].legend()
digits = np.asarray(result.outer[0]).T.reshape(2, 5, 28, 28).transpose(0, 2, 1, 3).reshape(56, 140)
picture = axes[1].imshow(digits, cmap="gray_r")
axes[1].set(xticks=[], yticks=[], title=r"$\lambda_j$ of the ten classes")
figure.colorbar(picture, ax=axes[1], shrink=0.6)
gallery.show(figure)

# %% [markdown]
# The strokes of a digit appear twice: low decay where ink is evidence for the class, high decay where the validation
# rows say that a weight is noise. The border, where all pixels are white, keeps the decay that it began with but for
# the prior.

# %%
source = "figure in github.com/HIPS/hypergrad (Maclaurin et al. 2015), read off to 0.003"
gallery.record(
    "weight_decay",
    "A weight decay for every weight",
    [
        gallery.Row("test loss after 50 outer steps, MNIST", 0.449, source,
                    curves["test"][min(49, size.meta - 1)],
                    better="lower", tolerance=0.003),
        gallery.Row("test loss at the start", 0.704, source, curves["test"][0], tolerance=0.003,
                    why="their batches follow the file, ours are random"),
    ],
    gradients=size.seeds * size.meta * 50,
)

# %% [markdown]
# # Dropout rates learned through training
#
# How much dropout, and where? A grid over two rates trains a network for every pair. A rate can also be an outer
# variable, moved by the derivative of the validation loss through training:
#
# $$\min_{p \in (0,1)^2} \; \mathrm{CE}_{\mathrm{val}}(w_K(p)), \qquad
# w_{t+1} = w_t - U\big(\nabla_w \mathrm{CE}(w_t; m_t(p))\big), \qquad m_t(p) \text{: masks of step } t .$$
#
# A mask that is 0 or 1 jumps, and the derivative of a jump in $p$ is 0 almost everywhere. The search therefore uses
# the relaxed mask of *concrete dropout* (Gal, Hron and Kendall 2017), $m = \sigma\big((\mathrm{logit}(1-p) +
# \mathrm{logit}(u)) / \tau\big)$ with $u$ uniform; what is found is then used with ordinary dropout. HiddenKey (Wang
# et al. 2024) tunes its rates by such grids, eight values a rate; [here](../hiddenkey.md) they are learned for LoRA.

# %%
import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel

size = gallery.sizes(short={"rows": 500, "val": 2000, "steps": 400, "meta": 40, "seeds": 3, "grid": 4,
                            "width": 64},
                     full={"meta": 300, "grid": 8, "seeds": 10},
                     smoke={"rows": 40, "val": 40, "steps": 3, "meta": 2, "seeds": 2, "grid": 2,
                            "width": 8})
arrays = gallery.data("mnist")
x, y = arrays["x_train"].reshape(-1, 784).astype("float32") / 255, arrays["y_train"].astype("int32")
test = arrays["x_test"].reshape(-1, 784).astype("float32") / 255, arrays["y_test"].astype("int32")


# %% [markdown]
# **Which hypergradient.** The rates act inside training only: `FirstOrder` would be exactly 0 and say so, and
# `Implicit` wants a minimum, which noisy steps do not reach. `Unrolled` replays the masks of each step from its key.
# It has to go through the *whole* training: what dropout prevents happens late. The second solver differentiates 20
# steps at a time and goes on from where it was, and finds that dropout only slows training down: the *short-horizon
# bias* of Wu et al. (2018). `Interval` keeps the rates between 0 and 0.9.

# %%
def network(w, rates, inputs, key, mask):
    h = inputs * mask(rates[0], key, 0, inputs.shape)
    h = jax.nn.relu(h @ w["W1"] + w["b1"])
    h = h * mask(rates[1], key, 1, h.shape)
    return h @ w["W2"] + w["b2"]


def relaxed(rate, key, place, shape):
    u = jax.random.uniform(jax.random.fold_in(key, place), shape, minval=1e-6, maxval=1 - 1e-6)
    keep = jax.nn.sigmoid((jax.scipy.special.logit(1 - rate) + jax.scipy.special.logit(u)) / 0.1)
    return keep / (1 - rate)


def ordinary(rate, key, place, shape):
    return jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, shape) / (1 - rate)


def none(rate, key, place, shape):
    return 1.0


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def problem(mask):
    def init_inner(key, rates):
        first, second = jax.random.split(key)
        return {"W1": jax.random.normal(first, (784, size.width)) / 28, "b1": jnp.zeros(size.width),
                "W2": jax.random.normal(second, (size.width, 10)) * size.width**-0.5,
                "b2": jnp.zeros(10)}

    return bilevel.Problem(
        lambda w, rates, batch, key: cross_entropy(network(w, rates, batch[0], key, mask), batch[1]),
        lambda w, rates, batch, key: cross_entropy(network(w, rates, batch[0], key, none), batch[1]),
        init_inner, lambda key: jnp.array([0.1, 0.1]), domain=bilevel.Interval(0.0, 0.9))


training = optax.adam(2e-3)
searched, trained = problem(relaxed), problem(ordinary)
solver = bilevel.Nested(searched, bilevel.Unrolled(training, steps=size.steps), optax.adam(0.2),
                        inner_start="cold")
short_sighted = bilevel.Nested(searched, bilevel.Unrolled(training, steps=20), optax.adam(0.2))

# %%
grid = [(a, b) for a in np.linspace(0, 0.75, size.grid) for b in np.linspace(0, 0.75, size.grid)]


def outcome(rates, train, val, seed):
    """Validation loss and test error in %, with ordinary dropout at these rates."""
    w = bilevel.fit(trained, jnp.asarray(rates), optimizer=training, data=bilevel.Batches(train, 40),
                    steps=size.steps, key=jax.random.key(seed), progress=False).inner.params
    wrong = jnp.argmax(network(w, (0.0, 0.0), test[0], None, none), axis=1) != test[1]
    return float(cross_entropy(network(w, (0.0, 0.0), val[0], None, none),
                               val[1])), 100 * float(jnp.mean(wrong))


found, paths, short_paths, learned, recommended, by_grid, tables = [], [], [], [], [], [], []
for seed in range(size.seeds):
    order = np.random.default_rng(seed).permutation(60_000)
    rows, held = order[: size.rows], order[size.rows : size.rows + size.val]
    train, val = (x[rows], y[rows]), (x[held], y[held])
    given = {"inner_data": bilevel.Batches(train, 40), "outer_data": val, "steps": size.meta,
             "progress": False,
             "key": jax.random.key(seed), "record": lambda state: {"rates": state.outer}}
    result = bilevel.run(solver, checkpoint_dir=gallery.checkpoints(f"dropout-{seed}"), **given)
    short_paths.append(bilevel.run(short_sighted, **given).history["rates"])
    paths.append(result.history["rates"])
    found.append(np.asarray(result.outer))
    learned.append(outcome(result.outer, train, val, seed)[1])
    recommended.append(outcome([0.2, 0.5], train, val, seed)[1])
    tables.append([outcome(rates, train, val, seed) for rates in grid])
    by_grid.append(min(tables[-1])[1])  # the rates that validation prefers
    print(f"rates {np.round(found[-1], 2)}; test error in %: {learned[-1]:.2f}, best of the grid "
          f"{by_grid[-1]:.2f}, without dropout {tables[-1][0][1]:.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2)
left.plot(np.mean(paths, axis=0), label=["pixels", "hidden units"])
left.set_prop_cycle(None)
left.plot(np.mean(short_paths, axis=0), ":", label=["pixels, 20 steps", "hidden, 20 steps"])
left.set(xlabel="outer step", ylabel="dropout rate", ylim=(0, 0.9))
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
loss = np.mean(tables, axis=0)[:, 0].reshape(size.grid, size.grid)
picture = right.imshow(loss, origin="lower", extent=(-0.125, 0.875, -0.125, 0.875), cmap="viridis_r")
right.plot(*np.array(found)[:, ::-1].T, "r*")
right.set(xlabel="rate of hidden units", ylabel="rate of pixels",
          title="validation loss of the grid,\nlearned rates as stars")
figure.colorbar(picture, ax=right, shrink=0.8)
gallery.show(figure)

# %%
gallery.record(
    "dropout", "Dropout rates learned through training",
    [gallery.Row("test error in %, against the best of a grid", float(np.mean(by_grid)),
                 "grid search, measured here",
                 learned, better="lower", spread=gallery.interval(by_grid)[1]),
     gallery.Row("test error in %, against rates 0.2 and 0.5", float(np.mean(recommended)),
                 "common advice for pixels and hidden units, measured here", learned, better="lower",
                 spread=gallery.interval(recommended)[1])],
    gradients=size.seeds * (size.meta * (20 + size.steps) + (len(grid) + 2) * size.steps),
    notes=f"The grid trains {len(grid)} networks a seed, the search one.",
)

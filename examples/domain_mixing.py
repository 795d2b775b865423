# %% [markdown]
# # Mixing domains: weights on a simplex
#
# A training set comes from eight domains, and nobody says which are any good. Here a domain is a camera: its digits
# of MNIST are turned by an angle of its own, and in two domains the labels are random. The target are digits as they
# are. How much of each domain to train on is eight numbers on a simplex:
#
# $$\min_{p \in \Delta^7} \; \mathrm{CE}_{\mathrm{target}}(w_K(p)), \qquad
# w_K(p) \text{: K steps of descent on } \sum_{d=1}^{8} p_d \, \mathrm{CE}_d(w).$$
#
# DoReMi (Xie et al. 2023) and ScaleBiO (Pan et al. 2024) choose the mixture of a language model's training data in
# this way. Their corpora are out of reach here; what is planted can be checked exactly. The three domains that are
# turned by at most 20 degrees and labelled rightly are useful, so that the area under the ROC curve (AUROC) of
# "weight" as a sign of a useful domain should be 1, and the noisy domains should end with nothing.

# %%
import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.ndimage

import bilevel

size = gallery.sizes(short={"rows": 500, "steps": 40, "meta": 60, "seeds": 5},
                     full={"meta": 400, "seeds": 20},
                     smoke={"rows": 20, "steps": 3, "meta": 2, "seeds": 2})
ANGLES, NOISY = np.array([0, 10, 20, 45, 90, 180, 0, 10]), np.arange(8) >= 6
USEFUL = (ANGLES <= 20) & ~NOISY
arrays = gallery.data("mnist")


def domains(seed):
    """`(train, val, test)`; a batch of training rows holds one row of every domain."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(60_000)
    x, y = arrays["x_train"][order].astype("float32") / 255, arrays["y_train"][order].astype("int32")
    parts = []
    for d, angle in enumerate(ANGLES):
        rows = slice(d * size.rows, (d + 1) * size.rows)
        labels = rng.integers(0, 10, size.rows, dtype="int32") if NOISY[d] else y[rows]
        turned = scipy.ndimage.rotate(x[rows], angle, axes=(1, 2), reshape=False, order=1)
        parts.append((turned.reshape(-1, 784), labels))
    train = tuple(np.stack(column, axis=1) for column in zip(*parts, strict=True))
    val = x[-500:].reshape(-1, 784), y[-500:]
    test = arrays["x_test"].reshape(-1, 784).astype("float32") / 255, arrays["y_test"].astype("int32")
    return train, val, test


# %% [markdown]
# **Which hypergradient.** The mixture acts on training alone, so that `FirstOrder`, which holds the weights where
# they are, would be exactly 0. Training is forty steps: `Unrolled`. `Simplex` is a bijector: the descent moves in
# coordinates without bounds, the losses see weights that sum to 1.

# %%
def cross_entropy(w, x, y):
    h = jax.nn.relu(x @ w["W1"] + w["b1"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ w["W2"] + w["b2"], y)


def inner_loss(w, mixture, batch, key):
    return mixture @ jnp.mean(cross_entropy(w, *batch), axis=0)


def outer_loss(w, mixture, batch, key):
    return jnp.mean(cross_entropy(w, *batch))


def init_inner(key, mixture):
    first, second = jax.random.split(key)
    return {"W1": jax.random.normal(first, (784, 64)) / 28, "b1": jnp.zeros(64),
            "W2": jax.random.normal(second, (64, 10)) / 8, "b2": jnp.zeros(10)}


problem = bilevel.Problem(inner_loss, outer_loss, init_inner, lambda key: jnp.full(8, 1 / 8),
                          domain=bilevel.Simplex())
training = optax.adam(3e-3)
solver = bilevel.Nested(problem, bilevel.Unrolled(training, steps=size.steps), optax.adam(0.1),
                        inner_start="cold")


def accuracy(mixture, train, test, seed):
    w = bilevel.fit(problem, mixture, optimizer=training,
                    data=bilevel.Batches(train, min(50, size.rows)),
                    steps=5 * size.steps, key=jax.random.key(seed), progress=False).inner.params
    h = jax.nn.relu(test[0] @ w["W1"] + w["b1"])
    return 100 * float(jnp.mean(jnp.argmax(h @ w["W2"] + w["b2"], axis=1) == test[1]))


# %%
mixtures, auroc, noise, learned, uniform, oracle = [], [], [], [], [], []
for seed in range(size.seeds):
    train, val, test = domains(seed)
    result = bilevel.run(solver, inner_data=bilevel.Batches(train, min(50, size.rows)),
                         outer_data=val, steps=size.meta,
                         key=jax.random.key(seed), record=lambda state: {"mixture": state.outer},
                         progress=False,
                         checkpoint_dir=gallery.checkpoints(f"domain_mixing-{seed}"))
    found = np.asarray(result.outer)
    mixtures.append(result.history["mixture"])
    auroc.append(np.mean(found[~USEFUL][:, None] < found[USEFUL][None, :]))
    noise.append(100 * np.sum(found[NOISY]))
    learned.append(accuracy(result.outer, train, test, seed))
    uniform.append(accuracy(jnp.full(8, 1 / 8), train, test, seed))
    oracle.append(accuracy(jnp.asarray(USEFUL, jnp.float32) * 0.33 + 0.00125, train, test, seed))
for name, values in (("uniform", uniform), ("learned", learned), ("useful domains alone", oracle)):
    print(f"{name}: test accuracy {gallery.number(*gallery.interval(values))} %")

# %%
figure, (left, right) = plt.subplots(1, 2)
path = np.mean(mixtures, axis=0)
for d in range(8):
    left.plot(path[:, d], linestyle="--" if NOISY[d] else "-")
left.set(xlabel="outer step", ylabel="weight of a domain")
names = [f"{angle}°{', noise' if noisy else ''}" for angle, noisy in zip(ANGLES, NOISY, strict=True)]
right.barh(names, path[-1], color=["tab:red" if noisy else "tab:blue" for noisy in NOISY])
right.invert_yaxis()
right.set(xlabel="weight at the end")
gallery.show(figure)

# %% [markdown]
# The mixture is not the useful domains in equal parts: digits as they are get most of the weight, and those turned by
# 20 degrees little. A digit turned by 45 degrees or more is of as little use as a random label, and the weights do
# not tell the two apart.

# %%
gallery.record(
    "domain_mixing", "Mixing domains: weights on a simplex",
    [gallery.Row("AUROC of a weight as a sign of a useful domain", 1.0, "planted", auroc,
                 better="higher"),
     gallery.Row("weight on the two noisy domains in %", 0.0, "planted", noise, better="lower",
                 tolerance=1.0),
     gallery.Row("test accuracy in %, against the useful domains alone", float(np.mean(oracle)),
                 "oracle, measured here", learned, better="higher",
                 spread=gallery.interval(oracle)[1])],
    gradients=size.seeds * (size.meta + 15) * size.steps,
    notes=f"A uniform mixture reaches {gallery.number(*gallery.interval(uniform))} %.",
)

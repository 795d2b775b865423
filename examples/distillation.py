# %% [markdown]
# # Ten images instead of sixty thousand
#
# Dataset distillation turns the usual question round: the training set is the variable. Ten images, one for each
# digit, are learned so that a LeNet which is trained on nothing else classifies MNIST:
#
# $$\min_{x, \eta} \; \mathrm{CE}_{\mathrm{MNIST}}(w_K), \qquad
# w_{t+1} = w_t - \eta_t \nabla_w \mathrm{CE}\big(w_t; \{(x_i, i)\}_{i=0}^{9}\big).$$
#
# Wang, Zhu, Torralba and Efros (2018) report 93.8 % for ten images and a start $w_0$ that is known when the images
# are learned, and 79.5 ± 8.1 % (over 200 networks) for a hundred images and random starts.

# %%
import gallery
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel

size = gallery.sizes(short={"batch": 256, "meta": 500, "seeds": 3, "meta_random": 150, "starts": 20,
                            "test": 10_000},
                     full={"batch": 1024, "meta": 5000, "meta_random": 20_000, "starts": 200},
                     smoke={"batch": 16, "meta": 2, "seeds": 2, "meta_random": 2, "starts": 2,
                            "test": 50})
arrays = gallery.data("mnist")
images = [arrays[f"x_{s}"].reshape(-1, 28, 28, 1).astype("float32") / 255 for s in ("train", "test")]
x, x_test = [(pixels - 0.1307) / 0.3081 for pixels in images]
y, y_test = arrays["y_train"].astype("int32"), arrays["y_test"].astype("int32")


# %% [markdown]
# LeNet, written out. A convolution is a product with patches of 5 by 5, which is quicker here than XLA's second
# derivatives of a convolution on CPU.

# %%
def init_lenet(key):
    shapes = {"c1": (25, 6), "c2": (150, 16), "d1": (400, 120), "d2": (120, 84), "d3": (84, 10)}
    keys = dict(zip(shapes, jax.random.split(key, 5), strict=True))
    return {name: {"w": jax.random.normal(keys[name], s) * s[0] ** -0.5, "b": jnp.zeros(s[-1])}
            for name, s in shapes.items()}


def lenet(w, images):
    h = images
    for name, padding in (("c1", 2), ("c2", 0)):
        h = jnp.pad(h, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        side = h.shape[1] - 4
        patches = jnp.concatenate([h[:, i : i + side, j : j + side] for i in range(5)
                                   for j in range(5)], axis=-1)
        h = jax.nn.relu(patches @ w[name]["w"] + w[name]["b"])
        h = h.reshape(len(h), h.shape[1] // 2, 2, h.shape[2] // 2, 2, -1).max((2, 4))
    h = h.reshape(len(h), -1)
    for name in ("d1", "d2"):
        h = jax.nn.relu(h @ w[name]["w"] + w[name]["b"])
    return h @ w["d3"]["w"] + w["d3"]["b"]


# %% [markdown]
# **Which hypergradient.** A few large steps from a given start are not a minimum of anything, so this is a problem
# for `Unrolled`. The images are in the inner loss, the rates in the optimizer; `rate` gives every step its own.

# %%
def inner_loss(w, outer, batch, key):
    logits = lenet(w, outer["images"])
    labels = jnp.arange(len(logits)) % 10
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def outer_loss(w, outer, batch, key):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(lenet(w, batch[0]), batch[1]))


def descent(outer):
    return optax.sgd(lambda step: jnp.exp(outer["log_rate"])[step])


def solver(images, steps, start, meta):
    problem = bilevel.Problem(
        inner_loss, outer_loss, init_inner=lambda key, outer: init_lenet(key if start is None
                                                                         else start),
        init_outer=lambda key: {"images": 0.5 * jax.random.normal(key, (images, 28, 28, 1)),
                                "log_rate": jnp.full(steps, -3.0)})
    careful = optax.chain(optax.clip_by_global_norm(1.0),
                          optax.adam(optax.cosine_decay_schedule(0.05, meta)))
    return bilevel.Nested(problem, bilevel.Unrolled(descent, steps=steps), careful, inner_start="cold")


def learn(images, steps, start, meta, seed):
    return bilevel.run(solver(images, steps, start, meta),
                       outer_data=bilevel.Batches((x, y), size.batch),
                       steps=meta,
                       key=jax.random.key(seed), progress=False,
                       checkpoint_dir=gallery.checkpoints(f"distillation-{images}-{seed}"))


@jax.jit
def accuracy(outer, start, x_test, y_test):
    w = init_lenet(start)
    for rate in jnp.exp(outer["log_rate"]):
        w = jax.tree.map(lambda a, g, rate=rate: a - rate * g, w,
                         jax.grad(inner_loss)(w, outer, None, None))
    parts = x_test.reshape(-1, min(500, len(x_test)), 28, 28, 1)
    predicted = jax.lax.map(lambda part: jnp.argmax(lenet(w, part), axis=1), parts)
    return 100 * jnp.mean(predicted.ravel() == y_test)


# %%
known = [learn(10, 3, jax.random.key(100 + seed), size.meta, seed) for seed in range(size.seeds)]
whole, few = (x_test[: size.test], y_test[: size.test]), (x_test[: size.test // 5],
                                                          y_test[: size.test // 5])
of_known = [float(accuracy(r.outer, jax.random.key(100 + s), *whole)) for s, r in enumerate(known)]
fresh = jax.random.split(jax.random.key(7), size.starts)
elsewhere = np.mean([accuracy(known[0].outer, key, *few) for key in fresh])
print(f"ten images at their start: {np.round(of_known, 1)} %; at other starts: {elsewhere:.1f} %")

# %% [markdown]
# Ten images serve the one start that they were made for. For unknown starts `init_inner` draws another network at
# every outer step (`inner_start="cold"`), and a hundred images take ten steps.

# %%
anywhere = learn(100, 10, None, size.meta_random, 0)
of_random = [float(accuracy(anywhere.outer, key, *few)) for key in fresh]

# %%
figure, axes = plt.subplots(2, 5, figsize=(7.2, 3.2))
for digit, axis in enumerate(axes.ravel()):
    axis.imshow(known[0].outer["images"][digit, :, :, 0], cmap="gray")
    axis.set(xticks=[], yticks=[], title=str(digit))
gallery.show(figure)

# %%
why = f"the short form stops after {size.meta} and {size.meta_random} outer steps"
source = "project page of Wang et al. 2018, ssnl.github.io/dataset_distillation"
gallery.record(
    "distillation",
    "Ten images instead of sixty thousand",
    [gallery.Row("test accuracy in %, ten images, known start", 93.8, source, of_known,
                 better="higher", why=why),
     gallery.Row("test accuracy in %, a hundred images, random starts", 79.5, source, of_random,
                 better="higher", spread=8.1, unit="held-out start", why=why)],
    gradients=3 * size.meta * size.seeds + 10 * size.meta_random,
)

"""Data cleaning on MNIST: one weight a training row, some rows with wrong labels."""

from benchopt import BaseDataset


class Dataset(BaseDataset):
    r"""Inner loss: $\frac1n \sum_i \sigma(x_i)\, \mathrm{CE}_i(z) + 0.2 \|z\|^2$ over 20,000 rows, a share
    `ratio` of whose labels are replaced by a uniformly random class; z is a linear classifier. Outer loss: mean
    cross-entropy of 5,000 clean rows. Starts at z = 0, x = -2.

    Metrics: `test_error` on 10,000 rows, `train_error`, `val_error`; `value` is `val_error`.
    """

    name = "mnist"
    parameters = {"ratio": [0.5, 0.7, 0.9], "regularisation": [0.2], "random_state": [32]}

    def get_data(self):
        import jax
        import jax.numpy as jnp
        import numpy as np
        from benchmark_utils.classification import cross_entropy, error_rates
        from benchmark_utils.data import load, scaler, split

        import bilevel

        arrays, rng = load("mnist"), np.random.RandomState(self.random_state)
        images = {name: arrays[f"x_{name}"].reshape(-1, 784) for name in ("train", "test")}
        train, val = split(rng, len(images["train"]), held_out=5_000, kept=20_000)
        labels = arrays["y_train"].astype(np.int32)
        noisy = labels[train]
        corrupted = rng.rand(len(train)) < self.ratio
        noisy[corrupted] = rng.randint(0, 10, corrupted.sum())
        scale = scaler(images["train"][train])
        x_train, x_val, x_test = (scale(x) for x in (images["train"][train], images["train"][val], images["test"]))
        inner = {"x": x_train, "y": noisy, "row": np.arange(len(train), dtype=np.int32)}
        outer = {"x": x_val, "y": labels[val]}

        def inner_loss(z, x, batch, key):
            weights = jax.nn.sigmoid(x[batch["row"]])
            return jnp.mean(weights * cross_entropy(z, batch)) + self.regularisation * jnp.sum(z**2)

        def outer_loss(z, x, batch, key):
            return jnp.mean(cross_entropy(z, batch))

        problem = bilevel.Problem(
            inner_loss,
            outer_loss,
            lambda key, outer: jnp.zeros((784, 10)),
            lambda key: jnp.full(len(train), -2.0),
        )
        metrics = error_rates(
            train=(x_train, noisy), val=(x_val, labels[val]), test=(x_test, arrays["y_test"].astype(np.int32))
        )
        return {
            "problem": problem,
            "inner": jax.tree.map(jnp.asarray, inner),
            "outer": jax.tree.map(jnp.asarray, outer),
            "metrics": metrics,
        }

"""Softmax regression on a balanced subset of Covertype: one regularisation weight a class."""

from benchopt import BaseDataset


class Dataset(BaseDataset):
    r"""Inner loss: mean cross-entropy plus :math:`\tfrac12 \sum_c e^{x_c} \|z_{:,c}\|^2`; z is a linear classifier on
    54 features and 7 classes. Outer loss: mean cross-entropy on validation rows, a fifth of the training file. Starts
    at z = 0, x = -2.

    The subset has 10,959 rows and nearly equal classes: its errors are not those published for the full set of 581,012.

    Metrics: `test_error`, `train_error`, `val_error`; `value` is `val_error`.
    """

    name = "covtype_subset"
    parameters = {"random_state": [2442]}

    def get_data(self):
        import jax.numpy as jnp
        import numpy as np
        from benchmark_utils.classification import cross_entropy, error_rates
        from benchmark_utils.data import load, scaler, split

        import bilevel

        arrays, rng = load("covtype_subset"), np.random.RandomState(self.random_state)
        x, y = arrays["x_train"], arrays["y_train"].astype(np.int32) - 1
        train, val = split(rng, len(x), held_out=-(-len(x) // 5))
        scale = scaler(x[train])
        sets = {
            "train": (scale(x[train]), y[train]),
            "val": (scale(x[val]), y[val]),
            "test": (scale(arrays["x_test"]), arrays["y_test"].astype(np.int32) - 1),
        }

        def outer_loss(z, x, batch, key):
            return jnp.mean(cross_entropy(z, batch))

        def inner_loss(z, x, batch, key):
            return outer_loss(z, x, batch, key) + 0.5 * jnp.sum(jnp.exp(x) * jnp.sum(z**2, axis=0))

        problem = bilevel.Problem(
            inner_loss, outer_loss, lambda key, outer: jnp.zeros((54, 7)), lambda key: jnp.full(7, -2.0)
        )
        inner, outer = ({"x": jnp.asarray(sets[n][0]), "y": jnp.asarray(sets[n][1])} for n in ("train", "val"))
        return {"problem": problem, "inner": inner, "outer": outer, "metrics": error_rates(**sets)}

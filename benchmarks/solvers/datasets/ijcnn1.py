"""Logistic regression on ijcnn1: one regularisation weight a feature, chosen on the test set as validation data."""

from benchopt import BaseDataset


class Dataset(BaseDataset):
    r"""Inner loss: mean logistic loss of 49,990 rows, plus $\tfrac12 \sum_j e^{x_j} z_j^2$ over 22 features.
    Outer loss: mean logistic loss of 91,701 rows. Starts at $z \sim N(0, I)$, $x = \log U(0, 1)$.

    Metrics: `value_func` is h(x), `value` the squared norm of its gradient, `inner_distance` the squared distance of z
    from the inner solution: by Newton's method in float64.
    """

    name = "ijcnn1"
    parameters = {"random_state": [2442]}

    def get_data(self):
        import jax
        import jax.numpy as jnp
        from benchmark_utils.data import load

        import bilevel

        arrays = load("ijcnn1")
        sides = [(arrays[f"x_{s}"], arrays[f"y_{s}"].astype("float32")) for s in ("train", "test")]
        inner, outer = ({"x": jnp.asarray(x), "y": jnp.asarray(y)} for x, y in sides)

        def loss(z, x, batch, key):
            return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ z)))

        def regularised(z, x, batch, key):
            return loss(z, x, batch, key) + 0.5 * jnp.sum(jnp.exp(x) * z**2)

        def init_outer(key):  # one start for all seeds: they differ in their batches
            return jnp.log(jax.random.uniform(jax.random.key(self.random_state), (22,)))

        def init_inner(key, outer):
            return jax.random.normal(jax.random.key(self.random_state + 1), (22,))

        problem = bilevel.Problem(regularised, loss, init_inner, init_outer)
        value = ValueFunction(*sides)
        return {"problem": problem, "inner": inner, "outer": outer, "metrics": value.metrics}


class ValueFunction:
    """h(x) = validation loss at the inner solution, and its gradient, in float64."""

    def __init__(self, train, validation):
        self.train, self.validation = [[a.astype("float64") for a in side] for side in (train, validation)]
        self.solved = None

    def __call__(self, x):
        """`(h, gradient, inner solution)`."""
        import numpy as np

        z, hessian = self._solve(np.asarray(x, np.float64))
        h, slope, _ = _logistic(z, *self.validation)
        return h, -np.exp(x) * z * np.linalg.solve(hessian, slope), z

    def metrics(self, inner, outer):
        import numpy as np

        x = np.asarray(outer, np.float64)
        h, gradient, z = self(x)
        distance = np.sum((np.asarray(inner, np.float64) - z) ** 2)
        return {"value": float(gradient @ gradient), "value_func": float(h), "inner_distance": float(distance)}

    def _solve(self, x):
        import numpy as np

        weights, z = np.exp(x), np.zeros(len(x)) if self.solved is None else self.solved

        def regularised(z):
            f, gradient, hessian = _logistic(z, *self.train)
            return f + weights @ z**2 / 2, gradient + weights * z, hessian + np.diag(weights)

        for _ in range(100):
            f, gradient, hessian = regularised(z)
            step = np.linalg.solve(hessian, gradient)
            if gradient @ step < 1e-24:
                break
            size = 1.0
            while size > 1e-6 and regularised(z - size * step)[0] > f:
                size /= 2
            z = z - size * step
        # The next solution is not far from this one, unless a solver has diverged.
        self.solved = z if np.isfinite(z).all() else None
        return z, hessian


def _logistic(z, x, y):
    """Mean logistic loss, gradient and Hessian."""
    import numpy as np

    margin = y * (x @ z)
    wrong = np.exp(-np.logaddexp(0, margin))
    hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x / len(y)
    return np.mean(np.logaddexp(0, -margin)), -(x.T @ (y * wrong)) / len(y), hessian

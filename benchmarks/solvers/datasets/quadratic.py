"""Quadratic inner and outer losses, finite sums of terms of rank one: everything has a closed form."""

from benchopt import BaseDataset


class Dataset(BaseDataset):
    r"""With $i$ over `n_samples` terms of each loss,

    $$
    \ell(z, x) = \frac1n \sum_i \tfrac12 (a_i^\top z)^2 + \tfrac12 (b_i^\top x)^2 + (p_i^\top x)(q_i^\top z)
                 + c_i^\top z + d_i^\top x,
    $$

    for the inner and for the outer loss, with data of their own. The means of $a a^\top$ have eigenvalues near
    [`mu`, 1], those of $b b^\top$ near {0} and [`mu`, 1], those of the coupling near `coupling`. Drawn anew until
    the value function h is convex. Starts at z = 0, x = -2.

    Metrics: `func` is h(x), `value` the squared norm of its gradient, `inner_distance` the squared distance of z from
    the inner solution: closed forms in float64.
    """

    name = "quadratic"
    parameters = {
        "dim": [100],
        "n_samples": [1024],
        "mu": [0.1],
        "coupling": [0.1],
        "random_state": [2442],
    }

    def get_data(self):
        import jax.numpy as jnp
        import numpy as np

        import bilevel

        rng = np.random.default_rng(self.random_state)
        for _ in range(20):
            inner, outer = (_terms(rng, self.n_samples, self.dim, self.mu, self.coupling) for _ in range(2))
            value = ValueFunction(inner, outer)
            if value.is_convex():
                break
        else:
            raise ValueError("20 draws gave no convex value function: raise mu or lower coupling.")
        start = np.full(self.dim, -2.0)
        problem = bilevel.Problem(
            _loss, _loss, lambda key, outer: jnp.zeros(self.dim), lambda key: jnp.asarray(start, jnp.float32)
        )
        single = [{name: jnp.asarray(a, jnp.float32) for name, a in terms.items()} for terms in (inner, outer)]
        return {"problem": problem, "inner": single[0], "outer": single[1], "metrics": value.metrics}


def _terms(rng, rows, dim, mu, coupling):
    import numpy as np

    def basis():
        return np.linalg.qr(rng.normal(size=(dim, dim)))[0]

    inside = basis() * np.logspace(np.log10(mu) / 2, 0, dim)
    outside = basis() * np.append(0, np.logspace(np.log10(mu) / 2, 0, dim - 1))
    shared = rng.normal(size=(rows, dim))
    return {
        "a": rng.normal(size=(rows, dim)) @ inside.T,
        "b": rng.normal(size=(rows, dim)) @ outside.T,
        "p": coupling * shared @ basis().T,
        "q": shared @ basis().T,
        "c": rng.normal(size=(rows, dim)),
        "d": rng.normal(size=(rows, dim)),
    }


def _loss(z, x, batch, key):
    import jax.numpy as jnp

    az, bx, px, qz = (batch[name] @ v for name, v in zip("abpq", (z, x, x, z), strict=True))
    return jnp.mean(0.5 * az**2 + 0.5 * bx**2 + px * qz + batch["c"] @ z + batch["d"] @ x)


class ValueFunction:
    """h(x) = outer loss at the inner solution, its gradient and Hessian, in float64."""

    def __init__(self, inner, outer):
        self.inner, self.outer = _moments(inner), _moments(outer)

    def solution(self, x):
        import numpy as np

        return np.linalg.solve(self.inner["A"], -self.inner["c"] - self.inner["P"].T @ x)

    def gradient(self, x):
        import numpy as np

        o, z = self.outer, self.solution(x)
        adjoint = np.linalg.solve(self.inner["A"], o["A"] @ z + o["P"].T @ x + o["c"])
        return o["B"] @ x + o["P"] @ z + o["d"] - self.inner["P"] @ adjoint

    def is_convex(self):
        import numpy as np

        o, slope = self.outer, -np.linalg.solve(self.inner["A"], self.inner["P"].T)
        cross = o["P"] @ slope
        return np.linalg.eigvalsh(o["B"] + cross + cross.T + slope.T @ o["A"] @ slope)[0] > 1e-12

    def metrics(self, inner, outer):
        import numpy as np

        z, x, o = np.asarray(inner, np.float64), np.asarray(outer, np.float64), self.outer
        best = self.solution(x)
        func = best @ o["A"] @ best / 2 + x @ o["B"] @ x / 2 + x @ o["P"] @ best + o["c"] @ best + o["d"] @ x
        square = np.sum(self.gradient(x) ** 2)
        return {"value": float(square), "func": float(func), "inner_distance": float(np.sum((z - best) ** 2))}


def _moments(terms):
    rows = len(terms["a"])
    return {
        "A": terms["a"].T @ terms["a"] / rows,
        "B": terms["b"].T @ terms["b"] / rows,
        "P": terms["p"].T @ terms["q"] / rows,
        "c": terms["c"].mean(0),
        "d": terms["d"].mean(0),
    }

"""A family of bilevel problems with closed forms."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem.problem import Problem
from bilevel.trees import Outer


@dataclasses.dataclass(frozen=True)
class Quadratic:
    r"""A bilevel problem whose training by gradient descent, and every hypergradient of it, has a closed form.

    $$
    f(w, \lambda) = \tfrac12 w^\top H w - (b + C \lambda)^\top w, \qquad
      F(w, \lambda) = \tfrac12 (w - c)^\top A (w - c) + \tfrac12 |\lambda|^2 .
    $$

    `outer` is a dict: `tilt` is $\lambda$; `rate`, if there, the learning rate $\eta$; `start`, if
    there, the initial point $w_0$. With $M = I - \eta H$, $\bar w = H^{-1}(b + C\lambda)$ and
    $v = A(w_K - c)$,

    $$ w_K = \bar w + M^K (w_0 - \bar w). $$

    The methods return what an estimator should: dicts of NumPy arrays with the keys of `outer`, computed in float64
    from these formulas and not by differentiation. `rate` and `start` are used where `outer` does not have them.

    Attributes:
      H, b, C, A, c: the coefficients, NumPy arrays; H and A symmetric and positive definite.
      start: $w_0$ where `outer` has no `start`.

    Examples:
      >>> import numpy as np
      >>> from bilevel.testing import Quadratic
      >>> one = np.ones((1, 1))
      >>> q = Quadratic(H=2 * one, b=one[0], C=one, A=one, c=0 * one[0], start=0 * one[0])
      >>> outer = {"tilt": np.ones(1)}
      >>> q.trained(outer, 50, rate=0.5).tolist()  # (b + C tilt) / H
      [1.0]
      >>> q.implicit(outer, 50, rate=0.5)["tilt"].tolist()  # tilt + C A w / H
      [1.5]
    """

    H: np.ndarray
    b: np.ndarray
    C: np.ndarray
    A: np.ndarray
    c: np.ndarray
    start: np.ndarray

    @property
    def problem(self) -> Problem:
        """The problem; its `init_outer` gives `{"tilt": 0}`."""
        bind = jax.tree_util.Partial
        return Problem(
            bind(_quadratic_inner, *map(jnp.asarray, (self.H, self.b, self.C))),
            bind(_quadratic_outer, *map(jnp.asarray, (self.A, self.c))),
            bind(_quadratic_start, jnp.asarray(self.start)),
            bind(_quadratic_tilt, jnp.zeros(self.C.shape[1])),
        )

    def trained(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> np.ndarray:
        """$w_K$ for K = `steps`."""
        rest, decay, begin = self._training(outer, rate, start)
        return rest + np.linalg.matrix_power(decay, steps) @ (begin - rest)

    def value(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> float:
        """$F(w_K, \\lambda)$."""
        away = self.trained(outer, steps, rate=rate, start=start) - self.c
        return 0.5 * away @ self.A @ away + 0.5 * np.sum(np.square(outer["tilt"]))

    def unrolled(
        self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None, truncate: int | None = None
    ) -> dict[str, np.ndarray]:
        r"""The derivative of T = `truncate` last steps; of all K by default. With $w_{K-T}$ held constant,

        $$
        \lambda + C^\top H^{-1} (I - M^T) v, \qquad
          -T\, v^\top H M^{T-1} (w_{K-T} - \bar w), \qquad M^K v \text{ if } T = K, \text{ else } 0
        $$

        are those with respect to `tilt`, `rate` and `start`. A warm `start=` is a constant.
        """
        last = steps if truncate is None else truncate
        rest, decay, _ = self._training(outer, rate, start)
        power = partial(np.linalg.matrix_power, decay)
        v = self._pull(outer, steps, rate, start)
        before = self.trained(outer, steps - last, rate=rate, start=start)
        solved = np.linalg.solve(self.H, v - power(last) @ v)
        return _only(
            outer,
            tilt=np.asarray(outer["tilt"]) + self.C.T @ solved,
            rate=-last * v @ self.H @ power(last - 1) @ (before - rest),
            start=power(steps) @ v if last == steps and start is None else np.zeros_like(v),
        )

    def implicit(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> dict[str, np.ndarray]:
        r"""$\lambda + C^\top H^{-1} v$ at $w_K$; 0 for `rate` and `start`."""
        v = self._pull(outer, steps, rate, start)
        tilt = np.asarray(outer["tilt"]) + self.C.T @ np.linalg.solve(self.H, v)
        return _only(outer, tilt=tilt, rate=np.zeros(()), start=np.zeros_like(v))

    def first_order(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> dict[str, np.ndarray]:
        r"""The direct term $\lambda$; 0 for `rate` and `start`."""
        del steps, rate, start
        return _only(outer, tilt=np.asarray(outer["tilt"]), rate=np.zeros(()), start=np.zeros_like(self.start))

    def _training(self, outer, rate, start):
        rate = outer["rate"] if rate is None else rate
        begin = outer.get("start", self.start) if start is None else start
        rest = np.linalg.solve(self.H, self.b + self.C @ np.asarray(outer["tilt"]))
        return rest, np.eye(len(self.b)) - float(rate) * self.H, np.asarray(begin)

    def _pull(self, outer, steps, rate, start):
        return self.A @ (self.trained(outer, steps, rate=rate, start=start) - self.c)


def quadratic(size: int = 4, outer_size: int = 3, *, condition: float = 10.0, seed: int = 0) -> Quadratic:
    """A random `Quadratic`: the eigenvalues of H and A lie in `[1 / condition, 1]`, so that any rate < 2 is stable.

    Examples:
      >>> import numpy as np
      >>> from bilevel.testing import quadratic
      >>> q = quadratic(size=4, outer_size=3)
      >>> q.unrolled({"tilt": np.ones(3)}, 10, rate=0.5)["tilt"].shape
      (3,)
    """
    rng = np.random.default_rng(seed)

    def definite():
        basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
        return (basis * np.geomspace(1 / condition, 1.0, size)) @ basis.T

    return Quadratic(
        H=definite(),
        b=rng.normal(size=size),
        C=rng.normal(size=(size, outer_size)),
        A=definite(),
        c=rng.normal(size=size),
        start=rng.normal(size=size),
    )


def _quadratic_inner(H, b, C, inner, outer, batch, key):
    return 0.5 * inner @ H @ inner - (b + C @ outer["tilt"]) @ inner


def _quadratic_outer(A, c, inner, outer, batch, key):
    return 0.5 * (inner - c) @ A @ (inner - c) + 0.5 * jnp.sum(outer["tilt"] ** 2)


def _quadratic_start(start, key, outer):
    return outer.get("start", start)


def _quadratic_tilt(tilt, key):
    return {"tilt": tilt}


def _only(outer, **values):
    return {name: values[name] for name in outer}

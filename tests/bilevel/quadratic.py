"""The quadratic family with closed forms, in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import bilevel

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """f = w'Hw/2 - (b + C lam)'w,  F = (w - c)'A(w - c)/2 + |lam|^2/2,  trained by gradient descent with step `eta`."""

    H: np.ndarray
    A: np.ndarray
    C: np.ndarray
    b: np.ndarray
    c: np.ndarray
    start: np.ndarray
    outer: np.ndarray
    eta: float

    @classmethod
    def random(cls, seed: int = 0, inner: int = 6, outer: int = 4) -> Quadratic:
        rng = np.random.default_rng(seed)
        root, other = rng.normal(size=(inner, inner)), rng.normal(size=(inner, inner))
        H = root @ root.T + np.eye(inner)
        vectors = [rng.normal(size=inner) for _ in range(3)]
        eta = 1 / np.linalg.eigvalsh(H)[-1]
        return cls(H, other @ other.T, rng.normal(size=(inner, outer)), *vectors, rng.normal(size=outer), eta)

    def problem(self, dtype=jnp.float64) -> bilevel.Problem:
        H, A, C, b, c, start, outer = (
            jnp.asarray(x, dtype) for x in (self.H, self.A, self.C, self.b, self.c, self.start, self.outer)
        )
        return bilevel.Problem(
            lambda w, lam, batch, key: 0.5 * w @ H @ w - (b + C @ lam) @ w,
            lambda w, lam, batch, key: 0.5 * (w - c) @ A @ (w - c) + 0.5 * lam @ lam,
            lambda key, lam: start,
            lambda key: outer,
        )

    def trained(self, steps: int) -> np.ndarray:
        w = self.start
        for _ in range(steps):
            w = w - self.eta * (self.H @ w - self.b - self.C @ self.outer)
        return w

    def toward(self, w: np.ndarray) -> np.ndarray:
        """dF/dw."""
        return self.A @ (w - self.c)

    def unrolled(self, w: np.ndarray, terms: int) -> np.ndarray:
        """The last `terms` of the sum that full unrolling has."""
        M = np.eye(len(w)) - self.eta * self.H
        total = sum(np.linalg.matrix_power(M, j) for j in range(terms))
        return self.outer + self.C.T @ (self.eta * total @ self.toward(w))

    def implicit(self, w: np.ndarray, damping: float = 0.0) -> np.ndarray:
        return self.outer + self.C.T @ np.linalg.solve(self.H + damping * np.eye(len(w)), self.toward(w))


def error(found, wanted) -> float:
    """Relative error in the 2-norm."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def central_difference(function, x, h: float = 1e-5) -> np.ndarray:
    """Gradient of a scalar function of a NumPy vector."""
    x = np.asarray(x)
    directions = np.eye(x.size).reshape(x.size, *x.shape) * h
    return np.array([(function(x + d) - function(x - d)) / (2 * h) for d in directions]).reshape(x.shape)

"""The inverse of a low-rank approximation."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from bilevel.linear_solvers.base import Matvec, info
from bilevel.settings.fields import check_fields, register, setting
from bilevel.settings.numeric import integer, real
from bilevel.settings.rules import one_of
from bilevel.trees import PyTree

Sketch = Literal["gaussian", "columns"]


@register
@dataclasses.dataclass(frozen=True)
class Nystrom:
    r"""The Nyström approximation of a positive semidefinite A, inverted by Woodbury's identity.

    With a sketch $\Omega$ of k columns, $Y = A\Omega$ and $\Omega^\top Y = Q D Q^\top$,

    $$
    A \approx B B^\top,\; B = Y Q D^{-1/2}, \qquad
      x = \tfrac1\rho\big(b - B (B^\top B + \rho I)^{-1} B^\top b\big).
    $$

    So it solves $(A + \rho I) x = b$ up to what rank k leaves out of A, with no iterations: one batched HVP of
    width k, and k vectors of memory. Exact when k reaches the rank of A. Directions of non-positive curvature are
    dropped. Rounding is amplified by $\lambda_{\max}/\rho$, so `damping` should not go below about 1e-8 of the
    largest eigenvalue in float64, 1e-3 in float32; an estimator's own damping is left at 0.

    With E what rank k leaves out of A, the error relative to $A^{-1} b$ is at most $\max(1, \|E\|/\rho -
    1)$, and about that large where A has many more eigenvalues of one size than k: the default damping is for an A
    whose tail is below it. `damping` of at least $\|E\|/2$ bounds the error by 1. There, take `CG`, with this as
    its preconditioner; `linear_residual` shows it.

    Args:
      rank: k; more than the dimension is cut down to it.
      damping: rho.
      sketch: `"gaussian"`, or `"columns"`: k random columns of A, as in the paper (worse where A's mass is uneven).

    References:
      Hataya and Yamada 2023, arXiv 2302.09726; Frangella, Tropp and Udell 2021, arXiv 2110.02820 (the sketch, and its
      use as a preconditioner).

    Examples:
      >>> import bilevel, jax
      >>> A, b = jax.numpy.array([[2.0, 1.0], [1.0, 3.0]]), jax.numpy.array([4.0, 7.0])
      >>> solver = bilevel.Nystrom(rank=2, damping=1e-3)
      >>> x, info = solver.solve(lambda x: A @ x, b, None, jax.random.key(0), symmetric=True)
      >>> [round(float(entry), 2) for entry in x]
      [1.0, 2.0]
    """

    rank: int = dataclasses.field(default=10, metadata=setting(integer(1)))
    damping: float = dataclasses.field(default=1e-3, metadata=setting(real(above=0.0)))
    sketch: Sketch = dataclasses.field(default="gaussian", metadata=setting(one_of(*get_args(Sketch))))

    symmetric_only = True

    def __post_init__(self):
        check_fields(self)

    def inverse(self, matvec: Matvec, like: PyTree, key: jax.Array) -> Matvec:
        """`b -> (A_k + rho I)^{-1} b`, from one batched product with A."""
        columns = self._columns(like, key)
        image = jax.vmap(matvec)(columns)
        d, q = jnp.linalg.eigh(_gram(columns, image))
        keep = d > len(d) * jnp.finfo(d.dtype).eps * jnp.max(d)
        weights = q * jnp.where(keep, 1 / jnp.sqrt(jnp.where(keep, d, jnp.ones_like(d))), jnp.zeros_like(d))[None]
        factor = jax.tree.map(lambda y: jnp.tensordot(weights.T, y, axes=1), image)
        s, u = jnp.linalg.eigh(_gram(factor, factor))

        def apply(b):
            along = _gram(factor, jax.tree.map(lambda x: x[None], b))[:, 0]
            along = u @ ((u.T @ along) / (s + self.damping))
            return jax.tree.map(lambda x, f: (x - jnp.tensordot(along, f, axes=1)) / self.damping, b, factor)

        return apply

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        return self.inverse(matvec, rhs, key)(rhs), info(1, min(self.rank, size))

    def _columns(self, like: PyTree, key: jax.Array) -> PyTree:
        leaves, structure = jax.tree.flatten(like)
        size = sum(leaf.size for leaf in leaves)
        rank = min(self.rank, size)
        if self.sketch == "gaussian":
            keys = jax.random.split(key, len(leaves))
            drawn = [jax.random.normal(k, (rank, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
            return jax.tree.unflatten(structure, drawn)
        chosen = jax.random.choice(key, size, (rank,), replace=False)
        ends = [sum(x.size for x in leaves[: i + 1]) for i in range(len(leaves))]
        # An index outside a leaf gives a row of zeros there.
        drawn = [
            jax.nn.one_hot(chosen - (end - x.size), x.size, dtype=x.dtype).reshape(rank, *x.shape)
            for end, x in zip(ends, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)


def _gram(a: PyTree, b: PyTree) -> jax.Array:
    """Inner products of the rows of two trees with a leading axis: `[k, l]`, made symmetric when square."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = [jnp.reshape(x, (x.shape[0], -1)) @ jnp.reshape(y, (y.shape[0], -1)).T for x, y in pairs]
    total = sum(products[1:], products[0])
    return (total + total.T) / 2 if total.shape[0] == total.shape[1] else total

"""The truncated Neumann series."""

from __future__ import annotations

import dataclasses

import jax

from bilevel.linear_solvers.base import info
from bilevel.settings.fields import check_fields, register, setting
from bilevel.settings.numeric import integer, real


@register
@dataclasses.dataclass(frozen=True)
class Neumann:
    r"""The truncated Neumann series $x = s \sum_{j<T} (I - sA)^j b$, with T terms and scale s.

    Converges to $A^{-1} b$ when the spectral radius of $I - sA$ is below 1: for a Hessian, for
    $0 < s < 2/\lambda_{\max}$. The remainder shrinks like $(1 - s\lambda_{\min})^T$. It is the iteration
    $x \leftarrow x + s(b - Ax)$, which goes on from `start` where there is one. On a Hessian with s the step size
    of gradient descent, from zero, it equals the unroll truncated to T steps at a fixed point.

    Args:
      terms: T; T - 1 matvecs from zero, T from a `start`.
      scale: s.

    References:
      Lorraine et al. 2020, arXiv 1911.02590.

    Examples:
      >>> import bilevel, jax
      >>> A, b = jax.numpy.array([[2.0, 1.0], [1.0, 3.0]]), jax.numpy.array([4.0, 7.0])
      >>> solver = bilevel.Neumann(terms=50, scale=0.4)
      >>> x, info = solver.solve(lambda x: A @ x, b, None, jax.random.key(0), symmetric=True)
      >>> [round(float(entry), 3) for entry in x]
      [1.0, 2.0]
    """

    terms: int = dataclasses.field(default=10, metadata=setting(integer(1)))
    scale: float = dataclasses.field(default=1.0, metadata=setting(real(above=0.0)))

    symmetric_only = False

    def __post_init__(self):
        check_fields(self)

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""

        def step(_, x):
            return jax.tree.map(lambda x, b, a: x + self.scale * (b - a), x, rhs, matvec(x))

        steps = self.terms
        if start is None:
            start, steps = jax.tree.map(lambda b: self.scale * b, rhs), self.terms - 1
        return jax.lax.fori_loop(0, steps, step, start), info(self.terms, steps)

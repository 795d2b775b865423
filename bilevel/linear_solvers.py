r"""Linear systems :math:`A x = b` given by products with A, as implicit differentiation meets them.

Every solver is a pytree with one method, `solve(matvec, rhs, start, key, symmetric=...) -> (solution, info)`:

- `matvec` maps a tree like `rhs` to a tree like `rhs`; all leaves of `rhs` share one real dtype.
- `start` is a first guess (the solution of the outer iteration before), or None for zero; direct solvers ignore it.
- `key` is the randomness of solvers that sketch A; `symmetric` says whether A is known to equal its transpose.
- `info` is `{"iterations", "matvecs"}`, int32 scalars. With A a Hessian, a matvec is a Hessian-vector product (HVP).

Iterative solvers stop at :math:`\|b - Ax\| \lesssim \mathrm{tol}\,\|b\|` with an equally small last step (both within
a factor of two), or after `max_steps`; none raises on the device. `tol=None` is `eps**0.75` of the dtype: 2e-12 in
float64, 6e-6 in float32.

| solver | A | cost in HVPs |
|---|---|---|
| `CG` | symmetric positive definite | one an iteration, about sqrt(condition) iterations |
| `NormalCG` | any nonsingular | two an iteration, about condition iterations |
| `GMRES` | any nonsingular | `restart` + 1 a cycle, at least two cycles |
| `BiCGStab` | any nonsingular (may break down) | two an iteration |
| `Neumann` | spectral radius of I - scale A below 1 | `terms` (one less from zero) |
| `Nystrom` | symmetric positive semidefinite, low rank + damping | `rank`, in one batch |
| `Dense` | any nonsingular, small | the dimension, in one batch |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

from bilevel.problem import as_pytree
from bilevel.trees import PyTree, global_norm

Matvec = Callable[[PyTree], PyTree]


class LinearSolver(Protocol):
    """A way to solve A x = b; see the module. `symmetric_only` says that A must equal its transpose."""

    @property
    def symmetric_only(self) -> bool: ...

    def solve(
        self, matvec: Matvec, rhs: PyTree, start: PyTree | None, key: jax.Array, *, symmetric: bool
    ) -> tuple[PyTree, dict[str, jax.Array]]: ...


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


def _info(iterations: Any, matvecs: Any) -> dict[str, jax.Array]:
    return {"iterations": jnp.asarray(iterations, jnp.int32), "matvecs": jnp.asarray(matvecs, jnp.int32)}


def _validate(solver: Any, name: str, low: int) -> None:
    value = getattr(solver, name)
    if not isinstance(value, int) or value < low:
        raise ValueError(f"{type(solver).__name__}({name}={value!r}): must be an integer >= {low}.")


def _krylov(method, tol, matvec, rhs, start, tags, preconditioner) -> tuple[PyTree, jax.Array]:
    """`(solution, steps)` of lineax's `method(rtol, atol)`."""
    dtype = jnp.result_type(jax.tree.leaves(rhs)[0])
    if tol is None:
        tol = float(jnp.finfo(dtype).eps) ** 0.75
    # lineax compares every entry with its own scale, atol + rtol |b_i|, and asks the same of the last step. On a unit
    # right-hand side, with the 2-norm and atol = rtol, that is the usual relative residual.
    norm = global_norm(rhs)
    unit = jnp.where(norm > 0, norm, jnp.ones_like(norm))
    structure = jax.eval_shape(lambda: rhs)
    operator = lx.FunctionLinearOperator(matvec, structure, tags)
    options: dict[str, Any] = {}
    if start is not None:
        options["y0"] = jax.tree.map(lambda x: x / unit, start)
    if preconditioner is not None:
        options["preconditioner"] = lx.FunctionLinearOperator(preconditioner, structure, tags)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        vector = jax.tree.map(lambda b: b / unit, rhs)
        result = lx.linear_solve(operator, vector, method(tol, tol), options=options, throw=False)
    return jax.tree.map(lambda x: x * unit, result.value), result.stats["num_steps"]


def _inverse(preconditioner, matvec, like, key):
    """The preconditioner as a function: its own, or that of a solver that can be prepared for `matvec`."""
    return preconditioner.inverse(matvec, like, key) if hasattr(preconditioner, "inverse") else preconditioner


_PSD = lx.positive_semidefinite_tag


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CG:
    r"""Conjugate gradients, for symmetric positive definite A.

    After n steps the error in the A-norm is at most :math:`2 ((\sqrt\kappa - 1)/(\sqrt\kappa + 1))^n` of the first. A
    Hessian that is not positive definite makes it stop early or diverge, which the linear residual shows: raise
    `damping`, or use `NormalCG` or `GMRES`. Costs one HVP an iteration, one at the start, and one every tenth
    iteration, where the residual is computed anew.

    Args:
      tol: relative residual.
      max_steps: most iterations.
      preconditioner: None, a linear function `x -> M^{-1} x` on trees like the inner variable (symmetric positive
        definite), or a `Nystrom`, sketched anew in each solve.

    References:
      Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, arXiv 1602.02355. Computed by lineax.
    """

    tol: float | None = _static(None)
    max_steps: int = _static(100)
    preconditioner: Any = None

    symmetric_only = True

    def __post_init__(self):
        _validate(self, "max_steps", 1)
        object.__setattr__(self, "preconditioner", as_pytree(self.preconditioner))

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See the module."""
        sketched = getattr(self.preconditioner, "rank", 0)
        inverse = _inverse(self.preconditioner, matvec, rhs, key)
        method = lambda rtol, atol: lx.CG(rtol, atol, norm=global_norm, stabilise_every=10, max_steps=self.max_steps)  # noqa: E731
        solution, steps = _krylov(method, self.tol, matvec, rhs, start, _PSD, inverse)
        return solution, _info(steps, steps + steps // 10 + 1 + sketched)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalCG:
    r"""Conjugate gradients on the normal equations :math:`A^\top A x = A^\top b`, for any nonsingular A.

    It takes indefinite and nonsymmetric A, for the square of the condition number. `tol` is relative to
    :math:`\|b\|` for the residual :math:`A^\top(b - Ax)` of those equations. Two matvecs an iteration.

    Args:
      tol, max_steps: as for `CG`.

    References:
      Hestenes and Stiefel 1952. Computed by lineax.
    """

    tol: float | None = _static(None)
    max_steps: int = _static(100)

    symmetric_only = False

    def __post_init__(self):
        _validate(self, "max_steps", 1)

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See the module."""
        tags = lx.symmetric_tag if symmetric else ()
        method = lambda rtol, atol: lx.Normal(  # noqa: E731
            lx.CG(rtol, atol, norm=global_norm, stabilise_every=10, max_steps=self.max_steps)
        )
        solution, steps = _krylov(method, self.tol, matvec, rhs, start, tags, None)
        return solution, _info(steps, 2 * (steps + steps // 10 + 1) + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GMRES:
    r"""Generalised minimal residuals with restarts, for any nonsingular A.

    The residual is smallest over the Krylov space of `restart` vectors, and never grows; with `restart` at least the
    dimension it is exact after one cycle. The residual is looked at between cycles only, and a second cycle confirms
    the first, so choose `restart` near the iterations that are needed. Holds `restart` + 1 vectors.

    Args:
      tol: relative residual.
      restart: Krylov vectors a cycle.
      max_steps: most matvecs, rounded up to whole cycles.
      preconditioner: as for `CG`, though it need not be symmetric.

    `info["matvecs"]` is an upper bound: a cycle that breaks off early, having the exact solution, is counted in full.

    References:
      Saad and Schultz 1986. Computed by lineax.
    """

    tol: float | None = _static(None)
    restart: int = _static(20)
    max_steps: int = _static(200)
    preconditioner: Any = None

    symmetric_only = False

    def __post_init__(self):
        _validate(self, "restart", 1)
        _validate(self, "max_steps", 1)
        object.__setattr__(self, "preconditioner", as_pytree(self.preconditioner))

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See the module."""
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        restart = min(self.restart, size)
        # lineax's first pass only computes the residual.
        passes = 1 + math.ceil(self.max_steps / restart)
        sketched = getattr(self.preconditioner, "rank", 0)
        inverse = _inverse(self.preconditioner, matvec, rhs, key)
        method = lambda rtol, atol: lx.GMRES(rtol, atol, norm=global_norm, restart=restart, max_steps=passes)  # noqa: E731
        solution, steps = _krylov(method, self.tol, matvec, rhs, start, (), inverse)
        cycles = jnp.maximum(steps - 1, 0)
        return solution, _info(cycles * restart, 1 + cycles * (restart + 1) + sketched)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiCGStab:
    """Stabilised biconjugate gradients, for any nonsingular A, in the memory of a few vectors.

    Converges as a rule, not by a theorem: it may break down where an inner product vanishes, and then returns what it
    has, or its start if that is no number; the linear residual shows it. Two matvecs an iteration, one at the start.

    Args:
      tol, max_steps, preconditioner: as for `GMRES`; `max_steps` counts iterations.

    References:
      van der Vorst 1992. Computed by lineax.
    """

    tol: float | None = _static(None)
    max_steps: int = _static(100)
    preconditioner: Any = None

    symmetric_only = False

    def __post_init__(self):
        _validate(self, "max_steps", 1)
        object.__setattr__(self, "preconditioner", as_pytree(self.preconditioner))

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See the module."""
        sketched = getattr(self.preconditioner, "rank", 0)
        inverse = _inverse(self.preconditioner, matvec, rhs, key)
        method = lambda rtol, atol: lx.BiCGStab(rtol, atol, norm=global_norm, max_steps=self.max_steps)  # noqa: E731
        solution, steps = _krylov(method, self.tol, matvec, rhs, start, (), inverse)
        # lineax's divides 0 by 0 where the start is already exact.
        finite = jnp.isfinite(global_norm(solution))
        start = jax.tree.map(jnp.zeros_like, rhs) if start is None else start
        solution = jax.tree.map(lambda x, s: jnp.where(finite, x, s), solution, start)
        return solution, _info(steps, 2 * steps + 1 + sketched)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neumann:
    r"""The truncated Neumann series :math:`x = s \sum_{j<T} (I - sA)^j b`, with T terms and scale s.

    Converges to :math:`A^{-1} b` when the spectral radius of :math:`I - sA` is below 1: for a Hessian, for
    :math:`0 < s < 2/\lambda_{\max}`. The remainder shrinks like :math:`(1 - s\lambda_{\min})^T`. It is the iteration
    :math:`x \leftarrow x + s(b - Ax)`, which goes on from `start` where there is one. On a Hessian with s the step size
    of gradient descent, from zero, it equals the unroll truncated to T steps at a fixed point.

    Args:
      terms: T; T - 1 matvecs from zero, T from a `start`.
      scale: s.

    References:
      Lorraine et al. 2020, arXiv 1911.02590.
    """

    terms: int = _static(10)
    scale: float = _static(1.0)

    symmetric_only = False

    def __post_init__(self):
        _validate(self, "terms", 1)
        if not self.scale > 0:
            raise ValueError(f"Neumann(scale={self.scale!r}): must be positive.")

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See the module."""

        def step(_, x):
            return jax.tree.map(lambda x, b, a: x + self.scale * (b - a), x, rhs, matvec(x))

        steps = self.terms
        if start is None:
            start, steps = jax.tree.map(lambda b: self.scale * b, rhs), self.terms - 1
        return jax.lax.fori_loop(0, steps, step, start), _info(self.terms, steps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nystrom:
    r"""The Nyström approximation of a positive semidefinite A, inverted by Woodbury's identity.

    With a sketch :math:`\Omega` of k columns, :math:`Y = A\Omega` and :math:`\Omega^\top Y = Q D Q^\top`,

    .. math:: A \approx B B^\top,\; B = Y Q D^{-1/2}, \qquad
              x = \tfrac1\rho\big(b - B (B^\top B + \rho I)^{-1} B^\top b\big).

    So it solves :math:`(A + \rho I) x = b` up to what rank k leaves out of A, with no iterations: one batched HVP of
    width k, and k vectors of memory. Exact when k reaches the rank of A. Directions of non-positive curvature are
    dropped. Rounding is amplified by :math:`\lambda_{\max}/\rho`, so `damping` should not go below about 1e-8 of the
    largest eigenvalue in float64, 1e-3 in float32; an estimator's own damping is left at 0.

    Args:
      rank: k; more than the dimension is cut down to it.
      damping: rho.
      sketch: `"gaussian"`, or `"columns"`: k random columns of A, as in the paper (worse where A's mass is uneven).

    References:
      Hataya and Yamada 2023, arXiv 2302.09726; Frangella, Tropp and Udell 2021, arXiv 2110.02820 (the sketch, and its
      use as a preconditioner).
    """

    rank: int = _static(10)
    damping: float = _static(1e-3)
    sketch: str = _static("gaussian")

    symmetric_only = True

    def __post_init__(self):
        _validate(self, "rank", 1)
        if not self.damping > 0:
            raise ValueError(f"Nystrom(damping={self.damping!r}): must be positive.")
        if self.sketch not in ("gaussian", "columns"):
            raise ValueError(f"Nystrom(sketch={self.sketch!r}): must be 'gaussian' or 'columns'.")

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
        """See the module."""
        size = sum(leaf.size for leaf in jax.tree.leaves(rhs))
        return self.inverse(matvec, rhs, key)(rhs), _info(1, min(self.rank, size))

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A made explicit, and an LU solve: for inner variables of at most a few thousand entries.

    Exact to rounding for any nonsingular A. The dimension in HVPs, in one batch; the square of it in memory.

    References:
      Computed by lineax.
    """

    symmetric_only = False

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See the module."""
        flat, unravel = ravel_pytree(rhs)
        rows = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
        solution = lx.linear_solve(lx.MatrixLinearOperator(rows.T), flat, lx.LU(), throw=False).value
        return unravel(solution), _info(1, flat.size)

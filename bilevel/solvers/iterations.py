"""Pieces of an outer iteration that several solvers share: directions, inner descent, inverse Hessians, momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.solvers.oracles import Draw
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, descend, minus, plus, zeros
from bilevel.trees import PyTree

Point = tuple[PyTree, PyTree]
"""`(w, lam)`: where derivatives are taken."""
DrawOf = Callable[[Any], Draw]
"""`draw_of(t)` is the batch and the random key that the t-th Hessian-vector product of a series is taken on."""


class Directions(NamedTuple):
    """Descent directions of w, of v and of lambda, and both losses."""

    inner: PyTree
    linear: PyTree
    outer: PyTree
    inner_loss: jax.Array
    outer_loss: jax.Array


def directions(at: Iteration, point: tuple[PyTree, PyTree, PyTree], draw: Draw, outer_draw: Draw) -> Directions:
    r"""$\partial_w f$, $H v - \partial_w F$ and $\partial_\lambda F - C v$ at `(w, lam, v)`.

    One inner gradient, one outer gradient, one Hessian-vector product, one mixed product.
    """
    w, lam, v = point
    inside, outside = at.products(w, lam, v, draw), at.outer_gradient(w, lam, outer_draw)
    return Directions(
        inside.grad,
        minus(inside.hvp, outside.inner),
        minus(outside.outer, inside.mixed),
        inside.value,
        outside.value,
    )


def follow(at: Iteration, v: PyTree, d: Directions, calls: Calls, memory: Callable[[PyTree], Any]) -> Iterate:
    """A step of w, v and lambda against `d`, each with its own step size; `memory(new v)` is what is kept."""
    v = descend(v, at.linear_step, d.linear)
    w = descend(at.w, at.inner_step, d.inner)
    return Iterate(w, at.move_outer(d.outer), memory(v), d.outer, d.inner_loss, d.outer_loss, calls)


def sgd(at: Iteration, w: PyTree, lam: PyTree, steps: int) -> PyTree:
    """w after `steps` inner steps on draws `0 .. steps - 1`."""

    def body(t, w):
        return descend(w, at.inner_step, at.inner_gradient(w, lam, at.draws[t]).inner)

    return jax.lax.fori_loop(0, steps, body, w)


def neumann(at: Iteration, points: Sequence[Point], rhs: Sequence[PyTree], terms: int, draw: DrawOf) -> list[PyTree]:
    r"""Truncated stochastic Neumann series, the same draws at every point; `terms` products a point.

    $$ v = \eta \sum_{q=0}^{Q} \prod_{j=1}^{q} (I - \eta H_j)\, b \;\approx\; H^{-1} b, \qquad Q = \text{terms}. $$

    The remainder is $(I - \eta H)^{Q+1} H^{-1} b$. (Ji, Yang & Liang 2021, arXiv 2010.07962, Algorithm 2.)
    """

    def body(t, carry):
        chains, sums = carry
        chains = _contract(at, points, chains, draw(t))
        return chains, [plus(s, r) for s, r in zip(sums, chains, strict=True)]

    _, sums = jax.lax.fori_loop(0, terms, body, (list(rhs), list(rhs)))
    return [descend(zeros(s), -jnp.asarray(at.linear_step), s) for s in sums]


def random_neumann(
    at: Iteration, points: Sequence[Point], rhs: Sequence[PyTree], terms: int, draw: DrawOf
) -> tuple[list[PyTree], jax.Array]:
    r"""One random term of the Neumann series, and p, the products that it took at each point.

    $$
    v = Q \eta \prod_{j=1}^{p} (I - \eta H_j)\, b, \qquad p \sim U\{0, \dots, Q - 1\}, \qquad
      E[v] = \eta \sum_{q=0}^{Q-1} (I - \eta H)^q b.
    $$

    (Ghadimi & Wang 2018, arXiv 1802.02246, Algorithm 3.)
    """
    p = jax.random.randint(at.key, (), 0, terms, jnp.int32)
    chains = jax.lax.fori_loop(0, p, lambda t, chains: _contract(at, points, chains, draw(t)), list(rhs))
    return [descend(zeros(r), -terms * jnp.asarray(at.linear_step), r) for r in chains], p


def random_solve(at: Iteration, first: int, terms: int) -> Callable[[PyTree, PyTree], tuple[PyTree, jax.Array]]:
    """`solve` of `double_loop` by `random_neumann`, on inner draws from number `first`."""

    def solve(w, rhs):
        [v], p = random_neumann(at, [(w, at.lam)], [rhs], terms, lambda t: at.draws[first + t])
        return v, p

    return solve


def _contract(at, points, chains, draw):
    products = [at.hvp(w, lam, r, draw) for (w, lam), r in zip(points, chains, strict=True)]
    return [descend(r, at.linear_step, hr) for r, hr in zip(chains, products, strict=True)]


def double_loop(at: Iteration, steps: int, solve: Callable[[PyTree, PyTree], tuple[PyTree, Any]]) -> Iterate:
    r"""Inner SGD from where it last ended, then $\lambda \leftarrow \lambda - \gamma (\partial_\lambda F - C v)$.

    `solve(w, dF/dw) -> (v, products)` approximates the linear system; C is taken on the last inner draw.
    """
    w = sgd(at, at.w, at.lam, steps)
    outside = at.outer_gradient(w, at.lam, at.outer_draws[0])
    v, hvps = solve(w, outside.inner)
    inside = at.products(w, at.lam, v, at.draws[-1])
    direction = minus(outside.outer, inside.mixed)
    calls = Calls(inner_gradients=steps, outer_gradients=1, hvps=hvps, mixed_products=1)
    return Iterate(w, at.move_outer(direction), v, direction, inside.value, outside.value, calls)


def momentum(new: PyTree, old: PyTree, direction: PyTree, eta: Any, step: jax.Array) -> PyTree:
    r"""Recursive momentum $d \leftarrow g(x_k) + (1 - \eta)(d - g(x_{k-1}))$; at step 0 it is $g(x_0)$.

    Both gradients are taken on the same draw. (Cutkosky & Orabona 2019, arXiv 1905.10018.)
    """
    keep = jnp.where(step == 0, 0.0, 1.0 - jnp.asarray(eta))
    return descend(new, -keep, minus(direction, old))

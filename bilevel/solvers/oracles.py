"""The derivatives that single-loop and stochastic solvers are made of, and what they are evaluated on.

Second derivatives come from one linearisation: with p = (w, lambda),

    d/de grad_p f(w + e v, lambda)  at e = 0   is   (H v, C v),   H = d2f/dw2,  C = d2f/(dlambda dw),

and the same forward-mode derivative holds grad_w f(w, lambda) as its value. H v is called the Hessian-vector product,
and C v, the mixed second derivative times a vector, the mixed product. So the inner gradient and both products
together cost one forward-over-reverse pass (what is not used, XLA drops). Second
derivatives commute, so this equals the pullback of v through (w, lambda) -> grad_w f, without storing its graph. Where
the loss has a derivative of its own they need not commute, and it is that pullback which is taken: H v then stands for
the transpose of the Jacobian of grad_w f, as the hypergradient wants it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from bilevel.data import FullBatch, Indexed, rows, slots
from bilevel.problem.problem import Problem
from bilevel.trees import PyTree, at_step, combine, replayed


class Draw(NamedTuple):
    """What one call of a loss is evaluated on: a batch, a random key, and the number that keys in `outer` fold in."""

    batch: PyTree
    key: jax.Array
    number: Any


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of one loss in one outer iteration; `draws[t]`, where t may be a traced integer."""

    batches: PyTree
    key: jax.Array
    first: int
    count: int
    what: str

    def __post_init__(self):
        slots(self.batches, self.count, self.what)  # a wrong leading axis is refused before any loop is traced

    def __getitem__(self, t: Any) -> Draw:
        t = t % self.count if isinstance(t, int) else t
        xs, bind = slots(self.batches, self.count, self.what)
        # Each key is made where it is used: a loss that uses none then costs none.
        key = jax.random.fold_in(self.key, self.first + t)
        return Draw(bind(jax.tree.map(lambda x: x[t], xs)), key, self.first + t)

    @property
    def full(self) -> Draw:
        """The whole data set; needs `Indexed` batches."""
        return Draw(FullBatch(self.batches.arrays), self[0].key, self.first)


def leading(batch: PyTree) -> PyTree:
    """One batch as a stack of one."""
    if isinstance(batch, FullBatch):
        return batch
    if isinstance(batch, Indexed):
        return batch.batch(None)
    return jax.tree.map(lambda x: x[None], batch)


class Gradient(NamedTuple):
    """A loss and its partial gradients; `inner` and `outer` are trees of the moving leaves."""

    value: jax.Array
    inner: PyTree
    outer: PyTree


class Products(NamedTuple):
    """Inner loss, its gradient in w, H v and C v at one point, from one linearisation."""

    value: jax.Array
    grad: PyTree
    hvp: PyTree
    mixed: PyTree


@dataclasses.dataclass(frozen=True)
class Oracles:
    """Both losses as functions of the moving leaves `w` of inner and `lam` of outer, and of a `Draw`.

    `commutes`: whether second derivatives of the inner loss do (`bilevel.differentiation.custom_rules`).
    """

    problem: Problem
    inner_fixed: PyTree
    outer_fixed: PyTree
    commutes: bool

    def inner_gradient(self, w: PyTree, lam: PyTree, draw: Draw) -> Gradient:
        """f, with its gradients in w and in lambda: one inner gradient."""
        return _gradient(self._inner, w, lam, draw)

    def outer_gradient(self, w: PyTree, lam: PyTree, draw: Draw) -> Gradient:
        """F, likewise: one outer gradient."""
        return _gradient(self._outer, w, lam, draw)

    def products(self, w: PyTree, lam: PyTree, v: PyTree, draw: Draw) -> Products:
        """One inner gradient, one Hessian-vector product and one mixed product; count those that are used."""
        if not self.commutes:
            grad, pull, value = jax.vjp(lambda w, lam: self._gradient(w, lam, draw), w, lam, has_aux=True)
            return Products(value, grad, *pull(v))

        def gradients(w):
            value, grads = jax.value_and_grad(self._inner, argnums=(0, 1))(w, lam, draw)
            return value, *grads

        (value, grad, _), (_, hvp, mixed) = jax.jvp(gradients, (w,), (v,))
        return Products(value, grad, hvp, mixed)

    def hvp(self, w: PyTree, lam: PyTree, v: PyTree, draw: Draw) -> PyTree:
        """H v alone: one Hessian-vector product."""
        if not self.commutes:
            return jax.vjp(lambda w: self._gradient(w, lam, draw)[0], w)[1](v)[0]
        return jax.jvp(lambda w: jax.grad(self._inner)(w, lam, draw), (w,), (v,))[1]

    def inner_value(self, w: PyTree, lam: PyTree, draw: Draw) -> jax.Array:
        """f alone."""
        return self._inner(w, lam, draw)

    def outer_value(self, w: PyTree, lam: PyTree, draw: Draw) -> jax.Array:
        """F alone."""
        return self._outer(w, lam, draw)

    def _gradient(self, w, lam, draw):
        value, grad = jax.value_and_grad(self._inner)(w, lam, draw)
        return grad, value

    def _inner(self, w, lam, draw):
        return self.problem.inner_value(*self._whole(w, lam, draw))[0]

    def _outer(self, w, lam, draw):
        return self.problem.outer_value(*self._whole(w, lam, draw))[0]

    def _whole(self, w, lam, draw):
        outer = combine(lam, at_step(self.outer_fixed, draw.number))
        # A draw may be visited at several points: what is compared there sees the same noise.
        return combine(w, self.inner_fixed), outer, draw.batch, replayed(draw.key)


def _gradient(loss, w, lam, draw) -> Gradient:
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(w, lam, draw)
    return Gradient(value, *grads)


def passes(solver: object, draws: Draws) -> int:
    """Batches in a pass over the data behind `draws`: ceil(N / b).

    Raises:
      ValueError: for batches that are not `Indexed`, which do not know the data they come from.
    """
    if not isinstance(draws.batches, Indexed):
        side = draws.what.split()[0]
        raise ValueError(
            f"{type(solver).__name__} needs the whole {side} data set beside each batch, but was given "
            f"{'no batches' if draws.batches is None else f'a {type(draws.batches).__name__}'}: "
            f"give {side}_data as Batches(arrays, size), so that batches are Indexed."
        )
    return -(-rows(draws.batches.arrays) // draws.batches.index.shape[-1])

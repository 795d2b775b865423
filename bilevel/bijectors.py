r"""Domains of outer leaves: positive numbers, intervals, simplices.

`Problem(domain=...)` is a tree like the top of `outer`, a bijector (or None) for a leaf or for everything below a node.
A solver then moves $u = T^{-1}(\lambda)$, which is free, by the gradient $(\partial T / \partial u)^\top
\partial F / \partial \lambda$, and sets $\lambda = T(u)$. Losses, optimizers made from `outer`, hypergradients
and `Result.outer` are in natural units: only the step is taken elsewhere. It cannot leave the domain.

A bijector is a pytree with two functions, `forward` (u to $\lambda$) and `inverse`, that keep shape and dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.settings.fields import check_fields, child, register, setting
from bilevel.settings.numeric import real
from bilevel.settings.rules import having
from bilevel.trees import PyTree, cast_like, is_inexact, leaf_names, named

is_bijector = having("a bijector, such as bilevel.Positive()", "forward", "inverse")
"""The rule of a setting that is a `Bijector`."""


def is_domain(value: PyTree) -> PyTree:
    """The rule of `Problem(domain=...)`: a tree of bijectors and None."""
    for bijector in jax.tree.leaves(value, is_leaf=lambda node: hasattr(node, "forward")):
        is_bijector(bijector)
    return value


class Bijector(Protocol):
    """A smooth one-to-one map from all real arrays (u) onto a domain (lambda). A pytree: register the class.

    Examples:
      >>> import dataclasses, jax
      >>> from bilevel.extend import register
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class AboveOne:
      ...     def forward(self, u):
      ...         return 1 + jax.numpy.exp(u)
      ...     def inverse(self, value):
      ...         return jax.numpy.log(value - 1)
      >>> float(AboveOne().inverse(AboveOne().forward(jax.numpy.array(0.0))))
      0.0
    """

    def forward(self, u: jax.Array) -> jax.Array:
        """From all real arrays onto the domain."""
        ...

    def inverse(self, value: jax.Array) -> jax.Array:
        """The u of a value in the domain."""
        ...


@register
@dataclasses.dataclass(frozen=True)
class Positive:
    r"""Numbers above 0, $\lambda = e^u$: steps are relative. For what varies over orders of magnitude.

    Examples:
      >>> import bilevel, jax
      >>> positive = bilevel.Positive()
      >>> float(positive.forward(jax.numpy.array(0.0))), float(positive.inverse(jax.numpy.array(1.0)))
      (1.0, 0.0)
    """

    def forward(self, u):
        """$e^u$."""
        return jnp.exp(u)

    def inverse(self, value):
        r"""$\log \lambda$."""
        return jnp.log(_above_zero(value))


@register
@dataclasses.dataclass(frozen=True)
class Softplus:
    r"""Numbers above 0, $\lambda = \log(1 + e^u)$: steps are absolute where $\lambda$ is well above 1.

    Examples:
      >>> import bilevel, jax
      >>> softplus = bilevel.Softplus()
      >>> round(float(softplus.forward(jax.numpy.array(0.0))), 3)  # log 2
      0.693
      >>> round(float(softplus.inverse(softplus.forward(jax.numpy.array(2.0)))), 3)
      2.0
    """

    def forward(self, u):
        r"""$\log(1 + e^u)$."""
        return jax.nn.softplus(u)

    def inverse(self, value):
        r"""$\lambda + \log(1 - e^{-\lambda})$."""
        value = _above_zero(value)
        return value + jnp.log(-jnp.expm1(-value))


@register
@dataclasses.dataclass(frozen=True)
class Interval:
    r"""Numbers between `low` and `high`, $\lambda = a + (b - a) / (1 + e^{-u})$.

    Raises:
      ValueError: unless low < high, both finite.

    Examples:
      >>> import bilevel, jax
      >>> dropout = bilevel.Interval(0.0, 1.0)
      >>> float(dropout.forward(jax.numpy.array(0.0))), float(dropout.inverse(jax.numpy.array(0.5)))
      (0.5, 0.0)
    """

    low: float = dataclasses.field(metadata=setting(real()))
    high: float = dataclasses.field(metadata=setting(real()))

    def __post_init__(self):
        check_fields(self)
        if not self.low < self.high:
            raise ValueError(f"Interval({self.low}, {self.high}): low must be below high, and both finite.")

    def forward(self, u):
        r"""$a + (b - a) / (1 + e^{-u})$."""
        return self.low + (self.high - self.low) * jax.nn.sigmoid(u)

    def inverse(self, value):
        r"""$\log \frac{\lambda - a}{b - \lambda}$."""
        # Where rounding has reached an end, the step starts from the number next to it.
        share = (value - self.low) / (self.high - self.low)
        share = jnp.minimum(_above_zero(share), 1 - jnp.finfo(share.dtype).eps)
        return jnp.log(share) - jnp.log1p(-share)


@register
@dataclasses.dataclass(frozen=True)
class Simplex:
    r"""Vectors of positive numbers that sum to 1, along the last axis: $\lambda = \mathrm{softmax}(u)$.

    Of all u with this softmax, `inverse` gives the one that sums to 0.

    Examples:
      >>> import bilevel, jax
      >>> bilevel.Simplex().forward(jax.numpy.zeros(4)).tolist()
      [0.25, 0.25, 0.25, 0.25]
    """

    def forward(self, u):
        r"""$\mathrm{softmax}(u)$."""
        return jax.nn.softmax(u, axis=-1)

    def inverse(self, value):
        r"""$\log \lambda$ less its mean."""
        logs = jnp.log(_above_zero(value))
        return logs - jnp.mean(logs, axis=-1, keepdims=True)


@register
@dataclasses.dataclass(frozen=True)
class Compose:
    """One bijector after another: `forward` is `first.forward`, then `then.forward`.

    `Compose(Interval(math.log(1e-6), 0.0), Positive())` is a number between 1e-6 and 1 on a logarithmic scale, as a
    learning rate wants it.

    Examples:
      >>> import math, bilevel, jax
      >>> rate = bilevel.Compose(bilevel.Interval(math.log(1e-6), 0.0), bilevel.Positive())
      >>> round(float(rate.forward(jax.numpy.array(0.0))), 6)  # halfway between 1e-6 and 1
      0.001
    """

    first: Bijector = dataclasses.field(metadata=child(is_bijector))
    then: Bijector = dataclasses.field(metadata=child(is_bijector))

    def __post_init__(self):
        check_fields(self)

    def forward(self, u):
        """Both, in their order."""
        return self.then.forward(self.first.forward(u))

    def inverse(self, value):
        """Both inverses, in the opposite order."""
        return self.first.inverse(self.then.inverse(value))


def _above_zero(value: jax.Array) -> jax.Array:
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny)


def free(domain: PyTree, natural: PyTree) -> PyTree:
    """The inexact leaves of `natural` by the inverses of their bijectors; others unchanged."""
    return _map(domain, natural, lambda bijector, x: bijector.inverse(x))


def natural(domain: PyTree, free: PyTree) -> PyTree:
    """Maps the free variable back to the natural one: the inverse of `free`."""
    return _map(domain, free, lambda bijector, x: bijector.forward(x))


def free_gradient(domain: PyTree, outer: PyTree, grad: PyTree) -> tuple[PyTree, PyTree]:
    """`(free(outer), the gradient there)` for a gradient in natural units; trees of inexact leaves."""
    if domain is None:
        return outer, grad
    moved = free(domain, outer)
    _, pull = jax.vjp(lambda moved: natural(domain, moved), moved)
    return moved, pull(cast_like(grad, outer))[0]


def check(domain: PyTree, outer: PyTree) -> None:
    """Raises ValueError, by name, if a leaf of `outer` is outside its domain, or on a border that no step leads away
    from; traced values are not looked at."""
    if domain is None:
        return
    _map(domain, outer, _refuse_complex)
    _refuse_constants(domain, outer)
    again = natural(domain, free(domain, outer))
    for name, x, y in zip(leaf_names(outer), jax.tree.leaves(outer), jax.tree.leaves(again), strict=True):
        if not is_inexact(x) or isinstance(x, Tracer):
            continue
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not np.allclose(x, y, rtol=1e-2, atol=0.0):
            raise ValueError(
                f"init_outer returned {np.array2string(x, precision=4, threshold=8)} in {named('outer', name)}, which "
                "is outside the domain that Problem(domain=...) gives it: start inside."
            )
    still = _map(domain, outer, _is_stuck)
    for name, x, is_stuck in zip(leaf_names(outer), jax.tree.leaves(outer), jax.tree.leaves(still), strict=True):
        if is_stuck is True:
            raise ValueError(
                f"init_outer returned {np.array2string(np.asarray(x), precision=4, threshold=8)} in "
                f"{named('outer', name)}, which is on the border of the domain that Problem(domain=...) gives it, from "
                "which no step leads away: start inside, for example at 1e-3."
            )


def _is_stuck(bijector: Bijector, x: jax.Array) -> Any:
    """Whether some entry of x hardly changes by whole steps of its free variable, to either side; x if it is traced."""
    if isinstance(x, Tracer) or not x.size:
        return x
    u = bijector.inverse(x)
    steps = (1 + jnp.arange(u.size, dtype=u.dtype) / u.size).reshape(u.shape)
    moves = jnp.maximum(jnp.abs(bijector.forward(u + steps) - x), jnp.abs(bijector.forward(u - steps) - x))
    # Steps of a positive number are relative: one of 1e-37 moves by as much.
    return bool(jnp.any((moves < 1e-35) & ((x == 0) | (moves <= 1e-2 * jnp.abs(x)))))


def _refuse_complex(bijector: Bijector, x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        raise ValueError(f"Problem(domain=...): {type(bijector).__name__} is a domain of real numbers.")
    return x


def _refuse_constants(domain: PyTree, outer: PyTree) -> None:
    """Raises ValueError for a bijector that has nothing to map: who gives a leaf a domain means it to be learned."""

    def refuse(bijector, below):
        leaves = jax.tree.leaves(below)
        if bijector is not None and leaves and not any(map(is_inexact, leaves)):
            raise ValueError(
                f"Problem(domain=...): {type(bijector).__name__} is the domain of a leaf of dtype "
                f"{jnp.result_type(leaves[0])}, a constant that is not learned: start at 1.0 in place of 1, or give it "
                "None as its domain."
            )

    jax.tree.map(refuse, domain, outer, is_leaf=_is_entry)


def _is_entry(node: Any) -> bool:
    return node is None or (hasattr(node, "forward") and hasattr(node, "inverse"))


def _map(domain: PyTree, tree: PyTree, function: Any) -> PyTree:
    def below(bijector, subtree):
        if bijector is None:
            return subtree
        return jax.tree.map(lambda x: function(bijector, x) if is_inexact(x) else x, subtree)

    try:
        jax.tree.map(lambda *_: None, domain, tree, is_leaf=_is_entry)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        if isinstance(domain, dict) and isinstance(tree, dict) and domain.keys() != tree.keys():
            missing = sorted(map(repr, tree.keys() - domain.keys()))
            strange = sorted(map(repr, domain.keys() - tree.keys()))
            reason = f"it has no entry for {', '.join(missing)}" if missing else f"outer has no {', '.join(strange)}"
        raise ValueError(
            f"Problem(domain=...) must be a tree like the top of outer, with a bijector or None at each leaf: {reason}."
        ) from None
    return jax.tree.map(below, domain, tree, is_leaf=_is_entry)

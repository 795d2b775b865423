"""A loss over a large batch as the mean over parts of it, of which one is in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.settings.fields import check_fields, child, register, setting
from bilevel.settings.numeric import integer
from bilevel.settings.rules import function, optional
from bilevel.trees import Batch, Inner, Key, Outer, is_inexact, leaf_names, shape, shapes


@register
@dataclasses.dataclass(frozen=True)
class MicroBatches:
    r"""A loss over a batch of B rows, computed in m parts of B / m rows, one after the other:

    $$
    f(w, \lambda; b, k) = \sum_{i=1}^{m} p_i\, f_0(w, \lambda; b_i, k_i),
      \qquad p_i = \frac{n(b_i)}{\sum_j n(b_j)} .
    $$

    Memory is that of one part, whatever the batch; the value and all derivatives are those of the whole batch, to
    rounding, where `loss` is a mean over rows (and draws nothing). Part i holds every m-th row from the i-th on, so
    that rows that are split over devices stay where they are; its key is `fold_in(key, i)`.

    It is a loss: give it to `Problem`, as its inner loss, its outer loss or both. An inner step adds up the gradients
    of its parts while it goes through them, which costs no evaluation more. `Unrolled` goes through them once more in
    its backward pass, in mixed mode a Hessian-vector product a part. Estimators and solvers that differentiate the
    loss otherwise evaluate it once more for each gradient.

    Args:
      loss: `f_0(inner, outer, batch, key) -> scalar`, or `(scalar, aux)`: each leaf of `aux` comes out with a leading
        axis of m parts.
      parts: m, a divisor of B.
      weight: `n(batch) -> scalar`, what a part counts, such as the number of tokens that its mean is over; None: all
        the same. Nothing is differentiated through it. A part that counts 0 is left out: another stands in its place.

    Raises:
      ValueError: when the loss is traced: for a batch without rows, or with a number that `parts` does not divide.

    Examples:
      >>> import bilevel, dataclasses, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> small = dataclasses.replace(problem, inner_loss=bilevel.MicroBatches(problem.inner_loss, parts=2))
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> for each in (problem, small):
      ...     estimate = hypergradient.estimate(
      ...         each, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ...     )
      ...     print(round(float(estimate.grad), 6))
      0.142875
      0.142875
    """

    loss: Callable[..., Any] = dataclasses.field(
        metadata=child(function("inner", "outer", "batch", "key", result="scalar"))
    )
    parts: int = dataclasses.field(metadata=setting(integer(1)))
    weight: Callable[[Batch], Any] | None = dataclasses.field(
        default=None, kw_only=True, metadata=child(optional(function("batch", result="scalar")))
    )

    def __post_init__(self):
        check_fields(self)

    def __call__(self, inner: Inner, outer: Outer, batch: Batch, key: Key) -> Any:
        """The loss of a batch. What a part leaves behind for a derivative is computed anew when it is wanted."""

        @partial(jax.checkpoint, prevent_cse=False)
        def of_part(inner: Inner, outer: Outer, batch: Batch, key: Key) -> Any:
            return self.loss(inner, outer, batch, key)

        shares, batches, keys = self.divided(batch, key)
        _, found = jax.lax.scan(lambda _, part: (None, of_part(inner, outer, *part)), None, (batches, keys))
        if isinstance(found, tuple) and len(found) == 2:
            return mean_of_parts(shares, found[0]), found[1]
        return mean_of_parts(shares, found)

    def divided(self, batch: Batch, key: Key) -> tuple[jax.Array, Batch, Key]:
        """`(p, batches, keys)`: each leaf leads with an axis of the m parts."""
        batches = jax.tree.map(self._leaf, self._checked(batch))
        numbers = jnp.arange(self.parts, dtype=jnp.int32)
        keys: Any = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(numbers.astype(jnp.uint32))
        if self.weight is None:
            return jnp.full((self.parts,), 1 / self.parts), batches, keys
        weights = jax.lax.stop_gradient(jax.vmap(self.weight)(batches))
        if not hasattr(weights, "ndim") or weights.ndim != 1:
            found = shape(weights[0]) if hasattr(weights, "ndim") else f"a {type(weights).__name__}"
            raise ValueError(f"MicroBatches: weight(batch) returned {found}, but must return a scalar.")
        weights = weights.astype(jnp.result_type(float))
        # A mean over nothing is 0/0, and 0 times that is no 0, nor are its derivatives: in place of a part that counts
        # nothing, the first that does is computed once more, and counts 0.
        counted = jnp.where(weights == 0, jnp.argmax(weights != 0).astype(jnp.int32), numbers)
        batches = jax.tree.map(lambda x: jnp.take(x, counted, axis=0), batches)
        return weights / weights.sum(), batches, keys

    def _checked(self, batch: Batch) -> Batch:
        names, leaves = leaf_names(batch), jax.tree.leaves(batch)
        if not leaves:
            raise ValueError(f"MicroBatches(parts={self.parts}): the batch holds no array that could be divided.")
        rows = {name: jnp.shape(leaf)[:1] for name, leaf in zip(names, leaves, strict=True)}
        if len(set(rows.values())) > 1 or () in rows.values():
            raise ValueError(
                f"MicroBatches(parts={self.parts}): the leaves of a batch must lead with one number of rows, not "
                f"{shapes(batch)}; bind what is no row to the loss by jax.tree_util.Partial."
            )
        ((count,),) = set(rows.values())
        if count % self.parts or not count:
            raise ValueError(
                f"MicroBatches(parts={self.parts}): a batch of {count} rows cannot be divided into {self.parts} equal "
                "parts: choose parts that divide it."
            )
        return batch

    def _leaf(self, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.moveaxis(x.reshape(len(x) // self.parts, self.parts, *x.shape[1:]), 1, 0)


def mean_of_parts(shares: jax.Array, values: Any) -> Any:
    """The sum of `shares[i] * values[i]`; what is no float (and is refused by who asked for a loss) of the first."""
    if not is_inexact(values):
        return jax.tree.map(lambda x: x[0], values)
    return jnp.tensordot(shares.astype(values.dtype), values, 1)

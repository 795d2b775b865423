"""SOBA with the variance reduction of SAGA: a table of past gradients and its average."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.data import rows
from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import Directions, follow
from bilevel.solvers.oracles import Draw, Draws, passes
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, minus, plus, zeros
from bilevel.trees import PyTree


class Table(NamedTuple):
    """What each fixed mini-batch gave when it was last drawn (`rows`, a leading axis), and the average over the
    data."""

    rows: PyTree
    average: PyTree


@register
@dataclasses.dataclass(frozen=True)
class SABA(Stochastic):
    r"""SABA: the updates of `SOBA`, each of its five terms replaced by its SAGA estimate. For a term g, table T and the
    drawn mini-batch j, a share $p_j$ of the data,

    $$
    \hat g = g_j - T_j + \bar T, \qquad \bar T \leftarrow \bar T + p_j (g_j - T_j), \qquad T_j \leftarrow g_j,
    \qquad \bar T = \sum_j p_j T_j \text{ at all times.}
    $$

    The data are cut into fixed mini-batches of b consecutive rows, as many as a batch has; the last may be smaller.
    The last row of an `Indexed` batch says which of them is drawn. With `Batches(..., order="rows")` each is drawn in
    proportion to its size and the estimates are unbiased; `order="blocks"` draws a smaller last one as often as the
    others, whose effect vanishes with the differences that a table corrects by. Tables start at 0.

    Constant steps; linear convergence on strongly convex finite sums.
    Cost per iteration: 1 inner gradient, 1 outer gradient, 1 Hessian-vector product, 1 mixed product.
    `State.memory` is `(v, inner tables, outer tables)`; with n and m mini-batches, P moving numbers in w and D in
    lambda, the tables hold n(2P + D) + m(P + D) numbers.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      inner_blocks: n, mini-batches in the inner data: ceil(rows / batch size).
      outer_blocks: m, likewise.
      linear_step: step size of v, a number or a schedule; None is `inner_step`.

    Raises:
      ValueError: for batches that are not `Indexed`, or a number of mini-batches that is not the data's.

    References:
      Dagréou, Ablin, Vaiter & Moreau 2022, arXiv 2201.13409, Algorithm 2; tables over mini-batches as in its
      experiments.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> train, val = bilevel.Batches(train, 2), bilevel.Batches(val, 2)
      >>> solver = bilevel.SABA(problem, inner_step=0.2, outer_step=0.3, inner_blocks=2, outer_blocks=1)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=400, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    inner_blocks: int = dataclasses.field(kw_only=True, metadata=setting(integer(1)))
    outer_blocks: int = dataclasses.field(kw_only=True, metadata=setting(integer(1)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return zeros(w), _table(self.inner_blocks, (w, w, lam)), _table(self.outer_blocks, (w, lam))

    def iterate(self, at: Iteration) -> Iterate:
        v, inner_table, outer_table = at.memory
        inner_block = Blocks(self, at.draws, self.inner_blocks)
        outer_block = Blocks(self, at.outer_draws, self.outer_blocks)

        def inside(draw):
            p = at.products(at.w, at.lam, v, draw)
            return (p.grad, p.hvp, p.mixed), p.value

        def outside(draw):
            g = at.outer_gradient(at.w, at.lam, draw)
            return (g.inner, g.outer), g.value

        new, inner_loss = inner_block.call(inside)
        (grad, hvp, mixed), inner_table = inner_block.saga(inner_table, new)
        new, outer_loss = outer_block.call(outside)
        (outer_inner, outer_outer), outer_table = outer_block.saga(outer_table, new)
        d = Directions(grad, minus(hvp, outer_inner), minus(outer_outer, mixed), inner_loss, outer_loss)
        return follow(at, v, d, Calls(1, 1, 1, 1), lambda v: (v, inner_table, outer_table))


def _table(blocks: int, like: PyTree) -> Table:
    return Table(jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), like), zeros(like))


class Blocks:
    """The fixed mini-batches of one data set, and which of them is drawn."""

    def __init__(self, solver: SABA, draws: Draws, blocks: int):
        if (found := passes(solver, draws)) != blocks:
            side = draws.what.split()[0]
            raise ValueError(
                f"SABA({side}_blocks={blocks}), but {rows(draws.batches.arrays)} rows of {side} data in batches of "
                f"{draws.batches.index.shape[-1]} make {found}: give {side}_blocks={found}."
            )
        self._draw = draws[0]
        self._arrays, index = self._draw.batch.arrays, self._draw.batch.index
        self._size, self._count = index.shape[0], rows(self._arrays)
        self.drawn = index[-1] // self._size

    def call(self, function: Any) -> Any:
        """`function(draw)` on the mini-batch that is drawn."""

        def on(size):
            slices = jax.tree.map(
                lambda a: jax.lax.dynamic_slice_in_dim(a, self.drawn * self._size, size), self._arrays
            )
            return function(Draw(slices, self._draw.key, self._draw.number))

        rest = self._count % self._size
        if not rest:
            return on(self._size)
        # Another shape is another computation; dropping or repeating rows would change the problem.
        last = self.drawn == self._count // self._size
        return jax.lax.cond(last, lambda: on(rest), lambda: on(self._size))

    def saga(self, table: Table, new: PyTree) -> tuple[PyTree, Table]:
        """The SAGA estimate, and the table with `new` in it."""
        j, there = self.drawn, self.drawn >= 0
        size = jnp.minimum(self._size, self._count - j * self._size)

        def row(table):
            # `there` is always true, which the compiler cannot know. The read is then finished before the write, which
            # depends on it, and the write is in place: fused with what follows, it would copy the table at every step.
            return jax.lax.cond(there, lambda: table[j], lambda: jnp.zeros_like(table[0]))

        old = jax.tree.map(row, table.rows)
        difference = minus(new, old)
        share = jax.tree.map(lambda d: size.astype(d.dtype) / self._count * d, difference)
        written = jax.tree.map(lambda x, y: jnp.where(there, x, y), new, old)
        kept = jax.tree.map(lambda t, x: jax.lax.dynamic_update_index_in_dim(t, x, j, 0), table.rows, written)
        return plus(difference, table.average), Table(kept, plus(table.average, share))

"""What is not finite is refused: before a run, and at the step that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

from bilevel.running.chunks import chunk
from bilevel.running.failures import describe_failure, inner_of, nan_weights, where_of
from bilevel.running.holes import holding_nan
from bilevel.sharding.processes import on_host
from bilevel.trees import PyTree, is_inexact, leaf_names, replayed


def refuse_start(solver: Any, state: Any, holes: np.ndarray, number: int) -> None:
    """Refuses a state before step `number` that holds a NaN; `holes` counts what is not finite.

    Infinities may be meant (a mask): they must only not become more.
    """
    if not holes.any():
        return
    if names := holding_nan("outer", state.outer) + holding_nan("inner", inner_of(state)):
        raise FloatingPointError(
            f"{where_of(solver, number)}the state it starts from is already not finite, in {', '.join(names)}; check "
            f"the start values (init_outer, init_inner).{nan_weights(solver)}"
        )


def has_failed(rows: dict[str, np.ndarray], holes: np.ndarray, new_holes: np.ndarray) -> bool:
    """Whether a chunk of steps made something that is not finite: a metric, or more of the state than before."""
    return bool(np.any(new_holes > holes)) or not all(np.isfinite(v).all() for v in _numbers(rows).values())


def _numbers(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in rows.items() if np.issubdtype(values.dtype, np.inexact)}


def refuse_failed(solver, record, capacity, before, data, done, rows, holes, new_holes, earlier=None) -> NoReturn:
    """Raises FloatingPointError for a chunk of steps from state `before` that has failed.

    Args:
      solver, record, capacity, data: what the chunk was given.
      before: the state.
      earlier: the outer variable before the last steps that led to `before`; None if there were none.
      done: the number of its first step.
      rows: the metrics of the chunk.
      holes, new_holes: how many entries of each inexact leaf of the state are not finite, and how many NaN: from the
        start, and now.
    """
    numbers = _numbers(rows)
    bad = [
        int(np.argmin(np.isfinite(v.reshape(len(v), -1)).all(1))) for v in numbers.values() if not np.isfinite(v).all()
    ]
    # The state may have been lost in a step whose metrics, taken before its update, are still finite.
    count = len(next(iter(rows.values()))) if rows else capacity
    first, last = 0, min(bad, default=count - 1)
    while first < last:
        middle = (first + last) // 2
        if np.any(np.asarray(chunk(solver, record, capacity, before, data, middle + 1)[2]) > holes):
            last = middle
        else:
            first = middle + 1
    state, norms = before, ""
    if first:
        if first > 1:
            before = chunk(solver, record, capacity, before, data, first - 1)[0]
        earlier, state = before.outer, chunk(solver, record, capacity, before, data, 1)[0]
        norms = ", ".join(f"{n} was {v[first - 1]:.3g}" for n, v in numbers.items() if v.ndim == 1)

    def fails(outer: PyTree) -> bool:
        at, same = replayed((state._replace(outer=outer), data))
        _, again, left = chunk(solver, record, capacity, at, same, 1)
        finite = all(np.isfinite(v[0]).all() for n, v in again.items() if n in numbers)
        return not finite or bool(np.any(np.asarray(left) > holes))

    names = [n for n, v in numbers.items() if not np.isfinite(v[first]).all()]
    try:
        moved = "" if earlier is None else _moved(earlier, state.outer, fails)
        told = describe_failure(solver, state, data, done + first, norms, moved, names)
    except Exception as error:  # a replay calls what is the user's by other ways than the run did
        found = ", ".join(names) or "the state after it"
        told = f"{where_of(solver, done + first)}{found} is not finite; lower the step sizes (not replayed: {error})."
    raise FloatingPointError(told)


_TRIED = 32
"""Most leaves of an outer variable that are put back, one by one."""


def _moved(earlier: PyTree, outer: PyTree, fails: Callable[[PyTree], bool]) -> str:
    """What the last move of `outer` has to do with a failure that is none at the `earlier` one; empty if nothing.

    Each leaf is put back by itself: those without whose move the step does not fail are named.
    """
    leaves, structure = jax.tree.flatten(outer)
    before = [old if is_inexact(old) else new for old, new in zip(jax.tree.leaves(earlier), leaves, strict=True)]
    names, numbers = leaf_names(outer, "outer"), [i for i, x in enumerate(leaves) if is_inexact(x)]
    moved = [i for i in numbers if not np.array_equal(on_host(before[i]), on_host(leaves[i]))]
    if not moved or fails(structure.unflatten(before)):
        return ""
    alone = [i for i in moved[:_TRIED] if not fails(structure.unflatten([*leaves[:i], before[i], *leaves[i + 1 :]]))]
    told = [f"{names[i]} from {_size(before[i])} to {_size(leaves[i])}" for i in alone or moved[:3]]
    return (
        f". The move of {', '.join(told)} in the outer steps before does it, without which this step stays finite: "
        "take smaller outer steps, or keep it in its range by Problem(domain=...)"
    )


def _size(leaf: Any) -> str:
    array = on_host(leaf)
    return f"{array.ravel()[0]:.3g}" if array.size == 1 else f"norm {np.linalg.norm(array.astype(np.complex128)):.3g}"

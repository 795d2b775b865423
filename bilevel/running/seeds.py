"""A run over a stack of keys: one state a key, side by side along a leading axis, and what belongs to one of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.hypergradients.contract import driven_from_host
from bilevel.solvers.states import check_state
from bilevel.trees import Key, PyTree


def split(key: Key) -> Iterator[Key]:
    """Three keys of a run, or of every run of a stack: those that it would have alone."""
    three = lambda key: jax.random.split(key, 3)  # noqa: E731
    return iter(jax.vmap(three, out_axes=1)(key) if key.ndim else three(key))


def start(solver: Any, key: Key) -> Any:
    """What `solver.init` returns; of a stack of keys, the states that it returns for each, stacked.

    Raises:
      ValueError: for a state that is none, and for a stack whose steps cannot be one compiled program.
    """
    if not key.ndim:
        state = solver.init(key)
        check_state(solver, state)
        return state
    if driven_from_host(solver):
        raise ValueError(
            f"run(key=...): was given {len(key)} keys, but {type(solver).__name__} is driven from the host, step by "
            "step, and cannot be part of one program for all of them: call run once for each."
        )
    # One after the other: a start may look at numbers, which a traced program has not.
    states = [solver.init(one) for one in key]
    for state in states:
        check_state(solver, state)
    if unlike := {jax.tree.structure(state) for state in states} - {jax.tree.structure(states[0])}:
        raise ValueError(
            f"run(key=...): the start of another key is another kind of tree, {unlike.pop()} and "
            f"{jax.tree.structure(states[0])}: runs side by side must be of one structure; call run once for each."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def numbers(state: Any) -> list[int | None]:
    """The runs in a solver's state: `[None]` for one alone, else their places in the stack."""
    return list(range(len(state.step))) if jnp.ndim(state.step) else [None]


def of(number: int | None, tree: PyTree) -> PyTree:
    """What of a stacked tree is that of one run; all of it where there is only one."""
    return tree if number is None else jax.tree.map(lambda x: x[number], tree)


def data_of(number: int | None, data: list[Any]) -> list[Any]:
    """The data of a chunk, `(source, key)`, as one run of a stack reads them: all share the source."""
    return data if number is None else [(source, key[number]) for source, key in data]


def rows_of(number: int | None, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of metrics of one run of a stack: these have an axis of runs behind that of steps."""
    return rows if number is None else {name: row[:, number] for name, row in rows.items()}


@contextlib.contextmanager
def told_of(number: int | None) -> Iterator[None]:
    """Errors and warnings about one run of a stack say which it is."""
    if number is None:
        yield
        return
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            yield
        except (FloatingPointError, ValueError) as error:
            raise type(error)(f"The run of key[{number}]: {error}") from error.__cause__
    for warning in heard:
        warnings.warn(f"The run of key[{number}]: {warning.message}", warning.category, stacklevel=4)

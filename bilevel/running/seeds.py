"""A run over a stack of keys: one state a key, side by side along a leading axis, and what belongs to one of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.tracing import keys_inside
from bilevel.hypergradients.contract import driven_from_host
from bilevel.solvers.states import check_state
from bilevel.trees import Key, PyTree, is_key, is_steady, leaf_names, shape


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
        name = type(getattr(solver, "hypergradient", solver)).__name__
        raise ValueError(
            f"run(key=...): was given {len(key)} keys, but {name} is driven from the host, step by step, and cannot be "
            "part of one program for all of them: call run once for each."
        )
    # One after the other: a start may look at numbers, which a traced program has not.
    states = [solver.init(one) for one in key]
    for number, state in enumerate(states):
        check_state(solver, state)
        own, other = (_shapes(tree) for tree in (state, states[0]))
        if unlike := [name for name in own | other if own.get(name) != other.get(name)]:
            now, before = (leaves.get(unlike[0], "nothing") for leaves in (own, other))
            raise ValueError(
                f"run(key=...): init_outer and init_inner give key[{number}] another kind of start than key[0]: state"
                f"{unlike[0]} is {now}, and was {before}. Runs side by side are of one structure, shape and dtype: "
                "call run once for each."
            )
    refuse_unsteady(states[0])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _shapes(tree: PyTree) -> dict[str, str]:
    """Name -> shape and dtype of each leaf, in words."""
    return dict(zip(leaf_names(tree), map(shape, jax.tree.leaves(tree)), strict=True))


def refuse_unsteady(keys: PyTree, where: str = "") -> None:
    """Raises ValueError if a leaf of `keys` is a random key that draws other numbers beside others than alone."""
    for key in filter(is_key, jax.tree.leaves(keys)):
        if not is_steady(key):
            raise ValueError(
                f"run(key=...): a stack of keys is mapped by jax.vmap, under which a {key.dtype}{where} "
                "draws other numbers than alone: give threefry2x32 keys, as jax.random.key(0) is unless "
                "jax_default_prng_impl says otherwise, or call run once for each."
            )


def refuse_unsteady_losses(state: Any, losses: list[Any]) -> None:
    """The same for keys that a loss makes itself; nothing of a run alone."""
    if jnp.ndim(state.step):
        for loss in losses:
            refuse_unsteady(list(keys_inside(loss.closed.jaxpr)), f" inside {loss.name}")


@contextlib.contextmanager
def mapped(state: Any) -> Iterator[None]:
    """What JAX cannot map over a stack of runs is said in a sentence.

    Raises:
      ValueError: in place of JAX's own error, which names no remedy.
    """
    try:
        yield
    except Exception as error:  # each operation that cannot be mapped raises a kind of its own
        if not jnp.ndim(state.step) or "vmap" not in str(error):
            raise
        raise ValueError(
            "run(key=...): a stack of keys is mapped by jax.vmap, which something that the losses or the solver call "
            f"does not allow: {str(error).strip().splitlines()[0]} Mend it, or call run once for each key."
        ) from error


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

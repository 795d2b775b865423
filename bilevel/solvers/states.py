"""What a solver returns: its state and metrics, understood or refused in a sentence that names the solver."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.trees import leaf_names, shape, unlike_array


def check_state(solver: Any, state: Any) -> None:
    """Checks what `init` of a solver returned.

    Raises:
      ValueError: names the attributes that are missing.
    """
    missing = [name for name in ("outer", "inner", "step", "key") if not hasattr(state, name)]
    if missing:
        raise ValueError(
            f"{type(solver).__name__}.init returned a {type(state).__name__} without {', '.join(missing)}: the state "
            "of a solver is a pytree, such as a NamedTuple, with the attributes outer, inner, step and key."
        )


def check_counts(solver: Any, before: int, after: int, steps: int) -> None:
    """Checks that `step` counted the steps that were taken.

    Raises:
      ValueError: names the solver, since every step would see the batches of the first.
    """
    if after != before + steps:
        raise ValueError(
            f"{type(solver).__name__}.step: state.step was {before}, and is {after} after {steps} steps: a step must "
            "add 1 to it, since batches are drawn by it."
        )


def checked_step(solver: Any, state: Any, result: Any) -> tuple[Any, dict[str, jax.Array]]:
    """What `step` of a solver returned at `state`, the metrics made arrays.

    Raises:
      ValueError: names what is not as `Solver` says.
    """
    name = f"{type(solver).__name__}.step"
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise ValueError(f"{name} returned no pair (state, metrics), metrics being a dict, name -> number.")
    new, metrics = result
    wanted, found = (dict(zip(leaf_names(x), jax.tree.leaves(x), strict=True)) for x in (state, new))
    for leaf in wanted | found:
        old, now = (shape(x[leaf]) if leaf in x else "not there" for x in (wanted, found))
        if old != now:
            raise ValueError(
                f"{name} returned a state of another kind: {leaf} is {now}, and was {old} before; a step must keep "
                "structure, shapes and dtypes."
            )
    if jax.tree.structure(state) != jax.tree.structure(new):
        raise ValueError(f"{name} returned a state that is another kind of tree than before: a {type(new).__name__}.")
    for key, value in metrics.items():
        if not isinstance(key, str) or any(unlike_array(x) is not None for x in jax.tree.leaves(value)):
            raise ValueError(f"{name}: metric {key!r} is a {type(value).__name__}, but must be a number or an array.")
    return new, jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), metrics)

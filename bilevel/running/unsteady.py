"""Functions that are not what was meant, told from their traces: they change between calls, or stand in wrong places.

JAX traces a function and from then on repeats what it computed: a random number of NumPy's, or a counter, is a constant
of the program. Two traces of the same function show it, and cost no run of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from bilevel.differentiation.captures import Reads
from bilevel.differentiation.computation import parts
from bilevel.differentiation.influence import StructuralZeroWarning, dependence
from bilevel.differentiation.loss_checks import TracedLoss
from bilevel.running.programs import Program
from bilevel.sharding.processes import on_host
from bilevel.trees import PyTree, is_inexact, is_key

_LOOKED_AT: set[int] = set()
"""Functions, with what they read, that were traced twice: a run that is repeated is not traced again."""


def refuse_changing(
    reads: Reads, losses: list[TracedLoss], again: Callable[[], list[TracedLoss]], others: Callable[[], list[Program]]
) -> None:
    """Refuses functions that are another computation when they are traced anew.

    Args:
      reads: what all of them read.
      losses: as JAX remembers them.
      again: traces them anew.
      others: what is called beside them.

    Raises:
      ValueError: names the function, and what is different.
    """
    if reads.whole and reads.number in _LOOKED_AT:
        return
    if (changed := _changed(losses, again())) is not None:
        name, what = changed
        if not _changed(again(), again()):
            raise ValueError(
                f"{name} has changed since JAX traced it in this process ({what}), and the old one would be run: pass "
                "what changes as an argument (jax.tree_util.Partial(loss, value)), define the loss anew, or "
                "jax.clear_caches()."
            )
        raise ValueError(_UNSTEADY.format(name, what, f"{_DRAW}, and carry what changes as Problem(mutable=...) says"))
    for program in others():
        old, new = program.traced(), program.traced()
        if old and new and (what := _difference(parts(old), parts(new))):
            remedy = _DRAW if program.name.startswith("init_") else "let it be a function of its arguments alone"
            raise ValueError(_UNSTEADY.format(program.name, what, remedy))


def are_steady(reads: Reads) -> None:
    """Takes note that functions which read this have passed `refuse_changing`."""
    if reads.whole:
        _LOOKED_AT.add(reads.number)


_UNSTEADY = (
    "{} is another function at each call ({}), but JAX traces it once and repeats what it did then, so that what it "
    "draws with NumPy or Python, or counts, would stay as it was: {}."
)
_DRAW = "draw with jax.random from its argument key"


def _changed(before: list[TracedLoss], now: list[TracedLoss]) -> tuple[str, str] | None:
    """The name of a loss that differs and what does; None if none does."""
    new = {loss.name: loss for loss in now}
    for loss in before:
        if loss.name in new and (what := _difference(parts(loss.closed), parts(new[loss.name].closed))):
            return loss.name, what
    return None


def _difference(old: Any, new: Any) -> str | None:
    if old.operations != new.operations or len(old.numbers) != len(new.numbers):
        return "its operations differ"
    for one, other in zip(old.numbers, new.numbers, strict=True):
        if one != other:
            return f"the number {one} in it is now {other}"
    if len(old.arrays) != len(new.arrays):
        return "its constant arrays differ"
    for one, other in zip(old.arrays, new.arrays, strict=True):
        if not _same(one, other):
            return f"a constant array {list(np.shape(one))} in it has other values"
    return None


def _same(one: Any, other: Any) -> bool:
    if one is other or isinstance(one, Tracer) or isinstance(other, Tracer):
        return True
    if is_key(one) and is_key(other):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return bool(np.array_equal(on_host(one), on_host(other), equal_nan=bool(is_inexact(one))))


_CONSTANT = (optax.GradientTransformation, optax.MultiSteps)


def warn_if_swapped(solver: Any, losses: list[TracedLoss], outer: PyTree, key: jax.Array) -> None:
    """Looks whether only the outer loss depends on `outer`, where the training should.

    A learned starting point or learning rate acts on the training too, and is none of this.

    Warns:
      StructuralZeroWarning: if the training does not.
    """
    found = {loss.name: loss for loss in losses}
    if len(found) < 2 or any(found["inner_loss"].reads()) or not any(found["outer_loss"].reads()):
        return
    problem = solver.problem
    if hasattr(solver, "hypergradient"):
        # Of the estimators those that train by one optimizer; of a function of outer it is what is learned.
        if not isinstance(getattr(solver.hypergradient, "optimizer", None), _CONSTANT):
            return
        try:
            starts = dependence(lambda outer: problem.start_inner(key, outer), outer)
        except Exception:  # which the run itself will say
            return
    elif hasattr(solver, "outer_step"):
        starts = []  # a stochastic solver goes on from where it is, in steps of its own
    else:
        return
    if not any(map(any, starts)):
        warnings.warn(
            "Only outer_loss depends on outer, and the training does not: are inner_loss and outer_loss in each "
            "other's places?",
            StructuralZeroWarning,
            stacklevel=3,
        )

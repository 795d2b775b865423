"""One contender of the comparison with other libraries, in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.hypergradients.measure import relative_error, resident_peak, timed

MISMATCH = 1e-9
"""Hypergradients whose relative difference is larger, in float64, do not agree."""


class Contender(NamedTuple):
    """`function(task, *options)` of `peers/<file>.py`, which needs `module`."""

    name: str
    file: str
    module: str
    function: str = "unrolled"
    options: tuple[str, ...] = ()


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("bilevel, mixed, none", "ours", "bilevel", options=("mixed", "none")),
        Contender("bilevel, mixed, step", "ours", "bilevel", options=("mixed", "step")),
        Contender("bilevel, mixed, sqrt", "ours", "bilevel", options=("mixed", "sqrt")),
        Contender("bilevel, mixed, binomial", "ours", "bilevel", options=("mixed", "binomial")),
        Contender("bilevel, reverse, none", "ours", "bilevel", options=("reverse", "none")),
        Contender("torchopt", "torchopt", "torchopt"),
        Contender("higher", "higher", "higher"),
        Contender("hypertorch, reverse_unroll", "hypertorch", "hypergrad.hypergradients", "storing"),
        Contender("hypertorch, reverse", "hypertorch", "hypergrad.hypergradients", "recomputing"),
        Contender("jaxopt, unroll", "jaxopt", "jaxopt"),
        Contender("optimistix, sqrt(K) checkpoints", "optimistix", "optimistix", options=("sqrt",)),
        Contender("optimistix, default", "optimistix", "optimistix", options=("default",)),
        Contender("equinox, sqrt(K) checkpoints", "equinox", "equinox.internal"),
    )
}

REFERENCE = "bilevel, mixed, none"
IN_TORCH = ("torchopt", "higher", "hypertorch")


def written(name: str, slots: int | str) -> str:
    """A row's name with its schedule as `Unrolled` takes it: records say "binomial" for any number of slots."""
    return name.replace("binomial", f"Binomial({slots})")


def installed(contender: Contender) -> bool:
    """Whether the module that it needs can be found."""
    try:
        return importlib.util.find_spec(contender.module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def measure(name: str, problem: str, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds, resident and temporary bytes, compile seconds and the hypergradient of one contender, in float32."""
    ready = _ready(name, problem, steps)
    ready.warm()
    resident = resident_peak(ready.call)
    took = timed({name: ready.call}, repeats)[name]
    return {
        "name": name,
        "seconds": took.seconds,
        "resident": resident,
        "temporary": ready.temporary,
        "compile_seconds": ready.compile_seconds,
        "grad": np.asarray(took.result, np.float64).tolist(),
    }


def agreement(problem: str, steps: int) -> list[dict[str, Any]]:
    """The relative error of each contender's hypergradient against the reference's, in float64."""
    jax.config.update("jax_enable_x64", True)
    reference = _ready(REFERENCE, problem, steps).call()
    rows = []
    for name, contender in CONTENDERS.items():
        if installed(contender) and can_solve(contender, problem):
            rows.append({"name": name, "error": relative_error(_ready(name, problem, steps).call(), reference)})
    return rows


def can_solve(contender: Contender, problem: str) -> bool:
    """Whether the losses are there in its framework."""
    return problem != "transformer" or contender.file not in IN_TORCH


def _ready(name: str, problem: str, steps: int) -> Any:
    from benchmarks.hypergradients.peers.base import make_task  # makes arrays, whose type is set by now

    contender = CONTENDERS[name]
    peer = importlib.import_module(f"benchmarks.hypergradients.peers.{contender.file}")
    return getattr(peer, contender.function)(make_task(problem, steps), *contender.options)

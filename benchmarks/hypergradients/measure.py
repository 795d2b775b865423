"""Seconds, bytes and compile time, measured the same way for everything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.resident import resident

SHORT, LONG = 0.5, 30.0
"""Seconds of timing that are little, and too much."""


class Compiled(NamedTuple):
    """A compiled function with its bytes of temporary memory, and the seconds that tracing and compiling took."""

    call: Callable[..., Any]
    temporary: int
    trace_seconds: float
    compile_seconds: float


def compile_ahead(function: Callable[..., Any], *args: Any) -> Compiled:
    """`jax.jit(function)` compiled for `args`."""
    begun = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    return Compiled(compiled, memory.temp_size_in_bytes, traced - begun, done - traced)


class Timed(NamedTuple):
    """The least time of a call, and what its first one returned."""

    seconds: float
    result: Any


def timed(calls: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, Timed]:
    """Each call timed over `repeats` rounds, after a warm-up, complete when its arrays are there. The calls take turns,
    so that what disturbs the machine disturbs all of them. There are more rounds where all of them take less than
    `SHORT` seconds, and fewer, but one, where they would take more than `LONG`."""
    results = {name: jax.block_until_ready(call()) for name, call in calls.items()}
    best, begun, done, elapsed = dict.fromkeys(calls, float("inf")), time.perf_counter(), 0, 0.0
    while done == 0 or ((done < repeats or elapsed < SHORT) and elapsed * (done + 1) / done < LONG):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], time.perf_counter() - started)
        done, elapsed = done + 1, time.perf_counter() - begun
    return {name: Timed(best[name], results[name]) for name in calls}


def resident_peak(call: Callable[[], Any]) -> int | None:
    """How many bytes of resident memory `call()` takes at its peak, above what the process holds before it.

    See `benchmarks.resident`. None where the kernel does not tell.
    """
    found = resident(call)
    return None if found is None else found.beyond


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def relative_error(grad: Any, reference: Any) -> float:
    """|g - g_ref| / |g_ref|."""
    grad, reference = np.asarray(grad), np.asarray(reference)
    return float(np.linalg.norm(grad - reference) / np.linalg.norm(reference))

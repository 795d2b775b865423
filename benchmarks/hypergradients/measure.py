"""Seconds, bytes and compile time of compiled functions, measured the same way for everything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


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


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least time of each call over `repeats` rounds, after a warm-up; the calls take turns, so that what disturbs the
    machine disturbs all of them."""
    for call in calls.values():
        jax.block_until_ready(call())
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], time.perf_counter() - begun)
    return best


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

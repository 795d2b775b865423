"""How a side of `benchmarks.attribution.beside_bergson` is measured; neither JAX nor torch is imported for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.resident import Resident, resident


class Run(NamedTuple):
    """Attributes:
    seconds: that passed.
    processor_seconds: that a processor computed for this process, in all of its threads.
    scores: of the rows, `[N]`.
    loss: of the query.
    """

    seconds: float
    processor_seconds: float
    scores: Any
    loss: float


def runs(prepare: Callable[[], Any], compute: Callable[[Any], Any], repeats: int) -> tuple[list[Run], Resident | None]:
    """`compute(prepare())` run `repeats` times, and the resident memory of the first of them.

    Only `compute`, which returns scores and loss, is measured.
    """
    found: list[Run] = []

    def call(prepared: Any) -> None:
        begun, computed = time.perf_counter(), time.process_time()
        answer = compute(prepared)
        found.append(Run(time.perf_counter() - begun, time.process_time() - computed, *answer))

    first = prepare()
    memory = resident(lambda: call(first))
    while len(found) < repeats:
        call(prepare())
    return found, memory


def summary(found: list[Run], memory: Resident | None) -> dict[str, Any]:
    """The least seconds, the memory, and what the first run found."""
    return {
        "seconds": min(run.seconds for run in found),
        "processor_seconds": min(run.processor_seconds for run in found),
        "memory": None if memory is None else memory._asdict(),
        "loss": found[0].loss,
        "scores": found[0].scores.tolist(),
    }

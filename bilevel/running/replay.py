"""A step of a solver taken once more, on the host, to look at what its estimator is asked and gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.running.chunks import step


class Instead:
    """Stands for a hypergradient, with another function in the place of its `estimate`."""

    def __init__(self, hypergradient: Any, estimate: Callable[..., Any]):
        self._hypergradient, self.estimate = hypergradient, estimate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hypergradient, name)


class _Asked(Exception):
    """Thrown by an `estimate` that only takes note of what it is asked."""


def asked_for(solver: Any, state: Any, data: Any) -> tuple[Any, ...] | None:
    """The arguments of the estimate that a step from `state` asks for; None where the solver has no hypergradient."""
    if not hasattr(solver, "hypergradient"):
        return None

    def listen(*args):
        raise _Asked(*args)

    try:
        step(dataclasses.replace(solver, hypergradient=Instead(solver.hypergradient, listen)), state, data)
    except _Asked as asked:
        return asked.args
    return None

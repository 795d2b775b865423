"""In which order the segments of a replayed training are computed, and which states are kept for how long."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from bilevel.differentiation import binomial
from bilevel.differentiation.schedules import Binomial


class Action(NamedTuple):
    """One thing that is done: `kind` on the segment, or the segment's start, that `at` numbers.

    "load": the state at a start becomes the state at hand. "advance": the state at hand goes through a segment; with
    `keep` its end is kept. "outer": the outer loss at the state at hand, after the last segment. "reverse": the
    adjoint goes back through a segment, whose start, which is kept, is then let go.
    """

    kind: Literal["load", "advance", "outer", "reverse"]
    at: int
    keep: bool = False


def actions(count: int, keep: Any) -> list[Action]:
    """What is done, in order, for `count` segments: forward through all, and back through each once."""
    found: list[Action] = []

    def forward(start: int, kept: list[int], end: int) -> None:
        found.extend(Action("advance", at, at + 1 in kept) for at in range(start, end))

    def back(start: int, end: int, slots: Any, kept: list[int]) -> None:
        bounds = [start, *kept, end]
        for number, (a, b) in reversed(list(enumerate(pairwise(bounds)))):
            if b - a == 1:
                found.append(Action("reverse", a))
                continue
            left = _fewer(slots, number)
            inner = _stops(a, b, left)
            found.append(Action("load", a))
            forward(a, inner, inner[-1])
            back(a, b, left, inner)

    slots = _slots(count, keep)
    stops = _stops(0, count, slots) if count > 1 else []
    forward(0, stops, count)
    found.append(Action("outer", count))
    back(0, count, slots, stops)
    return found


def _slots(count: int, keep: Any) -> Any:
    if isinstance(keep, Binomial):
        return ("binomial", keep.c)
    return ("levels", {"all": 1, "sqrt": 2}.get(keep, 0) if isinstance(keep, str) else keep.n)


def _fewer(slots: Any, number: int) -> Any:
    """What is left for the part of that number between the states that were kept."""
    kind, count = slots
    return (kind, max(count - (1 if kind == "levels" else number), 0 if kind == "binomial" else 1))


def _stops(start: int, end: int, slots: Any) -> list[int]:
    """The segment starts between `start` and `end`, at least one, that are kept on the way from one to the other."""
    (kind, count), length = slots, end - start
    if kind == "levels":
        size = math.ceil(length ** ((count - 1) / count) - 1e-9)
        return list(range(start + size, end, size)) if size < length else [end - 1]
    # Without a slot left, one state is kept for as long as the last segment takes.
    return [start + (binomial.advance(length, count + 1) if count else length - 1)]


def bytes_kept(todo: list[Action], state: int, adjoints: int = 1) -> int:
    """The most bytes that are kept at once, of states of so many: starts of segments, the state at hand, that at the
    end, and the adjoint of each question."""
    return (most_kept(todo) + 2 + adjoints) * state


def most_kept(todo: list[Action]) -> int:
    """The most starts of segments that are kept at once."""
    now = most = 1
    for action in todo:
        now += action.keep - (action.kind == "reverse")
        most = max(most, now)
    return most

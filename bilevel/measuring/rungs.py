"""What differences over much shorter steps say of a slope that was found over longer ones.

A derivative is a limit, and what is narrow beside a step is hidden from it: a wave, a kink, a stair. Shorter steps see
it, until they round. So the shortest steps have the last word as far as they know anything, with one exception: a
staircase has another slope on each of its steps than it has as a whole, and a float is a staircase at last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

KNOWN = 1e-3
"""Relative doubt up to which steps know a slope."""
TOLD = 0.1
"""Relative doubt up to which they tell it from another."""
NOTED = 1e-3
"""Change of a slope, relative to that of the leaf, from which it is noted."""
UNEVEN = 1e6
"""Multiple of rounding by which values jump about over steps that see no slope."""


class Rung(NamedTuple):
    """What differences over steps of one size say of the slope along one direction.

    Attributes:
      slope, doubt, rounding, still, kink: as of `Differences`.
      size: of the steps.
    """

    slope: float
    doubt: float
    rounding: float
    size: float
    still: bool
    kink: bool

    def tells(self, other: Rung) -> bool:
        """Whether it is known well enough to tell its slope from another."""
        return self.doubt <= TOLD * max(abs(self.slope), abs(other.slope))

    def agrees(self, other: Rung, least: float = 0.0) -> bool:
        return abs(self.slope - other.slope) <= max(3 * (self.doubt + other.doubt), least)


def held_against(
    long: Rung, rungs: list[Rung], beside: Callable[[], list[list[Rung]]], expected: float, size: float
) -> tuple[float, float, bool]:
    """The slope that is left of `long` once shorter steps have spoken, its doubt, and whether that is theirs.

    Where no shorter step tells anything else, and one tells the same, the slope stands: always if it is the expected
    one, and otherwise if no step is in doubt for another reason than rounding. In all other cases it is looked beside
    the point whether the slope of the short steps is that of a staircase.

    Args:
      long: what the longer steps say.
      rungs: what shorter steps say, the shortest at last.
      beside: what steps of these sizes say at several places beside the point, of each size at all places.
      expected: the slope by the estimate.
      size: of the slope of the whole leaf.
    """
    moving = [rung for rung in rungs if not rung.still]
    if not (math.isfinite(long.doubt) and math.isfinite(expected)):
        settled = _settled(moving)
        return (long.slope, long.doubt, False) if settled is None else (settled.slope, settled.doubt, False)
    least = max(abs(expected - long.slope) / 3, NOTED * size)
    telling = [rung for rung in moving if rung.tells(long)]
    against = [rung for rung in telling if not rung.agrees(long, least)]
    is_known = long.doubt <= KNOWN * abs(long.slope)
    could_tell = [rung for rung in moving if rung.rounding <= TOLD * abs(long.slope)]
    agrees = abs(expected - long.slope) <= max(3 * long.doubt, NOTED * size)
    if is_known and telling and not against and (agrees or len(telling) == len(could_tell)):
        return long.slope, long.doubt, False
    settled = None if is_known and not against else _settled(moving)
    change = max((abs(rung.slope - long.slope) for rung in against), default=0.0)
    if could_tell:
        step = _stair(long, rungs, against, settled, beside())
        if step is not None:
            # Below a step that sees the slope of the whole, stairs are those of rounding, of which the slope is free.
            confirmed = any(rung not in against for rung in telling)
            rounds = confirmed and abs(expected - step) > abs(expected - long.slope)
            doubt = 0.0 if rounds else abs(step - long.slope)
            return long.slope, max(long.doubt, doubt), doubt > long.doubt
    if settled is not None:
        return settled.slope, settled.doubt, False
    # Waves may be narrower than the shortest steps, over which values then jump about by much more than they round:
    # the expected slope may be theirs, if such jumps have it on so short a way. Other jumps tell nothing: Adam makes
    # whole steps of a gradient that is 0 but for rounding.
    apart = abs(expected - long.slope)
    jumps = [(rung.doubt - rung.rounding, rung) for rung in moving]
    if any(jump > UNEVEN * rung.rounding and jump * rung.size < 10 * rungs[-1].size * apart for jump, rung in jumps):
        change = max(change, apart)
    return long.slope, max(long.doubt, change), long.doubt < change


def _settled(moving: list[Rung]) -> Rung | None:
    """The first of two that agree on a slope, of which one knows it, and which no shorter one contradicts."""
    for i, (rung, shorter) in enumerate(itertools.pairwise(moving)):
        size = abs(rung.slope)
        knows = rung.doubt <= KNOWN * size and not rung.kink and shorter.doubt <= TOLD * size
        rest = [later for later in moving[i + 1 :] if later.tells(rung)]
        if knows and all(later.agrees(rung) for later in rest):
            return rung
    return None


def _stair(
    long: Rung, rungs: list[Rung], against: list[Rung], settled: Rung | None, beside: list[list[Rung]]
) -> float | None:
    """The slope on the steps of a staircase: the same here and beside, but not that of the longer steps; or None."""
    here = against[0] if against else settled
    # An edge may be right at the point, so that no short step tells anything there: beside it the shortest do that can.
    sizes = [beside[rungs.index(here)]] if here is not None else beside[::-1]
    told = ([rung for rung in places if rung.tells(long)] for places in sizes)  # the others are at an edge themselves
    telling = next((most for most in told if 2 * len(most) > len(beside[0])), [])
    if here is None and not telling:
        return None
    step = here.slope if here is not None else telling[0].slope
    gap = abs(step - long.slope)
    same = all(abs(place.slope - step) <= max(3 * place.doubt, gap / 10) for place in telling)
    return step if same and gap > max(3 * long.doubt, NOTED * abs(long.slope)) else None

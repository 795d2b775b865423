"""The table of all stochastic solvers: one row each, read by every test that holds for all of them.

A new solver needs one row here, and then takes part in `test_solver_steps.py` (step by step beside its rule in NumPy),
`test_solvers.py` (limits, biases, noise, oracle calls, pytrees, keys, projection), `../hypergradients/test_keys.py` (no
random key is consumed twice) and `../running/test_donation.py` (states can be given away).

`test_solver_steps.py` fails while a solver that `bilevel` exports has no row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

import bilevel
from tests.bilevel.solvers import rules
from tests.bilevel.solvers.finite_sum import FULL, OUTER_ROWS, PROBLEM, ROWS
from tests.bilevel.solvers.rules import AVERAGE, ETA, MU, PERIOD, SIGMA, N, Q, T

COUNTS = {"inner_steps": T, "linear_steps": N, "terms": Q, "directions": rules.J}
"""Settings small enough to count calls, and to follow steps, by hand."""


@dataclasses.dataclass(frozen=True, eq=False)  # a row is itself, so that what is recorded of it can be kept
class Row:
    """A solver and what is known of it.

    Attributes:
      cls: the solver.
      rule: `rule(s, now)`, one iteration in NumPy: changes what `s` holds, as `rules.py` says.
      calls: `(iteration, random products) -> (inner gradients, outer gradients, products with H, with C)`, by hand.
      settings: those of `test_solvers.py`, under which the solver reaches what it can.
      by_hand: settings under which the rule is followed, beside `COUNTS`.
      floor: the parameter its bias shrinks with, a coarse and a fine value of it.
      noise: whether what mini-batches leave "vanishes" at constant steps or is a "plateau"; None for a solver that has
        no such limit (BOME is deterministic by design: its weight divides by the squared norm of a gradient).
      exact: whether deterministic oracles lead it to the solution, with these settings.
      needs_data: whether it looks into the data set, so that batches must be `Indexed`.
      random: points at which it takes a random number of products; 0 for a solver that draws no such number.
    """

    cls: type
    rule: Callable[[Any, Any], None]
    calls: Callable[[int, int], tuple[int, int, int, int]]
    _: dataclasses.KW_ONLY
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_hand: dict[str, Any] = dataclasses.field(default_factory=dict)
    floor: tuple[str, Any, Any] | None = None
    noise: str | None = "plateau"
    exact: bool = False
    needs_data: bool = False
    random: int = 0

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def fields(self) -> set[str]:
        """Names of the settings of the solver."""
        return {field.name for field in dataclasses.fields(self.cls)}

    @property
    def small(self) -> dict[str, int]:
        """Those of `COUNTS` that it has."""
        return {name: n for name, n in COUNTS.items() if name in self.fields}

    def make(self, problem=PROBLEM, step=0.5, outer=None, *, data=FULL, blocks=None, **changes):
        """The solver; `blocks` of the two data sets for one with tables, by default those of `data`."""
        settings = self.settings | changes
        if "inner_blocks" in self.fields:
            found = (-(-count // batches.size) for count, batches in zip((ROWS, OUTER_ROWS), data, strict=True))
            settings |= dict(zip(("inner_blocks", "outer_blocks"), blocks or found, strict=True))
        return self.cls(problem, step, 0.1 * step / 0.5 if outer is None else outer, **settings)


TABLE = [
    Row(bilevel.SOBA, rules.soba, lambda k, p: (1, 1, 1, 1), exact=True),
    Row(
        bilevel.MASOBA,
        rules.ma_soba,
        lambda k, p: (1, 1, 1, 1),
        settings={"average": 0.5},
        by_hand={"average": AVERAGE},
        exact=True,
    ),
    Row(bilevel.SABA, rules.saba, lambda k, p: (1, 1, 1, 1), exact=True, noise="vanishes", needs_data=True),
    Row(
        bilevel.SRBA,
        rules.srba,
        lambda k, p: (4, 3, 4, 4) if k % 5 == 0 else (2, 2, 2, 2),
        settings={"period": 5},
        by_hand={"period": PERIOD},
        exact=True,
        noise="vanishes",
        needs_data=True,
    ),
    Row(
        bilevel.AmIGO,
        rules.amigo,
        lambda k, p: (T, 1, N, 1),
        settings={"inner_steps": 10, "linear_steps": 10},
        exact=True,
    ),
    Row(
        bilevel.StocBiO,
        rules.stocbio,
        lambda k, p: (T, 1, Q, 1),
        settings={"inner_steps": 10, "terms": 60},
        floor=("terms", 2, 8),
        exact=True,
    ),
    Row(
        bilevel.BSA,
        rules.bsa,
        lambda k, p: (T, 1, p, 1),
        settings={"inner_steps": 10, "terms": 10},
        floor=("terms", 2, 8),
        random=1,
    ),
    Row(
        bilevel.TTSA,
        rules.ttsa,
        lambda k, p: (1, 1, p, 1),
        settings={"terms": 10},
        floor=("terms", 2, 8),
        random=1,
    ),
    Row(bilevel.FSLA, rules.fsla, lambda k, p: (1, 3, 1, 2), by_hand={"eta": ETA}, exact=True),
    Row(
        bilevel.MRBO,
        rules.mrbo,
        lambda k, p: (2, 2, 2 * Q, 2),
        settings={"terms": 60},
        by_hand={"eta": ETA},
        floor=("terms", 2, 8),
        exact=True,
    ),
    Row(
        bilevel.VRBO,
        rules.vrbo,
        lambda k, p: tuple(
            2 * T * n + (k % 5 == 0) * full for n, full in zip((1, 1, Q, 1), (4, 3, 4 * Q, 4), strict=True)
        ),
        settings={"period": 5, "inner_steps": 3, "terms": 60},
        by_hand={"period": PERIOD},
        floor=("terms", 2, 8),
        exact=True,
        noise="vanishes",
        needs_data=True,
    ),
    Row(
        bilevel.SUSTAIN,
        rules.sustain,
        lambda k, p: (2, 2, 2 * p, 2),
        settings={"terms": 10},
        by_hand={"eta": ETA},
        floor=("terms", 2, 8),
        random=2,
    ),
    Row(
        bilevel.F2SA,
        rules.f2sa,
        lambda k, p: (2 * T + 2, T + 1, 0, 0),
        settings={"inner_steps": 10, "penalty": 10.0},
        by_hand={"penalty": SIGMA},
        floor=("penalty", 5.0, 50.0),
    ),
    Row(
        bilevel.BOME,
        rules.bome,
        lambda k, p: (T + 2, 1, 0, 0),
        settings={"gap_step": 0.5},
        by_hand={"eta": ETA, "gap_step": rules.ALPHA},
        floor=("inner_steps", 2, 8),
        noise=None,
    ),
    Row(
        bilevel.PZOBO,
        rules.pzobo,
        lambda k, p: (T * (1 + rules.J), 1, 0, 0),
        settings={"inner_steps": 10, "directions": 20},
        by_hand={"smoothing": MU},
    ),
]


def each(condition: Callable[[Row], Any] = lambda row: True):
    """Parametrizes a test with the rows of which `condition` holds."""
    return pytest.mark.parametrize("row", [row for row in TABLE if condition(row)], ids=lambda row: row.name)

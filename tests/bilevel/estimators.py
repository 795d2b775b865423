"""The table of all estimators: one row each, read by every test that holds for all of them.

A new estimator needs one row here, and then takes part in

- `hypergradients/test_estimators.py`, where the row has a closed form: values, keys, batches, warnings, `vmap`;
- `hypergradients/test_keys.py`: no random key is consumed twice;
- `differentiation/test_loss_checks.py`: captured variables, losses that cannot be differentiated;
- `running/test_diagnosis.py`, by the names that it asks for.

`test_estimators.py` fails while an estimator that `bilevel` exports has no row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel.testing import Quadratic


@dataclasses.dataclass(frozen=True)
class Row:
    """An estimator and what is known of it.

    Attributes:
      name: of the row.
      make: `make(optimizer, steps)`, the estimator.
      closed_form: `closed_form(quadratic, outer, steps, **kwargs)`, what it should return on the quadratic family,
        trained by gradient descent; None where a test file of its own says that (an estimate that is random, an
        optimizer of its own), and tests that compare numbers with others leave the row out.
      tolerance: the relative error allowed there.
      blind: the leaves of `outer` whose derivative it cannot see.
      second_order: whether it differentiates the gradient of the inner loss.
      random: whether the hypergradient is random, so that a 0 is one only where the trace says it.
      tasks: whether its inner batches are tasks, pairs `(support, query)`.
      setting: whether it is another setting of an estimator that has a row: for tests in which settings matter.
    """

    name: str
    make: Callable[[Any, int], bilevel.Hypergradient]
    closed_form: Callable[..., dict] | None = None
    _: dataclasses.KW_ONLY
    tolerance: float = 1e-10
    blind: tuple[str, ...] = ()
    second_order: bool = True
    random: bool = False
    tasks: bool = False
    setting: bool = False


def unseen(closed_form: Callable[..., dict], *names: str) -> Callable[..., dict]:
    """`closed_form` with 0 for `names`."""

    def changed(quadratic, outer, steps, **kwargs):
        result = closed_form(quadratic, outer, steps, **kwargs)
        return {name: np.zeros_like(leaf) if name in names else leaf for name, leaf in result.items()}

    return changed


def minimise(problem, outer, batch, key):
    """A solver of the inner problem that is no solver: where it starts."""
    return problem.init_inner(key, outer)


def tasks(count: int) -> tuple[Any, Any]:
    """Inner batches of an estimator that takes tasks."""
    return jnp.ones((1, count, 5)), jnp.ones((1, count, 5))


of = functools.partial
last_step = of(Quadratic.unrolled, truncate=1)
within = ("rate", "start")  # what acts inside training alone

TABLE = [
    Row("mixed", bilevel.Unrolled, Quadratic.unrolled),
    Row("reverse", of(bilevel.Unrolled, mode="reverse"), Quadratic.unrolled),
    Row("forward", of(bilevel.Unrolled, mode="forward"), Quadratic.unrolled),
    Row("truncated", of(bilevel.Unrolled, truncate=1), setting=True),
    Row("rematerialised", of(bilevel.Unrolled, checkpoint="sqrt"), setting=True),
    Row("binomial", of(bilevel.Unrolled, checkpoint=bilevel.Binomial(2)), setting=True),
    Row("replay", of(bilevel.Replay, segment=2), Quadratic.unrolled),
    Row("reversible", lambda optimizer, steps: bilevel.Reversible(0.1, 0.9, steps)),
    Row("first order", bilevel.FirstOrder, Quadratic.first_order, blind=within, second_order=False),
    Row("one step", bilevel.OneStep, last_step, blind=("start",)),
    Row("implicit", of(bilevel.Implicit, linear_solver=bilevel.Dense()), Quadratic.implicit, blind=within),
    Row("implicit by a series", of(bilevel.Implicit, linear_solver=bilevel.Neumann(3, 0.1)), setting=True),
    Row("implicit by CG", bilevel.Implicit, setting=True),
    Row("implicit with a sketch", of(bilevel.Implicit, linear_solver=bilevel.Nystrom(2)), setting=True),
    Row("fixed point", of(bilevel.FixedPoint, linear_solver=bilevel.Neumann(3))),
    Row("implicit solve", lambda optimizer, steps: bilevel.ImplicitSolve(minimise)),
    Row(
        "finite difference",
        bilevel.FiniteDifference,
        unseen(last_step, "rate"),
        tolerance=1e-9,  # it divides rounding by its radius
        blind=within,
        second_order=False,
    ),
    Row("sama", bilevel.SAMA, unseen(last_step, "rate"), tolerance=1e-9, blind=within, second_order=False),
    Row("evolution", of(bilevel.EvolutionStrategies, population=4), random=True, second_order=False),
    Row("persistent", of(bilevel.PersistentES, population=4), random=True, second_order=False),
    # Stored states would be enough, but under vmap the check of keys takes the second pass over a loop's keys for a
    # second use.
    Row("per task", lambda opt, steps: bilevel.PerTask(bilevel.Unrolled(opt, steps, checkpoint="step")), tasks=True),
]
ROWS = {row.name: row for row in TABLE}
EXACT = [row for row in TABLE if row.closed_form is not None]
"""Rows whose numbers can be compared with formulas and with each other."""

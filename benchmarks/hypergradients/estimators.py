"""Every estimator of the package on one problem and one K: seconds, temporary memory, compile time and bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import bilevel
from benchmarks.hypergradients.measure import bytes_of, compile_ahead, relative_error, timed
from benchmarks.hypergradients.problems import Case, data_weighting, lora_transformer, quadratic

MOMENTUM = 0.9
RATE = 0.1


def _quadratic() -> Case:
    return quadratic(optimizer=optax.sgd(RATE, MOMENTUM))


def _data_weighting() -> Case:
    return data_weighting(samples=256, size=256, optimizer=optax.adam(1e-3))


def _transformer() -> Case:
    return lora_transformer(layers=4, width=32, tokens=32, size=2, optimizer=optax.adam(3e-5))


# Rates at which training is stable up to the largest K, so that its derivative means something. Adam at 1e-2 amplifies
# rounding until derivatives of the same program, compiled twice, differ by more than their size. The transformer at
# 1e-3 leaves the stable regime after 80 steps: the derivative then grows 1.12-fold a step (6e8 at K = 256, 3e21 at
# K = 512) and overflows float32 before K = 1024, in every schedule, with weight decay as well as without.
PROBLEMS: dict[str, tuple[Callable[[], Case], str]] = {
    "quadratic": (_quadratic, "float64"),
    "data weighting": (_data_weighting, "float32"),
    "transformer": (_transformer, "float32"),
}
"""Name -> how to make it, and the floating-point type it is measured in."""

REFERENCE = "mixed, none"
"""What the bias of all others is taken against: the exact derivative of the training that was run."""


def estimators(case: Case, steps: int) -> dict[str, Any]:
    """Name -> estimator for K = `steps`. `Reversible` is there where the case trains by momentum (the quadratic);
    `PersistentES`, whose first estimate is that of `EvolutionStrategies`, is not."""
    optimizer = case.optimizer
    schedules = {
        "none": "none",
        "step": "step",
        "sqrt": "sqrt",
        "binomial": bilevel.Binomial(max(2, math.ceil(math.log2(steps)))),
    }
    found: dict[str, Any] = {
        f"mixed, {name}": bilevel.Unrolled(optimizer, steps, checkpoint=checkpoint)
        for name, checkpoint in schedules.items()
    }
    found |= {
        "reverse, none": bilevel.Unrolled(optimizer, steps, mode="reverse", checkpoint="none"),
        "forward": bilevel.Unrolled(optimizer, steps, mode="forward"),
        "truncated to K/4": bilevel.Unrolled(optimizer, steps, checkpoint="none", truncate=max(1, steps // 4)),
        "implicit, CG": bilevel.Implicit(optimizer, steps),
        "implicit, Nystrom": bilevel.Implicit(optimizer, steps, linear_solver=bilevel.Nystrom(rank=20)),
        "fixed point": bilevel.FixedPoint(optimizer, steps),
        "one step": bilevel.OneStep(optimizer, steps),
        "finite difference": bilevel.FiniteDifference(optimizer, steps),
        "SAMA": bilevel.SAMA(optimizer, steps),
        "first order": bilevel.FirstOrder(optimizer, steps),
        "evolution strategies": bilevel.EvolutionStrategies(optimizer, steps),
    }
    if case.name == "quadratic":
        found["reversible"] = bilevel.Reversible(RATE, MOMENTUM, steps)
    return found


def measure(problem: str, steps: int, skip: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row for training alone, then one for every estimator but those to `skip`."""
    jax.config.update("jax_enable_x64", PROBLEMS[problem][1] == "float64")
    case, key = PROBLEMS[problem][0](), jax.random.key(0)
    outer = case.problem.start_outer(key)
    batch = case.batch(jax.random.key(1))
    batches, outer_batch = bilevel.FullBatch(batch), case.batch(jax.random.key(2))
    plain = bilevel.FirstOrder(case.optimizer, steps)
    start = plain.init(case.problem, outer, key)
    training = compile_ahead(_solve, plain, case.problem, start, outer, batches, key)
    one = compile_ahead(_gradient, case.problem, start.params, outer, batch, key)
    calls: dict[str, Callable[[], Any]] = {
        "training": lambda: training.call(plain, case.problem, start, outer, batches, key)
    }
    rows: dict[str, dict[str, Any]] = {
        "training": {
            "temporary": training.temporary,
            "compile_seconds": training.trace_seconds + training.compile_seconds,
            "step_temporary": one.temporary,
            "state": bytes_of((start.params, start.opt_state)),
            "outer_numbers": sum(leaf.size for leaf in jax.tree.leaves(outer)),
        }
    }
    refused = []
    for name, estimator in estimators(case, steps).items():
        if name in skip:
            continue
        # The particles of an evolution strategy, the adjoint of a linear solve: every estimator starts its own.
        arguments = estimator, case.problem, estimator.init(case.problem, outer, key), outer, batches, outer_batch, key
        try:
            compiled = compile_ahead(_estimate, *arguments)
        except Exception as error:  # an estimator that refuses a problem is a finding, and the others go on
            refused.append({"name": name, "failed": str(error).splitlines()[0][:300]})
            continue
        calls[name] = lambda compiled=compiled, arguments=arguments: compiled.call(*arguments)
        rows[name] = {
            "temporary": compiled.temporary,
            "compile_seconds": compiled.trace_seconds + compiled.compile_seconds,
        }
    times = timed(calls, repeats)
    for name, row in rows.items():
        took = times[name].seconds
        row |= {"name": name, "seconds": took, "ratio": took / times["training"].seconds}
        if name != "training" and REFERENCE in times:
            row["error"] = relative_error(_flat(times[name].result[0]), _flat(times[REFERENCE].result[0]))
    return [*rows.values(), *refused]


def _flat(grad: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grad)])


def _estimate(estimator, *arguments):
    estimate = estimator.estimate(*arguments)
    return estimate.grad, estimate.value  # without the value, an estimator that ignores training would not train


def _solve(estimator, *arguments):
    return estimator.solve(*arguments)


def _gradient(problem, params, outer, batch, key):
    return jax.grad(lambda params: problem.inner_value(params, outer, batch, key)[0])(params)

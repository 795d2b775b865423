"""What bilevel computes of a task of `benchmarks.attribution.beside_bergson`, in a process of its own:

    python -m benchmarks.attribution.our_side FOLDER "bilevel.Replay"

The last line of the output is a JSON object.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.attribution.runs import runs, summary
from benchmarks.hypergradients.measure import compile_ahead
from methods.attribution import WEIGHTS, Numbered, problem
from methods.models.hooks import identity
from methods.models.loading import load

PACKAGES = ("jax", "jaxlib", "optax", "flax")


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A training whose rows are judged, and the batch that asks.

    Attributes:
      problem: a weight for each of the K B rows; see `methods.attribution`.
      optimizer: of the model's weights.
      start: before the first step.
      rows: the K batches, in their order: number `[K, B]`, tokens `[K, B, T]`.
      query: tokens `[Q, T]` of the batch whose loss is differentiated.
    """

    problem: bilevel.Problem
    optimizer: optax.GradientTransformation
    start: bilevel.InnerState
    rows: Numbered
    query: jax.Array

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What an estimator takes."""
        return self.problem, self.start, self.problem.start_outer(KEY), self.rows, self.query, KEY


KEY = jax.random.key(0)
"""Nothing here is random."""


def question(folder: Path, task: dict[str, Any], dtype: Any = jnp.float32) -> Question:
    """That of a folder: all weights are trained by Adam, and the loss is the mean over all tokens but the first.

    Of a batch b of B rows with T tokens each it is sum over i in b of lambda_i l_i / (B (T - 1)), l_i being the sum of
    the cross-entropies of row i. Models do not recompute their blocks in the backward pass, as bergson's do not.
    """
    loaded = load(folder / "model", dtype=dtype)
    model: Any = loaded.model
    model = dataclasses.replace(model, remat=False)

    def losses(weights: Any, params: Any, outer: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, rows, None, identity)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows[:, 1:]).sum(axis=1)
        return each, jnp.full_like(each, rows.shape[1] - 1)

    def asked(weights: Any, params: Any, outer: Any, batch: jax.Array) -> jax.Array:
        each, counts = losses(weights, params, outer, batch)
        return each.sum() / counts.sum()

    rows = np.load(folder / "rows.npy")
    of = problem(losses, asked, lambda key: loaded.weights, len(rows))
    first, second = task["betas"]
    optimizer = optax.adam(task["rate"], first, second, eps=task["eps"], eps_root=task["eps_root"])
    start = bilevel.Unrolled(optimizer, task["steps"]).init(of, of.start_outer(KEY), KEY)
    batches = Numbered(
        jnp.arange(len(rows), dtype=jnp.int32).reshape(task["steps"], task["batch"]),
        jnp.asarray(rows, jnp.int32).reshape(task["steps"], task["batch"], -1),
    )
    return Question(of, optimizer, start, batches, jnp.asarray(np.load(folder / "query.npy"), jnp.int32))


Ask = Callable[[], tuple[np.ndarray, float]]
"""What computes the derivative of the query's loss by each row's weight, `[K B]`, and the loss."""


def scores(estimate: bilevel.Estimate) -> tuple[np.ndarray, float]:
    """Of an estimate, on the host."""
    return np.asarray(estimate.grad[WEIGHTS], np.float64), float(estimate.value)


def replay(asked: Question) -> tuple[Ask, float]:
    """`bilevel.Replay`, and the seconds of its first call, in which its programs are compiled as they are met."""
    estimator = bilevel.Replay(asked.optimizer, len(asked.rows.number))

    def ask() -> tuple[np.ndarray, float]:
        return scores(estimator.estimate(*asked.arguments))

    begun = time.perf_counter()
    ask()
    return ask, time.perf_counter() - begun


def unrolled(asked: Question) -> tuple[Ask, float]:
    """`bilevel.Unrolled(checkpoint="sqrt")` in one program, and the seconds that tracing and compiling it took."""
    estimator = bilevel.Unrolled(asked.optimizer, len(asked.rows.number), checkpoint="sqrt")
    compiled = compile_ahead(estimator.estimate, *asked.arguments)
    return lambda: scores(compiled.call(*asked.arguments)), compiled.trace_seconds + compiled.compile_seconds


WAYS: dict[str, Callable[[Question], tuple[Ask, float]]] = {"bilevel.Replay": replay, "bilevel.Unrolled": unrolled}


def main(folder: Path, way: str) -> None:
    """Prints what was found and what it took."""
    task = json.loads((folder / "task.json").read_text())
    ask, compiling = WAYS[way](question(folder, task))
    found, memory = runs(lambda: None, lambda nothing: ask(), task["repeats"])
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    row = summary(found, memory) | {"versions": {"bilevel": bilevel.__version__, **versions}}
    if way == "bilevel.Replay":  # the first call computed, too
        compiling -= row["seconds"]
    print(json.dumps(row | {"compile_seconds": compiling}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

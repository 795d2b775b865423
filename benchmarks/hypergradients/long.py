"""A long training and its derivative by `Replay`: seconds, resident memory, and the cost over plain training.

    python -m benchmarks.hypergradients.long --steps 10000

A network of 784-64-10 on 10,000 images of MNIST, Adam, batches of 32; the outer variable is a weight for each of them.
States are kept in a folder. A process measures one K; memory is the most that it ever held.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.attribution.cases import images as drawn
from benchmarks.record import Record

ROWS, BATCH, WIDTH, CLASSES = 10_000, 32, 64, 10


def row(steps: int, segment: int | None = None) -> dict[str, Any]:
    """Seconds of plain training (compiled, the same segments), of the estimate, and the process's memory in bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import bilevel

    images, labels = drawn("train", ROWS, 0)

    def losses(w: Any, images: Any, labels: Any) -> jax.Array:
        logits = jnp.tanh(images @ w["in"]) @ w["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def start(key: jax.Array, outer: Any) -> Any:
        first, second = jax.random.split(key)
        draw = jax.random.normal
        return {"in": draw(first, (784, WIDTH)) / 28, "out": draw(second, (WIDTH, CLASSES)) / 8}

    def inner_loss(w: Any, weights: Any, batch: Any, key: jax.Array) -> jax.Array:
        images, labels, index = batch
        return jnp.mean(weights[index] * losses(w, images, labels))

    problem = bilevel.Problem(
        inner_loss, lambda w, weights, batch, key: jnp.mean(losses(w, *batch)), start, lambda key: jnp.ones(ROWS)
    )

    def batch(step: int) -> Any:
        index = np.random.default_rng(step).integers(0, ROWS, BATCH)
        return images[index], labels[index], index

    optimizer = optax.adam(1e-3)
    segment = segment or math.isqrt(steps - 1) + 1
    held_out, outer, key = drawn("test", 500, 0), jnp.ones(ROWS), jax.random.key(0)
    with tempfile.TemporaryDirectory() as folder:
        make = lambda steps: bilevel.Replay(optimizer, steps, segment=segment, store=f"{folder}/states")  # noqa: E731
        begun = time.perf_counter()
        make(segment).estimate(problem, None, outer, batch, held_out, key)
        compiled = time.perf_counter()
        jax.block_until_ready(make(steps).solve(problem, None, outer, batch, key))
        trained = time.perf_counter()
        found = make(steps).estimate(problem, None, outer, batch, held_out, key)
        jax.block_until_ready(found.grad)
        ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "steps": steps,
        "segment": segment,
        "first_call_seconds": compiled - begun,
        "training_seconds": trained - compiled,
        "estimate_seconds": ended - trained,
        "ratio": (ended - trained) / (trained - compiled),
        "peak_bytes": peak,
        "norm": float(jnp.linalg.norm(found.grad)),
    }


def main(words: list[str]) -> int:
    """Prints a row as JSON, and adds it to the record where one is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--segment", type=int, default=None)
    parser.add_argument("--record", type=Path, help="where the row is added: long.jsonl beside this file for the page")
    options = parser.parse_args(words)
    found = row(options.steps, options.segment)
    if options.record:
        Record(options.record).add([found])
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

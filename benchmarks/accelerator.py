"""One device, measured: `python -m benchmarks.accelerator`, at most six minutes on a GPU or TPU.

A Llama of about a billion random bfloat16 weights ("1b" of `benchmarks.scaling`; "tiny" on a processor), LoRA of rank 8
on q and v, Flexora's hypergradient by K inner steps of Adam in mixed mode:

- its seconds over those of K plain training steps, for each rematerialisation schedule. In operations of one inner
  step it is 3.07: a gradient on the way there, and on the way back a Hessian-vector product, which costs 2.07
  gradients. "sqrt" computes each gradient once more;
- the device memory that the compiled program asks for, and the most that was in use;
- operations a second, counted in the jaxpr, over what the chip is said to do;
- how far the hypergradient of a small float32 model is from that of the host in float64.

Adds its rows to `benchmarks/accelerator.jsonl`, and prints the table of the page *Scaling*.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.record import Record, machine
from benchmarks.scaling import SIZES, Size, search_problem
from bilevel.extend import flops

RECORD = Path(__file__).with_suffix(".jsonl")
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v6 lite": 918e12}
"""Dense bfloat16 operations a second that a chip is said to do, by a part of its name."""
SCHEDULES = "none", "step", "sqrt"


def batches(size: Size, steps: int, rows: int, tokens: int) -> tuple[Any, Any]:
    """Random inner and outer batches."""
    from methods.tasks.encode import TokenBatch

    rng = np.random.default_rng(0)

    def batch(*lead: int) -> TokenBatch:
        drawn = rng.integers(0, size.vocabulary, (*lead, rows, tokens)).astype(np.int32)
        answers = np.zeros(drawn.shape, bool)
        answers[..., -16:] = True
        return TokenBatch(*map(jnp.asarray, (drawn, np.ones(drawn.shape, bool), answers)))

    return batch(steps), batch()


def random_weights(spec: Any) -> Any:
    """Weights of a model that neither explodes nor vanishes, drawn leaf by leaf on the device."""
    leaves, structure = jax.tree.flatten(spec)
    draw = jax.jit(lambda key, x: 0.02 * jax.random.normal(key, x.shape, x.dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([draw(key, x) for key, x in zip(keys, leaves, strict=True)])


def seconds(function: Any, *arguments: Any, least: float = 2.0, most: int = 5) -> float:
    """The median of a few calls after the first, each waited for."""
    jax.block_until_ready(function(*arguments))
    times: list[float] = []
    while len(times) < most and sum(times) < least * most:
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begun)
    return float(np.median(times))


def measured(name: str, steps: int, rows: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each schedule, and one for K plain steps."""
    size, device = SIZES[name], jax.devices()[0]
    problem_of, spec = search_problem(size, tokens)
    problem = problem_of(random_weights(spec))
    key, optimizer = jax.random.key(1), optax.adam(1e-4)
    outer = problem.start_outer(key)
    given = problem, outer, *batches(size, steps, rows, tokens), key
    common = {"model": name, "steps": steps, "rows": rows, "tokens": tokens, "device": device.device_kind}

    def training(problem, outer, inner_batches, outer_batch, key):
        estimator = bilevel.Unrolled(optimizer, steps)
        return estimator.solve(problem, None, outer, inner_batches, key).params

    programs = {"training": training} | {schedule: _estimate(optimizer, steps, schedule) for schedule in SCHEDULES}
    found: list[dict[str, Any]] = []
    for schedule, function in programs.items():
        compiled = jax.jit(function).lower(*given).compile()
        memory: Any = compiled.memory_analysis()
        took, work = seconds(compiled, *given), flops(function, *given)
        stats = device.memory_stats() or {}
        plain = found[0]["seconds"] if found else took
        found.append(
            {"section": "accelerator", "name": schedule, **common, "seconds": took, "ratio": took / plain}
            | {"temporary": memory.temp_size_in_bytes, "peak": stats.get("peak_bytes_in_use")}
            | {"flops": work, "share": _share(work / took, device.device_kind)}
        )
        print(f"{name}, {schedule}: {took:.3g} s, {took / plain:.2f} of the training", file=sys.stderr, flush=True)
    return found


def _estimate(optimizer: Any, steps: int, schedule: Any) -> Any:
    estimator = bilevel.Unrolled(optimizer, steps, checkpoint=schedule)

    def estimate(problem, outer, inner_batches, outer_batch, key):
        return estimator.estimate(problem, None, outer, inner_batches, outer_batch, key).grad

    return estimate


def _share(rate: float, kind: str) -> float | None:
    """Of what the chip is said to do; None where nobody has said it here."""
    return next((rate / peak for part, peak in PEAK.items() if part in kind), None)


def agreement() -> dict[str, Any]:
    """The hypergradient of a small model in float32 on the device, and in float64 on the host."""
    size, steps = SIZES["tiny"], 3

    def grad(dtype: Any, device: Any) -> np.ndarray:
        with jax.default_device(device), jax.enable_x64(dtype == jnp.float64):
            problem_of, spec = search_problem(size, 32, dtype=dtype)
            rng, leaves = np.random.default_rng(0), jax.tree.leaves(spec)
            drawn = [jnp.asarray(0.02 * rng.normal(size=x.shape), dtype) for x in leaves]
            problem = problem_of(jax.tree.unflatten(jax.tree.structure(spec), drawn))
            estimate = jax.jit(_estimate(optax.sgd(0.1), steps, "none"))
            outer = problem.start_outer(jax.random.key(1))
            with jax.default_matmul_precision("highest"):
                found = estimate(problem, outer, *batches(size, steps, 4, 32), jax.random.key(1))
            return np.asarray(found, np.float64)

    device = jax.devices()[0]
    own, exact = grad(jnp.float32, device), grad(jnp.float64, jax.devices("cpu")[0])
    error = float(np.linalg.norm(own - exact) / np.linalg.norm(exact))
    return {"section": "agreement", "device": device.device_kind, "error": error}


def table(record: Record) -> str:
    """What was measured, as a table in Markdown."""
    head = "| device | model | schedule | seconds | over K plain steps | temporary | most in use | share of the chip |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    gigabytes = lambda x: "-" if x is None else f"{x / 1e9:.2f} GB"  # noqa: E731
    for row in record.find(section="accelerator"):
        share = "-" if row["share"] is None else f"{row['share']:.0%}"
        model = f"{row['model']}, K = {row['steps']}, {row['rows']} × {row['tokens']}"
        numbers = f"{row['seconds']:.3g} | {row['ratio']:.2f}", gigabytes(row["temporary"]), gigabytes(row["peak"])
        lines.append(f"| {row['device']} | {model} | {row['name']} | {' | '.join(numbers)} | {share} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Measures, adds to the record, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=SIZES, help="1b on an accelerator, tiny on a processor, if not given")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="512 of 1b, 64 of tiny, if not given")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args(words)
    model = options.model or ("tiny" if jax.default_backend() == "cpu" else "1b")
    tokens = options.tokens or (64 if model == "tiny" else 512)
    record = Record(options.out)
    record.add([machine(), agreement()])
    record.add(measured(model, options.steps, options.rows, tokens))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

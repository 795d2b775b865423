"""Unrolled differentiation of a LoRA transformer: time, memory and compile time of every mode and schedule.

    python benchmarks/hypergradients/unrolled.py [--steps 8] [--layers 6] [--model SmolLM2.gguf]

One run prints, for block rematerialisation on and off: the time of a hypergradient over the time of the same K training
steps, its temporary memory (`memory_analysis`) and its compile time; then the compile time at K = 16 and K = 1024; and,
with `--model`, memory, compile time and time on a pretrained model with 8 x 64 tokens and K = 4. Goals and limits are
printed beside what was measured. Everything is also written as JSON into `--out`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import optax
import tyro
from measure import bytes_of, compile_ahead, seconds
from problems import Case, lora_transformer
from rich.console import Console
from rich.table import Table

import bilevel

SCHEDULES = ("none", "step", "sqrt")
LIMITS = {("mixed", "none"): 3.07, ("mixed", "step"): 3.07, ("mixed", "sqrt"): 4.07, ("reverse", "none"): 2.07}
"""FLOP limits of time / time of training, where an HVP costs 2.07 gradients."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Attributes: steps: K. layers, width, tokens, size: of the transformer and its batch. repeats: timing rounds.
    model: a pretrained model to measure too. out: where the JSON goes."""

    steps: int = 8
    layers: int = 6
    width: int = 256
    tokens: int = 64
    size: int = 8
    repeats: int = 3
    model: str | None = None
    out: Path = Path("runs/unrolled")


def estimate(hypergradient, problem, state, outer, batches, batch, key):
    return hypergradient.estimate(problem, state, outer, batches, batch, key)


def solve(hypergradient, problem, state, outer, batches, key):
    return hypergradient.solve(problem, state, outer, batches, key)


def arguments(case: Case, steps: int) -> tuple[Any, ...]:
    """`(problem, state, outer, batches, batch, key)` for K steps of a case."""
    key = jax.random.key(0)
    outer = case.problem.start_outer(key)
    state = bilevel.FirstOrder(case.optimizer, steps).init(case.problem, outer, key)
    return case.problem, state, outer, case.batches(steps, key), case.batch(key), key


def measure(case: Case, options: Options) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What plain training costs, and a row for every mode and schedule."""
    args = arguments(case, options.steps)
    problem, state, outer, batches, batch, key = args
    plain = bilevel.FirstOrder(case.optimizer, options.steps)
    training = compile_ahead(solve, plain, problem, state, outer, batches, key)
    one = compile_ahead(
        lambda problem, params: jax.grad(lambda p: problem.inner_value(p, outer, batch, key)[0])(params),
        problem,
        state.params,
    )
    calls = {"training": lambda: training.call(plain, problem, state, outer, batches, key)}
    rows = {}
    for mode in ("mixed", "reverse"):
        for schedule in SCHEDULES:
            unrolled = bilevel.Unrolled(case.optimizer, options.steps, mode=mode, checkpoint=schedule)
            compiled = compile_ahead(estimate, unrolled, *args)
            name = f"{mode}/{schedule}"
            calls[name] = lambda compiled=compiled, unrolled=unrolled: compiled.call(unrolled, *args)
            rows[name] = {"mode": mode, "checkpoint": schedule, "temporary": compiled.temporary}
            rows[name]["compile_seconds"] = compiled.compile_seconds
    times = seconds(calls, options.repeats)
    for name, row in rows.items():
        row["ratio"] = times[name] / times["training"]
    base = {
        "training_seconds": times["training"],
        "step_temporary": one.temporary,
        "moving": bytes_of((state.params, state.opt_state)),
    }
    return base, list(rows.values())


def compile_growth(case: Case, lengths: tuple[int, int] = (16, 1024)) -> list[dict[str, Any]]:
    """Compile time at two K, for each schedule."""
    rows = []
    for schedule in SCHEDULES:
        took = []
        for steps in lengths:
            unrolled = bilevel.Unrolled(case.optimizer, steps, checkpoint=schedule)
            took.append(compile_ahead(estimate, unrolled, *arguments(case, steps)).compile_seconds)
        rows.append({"checkpoint": schedule, "short": took[0], "long": took[1], "ratio": took[1] / took[0]})
    return rows


def pretrained(name: str, steps: int = 4) -> dict[str, Any]:
    """A hypergradient through K steps of LoRA on a pretrained model, 8 sequences of 64 tokens."""
    from methods import flexora
    from methods.adapters.lora import LoRAConfig
    from methods.models.loading import load

    loaded, lora = load(name), LoRAConfig(rank=8)
    layers = loaded.config.num_layers

    def loss(weights, adapt, tokens):
        logits = loaded.model.apply({"params": weights}, tokens, None, adapt)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    problem = flexora.problem(
        loss, loaded.weights, lora, lambda key: lora.init(key, loaded.config.site_shapes(), layers), layers
    )
    case = Case(
        name, problem, optax.adam(1e-3), lambda key: jax.random.randint(key, (8, 64), 0, loaded.config.vocab_size)
    )
    args = arguments(case, steps)
    unrolled = bilevel.Unrolled(case.optimizer, steps, checkpoint="step")
    compiled = compile_ahead(estimate, unrolled, *args)
    training = compile_ahead(solve, unrolled, args[0], args[1], args[2], args[3], args[5])
    times = seconds(
        {
            "training": lambda: training.call(unrolled, args[0], args[1], args[2], args[3], args[5]),
            "unrolled": lambda: compiled.call(unrolled, *args),
        },
        1,
    )
    return {
        "temporary": compiled.temporary,
        "trace_seconds": compiled.trace_seconds,
        "compile_seconds": compiled.compile_seconds,
        "training_seconds": times["training"],
        "ratio": times["unrolled"] / times["training"],
    }


def main(options: Options) -> None:
    console, found = Console(), {}
    steps = options.steps
    for remat in (True, False):
        case = lora_transformer(
            layers=options.layers, width=options.width, tokens=options.tokens, size=options.size, remat=remat
        )
        base, rows = measure(case, options)
        found[f"remat={remat}"] = {**base, "rows": rows}
        title = f"{case.name}, K={steps}, blocks {'rematerialised' if remat else 'stored'}"
        table = Table("mode", "checkpoint", "time / training", "FLOP limit", "temporary MB", "compile s", title=title)
        for row in rows:
            limit = LIMITS.get((row["mode"], row["checkpoint"]))
            numbers = [f"{row['ratio']:.2f}", f"{limit:.2f}" if limit else "", f"{row['temporary'] / 1e6:.1f}"]
            table.add_row(row["mode"], row["checkpoint"], *numbers, f"{row['compile_seconds']:.1f}")
        console.print(table)
        memory = {(row["mode"], row["checkpoint"]): row["temporary"] for row in rows}
        allowed = 2 * base["step_temporary"] + 1.1 * steps * base["moving"]
        console.print(
            f"training: {base['training_seconds']:.2f} s; one step {base['step_temporary'] / 1e6:.1f} MB, moving state "
            f"{base['moving'] / 1e6:.2f} MB.  reverse/none over mixed/none: "
            f"{memory['reverse', 'none'] / memory['mixed', 'none']:.1f}x (goal 5);  equal rematerialisation: "
            + ", ".join(f"{s} {memory['reverse', s] / memory['mixed', s]:.1f}x" for s in SCHEDULES)
            + f";  best {min(memory.values()) / 1e6:.1f} MB of {allowed / 1e6:.1f} MB allowed.\n"
        )
    small = lora_transformer(layers=options.layers, width=64, tokens=16, size=2)
    found["compile"] = compile_growth(small)
    table = Table("checkpoint", "K=16", "K=1024", "ratio (goal 1.2)", title="Compile time, seconds")
    for row in found["compile"]:
        table.add_row(row["checkpoint"], f"{row['short']:.1f}", f"{row['long']:.1f}", f"{row['ratio']:.2f}")
    console.print(table)
    if options.model:
        found["pretrained"] = row = pretrained(options.model)
        console.print(
            f"{Path(options.model).name}, 8 x 64 tokens, K=4, mixed/step: {row['temporary'] / 1e6:.0f} MB (goal 1000), "
            f"compile {row['compile_seconds']:.1f} s (goal 30), time / training {row['ratio']:.2f}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "unrolled.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    main(tyro.cli(Options))

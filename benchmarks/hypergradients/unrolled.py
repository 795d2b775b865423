"""Unrolled differentiation of a LoRA transformer: time, memory and compile time of every mode and schedule.

    python -m benchmarks.hypergradients.unrolled [--steps 8] [--blocks 6] [--model SmolLM2.gguf]

One run prints, for block rematerialisation on and off: the time of a hypergradient over the time of the same K training
steps, its temporary memory (`memory_analysis`) and its compile time; then the compile time at K = 16 and K = 1024; and,
with `--model`, memory, compile time and time on a pretrained model with 8 x 64 tokens and K = 4. Goals and limits are
printed beside what was measured. Everything is also written as JSON into `--out`.

    python -m benchmarks.hypergradients.unrolled --record benchmarks/hypergradients/unrolled.jsonl

writes the record of the page *Which hypergradient* instead: memory, and the operations of every mode and schedule at
K = 16, counted in the traced program. Neither depends on what else the machine does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

import bilevel
from benchmarks.hypergradients import transformer
from benchmarks.hypergradients.problems import lora_transformer
from benchmarks.record import Record
from bilevel.extend import flops, gradient_flops

LIMITS = {"mixed, none": 3.07, "mixed, step": 3.07, "mixed, sqrt": 4.07, "reverse, none": 2.07}
"""FLOP limits of time / time of training, where an HVP costs 2.07 gradients."""
LENGTHS = 16, 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """Attributes: steps: K. blocks, width, tokens, size: of the transformer and its batch. repeats: timing rounds.
    model: a pretrained model to measure too. out: where the JSON goes. record: see above."""

    steps: int = 8
    blocks: int = 6
    width: int = 256
    tokens: int = 64
    size: int = 8
    repeats: int = 3
    model: str | None = None
    out: Path = Path("runs/unrolled")
    record: Path | None = None


def modes(options: Options, console: Console) -> list[dict[str, Any]]:
    """Two tables, of blocks rematerialised and of blocks stored."""
    shape = {"width": options.width, "tokens": options.tokens, "size": options.size}
    rows = transformer.measure(options.repeats, blocks=options.blocks, steps=options.steps, **shape)
    for kept in ("rematerialised", "stored"):
        title = f"{options.blocks} blocks of width {options.width}, K = {options.steps}, {kept}"
        table = Table("mode, checkpoint", "time / training", "FLOP limit", "temporary MB", "compile s", title=title)
        here = {row["name"]: row for row in rows if row["blocks"] == kept}
        for name, row in here.items():
            limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
            memory, compiling = f"{row['temporary'] / 1e6:.1f}", f"{row['compile_seconds']:.1f}"
            table.add_row(name, f"{row['ratio']:.2f}", limit, memory, compiling)
        console.print(table)
        case = lora_transformer(layers=options.blocks, remat=kept == "rematerialised", **shape)
        step, moving = transformer.step_memory(case)
        over = {
            schedule: here[f"reverse, {schedule}"]["temporary"] / here[f"mixed, {schedule}"]["temporary"]
            for schedule in transformer.SCHEDULES
        }
        best = min(row["temporary"] for name, row in here.items() if name != "training")
        console.print(
            f"training: {here['training']['seconds']:.2f} s; one step {step / 1e6:.1f} MB, moving state "
            f"{moving / 1e6:.2f} MB.  reverse over mixed, nothing checkpointed: {over['none']:.1f}x (goal 5);  "
            f"equal rematerialisation: {', '.join(f'{name} {ratio:.1f}x' for name, ratio in over.items())};  "
            f"best {best / 1e6:.1f} MB of {(2 * step + 1.1 * options.steps * moving) / 1e6:.1f} MB allowed.\n"
        )
    return rows


def compile_growth(blocks: int, console: Console) -> list[dict[str, Any]]:
    """A table of compile times at a small and a large K."""
    rows = transformer.length(LENGTHS, blocks=blocks)
    table = Table("checkpoint", *(f"K = {k}" for k in LENGTHS), "ratio (goal 1.2)", title="Compile time, seconds")
    for short, long in zip(rows[::2], rows[1::2], strict=True):
        took = short["compile_seconds"], long["compile_seconds"]
        table.add_row(short["name"], *(f"{seconds:.1f}" for seconds in took), f"{took[1] / took[0]:.2f}")
    console.print(table)
    return rows


def operations(options: Options, steps: int = 16) -> list[dict[str, Any]]:
    """Gradients a step, in operations, of every mode and schedule."""
    shape = {"layers": options.blocks, "width": options.width, "tokens": options.tokens, "size": options.size}
    rows, key = [], jax.random.key(0)
    for kept in ("rematerialised", "stored"):
        case = lora_transformer(remat=kept == "rematerialised", **shape)
        outer, batch = case.problem.start_outer(key), case.batch(jax.random.key(2))
        batches = bilevel.FullBatch(case.batch(jax.random.key(1)))
        for mode, schedule in itertools.product(("mixed", "reverse"), transformer.SCHEDULES):
            estimator = bilevel.Unrolled(case.optimizer, steps, mode=mode, checkpoint=schedule)
            given = case.problem, estimator.init(case.problem, outer, key), outer, batches, batch, key
            whole = flops(partial(_gradient, estimator), *given)
            one = gradient_flops(case.problem, estimator, outer, batches, key)
            name = f"{mode}, {schedule}"
            rows.append({"section": "operations", "blocks": kept, "steps": steps, "name": name})
            rows[-1]["gradients"] = whole / one / steps
    return rows


def _gradient(estimator: Any, *given: Any) -> Any:
    return estimator.estimate(*given).grad


def recorded(options: Options) -> list[dict[str, Any]]:
    """The rows of the page's record."""
    shape = {"width": options.width, "tokens": options.tokens, "size": options.size}
    memory = transformer.measure(1, blocks=options.blocks, steps=options.steps, **shape)
    gradient, state = transformer.step_memory(lora_transformer(layers=options.blocks, **shape))
    rows: list[dict[str, Any]] = [{"section": "step", "gradient": gradient, "state": state}]
    for row in memory:
        if row["name"] != "training":
            kept = {name: row[name] for name in ("blocks", "name", "temporary")}
            rows.append({"section": "memory", "steps": options.steps} | kept)
    return rows + operations(options)


def main(options: Options) -> None:
    if options.record:
        options.record.unlink(missing_ok=True)
        Record(options.record).add(recorded(options))
        return
    console = Console()
    found: dict[str, Any] = {"modes": modes(options, console), "compile": compile_growth(options.blocks, console)}
    if options.model:
        found["pretrained"] = row = transformer.pretrained(options.model, 1)
        console.print(
            f"{row['name']}, 8 x 64 tokens, K = {transformer.STEPS}, mixed, step: {row['temporary'] / 1e6:.0f} MB "
            f"(goal 1000), compile {row['compile_seconds']:.1f} s (goal 30), time / training {row['ratio']:.2f}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "unrolled.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    main(tyro.cli(Options))

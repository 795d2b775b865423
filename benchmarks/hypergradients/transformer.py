"""LoRA in a transformer: what mixed mode and rematerialisation save there, and compile time against depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax

import bilevel
from benchmarks.hypergradients.measure import Compiled, bytes_of, compile_ahead, timed
from benchmarks.hypergradients.problems import Case, lora_transformer

BLOCKS, STEPS = 8, 4
SCHEDULES = ("none", "step", "sqrt")
DEPTHS = (2, 8, 32)


def measure(
    repeats: int, *, blocks: int = BLOCKS, width: int = 128, tokens: int = 128, size: int = 4, steps: int = STEPS
) -> list[dict[str, Any]]:
    """A row for training and one for every mode and schedule, with blocks rematerialised and with blocks stored."""
    rows = []
    for remat in (True, False):
        case = lora_transformer(layers=blocks, width=width, tokens=tokens, size=size, remat=remat)
        programs = {"training": _training(case, steps)}
        for mode in ("mixed", "reverse"):
            for schedule in SCHEDULES:
                programs[f"{mode}, {schedule}"] = _hypergradient(case, steps, mode=mode, checkpoint=schedule)
        times = timed({name: program.call for name, program in programs.items()}, repeats)
        for name, program in programs.items():
            rows.append({"name": name, "blocks": "rematerialised" if remat else "stored", **_costs(program)})
            took = times[name].seconds
            rows[-1] |= {"seconds": took, "ratio": took / times["training"].seconds}
    return rows


def depth(depths: tuple[int, ...] = DEPTHS) -> list[dict[str, Any]]:
    """Compile time at several numbers of blocks."""
    rows = []
    for blocks in depths:
        case = lora_transformer(layers=blocks, width=32, tokens=16, size=2)
        rows.append({"name": f"{blocks} blocks", "blocks": blocks, **_costs(_hypergradient(case, STEPS))})
    return rows


def length(lengths: tuple[int, int], *, blocks: int = BLOCKS) -> list[dict[str, Any]]:
    """Compile time at two numbers of steps, for every schedule."""
    case = lora_transformer(layers=blocks, width=64, tokens=16, size=2)
    rows = []
    for schedule in SCHEDULES:
        for steps in lengths:
            program = _hypergradient(case, steps, checkpoint=schedule)
            rows.append({"name": schedule, "steps": steps, **_costs(program)})
    return rows


def step_memory(case: Case) -> tuple[int, int]:
    """Bytes: temporary of one gradient of the inner loss, and of what training moves (weights, optimizer state)."""
    key = jax.random.key(0)
    outer, batch = case.problem.start_outer(key), case.batch(key)
    state = bilevel.FirstOrder(case.optimizer, 1).init(case.problem, outer, key)

    def gradient(problem, params):
        return jax.grad(lambda params: problem.inner_value(params, outer, batch, key)[0])(params)

    return compile_ahead(gradient, case.problem, state.params).temporary, bytes_of((state.params, state.opt_state))


def pretrained(model: str, repeats: int) -> dict[str, Any]:
    """A hypergradient through LoRA steps on a pretrained model, 8 sequences of 64 tokens."""
    from methods import flexora  # these read weights, and are slow to import
    from methods.adapters.lora import LoRAConfig
    from methods.models.loading import load
    from methods.objective import of_hook

    loaded, lora = load(model), LoRAConfig(rank=8)
    vocabulary = loaded.config.vocab_size

    def loss(weights, adapt, tokens):
        logits = loaded.model.apply({"params": weights}, tokens, None, adapt)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    problem = flexora.problem(of_hook(loss, loaded.weights, lora, loaded.config))
    name = Path(model).name
    case = Case(name, problem, optax.adam(1e-3), lambda key: jax.random.randint(key, (8, 64), 0, vocabulary))
    programs = {"training": _training(case, STEPS), name: _hypergradient(case, STEPS, checkpoint="step")}
    times = timed({name: program.call for name, program in programs.items()}, repeats)
    ratio = times[name].seconds / times["training"].seconds
    return {"name": name, **_costs(programs[name]), "seconds": times[name].seconds, "ratio": ratio}


def _costs(program: Compiled) -> dict[str, Any]:
    return {"temporary": program.temporary, "compile_seconds": program.trace_seconds + program.compile_seconds}


def _hypergradient(case: Case, steps: int, **settings: Any) -> Compiled:
    return _compiled(bilevel.Unrolled(case.optimizer, steps, **settings), case, _estimate)


def _training(case: Case, steps: int) -> Compiled:
    return _compiled(bilevel.FirstOrder(case.optimizer, steps), case, _solve)


def _compiled(estimator: Any, case: Case, function: Any) -> Compiled:
    key = jax.random.key(0)
    outer = case.problem.start_outer(key)
    state = estimator.init(case.problem, outer, key)
    batches, batch = bilevel.FullBatch(case.batch(jax.random.key(1))), case.batch(jax.random.key(2))
    arguments = estimator, case.problem, state, outer, batches, batch, key
    found = compile_ahead(function, *arguments)
    return found._replace(call=lambda: found.call(*arguments))


def _estimate(estimator, *arguments):
    return estimator.estimate(*arguments).grad


def _solve(estimator, problem, state, outer, batches, batch, key):
    return estimator.solve(problem, state, outer, batches, key)

"""What a hypergradient of a language model takes on each device of a mesh, compiled and never allocated.

    python -m benchmarks.scaling --model 8b --devices 8 --rows 8 --tokens 1024

The machine needs no such devices and no such memory: weights and batches are shapes with a place on a mesh, and the
host's processor is told to be as many devices. The row says bytes of one device, and what the compiled program sends
between them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from typing import Any, NamedTuple


class Size(NamedTuple):
    """A Llama: its layers, widths, heads and vocabulary."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(4, 256, 512, 8, 4, 2_048),
    "1b": Size(16, 2_048, 8_192, 32, 8, 128_256),
    "8b": Size(32, 4_096, 14_336, 32, 8, 128_256),
    "70b": Size(80, 8_192, 28_672, 64, 8, 128_256),
}
BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One line of the compiled program that sends: what it does, what comes of it, and its bytes on one device."""

    kind: str
    shape: str
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collective operations in the text of a compiled program. One inside a loop is counted once."""
    found = []
    pattern = rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    for shape, kind in re.findall(pattern, text):
        parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
        size = sum(BYTES.get(dtype, 4) * _product(dims) for dtype, dims in parts)
        found.append(Collective(kind, re.sub(r"\{[^}]*\}", "", shape), size))
    return found


def float32_copies(text: str) -> int:
    """Bytes of the float32 copies of half-precision arguments in the text of a compiled program.

    XLA on a processor makes them, whole and before any loop, because it multiplies in float32; an accelerator does not.
    They are told by name: instructions of the entry that read one bf16 or f16 parameter and give a float32 array of as
    many elements. Each parameter counts once, so that what is left of the temporary memory is not told too small.
    """
    half, copied = {}, set()
    entry = text.partition("ENTRY ")[2]
    for line in entry.splitlines():
        found = re.match(r"\s*%(\S+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\((.*?)\)", line)
        if not found:
            continue
        name, dtype, dims, operation, operands = found.groups()
        if operation == "parameter" and dtype in ("bf16", "f16"):
            half[name] = _product(dims)
        read = re.findall(r"%([^\s,)]+)", operands)
        if dtype == "f32" and len(read) == 1 and half.get(read[0]) == _product(dims):
            copied.add(read[0])
    return sum(4 * half[name] for name in copied)


def _product(dims: str) -> int:
    size = 1
    for dim in filter(None, dims.split(",")):
        size *= int(dim)
    return size


def search_problem(size: Size, tokens: int, *, answers: int = 16, dtype: Any = "bfloat16") -> tuple[Any, Any]:
    """Flexora's problem on a Llama of that size, as a function of its weights, and the shapes of these."""
    import jax
    import jax.numpy as jnp

    from methods import flexora
    from methods.adapters.lora import LoRAConfig
    from methods.models.decoder import Decoder, DecoderConfig
    from methods.objective import of_hook
    from methods.tasks.loss import answer_prediction, cross_entropy

    config = DecoderConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_layers=size.layers,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        max_positions=tokens,
        tied=False,
    )
    model = Decoder(config, param_dtype=jnp.dtype(dtype))
    spec = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), None)["params"])

    def loss(weights, adapt, batch):
        variables = {"params": weights}
        hidden: Any = model.apply(variables, batch.tokens, batch.mask, adapt, method="hidden")
        head: Any = lambda h: model.apply(variables, h, method="head")  # noqa: E731
        return cross_entropy(answer_prediction(head, hidden, batch, answers))

    lora, wide = LoRAConfig(rank=8), dtype if jnp.finfo(dtype).bits > 32 else jnp.float32

    def start(key):  # what is trained is of single precision at least
        drawn = lora.init(key, config.site_shapes(), config.num_layers)
        return jax.tree.map(lambda x: x.astype(wide), drawn)

    return lambda weights: flexora.problem(of_hook(loss, weights, lora, config, start)), spec


def row(size: Size, devices: int, rows: int, tokens: int, *, steps: int = 8, answers: int = 16) -> dict[str, Any]:
    """Compiles Flexora's hypergradient (LoRA of rank 8 on q and v, bfloat16 weights) for a mesh of `fsdp` devices.

    Args:
      size: of the model.
      devices: over which weights and rows are split; 1 for no mesh.
      rows, tokens: of a batch, for the inner steps and for the outer loss.
      steps: inner steps K, mixed mode, each rematerialised.
      answers: tokens of a row that the loss counts.

    Returns:
      Bytes of all weights, and of one device's arguments and temporaries, and how much of the latter are
      `float32_copies`; the collectives of the program by kind, and "sent", each kind and shape of them once, the
      largest first; seconds of tracing and compiling.
    """
    import jax
    import jax.numpy as jnp
    import optax

    import bilevel
    from methods.tasks.encode import TokenBatch

    problem_of, spec = search_problem(size, tokens, answers=answers)
    problem, key = problem_of(spec), jax.random.key(0)
    estimator = bilevel.Unrolled(optax.adam(1e-4), steps, checkpoint="step")
    outer = jax.eval_shape(problem.start_outer, key)

    def batch(*lead: int) -> TokenBatch:
        return TokenBatch(*(jax.ShapeDtypeStruct((*lead, rows, tokens), t) for t in (jnp.int32, jnp.bool_, jnp.bool_)))

    inner_batches, outer_batch = batch(steps), batch()
    if devices > 1:
        sharding = bilevel.Sharding(jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices]), batch="fsdp")
        problem, outer, key = sharding.problem(problem), sharding.replicated(outer), sharding.replicated(key)
        inner_batches = sharding.rows("inner batches", inner_batches, axis=1)
        outer_batch = sharding.rows("outer batch", outer_batch)

    def estimate(problem, outer, inner_batches, outer_batch, key):
        return estimator.estimate(problem, None, outer, inner_batches, outer_batch, key).grad

    begun = time.perf_counter()
    lowered = jax.jit(estimate).lower(problem, outer, inner_batches, outer_batch, key)
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    sent = collectives(text)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(spec))
    return {
        "devices": devices,
        "rows": rows,
        "tokens": tokens,
        "weights": weights,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "float32_copies": float32_copies(text),
        "collectives": dict(Counter(each.kind for each in sent)),
        "sent": sorted(set(sent), key=lambda each: -each.bytes),
        "trace_seconds": traced - begun,
        "compile_seconds": time.perf_counter() - traced,
    }


def main(words: list[str]) -> int:
    """Prints a row as JSON, and as a table on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="8b")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(words)
    flags = f"--xla_force_host_platform_device_count={options.devices} {os.environ.get('XLA_FLAGS', '')}"
    os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    found = row(SIZES[options.model], options.devices, options.rows, options.tokens, steps=options.steps)
    largest = [each._asdict() for each in found.pop("sent")[:8]]
    print(json.dumps({"model": options.model} | found | {"largest": largest}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

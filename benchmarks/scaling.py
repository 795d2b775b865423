"""What a hypergradient of a language model takes on each device of a mesh, compiled and never allocated.

    python -m benchmarks.scaling --model 8b --devices 8 --rows 8 --tokens 1024
    python -m benchmarks.scaling --model 8b --chip v5p:2x2x2 --rows 8 --tokens 1024

The machine needs no such devices and no such memory: weights and batches are shapes with a place on a mesh. Without
`--chip` the host's processor is told to be as many devices. With it the compiler of that TPU is asked, which comes with
`pip install '.[lora,tpu]'` and runs on any Linux machine: what it says is what the chip will hold. The row says
bytes of one device, and what the compiled program sends between them; it is added to `benchmarks/scaling.jsonl`, and
the table of the page *Scaling* is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import Record

RECORD = Path(__file__).with_suffix(".jsonl")


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
    """The collective operations in the text of a compiled program. One inside a loop is counted once.

    The compiler of TPUs writes a reduce-scatter as a function of that name: a sum, of which each device takes a part.
    """
    found = []
    pattern = rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    # A function begins at a line that is not indented: "%name (operands) -> result {".
    for part in re.split(r"\n(?=%|ENTRY )", text):
        scattered = re.match(r"\s*%all-reduce-scatter\S* \(.*?\) -> (\S+) \{", part)
        sends = [(scattered[1], "reduce-scatter")] if scattered else re.findall(pattern, part)
        for shape, kind in sends:
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


def decoder(size: Size, tokens: int, *, dtype: Any = "bfloat16") -> tuple[Any, Any, Any]:
    """A Llama of that size: its configuration, the module, and the shapes of its weights."""
    import jax
    import jax.numpy as jnp

    from methods.models.decoder import Decoder, DecoderConfig

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
    return config, model, spec


def search_problem(size: Size, tokens: int, *, answers: int = 16, dtype: Any = "bfloat16") -> tuple[Any, Any]:
    """Flexora's problem on a Llama of that size, as a function of its weights, and the shapes of these."""
    import jax
    import jax.numpy as jnp

    from methods import flexora
    from methods.adapters.lora import LoRAConfig
    from methods.objective import of_hook
    from methods.tasks.loss import answer_prediction, cross_entropy

    config, model, spec = decoder(size, tokens, dtype=dtype)

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


def mixing_problem(size: Size, tokens: int, rows: int, *, dtype: Any = "bfloat16") -> tuple[Any, Any]:
    """All weights of a Llama are trained, on a batch whose row i counts as softmax(outer)_i; and their shapes.

    The weights are of single precision and are multiplied in `dtype`. Every token but the first is predicted.
    """
    import jax
    import jax.numpy as jnp

    import bilevel
    from methods.models.hooks import identity
    from methods.tasks.loss import answer_log_likelihood_at

    _, model, spec = decoder(size, tokens, dtype=dtype)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), spec)

    def losses(weights, batch):
        variables = {"params": jax.tree.map(lambda x: x.astype(dtype), weights)}
        hidden: Any = model.apply(variables, batch.tokens, batch.mask, identity, method="hidden")
        head: Any = lambda h: model.apply(variables, h, method="head")  # noqa: E731
        return -answer_log_likelihood_at(head, hidden, batch, tokens) / tokens

    problem = bilevel.Problem(
        lambda weights, outer, batch, key: jnp.sum(jax.nn.softmax(outer) * losses(weights, batch)),
        lambda weights, outer, batch, key: jnp.mean(losses(weights, batch)),
        lambda key, outer: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec),
        lambda key: jnp.zeros(rows, jnp.float32),
    )
    return problem, spec


def row(
    size: Size,
    devices: list[Any],
    rows: int,
    tokens: int,
    *,
    steps: int = 8,
    answers: int = 16,
    train: str = "lora",
) -> dict[str, Any]:
    """Compiles a hypergradient (bfloat16 products, mixed mode, each step rematerialised) for a mesh of `fsdp` devices.

    Args:
      size: of the model.
      devices: over which weights and rows are split; one processor for no mesh.
      rows, tokens: of a batch, for the inner steps and for the outer loss.
      steps: inner steps K.
      answers: tokens of a row that the loss of LoRA counts.
      train: "lora" for Flexora's hypergradient with LoRA of rank 8 on q and v, or "all" for that of the weights of rows
        (`mixing_problem`), where all parameters are trained, and split over the devices with their optimizer's state.

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

    if train == "lora":
        problem_of, spec = search_problem(size, tokens, answers=answers)
        problem = problem_of(spec)
    else:
        problem, spec = mixing_problem(size, tokens, rows)
    key = jax.eval_shape(jax.random.key, 0)
    estimator = bilevel.Unrolled(optax.adam(1e-4), steps, checkpoint="step")
    outer = jax.eval_shape(problem.start_outer, key)

    def batch(*lead: int) -> TokenBatch:
        return TokenBatch(*(jax.ShapeDtypeStruct((*lead, rows, tokens), t) for t in (jnp.int32, jnp.bool_, jnp.bool_)))

    inner_batches, outer_batch = batch(steps), batch()
    if len(devices) > 1 or devices[0].platform != "cpu":
        mesh = jax.make_mesh((len(devices),), ("fsdp",), devices=devices)
        sharding = bilevel.Sharding(mesh, batch="fsdp", inner="weights" if train == "all" else None)
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
        "devices": len(devices),
        "rows": rows,
        "tokens": tokens,
        "steps": steps,
        "train": train,
        "weights": weights,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "float32_copies": float32_copies(text),
        "collectives": dict(Counter(each.kind for each in sent)),
        "sent": sorted(set(sent), key=lambda each: -each.bytes),
        "trace_seconds": traced - begun,
        "compile_seconds": time.perf_counter() - traced,
    }


def devices_of(chip: str, count: int | None) -> list[Any]:
    """The devices to compile for: `count` of this machine's for "cpu", else those of a slice of TPUs that need not be.

    Args:
      chip: "cpu", or a kind of TPU and the shape of its slice, such as "v5p:2x2x2" or "v6e:2x4".
      count: how many of them; all of a slice if None.
    """
    import jax

    if chip == "cpu":
        return jax.devices()[: count or 8]
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=chip).devices)[:count]


def table(record: Record) -> str:
    """What was compiled, as a table in Markdown."""
    head = "| trained | model | device | devices | rows × tokens | weights | temporary | of it float32 copies | left |"
    lines = [head + " sums that are scattered | compiled in |", "|---" * 11 + "|"]
    for row in record.find(section="scaling"):
        gigabytes = [row["weights"] / row["devices"], row["temporary"], row["float32_copies"]]
        gigabytes.append(row["temporary"] - row["float32_copies"])
        cells = [
            "LoRA" if row["train"] == "lora" else "all weights",
            f"Llama, {row['model'].upper()}",
            "processor" if row["chip"] == "cpu" else f"TPU {row['chip'].partition(':')[0]}",
            str(row["devices"]),
            f"{row['rows']} × {row['tokens']:,}",
            *(f"{x / 1e9:.1f} GB" for x in gigabytes),
            str(row["collectives"].get("reduce-scatter", 0)),
            f"{row['compile_seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Compiles a row, adds it to the record, prints what it sends and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="8b")
    parser.add_argument("--chip", default="cpu", help="cpu, or a slice of TPUs such as v5p:2x2x2 or v6e:2x4")
    parser.add_argument("--devices", type=int, help="8 of cpu, all of a slice, if not given")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--train", choices=("lora", "all"), default="lora")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args(words)
    flags = f"--xla_force_host_platform_device_count={options.devices or 8} {os.environ.get('XLA_FLAGS', '')}"
    os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    # The library of TPUs asks the cloud which machine it is on, unless it is told.
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-16", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= told | {name: os.environ[name] for name in told if name in os.environ}
    devices = devices_of(options.chip, options.devices)
    found = row(
        SIZES[options.model], devices, options.rows, options.tokens, steps=options.steps, train=options.train
    )
    largest = {each.kind: [each.shape, each.bytes] for each in reversed(found.pop("sent"))}
    record = Record(options.out)
    record.add([{"section": "scaling", "model": options.model, "chip": options.chip} | found | {"largest": largest}])
    print(json.dumps(record.rows[-1], indent=1))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

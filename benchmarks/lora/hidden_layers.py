r"""Hidden layers: an update is hidden in a few layers of a pretrained model; does the search find them?

The teacher is the model with a low-rank update, `size` of each matrix's own norm, on q and v of `planted` of its
layers. The student is the model as it is, with LoRA on q and v of all layers, and learns the teacher's last hidden
states h of random tokens,

$$ L = \mathrm{mean}\, (h_{student} - h_{teacher})^2 \,/\, \mathrm{var}\, h_{teacher}, $$

whose minimum 0 is reached by the hidden update. Four scores of a layer are told beside each other by their AUROC, how
often a layer with an update has a larger score than one without:

    hypergradient  `bilevel allocate`: the components of a trained LoRA at half of their size, through K steps
    size           squared singular values of that LoRA (`--score singular-values`)
    first gradient squared norm of the gradient of a fresh LoRA's B, over as many rows as the training sees
    flexora        the logits after some outer steps of `bilevel flexora`, from a fresh LoRA

    python -m benchmarks.lora.hidden_layers --model FILE --out FOLDER   # table, figure and record of one draw
    python -m benchmarks.lora.hidden_layers --model FILE --out FOLDER --seeds 5
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import bilevel
from benchmarks.lora.planted import auroc
from benchmarks.record import Record, Row
from methods import allocate, figures, fingerprint, flexora, lora, models, ranges
from methods.adapters.lora import LoRAConfig
from methods.objective import Given, of_hook
from methods.ranges import Count, CountOrNone, Positive, finite

SITES = ("q_proj", "v_proj")
WAYS = {
    "hypergradient": "hypergradient, halved components of a trained LoRA",
    "size": "size of what that LoRA has learned",
    "first gradient": "gradient of a fresh LoRA",
    "flexora": "Flexora's logits, from a fresh LoRA",
}


@dataclasses.dataclass(frozen=True)
class Hidden:
    """The numbers of the benchmark.

    Attributes:
      model: a .gguf file, or a folder in Hugging Face layout, of a decoder.
      out: where the record and the figure go; the record goes on where it was.
      seeds: so many draws of layers, update, rows and start.
      planted: layers with an update.
      rank: of the update, and of LoRA.
      size: norm of the update, relative to that of the matrix it is on.
      rows, tokens: random sequences, of which half are for validation.
      batch: sequences a step.
      warmup: steps of Adam of the training whose components are scored.
      rate: its learning rate.
      unroll: K.
      outer: hypergradients that are summed.
      flexora: outer steps of Flexora, each through K steps; 0 leaves it out.
    """

    model: Path
    out: Path
    seeds: Count = 1
    planted: Count = 5
    rank: Count = 8
    size: Positive = 0.3
    rows: Count = 400
    tokens: Count = 32
    batch: Count = 4
    warmup: Count = 40
    rate: Positive = 3e-3
    unroll: Count = 2
    outer: Count = 6
    flexora: CountOrNone = 8

    @property
    def ways(self) -> list[str]:
        """Those of `WAYS` that are measured."""
        return [name for name in WAYS if name != "flexora" or self.flexora]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one seed draws: where the update is, `[L]`, it, the losses, and rows with the teacher's answers."""

    there: np.ndarray
    update: Any
    given: Given
    train: Any
    val: Any


def draw(hidden: Hidden, pretrained: models.Pretrained, key: jax.Array) -> Drawn:
    """The teacher of one seed, and what it says."""
    keys, config, weights = jax.random.split(key, 4), pretrained.config, pretrained.weights
    adapter = LoRAConfig(hidden.rank, float(hidden.rank), list(SITES))
    chosen = jax.random.permutation(keys[0], config.num_layers)[: hidden.planted]
    there = np.isin(np.arange(config.num_layers), np.asarray(chosen))
    update = {}
    for number, (site, leaves) in enumerate(adapter.init(keys[1], config.site_shapes(), config.num_layers).items()):
        b = jax.random.normal(jax.random.fold_in(keys[1], number), leaves["b"].shape)
        kernel = weights["blocks"][site]["kernel"]
        own, drawn = (jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=(1, 2))) for x in (kernel, leaves["a"] @ b))
        update[site] = {"a": leaves["a"], "b": b * jnp.where(there, hidden.size * own / drawn, 0.0)[:, None, None]}

    def states(weights: Any, hook: Any, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(pretrained.model.apply({"params": weights}, tokens, None, hook, method="hidden"))

    def loss(weights: Any, hook: Any, batch: Any) -> jax.Array:
        return jnp.mean((states(weights, hook, batch["tokens"]) - batch["states"]) ** 2)

    @jax.jit
    def answers(weights: Any, update: Any, tokens: jax.Array) -> jax.Array:
        teach = lambda few: states(weights, adapter.bind(update, base=weights["blocks"]), few)  # noqa: E731
        return jax.lax.map(teach, tokens)

    # Token ids of the first hundreds are often bytes and marks; all others are words and parts of words.
    shape = (hidden.rows // hidden.batch, hidden.batch, hidden.tokens)
    tokens = jax.random.randint(keys[2], shape, min(500, config.vocab_size // 2), config.vocab_size, jnp.int32)
    said = answers(weights, update, tokens)
    # A scale for all rows, so that the loss is a share of the variance.
    rows = {"tokens": tokens, "states": said}
    rows = {name: np.asarray(x.reshape(-1, *x.shape[2:])) for name, x in rows.items()}
    spread = float(rows["states"].std())
    scaled = lambda weights, hook, batch: loss(weights, hook, batch) / spread**2  # noqa: E731
    half = hidden.rows // 2
    train, val = ({name: x[part] for name, x in rows.items()} for part in (slice(half), slice(half, None)))
    return Drawn(there, update, of_hook(scaled, weights, adapter, config), train, val)


def scores(hidden: Hidden, drawn: Drawn, key: jax.Array) -> dict[str, np.ndarray]:
    """Of each way the score of every layer, `[L]`."""
    given, keys = drawn.given, jax.random.split(key, 3)
    train, val = bilevel.Batches(drawn.train, hidden.batch), bilevel.Batches(drawn.val, hidden.batch)
    optimizer, everywhere = optax.adam(hidden.rate), lora.everywhere(given)
    problem = lora.problem(given)

    @jax.jit
    def gradient(weights: Any, params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: given.loss(weights, given.bind(weights, p), batch))(params)["lora"]

    fresh, norms = given.start(keys[0]), np.zeros(given.num_layers)
    for number in range(hidden.warmup):
        rows = np.arange(number * hidden.batch, (number + 1) * hidden.batch) % len(drawn.train["tokens"])
        found = gradient(given.weights, fresh, jax.tree.map(lambda x, rows=rows: x[rows], drawn.train))
        norms += np.sum([np.asarray((leaves["b"] ** 2).sum((1, 2))) for leaves in found.values()], axis=0)
    told = {"first gradient": norms}

    trained = bilevel.fit(
        problem, everywhere, optimizer=optimizer, data=train, steps=hidden.warmup, key=keys[0], title="warm-up"
    ).inner.params
    start = trained | {"lora": allocate.rotated(trained["lora"])}
    setup = allocate.Used(
        model="", per="rank", rank=hidden.rank, max_rank=hidden.rank, inner_steps=hidden.unroll, inner_lr=hidden.rate
    )
    told["size"] = of_layers(allocate.energies(setup, start["lora"]))
    result = bilevel.run(
        allocate.solver(setup, given, start),
        inner_data=train, outer_data=val, steps=hidden.outer, key=keys[1], title="search",
    )  # fmt: skip
    told["hypergradient"] = of_layers(result.outer)

    if hidden.flexora:
        search = bilevel.Nested(
            flexora.problem(given),
            bilevel.Unrolled(optimizer, hidden.unroll, checkpoint="step"),
            optax.adam(0.2),
        )
        found = bilevel.run(
            search, inner_data=train, outer_data=val, steps=hidden.flexora, key=keys[2], title="Flexora"
        )
        told["flexora"] = np.asarray(found.outer)
    return {name: told[name] for name in WAYS if name in told}


def of_layers(components: Any) -> np.ndarray:
    """The scores of layers, `[L]`, from those of the components of their modules, `{site: [L, r]}`."""
    return np.sum([np.asarray(score).sum(axis=1) for score in components.values()], axis=0)


def judged(hidden: Hidden, there: np.ndarray, score: np.ndarray) -> Row:
    """AUROC, and how many of the layers with an update are among as many with the largest scores."""
    best = np.argsort(-score, kind="stable")[: hidden.planted]
    return {"auroc": float(auroc(score, there)), "found": int(there[best].sum())}


def measure(hidden: Hidden, record: Record) -> list[Row]:
    """The row of each way and seed; those that the record lacks are measured, and added to it.

    A model is known by what its files hold, `sha256` of a row, wherever they are and whatever they are called.

    Raises:
      ValueError: if an option is out of its range, if the record holds another model or other settings, whose rows
        these would be mixed with, or what is no row of this benchmark.
      FileNotFoundError: if there is no such model.
    """
    ranges.check(hidden)
    if not hidden.model.exists():
        raise FileNotFoundError(f"--model {hidden.model} is not there: name a .gguf file or a folder.")
    asked = {name: value for name, value in dataclasses.asdict(hidden).items() if name not in ("model", "out", "seeds")}
    digest = fingerprint.digest(hidden.model)
    for number, row in enumerate(record.rows, 1):
        at = f"{record.path}, line {number}"
        if not _is_row(row):
            raise ValueError(f"{at} is no row of this benchmark: remove it, and it is made again.")
        if row.get("sha256") != digest or row["settings"] != asked:
            what = "other settings" if row.get("sha256") == digest else "another model, or of one that it does not tell"
            raise ValueError(f"{at} is of {what}: name another folder with --out.")
    jobs = [(seed, way) for seed in range(hidden.seeds) for way in hidden.ways]
    first = lambda: {(row["seed"], row["way"]): row for row in reversed(record.rows)}  # noqa: E731
    left = [job for job in jobs if job not in first()]
    if left:
        pretrained = models.load(hidden.model)
    for seed in dict.fromkeys(seed for seed, _ in left):
        begun, key = time.perf_counter(), jax.random.key(seed)
        drawn = draw(hidden, pretrained, key)
        told = scores(hidden, drawn, jax.random.fold_in(key, 1))
        seconds, name = time.perf_counter() - begun, hidden.model.name.removesuffix(".gguf")
        made = {"seconds": seconds, "model": name, "sha256": digest, "settings": asked}
        record.add(
            [
                {"seed": seed, "way": way, **judged(hidden, drawn.there, score), "scores": score.tolist()}
                | {"there": drawn.there.tolist(), **made}
                for way, score in told.items()
                if (seed, way) in left
            ]
        )
    return [first()[job] for job in jobs]


def _is_row(row: Row) -> bool:
    """Whether a row of the record is one of these: it has what is read of it."""
    lists = [row.get(name) for name in ("scores", "there")]
    return (
        row.get("way") in WAYS
        and type(row.get("seed")) is int
        and isinstance(row.get("settings"), dict)
        and all(finite(row.get(name)) for name in ("auroc", "found"))
        and all(isinstance(each, list) and each for each in lists)
        and all(map(finite, lists[0] or []))
        and all(isinstance(each, bool) for each in lists[1] or [])
        and len(lists[0] or []) == len(lists[1] or [])
    )


def table(rows: list[Row]) -> Table:
    """What was found, a line for each way, as means over seeds."""
    planted, seeds = sum(rows[0]["there"]), len({row["seed"] for row in rows})
    shown = Table("layers ranked by", "AUROC", f"found of {planted}", box=None, pad_edge=False)
    verb, draws = "has" if planted == 1 else "have", f"{seeds} draw{'s' * (seeds > 1)}"
    shown.title = f"{planted} of {len(rows[0]['there'])} layers {verb} a hidden update ({draws})"
    for name, what in WAYS.items():
        if own := [row for row in rows if row["way"] == name]:
            found = np.mean([row["found"] for row in own])
            shown.add_row(what, f"{np.mean([row['auroc'] for row in own]):.3f}", f"{found:.3g}")
    return shown


def figure(rows: list[Row]) -> Any:
    """The scores of one draw, a panel for each way; layers with a hidden update are orange."""
    plt = figures.pyplot()
    fig, axes = plt.subplots(len(rows), 1, figsize=(7.2, 0.6 + 1.3 * len(rows)), sharex=True, layout="constrained")
    for axis, row in zip(np.atleast_1d(axes), rows, strict=True):
        score, there = np.asarray(row["scores"]), np.asarray(row["there"])
        axis.bar(np.arange(len(score)), score / np.abs(score).max(), color=np.where(there, "#e07a2f", "#9bb7cc"))
        axis.set_title(f"{WAYS[row['way']]}: AUROC {row['auroc']:.2f}", fontsize=10, loc="left")
        axis.axhline(0, color="black", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(ylabel="score", yticks=[0, 1])
    axes[-1].set_xlabel("layer (orange: has a hidden update)")
    return fig


def main(hidden: Hidden) -> None:
    """Measures what the record lacks; prints the table, and draws the first draw."""
    hidden.out.mkdir(parents=True, exist_ok=True)
    rows = measure(hidden, Record(hidden.out / "hidden_layers.jsonl"))
    figures.save(figure([row for row in rows if row["seed"] == 0]), hidden.out / "hidden_layers.png")
    console = Console()
    console.print()
    console.print(table(rows))
    console.print(f"{hidden.out / 'hidden_layers.png'}  (the scores of every layer)", soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Hidden, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error

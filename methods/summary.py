"""Figures and pages of the methods that act inside training: learned rates, closed gates, edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from methods import report
from methods.experiment import Bench
from methods.report import accuracy_table, save_figure
from methods.runfolder import RunFolder


def page(
    folder: RunFolder,
    settings: Any,
    bench: Bench,
    title: str,
    found: str,
    figures: Mapping[str, str],
    arms: Sequence[str],
    made: str,
) -> None:
    """`report.md`: what was found, with its figures, what it is worth on the test rows, and how it was made.

    Args:
      folder: the run's; its `results/<arm>.json` are the rows of the table.
      settings, bench: of the run.
      title: the method's name.
      found: Markdown.
      figures: file name in `figures/` -> caption.
      arms: models compared.
      made: Markdown, what this method adds to what is said of every run.
    """
    results = {name: folder.read(f"results/{name}") for name in arms}
    shown = "\n\n".join(f"![{caption}](figures/{file})" for file, caption in figures.items())
    folder.write_text(
        "report.md",
        f"""# {title} on {bench.task.name}, {Path(settings.model).name}

## What was found

{found}

{shown}

## What it is worth

{accuracy_table(results)}

Test: {report.tested(bench)} of the published {bench.task.test} set, which no search or training saw. Intervals
are Wilson's 95 % binomial intervals; smaller differences between two rows say nothing by themselves.

## How it was made

Trained on {len(bench.splits.train)} rows; what is outer, on {len(bench.splits.outer)} other rows of the published
training set ({bench.left_out:,} of its rows were not considered: longer than {settings.length} tokens, or beyond what
was asked for). LoRA rank {settings.rank}, alpha {settings.lora_alpha:g} on
{", ".join(bench.lora.sites(bench.pretrained.config.site_shapes()))}; {settings.finetune_steps} training steps, peak
learning rate {settings.finetune_lr:g}. {made} All settings: `config.json`; every step: `metrics.jsonl`.
""",
    )


def curves(file: Path, history: Mapping[str, np.ndarray], xlabel: str, title: str) -> None:
    """One panel for each name: `[T]`, or `[T, L]` with colour by depth."""
    plt = report.pyplot()
    fig, axes = plt.subplots(1, len(history), figsize=(3.6 * len(history), 3.0), layout="constrained", squeeze=False)
    for ax, (name, values) in zip(axes[0], history.items(), strict=True):
        values = np.asarray(values)
        lines = values if values.ndim == 2 else values[:, None]
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, lines.shape[1]))
        for line, colour in zip(lines.T, colours, strict=True):
            ax.plot(np.arange(1, len(line) + 1), line, color=colour, lw=1.4, marker="o" if len(line) < 20 else "", ms=3)
        ax.set(xlabel=xlabel, ylabel=name)
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title)
    save_figure(fig, file)


def gate_map(file: Path, shares: Mapping[str, np.ndarray], title: str) -> None:
    """Share of open gates, `{structure: [L]}`, as a map of layers and structures."""
    plt = report.pyplot()
    table = np.stack([np.asarray(share) for share in shares.values()])
    fig, ax = plt.subplots(figsize=(1.6 + 0.45 * table.shape[1], 1.6 + 0.32 * table.shape[0]), layout="constrained")
    image = ax.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set(xlabel="layer", title=title, yticks=range(len(shares)), yticklabels=list(shares))
    ax.set_xticks(range(table.shape[1]))
    for (row, column), share in np.ndenumerate(table):
        ax.text(
            column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color="white" if share > 0.6 else "black"
        )
    fig.colorbar(image, ax=ax, label="share open")
    save_figure(fig, file)


def sparsity_curve(file: Path, results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """The primary metric against the counted share of removed weights; models that remove none as lines."""
    plt = report.pyplot()
    fig, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    metric = next(iter(next(iter(results.values()))["metrics"]))
    points = sorted((row["removed"], row["metrics"][metric]) for row in results.values() if "removed" in row)
    ax.plot([x for x, _ in points], [y for _, y in points], "o-", color="#2a6f97", label="gated")
    dense = [(name, row) for name, row in results.items() if "removed" not in row]
    for (name, row), style in zip(dense, (":", "--", "-."), strict=False):
        ax.axhline(row["metrics"][metric], color="black", lw=0.9, ls=style, label=name)
    ax.set(xlabel="share of linear weights removed (counted)", ylabel=metric, title=title)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(fig, file)


def rates(
    folder: RunFolder,
    settings: Any,
    bench: Bench,
    history: Mapping[str, np.ndarray],
    arms: Sequence[str],
    hypergradient: str,
) -> None:
    """`figures/rates.png` and `report.md` of a HiddenKey run; `hypergradient` says in words what that was."""
    (folder.path / "figures").mkdir(exist_ok=True)
    curves(folder.path / "figures" / "rates.png", history, "outer step", "Learned dropout rates and loss weight")
    learned = [f"- {name}: {_numbers(values[-1])}" for name, values in history.items()]
    for name in arms:
        learned.append(f"- validation loss, {name}: {folder.read(f'results/{name}')['validation_loss']:.4f}")
    if settings.grid:
        points = folder.read("grid")
        best = min(points, key=lambda point: point["validation_loss"])
        there = ", ".join(f"{name} {value:g}" for name, value in best.items() if name != "validation_loss")
        learned.append(f"- the best of {len(points)} points of the grid: {there}")
    made = (
        f"Rules: {'; '.join(settings.rules)}. Rates started at {settings.rate:g} and beta at {settings.beta:g}; "
        f"{settings.outer_steps} outer steps of {settings.inner_steps} inner steps, hypergradient "
        f"{hypergradient}, masks of temperature {settings.temperature:g}; hard masks afterwards."
    )
    shown = {"rates.png": "rates over the search"}
    page(folder, settings, bench, "HiddenKey", "\n".join(learned), shown, arms, made)


def pruning(folder: RunFolder, settings: Any, bench: Bench, gated: Sequence[str]) -> None:
    """Gate maps, the sparsity curve and `report.md` of a FineGates run; `gated` are the pruned models' names."""
    figures = folder.path / "figures"
    figures.mkdir(exist_ok=True)
    arms = ["lora", *gated]
    results = {name: folder.read(f"results/{name}") for name in arms}
    shown = {"sparsity.png": "metric against removed weights"}
    sparsity_curve(figures / "sparsity.png", results, f"{bench.task.name}: what removed weights cost")
    found = []
    for name in gated:
        row = results[name]
        gate_map(figures / f"gates-{name}.png", row["open"], f"Open gates, {name}")
        shown[f"gates-{name}.png"] = f"open gates, {name}"
        cut = f"; the sliced model differs from the gated one by {row['sliced_differs_by']:.1e}"
        found.append(
            f"- {name}: {100 * row['removed']:.1f} % of the blocks' linear weights removed (counted)"
            + (cut if "sliced_differs_by" in row else "")
        )
    level = {"none": "trained with the biases", "gates": "chosen on the outer rows", "sparsity": "trained at a learned"}
    made = (
        f"Gates ({settings.gating}, {settings.family}) {level[settings.outer]}"
        f"{' sparsity weight' if settings.outer == 'sparsity' else ''}, {'with' if settings.lora else 'without'} LoRA; "
        f"lambda_s {settings.weight:g}."
    )
    page(folder, settings, bench, "FineGates", "\n".join(found), shown, arms, made)


def edited(folder: RunFolder, settings: Any, bench: Bench) -> None:
    """`figures/training.png` and `report.md` of a LoRATRF run."""
    (folder.path / "figures").mkdir(exist_ok=True)
    arms = ["loratrf", "lora"]
    losses = {name: np.array([row["inner_loss"] for row in folder.rows(f"finetune {name}")]) for name in arms}
    curves(folder.path / "figures" / "training.png", losses, "step", "Training loss")
    found = (
        "This is a reconstruction: the paper's text and code were not to be had (see `methods.loratrf`). An edit "
        "behind a filter depends on its input and does not merge into the weights."
    )
    made = (
        f"Filter {settings.filter} on {settings.place}, vectors from {settings.vectors}, edit rank "
        f"{settings.edit_rank}; outer: {settings.outer}."
    )
    page(folder, settings, bench, "LoRATRF (reconstructed)", found, {"training.png": "training loss"}, arms, made)


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.3f}" for value in np.atleast_1d(values))

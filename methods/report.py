"""Figures, tables and the page that tells what a run found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from methods import experiment
from methods.experiment import Bench
from methods.runfolder import RunFolder
from methods.tasks import Evaluation


def arm(bench: Bench, layers: list[int], evaluation: Evaluation) -> dict[str, Any]:
    """One row of the comparison, as it is stored: which layers, how many parameters, how many right."""
    return {
        "layers": layers,
        "parameters": experiment.trainable_parameters(bench, layers),
        "accuracy": evaluation.accuracy._asdict(),
        "accuracy_per_token": evaluation.per_token._asdict(),
        "accuracy_unnormalised": evaluation.unnormalised._asdict(),
        "predictions": evaluation.predictions,
    }


def layer_selection(
    folder: RunFolder, settings: Any, bench: Bench, alpha: np.ndarray, chosen: list[int], rule: str, arms: list[str]
) -> None:
    """`figures/alpha.png`, `figures/selection.png` and `report.md` of a layer selection.

    Args:
      folder: the run's; its `results/<arm>.json` are the rows of the table.
      alpha: layer logits after every outer step, `[T, n]`.
      chosen: the selected layers.
      rule: how they were selected.
      arms: names of the trained models compared.
    """
    results = {name: folder.read(f"results/{name}") for name in arms}
    figures = folder.path / "figures"
    figures.mkdir(exist_ok=True)
    alpha_figure(figures / "alpha.png", alpha, chosen)
    selection_figure(figures / "selection.png", alpha[-1], chosen, rule)
    folder.write_text("report.md", _page(settings, bench, alpha, chosen, rule, results))


def alpha_figure(file: Path, alpha: np.ndarray, chosen: list[int]) -> None:
    """Layer logits over outer steps, colour by depth, the selected ones drawn through, the others dashed."""
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    path = np.concatenate([np.zeros((1, alpha.shape[1]), alpha.dtype), alpha])
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, alpha.shape[1]))
    for layer, colour in enumerate(colours):
        selected = layer in chosen
        ax.plot(path[:, layer], color=colour, lw=1.6 if selected else 0.8, ls="-" if selected else (0, (3, 2)))
    scale = plt.cm.ScalarMappable(norm=plt.Normalize(0, alpha.shape[1] - 1), cmap="viridis")
    fig.colorbar(scale, ax=ax, label="layer")
    ax.set(xlabel="outer step", ylabel=r"layer logit $\alpha$", title="Layer logits (dashed: not selected)")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def selection_figure(file: Path, alpha: np.ndarray, chosen: list[int], rule: str) -> None:
    """Final layer logits as bars, the selected ones filled."""
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    colours = ["#2a6f97" if layer in chosen else "#d0d5da" for layer in range(len(alpha))]
    ax.bar(np.arange(len(alpha)), alpha, color=colours)
    ax.axhline(alpha.mean(), color="black", lw=0.8, ls=":")
    title = f"Selected: {len(chosen)} of {len(alpha)} layers ({rule}; dotted: mean)"
    ax.set(xlabel="layer", ylabel=r"$\alpha$", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def accuracy_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: parameters, accuracy and its 95 % interval for each model."""
    lines = [
        "| model | layers | trainable parameters | accuracy per character | 95 % interval | right |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in results.items():
        score = row["accuracy"]
        lines.append(
            f"| {name} | {len(row['layers'])} | {row['parameters']:,} | {100 * score['value']:.1f} % "
            f"| {100 * score['low']:.1f} to {100 * score['high']:.1f} % | {score['correct']}/{score['total']} |"
        )
    return "\n".join(lines)


def paired_difference(first: dict[str, Any], second: dict[str, Any], labels: np.ndarray) -> tuple[int, int, float]:
    """Questions only the first got right, only the second, and the two-sided exact sign test of the difference."""
    right = [np.asarray(row["predictions"]) == labels for row in (first, second)]
    wins, losses = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    n, k = wins + losses, min(wins, losses)
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    return wins, losses, p


def _page(settings, bench: Bench, alpha, chosen, rule, results) -> str:
    labels = np.array([row["label"] for row in bench.splits.test])
    steps, count = alpha.shape
    agreement = _halves(alpha)
    width = max(row["accuracy"]["high"] - row["accuracy"]["low"] for row in results.values())
    compared = "\n".join(
        "- against {}: {} questions only flexora got right, {} only the other; p = {:.2f} (exact sign test)".format(
            name, *paired_difference(results["flexora"], row, labels)
        )
        for name, row in results.items()
        if name != "flexora"
    )
    if settings.released:
        kind = "as the released code computes it (first order, cubed gate)"
    else:
        kind = {"unrolled": "through the unrolled training", "first-order": "first order"}[settings.hypergradient]
    return f"""# Flexora on {bench.task.name}, {Path(settings.model).name}

## What was found

{len(chosen)} of {count} layers, by the rule {rule}: {", ".join(map(str, chosen))}.

![layer logits over time](figures/alpha.png)

![selection](figures/selection.png)

## What it is worth

{accuracy_table(results)}

Test rows: {len(labels)} of the published validation set, which no search or training saw. Intervals are Wilson's 95 %
binomial intervals; the widest is {100 * width:.0f} points across, and smaller differences between two rows say nothing
by themselves. On the same questions:

{compared}

## How far to trust the selection

The search took {steps} outer steps of {1 if settings.released else settings.inner_steps} inner steps each, batches of
{settings.batch_size} training and {settings.outer_batch_size} validation rows, the hypergradient taken {kind}.
{agreement}
{_warning(steps, count)}
## How it was made

Trained on {len(bench.splits.train)} rows, alpha on {len(bench.splits.outer)} other rows of the published training set
({bench.left_out:,} of its rows were not considered: longer than {settings.length} tokens, or beyond what was asked
for; {bench.splits.dropped} share a subject with the test). LoRA rank {settings.rank}, alpha {settings.lora_alpha:g} on
{", ".join(bench.lora.sites(bench.pretrained.config.site_shapes()))}; final training {settings.finetune_steps} steps of
AdamW from scratch, peak learning rate {settings.finetune_lr:g}, the same for every row of the table.
The adapter of the selected layers is in `adapter/`, in PEFT's format. All settings: `config.json`; every step:
`metrics.jsonl`.
"""


def _halves(alpha: np.ndarray) -> str:
    steps = len(alpha)
    if steps < 4:
        return "Too few steps to compare one half of the search with the other."
    first, second = alpha[steps // 2 - 1], alpha[-1] - alpha[steps // 2 - 1]
    ranks = np.stack([np.argsort(np.argsort(x)) for x in (first, second)])
    rho = float(np.corrcoef(ranks).ravel()[1])
    return (
        f"What the first and the second half of the search did to the layers has rank correlation {rho:+.2f} "
        "(1: the same order, 0: unrelated)."
    )


def _warning(steps: int, layers: int) -> str:
    if steps >= 3 * layers:
        return ""
    return (
        f"\n**So short a search cannot rank {layers} layers.** {steps} noisy steps move {layers} logits by less than "
        "the batches' own noise; this run demonstrates the machinery. `--preset evidence` is the long one.\n"
    )


def _pyplot() -> Any:
    import matplotlib  # half a second, and only needed at the end

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt

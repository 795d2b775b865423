"""Figures, tables and the page that tells what a run found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from methods import experiment, files
from methods.experiment import Bench, Where
from methods.runfolder import RunFolder
from methods.tasks import METRICS, Accuracy, Classified, Evaluation, Written, units


def arm(bench: Bench, where: Where, evaluation: Evaluation | Classified | Written) -> dict[str, Any]:
    """One row of the comparison, as it is stored: which modules, how many parameters, how well on the test rows."""
    on = {site: np.asarray(mask) for site, mask in experiment.modules(bench, where).items()}
    row = {
        "layers": np.flatnonzero(np.any(list(on.values()), axis=0)).tolist(),
        "on": {site: mask.astype(int).tolist() for site, mask in on.items()},
        "parameters": experiment.trainable_parameters(bench, where),
        "predictions": evaluation.predictions,
        "right": None if evaluation.right is None else evaluation.right.astype(int),
        "cut": evaluation.cut,
    }
    if not isinstance(evaluation, Evaluation):
        row["metrics"] = evaluation.metrics
        if evaluation.right is not None:
            row["accuracy"] = Accuracy.of(evaluation.right)._asdict()
        return row
    return row | {
        "metrics": {
            "accuracy per character": evaluation.accuracy.value,
            "accuracy per token": evaluation.per_token.value,
        },
        "accuracy": evaluation.accuracy._asdict(),
        "accuracy_per_token": evaluation.per_token._asdict(),
        "accuracy_unnormalised": evaluation.unnormalised._asdict(),
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
    folder.write_text("report.md", _page(folder, settings, bench, alpha, chosen, rule, results))


def training(folder: RunFolder, settings: Any, bench: Bench, arms: list[str]) -> None:
    """`figures/training.png` and `report.md` of fine-tuning runs.

    Args:
      folder: the run's; its `results/<arm>.json` are the rows of the table.
      arms: names of the models compared, the trained ones also those of their metrics.
    """
    results = {name: folder.read(f"results/{name}") for name in arms}
    figures = folder.path / "figures"
    figures.mkdir(exist_ok=True)
    training_figure(figures / "training.png", folder, arms)
    folder.write_text("report.md", _training_page(settings, bench, results))


def training_figure(file: Path, folder: RunFolder, arms: list[str]) -> None:
    """Training loss over batches, smoothed over a twentieth of them, with the validation losses as dots."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for name in arms:
        rows = folder.rows(f"finetune {name}")
        if not rows:
            continue
        loss = np.array([row["inner_loss"] for row in rows])
        window = max(1, len(loss) // 20)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        (line,) = ax.plot(np.arange(window, len(loss) + 1), smooth, lw=1.2, label=f"{name}, training")
        if (folder.path / f"validation/{name}.json").is_file():
            points = folder.read(f"validation/{name}")
            at, values = [p["step"] for p in points], [p["loss"] for p in points]
            ax.plot(at, values, "o--", ms=4, lw=0.8, color=line.get_color(), label=f"{name}, validation")
    ax.set(xlabel="batch", ylabel="loss", title="Loss")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(fig, file)


def alpha_figure(file: Path, alpha: np.ndarray, chosen: list[int]) -> None:
    """Layer logits over outer steps, colour by depth, the selected ones drawn through, the others dashed."""
    plt = pyplot()
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
    save_figure(fig, file)


def selection_figure(file: Path, alpha: np.ndarray, chosen: list[int], rule: str) -> None:
    """Final layer logits as bars, the selected ones filled."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    colours = ["#2a6f97" if layer in chosen else "#d0d5da" for layer in range(len(alpha))]
    ax.bar(np.arange(len(alpha)), alpha, color=colours)
    ax.axhline(alpha.mean(), color="black", lw=0.8, ls=":")
    title = f"Selected: {len(chosen)} of {len(alpha)} layers ({rule}; dotted: mean)"
    ax.set(xlabel="layer", ylabel=r"$\alpha$", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(fig, file)


def accuracy_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: parameters, the task's metrics, and for classes the share that is right and its interval."""
    metrics = list(next(iter(results.values()))["metrics"])
    titles = ["model", "layers", "trainable parameters", *metrics]
    counted = all("accuracy" in row for row in results.values())
    titles += ["95 % interval of accuracy", "right"] if counted else []
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for name, row in results.items():
        cells = [name, str(len(row["layers"])), f"{row['parameters']:,}"]
        cells += [f"{100 * row['metrics'][metric]:.1f}" for metric in metrics]
        if counted:
            score = row["accuracy"]
            cells += [f"{100 * score['low']:.1f} to {100 * score['high']:.1f}", f"{score['correct']}/{score['total']}"]
        lines.append(f"| {' | '.join(cells)} |")
    if cut := max(row.get("cut", 0) for row in results.values()):
        lines.append(f"\n**{cut} test texts were longer than the model takes and were cut.**")
    return "\n".join(lines)


def tested(bench: Bench) -> str:
    """How much was tested, in words: rows, and where texts are written the prompts whose references they are."""
    rows, prompts = len(bench.splits.test), len(units(bench.task, bench.splits.test))
    return f"{prompts} prompts with {rows} references" if prompts < rows else f"{rows} rows"


def paired_difference(first: Any, second: Any) -> tuple[int, int, float]:
    """Questions only the first got right, only the second, and the two-sided exact sign test of the difference.

    Args:
      first, second: `[questions]`, whether each was right.
    """
    right = [np.asarray(each, bool) for each in (first, second)]
    wins, losses = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    from scipy import stats  # half a second

    return wins, losses, float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _page(folder: RunFolder, settings, bench: Bench, alpha, chosen, rule, results) -> str:
    steps, count = alpha.shape
    agreement = _halves(alpha) + _repetitions(folder)
    if settings.released:
        kind = "as the released code computes it (first order, cubed gate)"
    else:
        kind = {"unrolled": "through the unrolled training", "first-order": "first order"}[settings.hypergradient]
    return f"""# Flexora on {bench.task.name}, {Path(settings.model).name}

## What was found

{len(chosen)} of {count} {settings.per}s, by the rule {rule}: {", ".join(map(str, chosen))}.

![layer logits over time](figures/alpha.png)

![selection](figures/selection.png)

## What it is worth

{accuracy_table(results)}

Test: {tested(bench)} of the published {bench.task.test} set, which no search or training saw.
{_compared(results)}

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


def _compared(results: dict[str, dict[str, Any]]) -> str:
    """What intervals and paired differences from flexora say; nothing of answers that are not right or wrong."""
    if any(row.get("right") is None for row in results.values()):
        return ""
    width = max(row["accuracy"]["high"] - row["accuracy"]["low"] for row in results.values())
    lines = [
        "- against {}: {} questions only flexora got right, {} only the other; p = {:.2f} (exact sign test)".format(
            name, *paired_difference(results["flexora"]["right"], row["right"])
        )
        for name, row in results.items()
        if name != "flexora"
    ]
    return "\n".join(
        [
            f"Intervals are Wilson's 95 % binomial intervals; the widest is {100 * width:.0f} points across, and",
            "smaller differences between two rows say nothing by themselves. On the same questions:\n",
            *lines,
        ]
    )


def _training_page(settings, bench: Bench, results) -> str:
    every = settings.validate_every
    chosen = f"the best of the validations, one every {every} steps," if every else "the last, without validation,"
    return f"""# LoRA on {bench.task.name}, {Path(settings.model).name}

{accuracy_table(results)}

Test: {tested(bench)} of the published {bench.task.test} set, which no training saw. Metrics in per cent;
intervals are Wilson's 95 % binomial intervals.

![loss](figures/training.png)

## How it was made

Trained on {len(bench.splits.train)} rows, validated on {len(bench.splits.outer)} other rows of the published training
set ({bench.left_out:,} of its rows were not considered: longer than {settings.length} tokens, or beyond what was asked
for; {bench.splits.dropped} share a subject with the test). {settings.adapter}, rank {settings.rank}, alpha
{settings.lora_alpha:g}, on {", ".join(bench.lora.sites(bench.pretrained.config.site_shapes()))} of all
{bench.num_layers} layers; {settings.finetune_steps} steps of AdamW, {_batches(settings.accumulate)} of
{settings.batch_size} rows each, peak learning rate {settings.finetune_lr:g}; {chosen} is what was tested.
The adapter is in `adapter/`, in PEFT's format. All settings: `config.json`; every step: `metrics.jsonl`.
"""


def _batches(count: int) -> str:
    return f"{count} batch{'es' * (count != 1)}"


def _halves(alpha: np.ndarray) -> str:
    steps = len(alpha)
    if steps < 4:
        return "Too few steps to compare one half of the search with the other."
    first, second = alpha[steps // 2 - 1], alpha[-1] - alpha[steps // 2 - 1]
    rho = METRICS["spearman"](first, second)
    return (
        f"What the first and the second half of the search did to the layers has rank correlation {rho:+.2f} "
        "(1: the same order, 0: unrelated)."
    )


def _repetitions(folder: RunFolder) -> str:
    selection = folder.read("selection")
    if "stability" not in selection:
        return ""
    index = selection["stability"]
    return (
        f" Over {len(selection['searches'])} searches that differ in their seed alone the selections have a mean "
        f"Jaccard index of {index['jaccard']:.2f}; random ones of their sizes would have {index['random']:.2f}."
    )


def _warning(steps: int, layers: int) -> str:
    if steps >= 3 * layers:
        return ""
    return (
        f"\n**So short a search cannot rank {layers} layers.** {steps} noisy steps move {layers} logits by less than "
        "the batches' own noise; this run demonstrates the machinery. `--preset evidence` is the long one.\n"
    )


def save_figure(fig: Any, file: Path, dpi: int = 150) -> None:
    """Writes a figure, whole or not at all, and lets go of it."""
    with files.replacing(file) as part:
        fig.savefig(part, dpi=dpi)
    pyplot().close(fig)


def pyplot() -> Any:
    """matplotlib's, without a display."""
    import matplotlib  # half a second, and only needed at the end

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt

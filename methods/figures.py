"""The figures of the pages; every one is written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from methods import files
from methods.causes import reading
from methods.integrity import METRICS, OTHERWISE
from methods.runfolder import RunFolder


def curves(file: Path, history: Mapping[str, np.ndarray], xlabel: str, title: str) -> None:
    """One panel for each name: `[T]`, or `[T, L]` with colour by depth."""
    plt = pyplot()
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
    save(fig, file)


def training(file: Path, folder: RunFolder, arms: Sequence[str]) -> None:
    """Training loss over batches, smoothed over a twentieth of them, with the validation losses as dots."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for name in arms:
        rows = folder.rows(f"finetune {name}")
        if not rows:
            continue
        with reading(str(folder.path / METRICS), OTHERWISE):
            loss = drawable([float(row["inner_loss"]) for row in rows])
        window = max(1, len(loss) // 20)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        (line,) = ax.plot(np.arange(window, len(loss) + 1), smooth, lw=1.2, label=f"{name}, training")
        if folder.has(f"validation/{name}"):
            points = folder.read(f"validation/{name}")
            with reading(str(folder.path / "validation" / f"{name}.json"), "put the old one back, or delete it"):
                at, values = [int(p["step"]) for p in points], [float(p["loss"]) for p in points]
            ax.plot(at, values, "o--", ms=4, lw=0.8, color=line.get_color(), label=f"{name}, validation")
    ax.set(xlabel="batch", ylabel="loss", title="Loss")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, file)


def layer_logits(file: Path, alpha: np.ndarray, chosen: list[int], per: str = "layer") -> None:
    """Logits of layers, or modules, over outer steps, colour by place, those selected drawn through, others dashed."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    path = np.concatenate([np.zeros((1, alpha.shape[1]), alpha.dtype), alpha])
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, alpha.shape[1]))
    for layer, colour in enumerate(colours):
        selected = layer in chosen
        ax.plot(path[:, layer], color=colour, lw=1.6 if selected else 0.8, ls="-" if selected else (0, (3, 2)))
    scale = plt.cm.ScalarMappable(norm=plt.Normalize(0, alpha.shape[1] - 1), cmap="viridis")
    fig.colorbar(scale, ax=ax, label=per)
    title = f"{per.capitalize()} logits (dashed: not selected)"
    ax.set(xlabel="outer step", ylabel=rf"{per} logit $\alpha$", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, file)


def selected_layers(file: Path, alpha: np.ndarray, chosen: list[int], rule: str, per: str = "layer") -> None:
    """Final logits of layers, or modules, as bars, the selected ones filled."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    colours = ["#2a6f97" if layer in chosen else "#d0d5da" for layer in range(len(alpha))]
    ax.bar(np.arange(len(alpha)), alpha, color=colours)
    ax.axhline(alpha.mean(), color="black", lw=0.8, ls=":")
    title = f"Selected: {len(chosen)} of {len(alpha)} {per}s ({rule}; dotted: mean)"
    ax.set(xlabel=per, ylabel=r"$\alpha$", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, file)


def gate_map(file: Path, shares: Mapping[str, np.ndarray], title: str) -> None:
    """Share of open gates, `{structure: [L]}`, as a map of layers and structures."""
    _map(file, shares, title, "share open", most=1.0, digits=2)


def rank_map(file: Path, ranks: Mapping[str, Sequence[int]], title: str) -> None:
    """Ranks, `{linear: [L]}`, as a map of layers and linears."""
    _map(file, ranks, title, "rank", most=max(1, *map(max, ranks.values())), digits=0)


def _map(file: Path, rows: Mapping[str, Any], title: str, label: str, *, most: float, digits: int) -> None:
    plt = pyplot()
    table = np.stack([np.asarray(row, float) for row in rows.values()])
    fig, ax = plt.subplots(figsize=(1.6 + 0.45 * table.shape[1], 1.6 + 0.32 * table.shape[0]), layout="constrained")
    image = ax.imshow(table, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    ax.set(xlabel="layer", title=title, yticks=range(len(rows)), yticklabels=list(rows))
    ax.set_xticks(range(table.shape[1]))
    style = {"ha": "center", "va": "center", "fontsize": 6}
    for (row, column), value in np.ndenumerate(table):
        ax.text(column, row, f"{value:.{digits}f}", color="white" if value > 0.6 * most else "black", **style)
    fig.colorbar(image, ax=ax, label=label)
    save(fig, file)


def sparsity_curve(file: Path, results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """The primary metric against the counted share of removed weights; models that remove none as lines."""
    plt = pyplot()
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
    save(fig, file)


def influences(file: Path, scores: np.ndarray) -> None:
    """Influences `[Q, N]`: the rows in the order of their mean, its curve over the middle half of the questions."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    ordered = scores[:, np.argsort(scores.mean(axis=0), kind="stable")]
    at = np.arange(1, ordered.shape[1] + 1)
    low, high = np.quantile(ordered, [0.25, 0.75], axis=0)
    ax.fill_between(at, low, high, color="#a9c7dd", lw=0, label="middle half of the questions")
    ax.plot(at, ordered.mean(axis=0), color="#2a6f97", lw=1.6, label="mean of the questions")
    ax.axhline(0, color="black", lw=0.8, ls=":")
    ax.set(xlabel="training rows, from the most helpful on", ylabel="influence (change of loss)", title="Influences")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, file)


def row_weights(file: Path, history: np.ndarray, kept: Sequence[int]) -> None:
    """Weights of rows over outer steps `[T, N]`, and how they are spread at the end, the kept ones filled."""
    plt = pyplot()
    fig, (path, spread) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    on = np.isin(np.arange(history.shape[1]), kept)
    for each, colour in ((~on, "#b9c0c7"), (on, "#2a6f97")):
        if each.any():
            whole = np.concatenate([np.ones((1, int(each.sum()))), history[:, each]])
            path.plot(whole, color=colour, lw=0.7, alpha=0.7)
    path.set(xlabel="outer step", ylabel="weight of a row", title="Weights of rows (blue: kept)")
    bins = np.histogram_bin_edges(history[-1], 30)
    spread.hist([history[-1][on], history[-1][~on]], bins=list(bins), stacked=True, color=["#2a6f97", "#b9c0c7"])
    spread.set(xlabel="weight of a row at the end", ylabel="rows", title="At the end")
    for ax in (path, spread):
        ax.spines[["top", "right"]].set_visible(False)
    save(fig, file)


def datamodeling(file: Path, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Linear datamodeling scores with their intervals, `{name: {"value", "low", "high"}}`."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.2, 1.2 + 0.32 * len(table)), layout="constrained")
    values = np.array([[row["value"], row["low"], row["high"]] for row in table.values()])
    at = np.arange(len(table))[::-1]
    error = np.abs(values[:, 1:] - values[:, :1]).T
    ax.errorbar(values[:, 0], at, xerr=error, fmt="o", color="#2a6f97", ms=5, capsize=3, lw=1.2)
    ax.axvline(0, color="black", lw=0.8, ls=":")
    ax.set(xlabel="linear datamodeling score, 95 % interval", yticks=at, yticklabels=list(table))
    ax.set_xlim(min(-0.3, float(values.min()) - 0.05), 1.05)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, file)


DRAWN = 1e100
"""Numbers beyond are not drawn: the arithmetic of axes overflows with them."""


def drawable(values: Any) -> np.ndarray:
    """Numbers, those that no axis can show as NaN, of which nothing is drawn."""
    values = np.asarray(values, float)
    return np.where(np.abs(values) < DRAWN, values, np.nan)


def save(fig: Any, file: Path, dpi: int = 150) -> None:
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

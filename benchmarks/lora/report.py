"""The page of the allocation benchmarks, planted and real, with its figures, from their records.

python -m benchmarks.lora.report
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from benchmarks.lora import hidden_layers
from benchmarks.lora.planted import auroc, mean_sd, precision
from benchmarks.record import Record, Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCORES = Path(__file__).with_name("planted_scores.jsonl")
RANKS = Path(__file__).with_name("planted_ranks.jsonl")
HIDDEN = Path(__file__).with_name("hidden_layers.jsonl")
REAL = Path(__file__).with_name("allocation.jsonl")
DOCS = Path("docs")
PAGE = "allocation-benchmark.md"
RESAMPLES = 10_000
MEASURES = ("auroc", "precision", "rank")
NAIVE = ("first order", "grad-norm")


def write(
    out: Path = DOCS, scores: Path = SCORES, real: Path = REAL, ranks: Path = RANKS, hidden: Path = HIDDEN
) -> list[Path]:
    """Writes page and figures into `out`, of what the records hold; returns their paths."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    parts = [
        "# Allocation measured\n",
        "Which modules deserve a budget of LoRA parameters: by scores where the answer is known, and by what the "
        "trained model is worth where it is not. Written by `python -m benchmarks.lora.report` from the records in "
        "`benchmarks/lora/`.\n",
    ]
    written = []

    def draw(figure: Any, name: str) -> str:
        written.append(out / "figures" / name)
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
        return f"figures/{name}"

    planted, tasks = Record(scores), Record(real)
    if any("seed" in row for row in planted.rows):
        parts += _planted(planted, draw(_planted_figure(planted), "planted_scores.png"))
        parts += _planted_ranks(Record(ranks))
    if rows := Record(hidden).find():
        first = hidden_layers.figure([row for row in rows if row["seed"] == 0])
        parts += _hidden(rows, draw(first, "hidden_layers.png"))
    learned, left = by_learning(tasks)
    for chosen, name, section in (
        (learned, "allocation.png", _real),
        (left, "allocation-appendix.png", _appendix),
    ):
        if chosen:
            parts += section(tasks, chosen, draw(_real_figure(tasks, chosen), name))
    (out / PAGE).write_text("\n".join(parts), encoding="utf-8")
    return [*written, out / PAGE]


# --- planted ------------------------------------------------------------------------------------------------------


def measures(record: Record, variant: str) -> dict[str, dict[str, Any]]:
    """Of every score its cost and seeds, and for each of these AUROC, precision@k, rank correlation with the oracle."""
    rows = record.find(variant=variant)
    oracle = {row["seed"]: np.array(row["values"]) for row in rows if row["score"] == "leave one out"}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        values = np.array(row["values"])
        planted = np.isin(np.arange(len(values)), row["planted"])
        of = found.setdefault(row["score"], {"cost": row["cost"]} | {m: [] for m in ("seeds", *MEASURES)})
        of["seeds"].append(row["seed"])
        of["auroc"].append(auroc(values, planted))
        of["precision"].append(precision(values, planted))
        of["rank"].append(spearman(values, oracle[row["seed"]]))
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(score: str) -> float:
    """Oracles first, then by K, random last."""
    if score.startswith("leave"):
        return -1
    return float("inf") if score == "random" else int(score.rpartition("K = ")[2])


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation, the order of ties by place, where `scipy.stats.spearmanr` would have them share a rank."""
    ranks = [stats.rankdata(x, method="ordinal") for x in (one, other)]
    return float(stats.pearsonr(*ranks).statistic)  # pyright: ignore


def _variants(record: Record) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in record.rows))


def _planted(record: Record, figure: str) -> Iterable[str]:
    yield "## Planted modules\n"
    yield (
        "A random decoder gets a low-rank update on a few layers, or on single modules (q or v of a layer); a student "
        "learns towards it, and scores say where the update is (`benchmarks/lora/planted_scores.py`). Every score may "
        "spend the same number of inner gradients, over which its repetitions are averaged; the oracle, a training a "
        "unit, stands outside. *UD* differentiates through K steps from a fresh LoRA; *halved*, as `bilevel allocate` "
        "does, from a LoRA that half of the budget trained, at half of what each unit learned. Mean ± standard "
        "deviation over seeds.\n"
    )
    yield f"![AUROC of every score and seed]({figure})\n"
    for variant in _variants(record):
        found = measures(record, variant)
        first = record.find(variant=variant)[0]
        seeds = len(found["leave one out"]["seeds"])
        yield (
            f"**{variant.capitalize()}**: {len(first['planted'])} of {len(first['values'])} planted, {seeds} "
            f"{'seed' if seeds == 1 else 'seeds'}.\n"
        )
        body = [(name, f"{of['cost']:.0f}", *(mean_sd(of[m]) for m in MEASURES)) for name, of in found.items()]
        yield table(("score", "inner gradients", "AUROC", "precision@k", "rank correlation with leave one out"), body)
        yield from _against(found)


def _against(found: dict[str, dict[str, Any]]) -> Iterable[str]:
    """AUROC of the unrolled hypergradient minus that of what it should beat, at the same K, seed by seed."""
    lines = []
    for name, of in found.items():
        if not name.startswith("UD, "):
            continue
        for other in (name.replace("UD", rival) for rival in NAIVE):
            there = dict(zip(found[other]["seeds"], found[other]["auroc"], strict=True)) if other in found else {}
            pairs = [a - there[s] for s, a in zip(of["seeds"], of["auroc"], strict=True) if s in there]
            if len(pairs) > 1:
                error = np.std(pairs, ddof=1) / len(pairs) ** 0.5
                lines.append(f"- {name}, minus {other.split(',')[0]}: {np.mean(pairs):+.3f} ± {error:.3f}")
    if lines:
        yield "Paired differences of AUROC, mean ± standard error:\n\n" + "\n".join(lines) + "\n"


def _planted_ranks(record: Record) -> Iterable[str]:
    """The section on ranks; nothing without a record of them."""
    ways = list(dict.fromkeys(row["way"] for row in record.rows if "way" in row))
    if not ways:
        return
    rows = {way: record.find(way=way) for way in ways}
    true = np.array(next(iter(rows.values()))[0]["true"])
    yield "## Planted ranks\n"
    planted = ", ".join(map(str, sorted(true[true > 0].tolist())))
    yield (
        f"The same decoder gets updates of known ranks, {planted}, in as many of its {len(true)} modules; the others "
        "get none. Every singular value is worth the same. Each way gives a score to every rank-one component of every "
        "module, for the same number of inner gradients (`python -m benchmarks.lora.planted_ranks`); EVA and GRAD-NORM "
        "need fewer. AUROC says how well the scores tell the components that are needed, and the rank correlation how "
        "well the ranks that they buy, as many as there are, agree with the true ones. Mean ± standard deviation over "
        f"{len(next(iter(rows.values())))} seeds.\n"
    )
    head = ("components scored by", "AUROC", "rank correlation of the ranks")
    body = []
    for way, found in rows.items():
        told = [[row[name] for row in found] for name in ("auroc", "rank correlation")]
        body.append((_WAYS.get(way, way), *(mean_sd(values) for values in told)))
    yield table(head, body)


def _hidden(rows: list[Row], figure: str) -> Iterable[str]:
    """The section on an update that is hidden in a pretrained model."""
    first, seeds = rows[0], len({row["seed"] for row in rows})
    used, there = first["settings"], first["there"]
    for way in dict.fromkeys(row["way"] for row in rows):
        if sorted(row["seed"] for row in rows if row["way"] == way) != (every := sorted({row["seed"] for row in rows})):
            raise ValueError(
                f"The record of hidden layers has not one row of {way!r} for each of its seeds, "
                f"{', '.join(map(str, every))}: continue it with `python -m benchmarks.lora.hidden_layers`."
            )
    yield "## Hidden layers\n"
    yield (
        f"The same in a pretrained model, {first['model']}: q and v of {sum(there)} of its {len(there)} layers get an "
        f"update of rank {used['rank']} and {100 * used['size']:.0f} % of their norm. LoRA on all layers "
        "learns the last hidden states of random tokens that this makes, and scores say where it is "
        "(`python -m benchmarks.lora.hidden_layers`, the second part of `make flexora`). The gradient is taken over as "
        f"many rows as the {used['warmup']} steps of training see; the hypergradient sees {used['outer']} times "
        f"{used['unroll']} steps more. Mean ± standard deviation over {seeds} draws.\n"
    )
    yield f"![The scores of every layer, of the first draw]({figure})\n"
    body = []
    for way, what in hidden_layers.WAYS.items():
        if own := [row for row in rows if row["way"] == way]:
            body.append((what, *(mean_sd([float(row[name]) for row in own]) for name in ("auroc", "found"))))
    yield table(("layers ranked by", "AUROC", f"found of {sum(there)}"), body)
    if used["flexora"]:
        yield (
            f"\nFlexora's search begins at a fresh LoRA, and took {used['flexora']} outer steps: its logits say which "
            "layers the first steps of a training gain most from.\n"
        )


_WAYS = {
    "hypergradient": "hypergradients through training, of singular vectors (`bilevel allocate`)",
    "singular values": "singular values of a training (`--score singular-values`)",
    "first order": "the same, first order",
}


def _planted_figure(record: Record) -> Any:
    variants = {name: measures(record, name) for name in _variants(record)}
    names = list(next(iter(variants.values())))[::-1]
    fig, axes = plt.subplots(1, len(variants), figsize=(4 * len(variants), 6), sharey=True, layout="constrained")
    for ax, (variant, found) in zip(np.atleast_1d(axes), variants.items(), strict=True):
        for place, name in enumerate(names):
            values = found.get(name, {"auroc": []})["auroc"]
            jitter = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(len(values))
            ax.plot(values, place + jitter, ".", color="#9fb8c8", ms=5)
            if values:
                ax.plot(np.mean(values), place, "|", color="#2a6f97", ms=14, mew=2.4)
        ax.axvline(0.5, color="0.6", lw=0.8, ls=":")
        ax.set(title=variant, xlabel="AUROC (bar: mean of the seeds)", xlim=(-0.03, 1.03))
        ax.set_yticks(range(len(names)), names)
        ax.spines[["top", "right"]].set_visible(False)
    return fig


# --- real ---------------------------------------------------------------------------------------------------------


def paired(record: Record, task: str, method: str, other: str) -> tuple[np.ndarray, np.ndarray]:
    """`[seeds, questions]` in {-1, 0, 1}, right with one minus right with the other; the seeds that both have."""
    rows = [{row["seed"]: row["right"] for row in record.find(task=task, method=name)} for name in (method, other)]
    seeds = sorted(set(rows[0]) & set(rows[1]))
    right = [np.array([[int(c) for c in of[seed]] for seed in seeds]) for of in rows]
    return right[0] - right[1], np.array(seeds)


def interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `[seeds, questions]`: both are drawn again (Owen 2007, the pigeonhole bootstrap).

    It errs on the wide side.
    """
    rng, (seeds, questions) = np.random.default_rng(0), difference.shape
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    columns = rng.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES) / questions
    low, high = np.percentile(((rows @ difference) * columns).sum(1), [2.5, 97.5])
    return float(low), float(high)


def methods(record: Record, task: str) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in record.find(task=task) if "method" in row))


def _tasks(record: Record) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in record.rows if "method" in row))


def commonest(real: Path = REAL) -> dict[str, float]:
    """The share of test rows, by task, that always saying the commonest label gets right."""
    return {row["plan"]: row["majority"] for row in Record(real).rows if "plan" in row}


MARGIN = 0.03
"""A task is learned where an arm is right in so much more of the test rows than the commonest label is."""
NOT_LEARNED = (
    "LoRA itself does not learn these tasks from so few rows, and neither does anything else that was tried: no arm "
    f"has an accuracy more than {100 * MARGIN:g} points above that of always saying the commonest label. So these "
    "tables compare nothing. They are kept because the runs were planned and made.\n"
)


def by_learning(record: Record) -> tuple[list[str], list[str]]:
    """The tasks that are learned, and those that are not."""
    learned = {task: _is_learned(record, task) for task in _tasks(record)}
    return [t for t, is_one in learned.items() if is_one], [t for t, is_one in learned.items() if not is_one]


def _is_learned(record: Record, task: str) -> bool:
    (plan,) = record.find(plan=task)[:1]
    means = [
        np.mean([np.mean([int(c) for c in row["right"]]) for row in record.find(task=task, method=method)])
        for method in methods(record, task)
    ]
    return bool(max(means) > plan["majority"] + MARGIN)


def _real(record: Record, tasks: list[str], figure: str) -> Iterable[str]:
    yield (
        "## Real tasks\n\nThe same budget of adapter parameters, spent evenly, at random, by HeteroLoRA or by Flexora "
        "(`benchmarks/lora/allocation.py`): the same rows, start values and number of training steps for what is "
        "tested. Test rows are from the published validation set, which no search and no training saw. In brackets "
        "95 % intervals of the paired difference in points, seeds and questions both drawn again.\n"
    )
    yield from _tables(record, tasks, figure)


def _appendix(record: Record, tasks: list[str], figure: str) -> Iterable[str]:
    yield f"## Appendix: tasks that are not learned\n\n{NOT_LEARNED}"
    yield from _tables(record, tasks, figure)


def _tables(record: Record, tasks: list[str], figure: str) -> Iterable[str]:
    yield f"![Paired differences from uniform LoRA]({figure})\n"
    for task in tasks:
        plan = record.find(plan=task)[0]
        yield (
            f"**{task}**: {plan['test_rows']} test rows; always the commonest label is right in "
            f"{100 * plan['majority']:.1f} %. Said before the runs: with {plan['discordance']:.0%} of the "
            f"questions answered differently, a difference of {100 * plan['detectable']:.1f} points is found in 80 % "
            f"of pairs of runs at the 5 % level (the grey band); over {plan['seeds']} seeds it is "
            f"{100 * plan['detectable_at_best']:.1f} at best, if every seed erred on questions of its own.\n"
        )
        body = [_line(record, task, method) for method in methods(record, task)]
        head = ("", "seeds", "parameters", "accuracy", "− uniform", "− random", "unlike uniform", "search s", "all s")
        yield table(head, body)


def _line(record: Record, task: str, method: str) -> tuple[str, ...]:
    rows = record.find(task=task, method=method)
    parameters = sorted({row["parameters"] for row in rows})
    cells = [method, str(len(rows)), " to ".join(f"{p:,}" for p in (parameters[0], parameters[-1])[: len(parameters)])]
    values = [100 * np.mean([int(c) for c in row["right"]]) for row in rows]
    cells.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""))
    for other in ("uniform", "random"):
        difference, seeds = paired(record, task, method, other)
        if method == other or not len(seeds):
            cells.append("")
            continue
        low, high = interval(difference)
        cells.append(f"{100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    difference, seeds = paired(record, task, method, "uniform")
    cells.append(f"{np.mean(difference != 0):.0%}" if method != "uniform" and len(seeds) else "")
    return (*cells, *(f"{np.mean([row[k] for row in rows]):.0f}" for k in ("search_seconds", "seconds")))


def _real_figure(record: Record, tasks: list[str]) -> Any:
    size = (1 + 3.5 * len(tasks), 2.8)
    fig, axes = plt.subplots(1, len(tasks), figsize=size, sharey=True, layout="constrained")
    others = list(dict.fromkeys(m for task in tasks for m in methods(record, task) if m != "uniform"))[::-1]
    for ax, task in zip(np.atleast_1d(axes), tasks, strict=True):
        plan = record.find(plan=task)[0]
        ax.axvspan(-100 * plan["detectable"], 100 * plan["detectable"], color="0.94", zorder=0)
        ax.axvline(0, color="0.6", lw=0.8)
        for place, method in enumerate(others):
            difference, seeds = paired(record, task, method, "uniform")
            if not len(seeds):
                continue
            mean, (low, high) = difference.mean(), interval(difference)
            error = 100 * np.array([[max(mean - low, 0)], [max(high - mean, 0)]])
            ax.errorbar(100 * mean, place, xerr=error, fmt="o", color="#2a6f97", ms=5, capsize=3)
            ax.plot(100 * difference.mean(1), np.full(len(seeds), place - 0.22), ".", color="#9fb8c8", ms=5)
        ax.set(title=task, ylim=(-0.6, len(others) - 0.4))
        ax.set_yticks(range(len(others)), others)
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel("accuracy − uniform, points", fontsize="medium")
    return fig


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    head = list(head)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body)) + "\n"


if __name__ == "__main__":
    for path in write():
        print(f"wrote {path}")

"""The page of the benchmarks on little data, HiddenKey, FineGates and LoRATRF, with its figures, from their records.

python -m benchmarks.lora.low_data_report
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.lora.planted import mean_sd
from benchmarks.lora.report import DOCS, MARGIN, NOT_LEARNED, commonest, table
from benchmarks.record import short

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECORDS = Path(__file__).with_name("records")
PAGE = "low-data-benchmark.md"
BLUE, PALE, RED = "#2a6f97", "#9fb8c8", "#c8553d"


def add(name: str, record: dict[str, Any], docs: Path, records: Path) -> None:
    """Writes the record `name`, then the page."""
    records.mkdir(parents=True, exist_ok=True)
    (records / f"{name}.json").write_text(json.dumps(short(record), indent=1) + "\n", encoding="utf-8")
    for path in write(docs, records):
        print(f"wrote {path}")


def write(docs: Path = DOCS, records: Path = RECORDS) -> list[Path]:
    """Writes page and figures into `docs`, of the records there are; returns their paths."""
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    parts = [
        "# Little data measured\n",
        "HiddenKey, FineGates and LoRATRF where there are few rows. Written by `python -m "
        "benchmarks.lora.low_data_report` from the records in `benchmarks/lora/records/`; what is not said there is as "
        "the commands have it by default.\n",
    ]
    written, appendix = [], []
    for pattern, section, figure in SECTIONS:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(records.glob(pattern))]
        for is_learned, where, suffix in ((True, parts, ""), (False, appendix, "-appendix")):
            chosen = [record for record in found if _is_learned(record) == is_learned]
            if not chosen:
                continue
            image = ""
            if figure is not None:
                image = f"figures/low-data-{pattern.partition('-*')[0].removesuffix('.json')}{suffix}.png"
                drawn = figure(chosen)
                drawn.savefig(docs / image, dpi=120)
                plt.close(drawn)
                written.append(docs / image)
            where += [part.replace("## ", "### ") if suffix else part for part in section(chosen, image)]
    if appendix:
        parts += [f"## Appendix: tasks that are not learned\n\n{NOT_LEARNED}", *appendix]
    (docs / PAGE).write_text("\n".join(parts), encoding="utf-8")
    return [*written, docs / PAGE]


def _is_learned(record: dict[str, Any]) -> bool:
    """Whether an arm is right beyond the commonest label of its task; so are tasks of which nobody has counted it."""
    task = record["setup"].get("task")
    arms = [arm for run in record["runs"] for arm in _arms_of(run)]
    if task not in (counted := commonest()):
        return True
    names = dict.fromkeys(name for name, _ in arms)
    return max(np.mean([metric for name, metric in arms if name == each]) for each in names) > counted[task] + MARGIN


def _arms_of(run: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The arms of a run with their metric; those of some records are under a number of rows."""
    for name, arm in run.items():
        if "metric" in arm:
            yield above + name, arm["metric"]
        elif "metrics" in arm:
            yield above + name, _first(arm["metrics"])
        elif all(isinstance(each, dict) for each in arm.values()):
            yield from _arms_of(arm, f"{name} rows, ")


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval, by Student's t."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def told(values: np.ndarray, digits: int = 2) -> str:
    """Mean and interval of differences, as the tables tell them."""
    mean, low, high = (f"{value:+.{digits}f}" for value in interval(values))
    return f"{mean} [{low}, {high}]"


def excess(record: dict[str, Any], arm: str, reference: str) -> np.ndarray:
    """Test loss of an arm beyond that of the reference, in per cent of the reference's mean; one value a seed."""
    test = {name: np.array([run[name]["test"] for run in record["runs"]]) for name in (arm, reference)}
    return 100 * (test[arm] - test[reference]) / test[reference].mean()


def _first(metrics: dict[str, float]) -> float:
    return next(iter(metrics.values()))


def _sizes(setup: dict[str, Any], seeds: int) -> str:
    rows = setup["rows"] if isinstance(setup["rows"], int) else " and ".join(map(str, setup["rows"]))
    steps = f"{setup['steps']} steps of {setup['batch_size']} rows at learning rate {setup['learning_rate']:g}"
    return f"{setup['model']}, {rows} training rows, {steps}, {seeds} seeds"


# --- HiddenKey ----------------------------------------------------------------------------------------------------


def _grid(records: list[dict[str, Any]], image: str) -> Iterator[str]:
    yield (
        "## HiddenKey: rates and KL weight, learned or from a grid\n\nThe grid trains every point, and validation "
        "chooses one; unrolled differentiation begins one training, learns the three numbers in a few steps that go on "
        "from there, and trains once with them (`benchmarks/lora/dropout.py`). Regret is the test loss beyond "
        "that of the grid's choice, paired over seeds. First order is the control: its gradient is 0, and it trains "
        "with the rates it started from.\n"
    )
    yield f"![Regret of every seed]({image})\n"
    for record in records:
        runs, setup = record["runs"], record["setup"]
        yield f"**{setup['task']}**: {_sizes(setup, len(runs))}.\n"
        body = []
        for arm in runs[0]:
            regret = told(excess(record, arm, "grid")) if arm != "grid" else ""
            cells = [arm, mean_sd([run[arm]["test"] for run in runs]), regret]
            cells += [mean_sd([run[arm]["metric"] for run in runs]), f"{runs[0][arm]['gradients']:.0f}"]
            body.append(cells)
        yield table(("", "test loss", "regret, % [95 %]", "test metric", "inner gradients"), body)
        share = runs[0]["unrolled"]["gradients"] / runs[0]["grid"]["gradients"]
        names = [name for name in runs[0]["unrolled"] if name.startswith("rate ") or name == "beta"]
        learned, chosen = (
            "; ".join(f"{n} " + ", ".join(f"{run[arm][n]:.3g}" for run in runs) for n in names)
            for arm in ("unrolled", "grid")
        )
        yield (
            f"Gradients of unrolled over those of the grid: {share:.1%}. Learned, seed by seed: {learned}. Chosen from "
            f"the grid: {chosen}.\n"
        )
    regrets = [
        np.concatenate([excess(record, arm, "grid") for record in records]) for arm in ("unrolled", "first-order")
    ]
    yield (
        f"All {len(regrets[0])} splits together: regret of unrolled {told(regrets[0], 1)} %, its test loss beyond that "
        f"of first order {told(regrets[0] - regrets[1], 1)} % (lower in {int((regrets[0] < regrets[1]).sum())}).\n"
    )


def _grid_figure(records: list[dict[str, Any]]) -> Any:
    fig, axes = plt.subplots(1, len(records), figsize=(4 * len(records), 2.2), sharey=True, layout="constrained")
    for ax, record in zip(np.atleast_1d(axes), records, strict=True):
        arms = [arm for arm in record["runs"][0] if arm != "grid"][::-1]
        ax.axvline(0, color="0.6", lw=0.8)
        ax.axvline(5, color=RED, lw=0.8, ls=":")
        for place, arm in enumerate(arms):
            values = excess(record, arm, "grid")
            mean, low, high = interval(values)
            ax.plot(values, np.full(len(values), place - 0.2), ".", color=PALE, ms=6)
            ax.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=BLUE, ms=5, capsize=3)
        ax.set(title=record["setup"]["task"], xlabel="regret, % of the test loss (dotted: goal)", ylim=(-0.6, 1.5))
        ax.set_yticks(range(len(arms)), arms)
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def _positions(records: list[dict[str, Any]], image: str) -> Iterator[str]:
    yield (
        "## Positions, patterns and compensations\n\nTest loss beyond that without dropout, in per cent, at one rate "
        "and one weight for all, with the 95 % interval of the mean over seeds; below 0 dropout helps.\n"
    )
    for record in records:
        runs, setup = record["runs"], record["setup"]
        none = f"without dropout {mean_sd([run['no dropout']['test'] for run in runs])}"
        yield f"**{setup['task']}**: {_sizes(setup, len(runs))}; {none}.\n"
        words = [arm.split() for arm in runs[0] if arm != "no dropout"]
        terms = list(dict.fromkeys(word[2] for word in words))
        body = []
        for position, pattern in dict.fromkeys((word[0], word[1]) for word in words):
            cells = [told(excess(record, f"{position} {pattern} {term}", "no dropout")) for term in terms]
            body.append([position, pattern, *cells])
        yield table(("position", "pattern", *terms), body)


# --- FineGates ----------------------------------------------------------------------------------------------------


def _arms(record: dict[str, Any], rows: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Counted share removed `[targets]`, and the metric `[targets, seeds]`."""
    arms = [arm for arm in record["runs"][0][rows] if arm.startswith(kind)]
    removed = np.array([np.mean([run[rows][arm]["removed"] for run in record["runs"]]) for arm in arms])
    return removed, np.array([[_first(run[rows][arm]["metrics"]) for run in record["runs"]] for arm in arms])


def _pruning(records: list[dict[str, Any]], image: str) -> Iterator[str]:
    yield (
        "## FineGates: accuracy against counted removed weights\n\nGates trained with their biases and a head; gates "
        "closed by the magnitude of the weights they remove, with the same biases trained; LoRA on the dense model at "
        "the nearest number of parameters (`benchmarks/lora/pruning.py`). Removed is the counted share of the blocks' "
        "weights. Mean ± standard deviation over seeds.\n"
    )
    yield f"![Accuracy against counted removed weights]({image})\n"
    for record in records:
        runs, setup = record["runs"], record["setup"]
        yield f"**{setup['task']}**: {_sizes(setup, len(runs))}.\n"
        body = [
            (rows, arm, f"{100 * np.mean([run[rows][arm]['removed'] for run in runs]):.1f}")
            + (mean_sd([_first(run[rows][arm]["metrics"]) for run in runs]),)
            for rows in runs[0]
            for arm in runs[0][rows]
        ]
        yield table(("rows", "arm and target", "removed, %", "test metric"), body)
        body = [
            (
                f"{row['batch']}",
                f"{100 * row['removed']:.1f}",
                f"{1e3 * row['dense']:.1f}",
                f"{1e3 * row['sliced']:.1f}",
            )
            + (f"{100 * (1 - row['sliced'] / row['dense']):.0f}",)
            for row in record["times"]
        ]
        yield f"Forward time at {setup['length']} tokens, dense and sliced in turns, median:\n"
        yield table(("batch", "removed, %", "dense, ms", "sliced, ms", "saved, %"), body)


def _pruning_figure(records: list[dict[str, Any]]) -> Any:
    panels = [(record, rows) for record in records for rows in record["runs"][0]]
    lines = -(-len(panels) // 2)
    fig, axes = plt.subplots(lines, 2, figsize=(8, 3 * lines), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (record, rows) in zip(axes.flat, panels, strict=False):
        for kind, color in (("finegates", BLUE), ("magnitude", RED)):
            removed, metric = _arms(record, rows, kind)
            spread = metric.std(axis=1, ddof=1) if metric.shape[1] > 1 else np.zeros(len(metric))
            ax.errorbar(
                100 * removed, metric.mean(1), yerr=spread, color=color, marker="o", ms=4, capsize=3, label=kind
            )
        ax.axhline(_arms(record, rows, "lora")[1].mean(), color="0.5", ls="--", lw=1, label="LoRA, dense")
        ax.set(title=f"{record['setup']['task']}, {rows} rows")
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel("removed weights, % (counted)", fontsize="medium")
    fig.supylabel("test metric", fontsize="medium")
    axes[0, 0].legend(frameon=False)
    return fig


# --- LoRATRF ------------------------------------------------------------------------------------------------------


def _filters(records: list[dict[str, Any]], image: str) -> Iterator[str]:
    runs = records[0]["runs"]
    yield (
        "## LoRATRF: does the filter find the tokens that matter?\n\nReconstructed, not published code. A synthetic "
        "mixture of two tasks in which it is known which tokens matter (`benchmarks/lora/filters.py`). The oracle, the "
        "mean of the tokens that matter minus that of the others, shows that one vector can tell them. AUROC is that "
        "of the cosine with the task vector, before it is clipped and in the frozen model, at the better of the two "
        "layers on validation rows: random vectors are above a half. Differences are paired, with the 95 % interval of "
        f"the mean over {len(runs)} seeds.\n"
    )
    values = {(arm, of): np.array([run[arm][of] for run in runs]) for arm in runs[0] for of in runs[0][arm]}
    body = []
    for arm in runs[0]:
        cells = [mean_sd(values[arm, "accuracy"]), "", "", ""]
        if arm != "LoRA":
            start = f"{arm.partition(',')[0]}, fixed"
            cells[1] = told(100 * (values[arm, "accuracy"] - values["LoRA", "accuracy"]), 1)
            cells[2] = mean_sd(values[arm, "auroc"])
            cells[3] = told(values[arm, "auroc"] - values[start, "auroc"]) if arm != start else ""
        body.append((arm, *cells))
    yield table(("task vectors", "test accuracy", "− LoRA, points", "AUROC of the filter", "− where it started"), body)


def _edits(records: list[dict[str, Any]], image: str) -> Iterator[str]:
    yield (
        "## LoRATRF on tasks\n\nTask vectors trained with the rest on training rows, or chosen on validation rows by "
        "unrolled differentiation, no filter, and LoRA at the nearest number of parameters "
        "(`benchmarks/lora/edits.py`). Paired differences from LoRA in points, with 95 % intervals over seeds.\n"
    )
    for record in records:
        runs, setup = record["runs"], record["setup"]
        yield f"**{setup['task']}**: {_sizes(setup, len(runs))}.\n"
        body = []
        for arm in runs[0]:
            metric = np.array([[_first(run[name]["metrics"]) for run in runs] for name in (arm, "LoRA")])
            against = told(100 * (metric[0] - metric[1]), 1) if arm != "LoRA" else ""
            body.append([arm, f"{runs[0][arm]['parameters']:,}", mean_sd(metric[0]), against])
        yield table(("", "parameters", "test metric", "− LoRA"), body)


SECTIONS: Iterable[tuple[str, Any, Any]] = (
    ("dropout-grid-*.json", _grid, _grid_figure),
    ("dropout-table-*.json", _positions, None),
    ("pruning-*.json", _pruning, _pruning_figure),
    ("filters.json", _filters, None),
    ("edits-*.json", _edits, None),
)
"""Pattern of the records, what is written of them, what is drawn."""


if __name__ == "__main__":
    for path in write():
        print(f"wrote {path}")

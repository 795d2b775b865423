"""The page *Results*: the headline of each benchmark, and which goals were met, from the records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import accelerator, scaling, search
from benchmarks.attribution import bergson_report, beside_bergson
from benchmarks.attribution import report as attribution
from benchmarks.hypergradients import report as hypergradients
from benchmarks.hypergradients.goals import goals as hypergradient_goals
from benchmarks.lora import report as allocation
from benchmarks.record import Record
from benchmarks.solvers import report as solvers

PAGE = "results.md"
PEFT = Path(allocation.__file__).with_name("peft_comparison.json")


class Headline(NamedTuple):
    """Attributes: name: of the benchmark. text: what came out, in sentences. page: where all of it is. command."""

    name: str
    text: str
    page: str
    command: str


class Verdict(NamedTuple):
    """A goal that was set before: `met` of `count` measurements reach it."""

    benchmark: str
    goal: str
    where: str
    measured: str
    wanted: str
    met: int
    count: int


def headlines() -> Iterator[Headline]:
    """In the order of the site."""
    record = Record(search.RECORD)
    yield Headline(
        "One training against many",
        f"Twenty weight decays of a regression, learned while it is trained. {search.sentence(record)}",
        "index.md",
        "python -m benchmarks.search",
    )
    yield from _hypergradients(Record(hypergradients.RECORD))
    yield from _solvers(solvers.HERE / "records")
    yield from _allocation(Record(allocation.SCORES), Record(allocation.RANKS), Record(allocation.REAL))
    yield from _attribution(Record(attribution.RECORD))
    yield from _devices(Record(scaling.RECORD), Record(accelerator.RECORD))
    yield from _peft(json.loads(PEFT.read_text(encoding="utf-8")))


def _hypergradients(record: Record) -> Iterator[Headline]:
    rows = hypergradients.front(record)
    best = next(row for row in rows if row["name"].startswith("bilevel"))
    others = [row for row in rows if not row["name"].startswith("bilevel")]
    told = "; ".join(
        f"{row['name']} {row['resident'] / best['resident']:.1f} and {row['seconds'] / best['seconds']:.2f}"
        for row in others
    )
    yield Headline(
        "Hypergradients beside other libraries",
        f"The same hypergradient through {best['steps']} steps of Adam on an MLP: "
        f"`checkpoint={hypergradients.schedule(best)}` needs {best['resident'] / 1e6:.0f} MB and "
        f"{best['seconds']:.2f} s. Of this memory and this time the others need, as multiples: {told}.",
        "hypergradient-benchmark.md",
        "python -m benchmarks.hypergradients",
    )


def _solvers(records: Path) -> Iterator[Headline]:
    parts = []
    for data, (metric, label, _) in solvers.METRICS.items():
        ends = {
            name: solvers.levels(record, metric)[1, -1] for name, record in solvers.runs(records / data).items()
        }
        ends = {name: value for name, value in ends.items() if np.isfinite(value)}
        best = min(ends, key=ends.__getitem__)
        unrolled = min((name for name in ends if name.startswith("UD")), key=ends.__getitem__)
        parts.append(f"{data} ({label}): {best} {ends[best]:.3g}, {unrolled} {ends[unrolled]:.3g}")
    yield Headline(
        "Solvers at equal oracle calls",
        f"The best solver of each data set, and the best unrolled one: {'; '.join(parts)}. h is the outer loss at the "
        "exact solution of the inner problem.",
        "solver-benchmark.md",
        "python benchmarks/solvers/record.py",
    )
    ratios = [row["ratio"] for row in solvers.read(records / "speed.json")]
    yield Headline(
        "Speed beside benchmark_bilevel",
        f"An iteration takes {np.median(ratios):.2f} of theirs in the median of {len(ratios)} solvers and data sets "
        f"({min(ratios):.2f} to {max(ratios):.2f}), both synchronised.",
        "solver-benchmark.md#beside-benchmark_bilevel",
        "python benchmarks/solvers/speed.py FOLDER",
    )
    joined = solvers.read(records / "joined.json")
    alone, reached = joined["alone"]["gradient_calls"], joined["reached"]
    shares = {name: alone / of["most"] for name, of in reached.items()}
    yield Headline(
        "With Optuna",
        f"On ijcnn1 Optuna alone reaches a loss of {joined['alone']['value_func']:.3f} in {alone:,.0f} gradient calls. "
        f"Optuna for the settings without a gradient and hypergradients for the 22 others are there with "
        f"{shares['gradient_calls']:.0f} times fewer of them ({shares['oracle_calls']:.0f} times fewer oracle calls in "
        f"all), in the worst of {joined['seeds']} seeds.",
        "optuna.md#what-it-saves",
        "python benchmarks/solvers/joined.py",
    )


def _allocation(scores: Record, ranks: Record, real: Record) -> Iterator[Headline]:
    parts = []
    for variant in dict.fromkeys(row["variant"] for row in scores.rows):
        found = allocation.measures(scores, variant)
        shown = ("UD, K = 20", "halved, K = 4", "first order, K = 20", "LoRA-drop, K = 20", "grad-norm, K = 0")
        parts.append(f"{variant}: " + ", ".join(f"{name} {np.mean(found[name]['auroc']):.2f}" for name in shown))
    yield Headline(
        "Which modules: planted answers",
        f"AUROC of scores that should find the modules with a planted update, {'; '.join(parts)} "
        f"({len(found['random']['seeds'])} seeds; 0.5 is chance).",
        "allocation-benchmark.md#planted-modules",
        "python -m benchmarks.lora.planted_scores",
    )
    told = {
        way: np.mean([row["rank correlation"] for row in ranks.find(way=way)])
        for way in dict.fromkeys(row["way"] for row in ranks.rows if "way" in row)
    }
    yield Headline(
        "Which ranks: planted answers",
        "Rank correlation of the ranks bought with the true ones: "
        + ", ".join(f"{way} {value:.2f}" for way, value in told.items())
        + ".",
        "allocation-benchmark.md#planted-ranks",
        "python -m benchmarks.lora.planted_ranks",
    )
    learned, left = allocation.by_learning(real)
    for task in learned:
        spans, intervals = [], []
        for method in allocation.methods(real, task):
            if method != "uniform":
                difference, _ = allocation.paired(real, task, method, "uniform")
                low, high = allocation.interval(difference)
                intervals.append((low, high))
                spans.append(f"{method} {100 * difference.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        told = [low > 0 or high < 0 for low, high in intervals]
        verdict = "No difference is told from 0." if not any(told) else f"{sum(told)} of them are told from 0."
        aside = f" ({' and '.join(left)} are not learned by LoRA itself from so few rows: an appendix.)" if left else ""
        yield Headline(
            f"Allocation on {task}",
            f"Accuracy beyond LoRA spread evenly over all modules for the same parameters, in points with a 95 % "
            f"interval: {', '.join(spans)}. {verdict}{aside}",
            "allocation-benchmark.md#real-tasks",
            "python -m benchmarks.lora.allocation",
        )


def _attribution(record: Record) -> Iterator[Headline]:
    rank, count = attribution.correlation(record)
    best = max(score for *_, score in attribution.points(record))
    yield Headline(
        "Influence of training rows",
        f"Influences through training foretell retraining on half of the rows with a rank correlation of up to "
        f"{best:.3f}; how well they do goes with the smoothness of the training ({rank:.2f} over {count} settings).",
        "attribution-benchmark.md",
        "python -m benchmarks.attribution",
    )
    rows = record.find(section=beside_bergson.SECTION)
    theirs = {(row["model"], row["steps"]): row for row in rows if row["side"] == beside_bergson.PEER}
    own = [row for row in rows if row["side"] == "bilevel.Unrolled"]
    shares = [row["seconds"] / theirs[row["model"], row["steps"]]["seconds"] for row in own]
    memory = [
        bergson_report.in_all(row) / bergson_report.in_all(theirs[row["model"], row["steps"]])  # pyright: ignore
        for row in own
    ]
    yield Headline(
        "Beside bergson",
        f"`Unrolled` takes {min(shares):.2f} to {max(shares):.2f} of bergson's seconds and {min(memory):.2f} to "
        f"{max(memory):.2f} of its memory in all, on one core; the scores are the same.",
        "attribution-benchmark.md#beside-bergson",
        "python -m benchmarks.attribution --only bergson --python PATH",
    )


def _devices(compiled: Record, measured: Record) -> Iterator[Headline]:
    row = next(r for r in compiled.find(section="scaling", train="lora") if r["chip"] != "cpu" and r["devices"] > 1)
    held, temporary = row["weights"] / row["devices"] / 1e9, row["temporary"] / 1e9
    chips, size = f"{row['devices']} TPU {row['chip'].partition(':')[0]}", f"{row['rows']} × {row['tokens']:,} tokens"
    yield Headline(
        "Language models on a mesh, compiled",
        f"Flexora's hypergradient on a Llama of {row['model'].upper()} needs "
        f"{held:.1f} GB of weights and {temporary:.1f} GB besides on each of {chips} ({size}, K = {row['steps']}). "
        "Compiled for them, not run.",
        "scaling.md#what-is-split-measured",
        "python -m benchmarks.scaling",
    )
    rows = measured.find(section="accelerator")
    for device, model in dict.fromkeys((row["device"], row["model"]) for row in rows if row["device"] != "cpu"):
        ratios = ", ".join(
            f'"{row["name"]}" {row["ratio"]:.2f}'
            for row in rows
            if (row["device"], row["model"]) == (device, model) and row["name"] != "training"
        )
        yield Headline(
            f"On {device}",
            f"A hypergradient over as many plain steps, model {model}: {ratios}.",
            "scaling.md#one-device-measured",
            "python -m benchmarks.accelerator",
        )


def _peft(found: dict[str, Any]) -> Iterator[Headline]:
    gaps = [
        abs(a - b)
        for of in found.values()
        for ours, theirs in zip(of["ours"], of["peft"], strict=True)
        for a, b in zip(ours["losses"], theirs["losses"], strict=True)
    ]
    ratios = [of["time"]["ours"] / of["time"]["peft"] for of in found.values() if "time" in of]
    slower = f" A step takes {min(ratios):.2f} to {max(ratios):.2f} of peft's on one core: slower." if ratios else ""
    yield Headline(
        "Plain LoRA beside peft",
        f"From the same start the losses of both agree to {max(gaps):.1e} over {len(found)} tasks.{slower}",
        "lora.md#beside-peft",
        "python -m benchmarks.lora.peft_comparison",
    )


# --- goals ------------------------------------------------------------------------------------------------------------


def verdicts() -> list[Verdict]:
    """Every goal that a record has the numbers for."""
    found, text = [], ""
    for goal in hypergradient_goals(Record(hypergradients.RECORD)):
        wanted = f"{'at least' if goal.is_least else 'at most'} {goal.wanted:g}"
        reached = [x >= goal.wanted if goal.is_least else x <= goal.wanted for x in goal.measured]
        measured = " / ".join(f"{x:.2f}" for x in goal.measured)
        if goal.text.startswith("... at"):  # and this memory, of the goal before
            own, _, other = text.partition(" is 1.5 times faster than ")
            text = f"{own} needs at most {goal.wanted:g} times the temporary memory of {other}"
        else:
            text = goal.text
        found.append(Verdict("hypergradients", text, goal.where, measured, wanted, sum(reached), len(reached)))
    record = Record(attribution.RECORD)
    selected = record.find(section="selection")
    trainings = dict.fromkeys(row["training"] for row in selected)
    best = max(np.mean([row["auroc"] for row in selected if row["training"] == name]) for name in trainings)
    goal = "training rows", "AUROC of rows with wrong labels", "MNIST"
    found.append(Verdict(*goal, f"{best:.3f}", "at least 0.99", int(best >= 0.99), 1))
    for each in bergson_report.judged(record.find(section=beside_bergson.SECTION)):
        text, _, wanted = each.wanted.rpartition(": ")
        found.append(Verdict("bergson", f"`{each.way}`: {text}", "", each.measured, wanted, each.met, each.count))
    joined = solvers.read(solvers.HERE / "records" / "joined.json")
    share = joined["alone"]["gradient_calls"] / max(of["most"] for of in joined["reached"].values())
    goal = "with Optuna", "fewer calls than Optuna alone, by a factor of", "ijcnn1"
    found.append(Verdict(*goal, f"{share:.0f}", "at least 10", int(share >= 10), 1))
    return found


def page() -> str:
    """In Markdown."""
    parts = [
        "# Results\n",
        "The headline of each benchmark, and the goals that were set beforehand, met and missed. Every number here is "
        "written by `make results` from the records in `benchmarks/`, none by hand; the command beside a headline "
        "makes its record anew. All of it is on processors unless a device is named.\n",
        "## Headlines\n",
    ]
    for each in headlines():
        parts.append(f"**{each.name}.** {each.text} [All of it]({each.page}); `{each.command}`.\n")
    found = verdicts()
    parts.append("## Goals\n")
    parts.append(
        f"{sum(v.met == v.count for v in found)} of {len(found)} goals are met, "
        f"{sum(0 < v.met < v.count for v in found)} in part, {sum(not v.met for v in found)} missed.\n"
    )
    for title, chosen in {
        "Missed, or met in part": [v for v in found if v.met < v.count],
        "Met": [v for v in found if v.met == v.count],
    }.items():
        head = ("benchmark", "goal", "where", "measured", "wanted")
        body = [v[:5] if v.met in (0, v.count) else (*v[:4], f"{v.wanted}: {v.met} of {v.count}") for v in chosen]
        rows = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))
        parts.append(f"### {title}\n\n{rows}\n")
    parts.append(
        "## What is not compared\n\nTables on tasks that LoRA itself does not learn from so few rows are in appendices "
        "that say so: [of allocation](allocation-benchmark.md#appendix-tasks-that-are-not-learned), and [of little "
        "data](low-data-benchmark.md#appendix-tasks-that-are-not-learned).\n"
    )
    return "\n".join(parts)


def write(docs: Path) -> list[Path]:
    """The page, into `docs`."""
    (docs / PAGE).write_text(page(), encoding="utf-8")
    return [docs / PAGE]

"""Finished runs as one page of HTML: trajectories, steadiness, accuracy against parameters, cost and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from methods import histories, markdown, results, units, webpage
from methods.figures import drawable
from methods.histories import History, Stage
from methods.results import Read, Row
from methods.webpage import LINE, NAMED, ORDERED, axes, colour, figure, figures, heading, paragraph, table

POINTS, LINES, PANELS = 200, 40, 24
"""Most points of a line, lines of a panel and panels of a search that are drawn."""


def page(
    found: Read,
    runs: Sequence[History],
    several: Sequence[Sequence[Row]],
    means: tuple[Sequence[str], Sequence[Sequence[str]], str],
) -> str:
    """The page, whole: what cannot be shown is said where it would be.

    Args:
      found: the models.
      runs: what their folders tell.
      several: the models of runs that differ in their seed alone.
      means: titles and cells of a table of these, and a note on it.
    """
    named = [(f"r{number}", run) for number, run in enumerate(runs)]
    links = [("models", "Models"), *((name, run.name) for name, run in named)]
    links += [("cost", "Cost"), ("settings", "Settings")]
    parts = [
        webpage.contents(links),
        heading(2, "Models", "models"),
        _models(found),
        heading(2, "Over seeds"),
        *_seeds(several, means),
        heading(2, "Worth against parameters"),
        _fronts(found),
        heading(2, "Runs"),
        *(part for name, run in named for part in _run(run, name, _arms(found, run))),
        heading(2, "Cost", "cost"),
        _cost(runs),
        heading(2, "Settings", "settings"),
        *_settings(runs),
    ]
    if found.unfinished:
        names = ", ".join(map(str, found.unfinished))
        parts.append(paragraph(f"Not finished yet, so that models may be missing: {names}.", "missing"))
    if found.left_out:
        parts += [heading(2, "Left out"), *(paragraph(sentence, "missing") for sentence in found.left_out)]
    return webpage.document("Side by side", parts)


def _arms(found: Read, run: History) -> list[Row]:
    return [row for row in found.rows if row.path == run.path]


# What the models are worth.


def _models(found: Read) -> str:
    shown = results.table(found.rows)
    return table(shown.titles, shown.rows, shown.numbers) + "".join(paragraph(note, "note") for note in shown.notes)


def _seeds(several: Sequence[Sequence[Row]], means: tuple[Sequence[str], Sequence[Sequence[str]], str]) -> list[str]:
    if not several:
        words = "No two runs differ in their seed alone: nothing is said of how much a result depends on it."
        return [paragraph(words, "note")]
    titles, cells, note = means
    parts = [table(titles, cells, (3, 5, 6)), paragraph(note, "note")]
    rows = []
    for group in several:
        chosen = [on for row in group if (on := _on(row)) is not None]
        pairs = [(a, b) for a, b in combinations(chosen, 2) if len(a) == len(b)]
        if pairs and not (all(on.all() for on in chosen) or not any(on.any() for on in chosen)):
            alike = [histories.jaccard(a, b) for a, b in pairs]
            chance = [histories.by_chance(int(a.sum()), int(b.sum()), len(a)) for a, b in pairs]
            first = group[0]
            cells = [first.method, first.arm, first.config["task"], len(pairs)]
            rows.append([*cells, f"{np.mean(alike):.2f}", f"{np.min(alike):.2f}", f"{np.mean(chance):.2f}"])
    if rows:
        titles = ["method", "model", "task", "pairs", "mean Jaccard", "least", "by chance"]
        note = "Modules in use by one seed and by another: the share of all that either uses which both use."
        parts += [heading(3, "Selection"), table(titles, rows, (3, 4, 5, 6)), paragraph(note, "note")]
    return parts


def _on(row: Row) -> np.ndarray | None:
    on = row.result.get("on")
    if not on:
        return None
    return np.concatenate([np.asarray(on[site], float) > 0 for site in sorted(on)])


def _fronts(found: Read) -> str:
    """A figure of the models against their parameters for each task, model and metric."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found.rows:
        if np.isfinite(drawable(row.worth[1])):
            groups.setdefault((row.config["task"], row.base, row.worth[0]), []).append(row)
    drawn = [_front(f"f{i}", names, rows) for i, (names, rows) in enumerate(groups.items())]
    return figures(drawn) or paragraph("No model has a number that could be drawn.", "missing")


def on_front(sizes: Sequence[float], worths: Sequence[float]) -> list[int]:
    """Which models no other has less parameters than and is as good as, by number; the smallest first."""
    front: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], -worths[i])):
        if not front or worths[i] > worths[front[-1]]:
            front.append(i)
    return front


def _front(name: str, names: tuple[str, str, str], rows: list[Row]) -> str:
    task, base, metric = names
    unit = units.of(metric)
    sizes = [float(row.result["parameters"]) for row in rows]
    worths = [unit.times * row.worth[1] for row in rows]
    front = on_front(sizes, [unit.better(row.worth[1]) for row in rows])
    with axes(5.2, 3.2) as (fig, ax):
        for i, row in enumerate(rows):
            shade = colour(NAMED, list(dict.fromkeys(r.run for r in rows)).index(row.run))
            if units.share_of(row.result) == metric:
                ends = units.ends(row.result)
                ax.errorbar(sizes[i], worths[i], yerr=ends, fmt="none", ecolor=shade, elinewidth=0.8, alpha=0.6)
            ax.plot(sizes[i], worths[i], "o", color=shade, ms=6, mfc=shade if i in front else "none", clip_on=False)
        ax.plot(*zip(*[(sizes[i], worths[i]) for i in front], strict=True), color=LINE, lw=1, zorder=0)
        positive = [size for size in sizes if size > 0]
        if positive and max(positive) > 20 * min(positive):
            ax.set_xscale("symlog", linthresh=min(positive))
        ax.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
        ax.margins(x=0.18)
        ax.set_xlim(left=0)  # nothing has less
        for together in _near(ax, sizes, worths):
            arms = [*dict.fromkeys(rows[i].arm for i in together)]
            label = ", ".join(arm[:24] for arm in arms[:2]) + f" and {len(arms) - 2} more" * (len(arms) > 2)
            place = sizes[together[0]], worths[together[0]]
            ax.annotate(label, place, xytext=(5, 4), textcoords="offset points", fontsize=8, rotation=30)
        ax.set(xlabel="trained parameters", ylabel=units.axis(metric))
        best = ", ".join(f"{rows[i].arm} of {rows[i].run}" for i in front)
        words = f"{task}, {base}. Filled, on the line: no smaller model is as good ({best})."
        return figure(fig, name, words, list(dict.fromkeys(row.run for row in rows)))


def _near(ax: Any, sizes: Sequence[float], worths: Sequence[float]) -> list[list[int]]:
    """The models by number, those together whose labels would be written over each other."""
    ax.autoscale_view()
    places = ax.transData.transform(list(zip(sizes, worths, strict=True)))
    height = 8 * ax.figure.dpi / 72  # of a label, in pixels
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        near = next((group for group in groups if np.abs(places[group[0]] - place).max() < height), None)
        if near is None:
            groups.append([i])
        else:
            near.append(i)
    return groups


# A run.


def _run(run: History, name: str, rows: list[Row]) -> list[str]:
    method = rows[0].method if rows else ""
    task = run.config.get("task", "task unknown")
    parts = [heading(3, f"{run.name}{f': {method}' if method else ''}, {task}", name)]
    parts += [paragraph(sentence, "missing") for sentence in run.missing]
    searches = [stage for stage in run.stages if stage.is_search]
    if run.stages and not searches:
        parts.append(paragraph("Nothing was searched by steps in this run; below are its trainings.", "note"))
    for number, stage in enumerate(searches):
        parts += _search(run, stage, f"{name}s{number}", titled=len(searches) > 1)
    if len(searches) > 1:
        parts += _searches(searches)
    parts += _selection(run, rows)
    trainings = [stage for stage in run.stages if not stage.is_search and "inner_loss" in stage.series]
    if trainings:
        parts.append(figures([_trainings(trainings, f"{name}t")]))
    if run.page:
        parts.append(webpage.details("The page of the run itself, report.md", markdown.html(run.page)))
    return parts


def _search(run: History, stage: Stage, name: str, *, titled: bool) -> list[str]:
    parts = [heading(4, stage.name)] if titled else []
    drawn: list[str] = []
    told = {key: values for key, values in stage.series.items() if values.ndim == 1}
    if "hypergradient_norm" in told:
        norm = told["hypergradient_norm"]
        drawn.append(_lines(f"{name}n", stage, {"hypergradient norm": norm}, "norm of the hypergradient", log=True))
    losses = {key.replace("_", " "): told[key] for key in ("outer_loss", "inner_loss") if key in told}
    if losses:
        drawn.append(_lines(f"{name}l", stage, losses, "losses at each outer step"))
    outer = stage.outer
    for i, (key, values) in enumerate(list(outer.items())[:PANELS]):
        drawn.append(_stack(f"{name}o{i}", stage, key, values))
    if not outer:
        parts.append(paragraph("Of the outer variables the steps recorded no values.", "note"))
    elif len(outer) > PANELS:
        parts.append(paragraph(f"{len(outer) - PANELS} further variables are in metrics.jsonl and not drawn.", "note"))
    steady = histories.steadiness(run, stage)
    if steady:
        words = "how alike to the last step each step is: 1 is the same choice, or order"
        drawn.append(_lines(f"{name}j", stage, steady, words, low=min(0.0, *(np.nanmin(v) for v in steady.values()))))
    return [*parts, figures(drawn)]


def _searches(stages: list[Stage]) -> list[str]:
    """Whether searches from other starts or keys agree."""
    rows = [[one, other, name, f"{value:.2f}"] for one, other, name, value in histories.agreement(stages)]
    if not rows:
        return []
    words = "Rank correlation of what two searches of this run ended with:"
    return [paragraph(words), table(["search", "and", "variable", "rank correlation"], rows, (3,))]


def _selection(run: History, rows: list[Row]) -> list[str]:
    told = {key: json.dumps(_short(value), default=str) for key, value in run.selection.items() if key != "history"}
    parts = [webpage.bullets([f"{key}: {text}" for key, text in told.items() if len(text) < 160])]
    maps, whole = [], []
    for row in rows:
        on = {site: each for site, each in (row.result.get("on") or {}).items() if each}
        shares = [share for each in on.values() for share in each]
        if shares and min(shares) >= 1:
            whole.append(row.arm)
        elif any(shares):
            depth = [str(i) for i in range(max(map(len, on.values())))]
            maps.append(webpage.share_map(depth, list(on.items()), f"Modules in use by {row.arm}, by layer"))
    if whole:
        parts.append(paragraph(f"Every module is in use by {', '.join(whole)}.", "note"))
    return [*parts, figures(maps, "maps")]


def _short(value: Any) -> Any:
    """A value of JSON with its numbers to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_short(each) for each in value]
    return {name: _short(each) for name, each in value.items()} if isinstance(value, dict) else value


def _trainings(stages: list[Stage], name: str) -> str:
    stages = sorted(stages, key=lambda stage: not stage.name.startswith("finetune"))  # what the tables are of
    with axes(6.0, 2.9) as (fig, ax):
        for i, stage in enumerate(stages[:LINES]):
            loss = drawable(stage.series["inner_loss"]).reshape(len(stage.steps), -1).mean(1)
            window = max(1, len(loss) // 20)
            smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
            keep = _thinned(len(smooth))
            style = "-" if i < len(NAMED.light) else "--"
            ax.plot(stage.steps[window - 1 :][keep], smooth[keep], style, color=colour(NAMED, i), lw=1.2)
        ax.set(xlabel="batch", ylabel="training loss")
        words = "Trainings: the loss of their batches, smoothed over a twentieth of them"
        words += f"; the first {LINES} of {len(stages)}" * (len(stages) > LINES)
        return figure(fig, name, f"{words}.", [stage.name.removeprefix("finetune ") for stage in stages[:LINES]])


def _lines(
    name: str, stage: Stage, series: dict[str, np.ndarray], caption: str, *, log: bool = False, low: float | None = None
) -> str:
    if len(series) > LINES:
        caption += f" (the first {LINES} of {len(series)})"
        series = dict(list(series.items())[:LINES])
    series = {key: drawable(values) for key, values in series.items()}
    with axes() as (fig, ax):
        for i, values in enumerate(series.values()):
            keep = _thinned(len(values))
            mark, style = "o" if len(values) < 20 else "", "-" if i < len(NAMED.light) else "--"
            ax.plot(stage.steps[keep], values[keep], style, marker=mark, ms=3, lw=1.3, color=colour(NAMED, i))
        values = np.concatenate(list(series.values()))
        if log and (values > 0).all() and values.max() > 20 * values.min():
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_formatter(lambda value, _: "")
        if low is not None:
            ax.set_ylim(low - 0.05, 1.05)
        ax.set(xlabel="outer step")
        keys = list(series) if len(series) > 1 or low is not None else []
        return figure(fig, name, f"{caption[:1].upper()}{caption[1:]}.", keys)


def _stack(name: str, stage: Stage, key: str, values: np.ndarray) -> str:
    """The entries of a variable over the steps, coloured in their order."""
    values, count = drawable(values), values.shape[1]
    drawn = np.unique(np.linspace(0, count - 1, min(count, LINES)).astype(int))
    keep = _thinned(len(values))
    with axes() as (fig, ax):
        for entry in drawn:
            place = round(entry / max(count - 1, 1) * (len(ORDERED.light) - 1))
            mark = "o" if len(values) < 20 else ""
            shade = colour(ORDERED, place if count > 1 else 4)
            ax.plot(stage.steps[keep], values[keep, entry], marker=mark, ms=3, lw=1.1, color=shade)
        ax.set(xlabel="outer step")
        words = key if count == 1 else f"{key}: {count} entries, from the first (violet) to the last (yellow)"
        words += f"; {len(drawn)} of them are drawn" * (len(drawn) < count)
        return figure(fig, name, f"{words}.")


def _thinned(count: int) -> np.ndarray:
    """Numbers of the points that are drawn of a line, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).astype(int)) if count else np.arange(0)


# What it took, and how it was set.


def _cost(runs: Sequence[History]) -> str:
    rows = []
    for run in runs:
        for stage in run.stages:
            rows.append([run.name, stage.name, *_counted(run, stage), _seconds(run, stage)])
    if not rows:
        return paragraph("No run has logged a step.", "missing")
    titles = ["run", "stage", "steps", "gradients of a batch", "Hessian-vector products of a batch", "seconds"]
    note = (
        "Steps: of a training, of its optimizer; of a search, outer ones. Gradients of a batch: of a training, its "
        "batches; of a search, outer steps times the inner steps of each, as set, times --accumulate. Hessian-vector "
        "products: as the estimator counted them, times --accumulate. Seconds: of these steps, on the clock, "
        "compilation included. A dash: not recorded. Not in any stage, and so not counted: what looks at rows without "
        "training on them, and of attribute the influences and the trainings on subsets."
    )
    return table(titles, rows, (2, 3, 4, 5)) + paragraph(note, "note")


def _counted(run: History, stage: Stage) -> list[str]:
    """Steps, and what they took in batches: one of `--accumulate` that make a step."""
    accumulate = run.config.get("accumulate")
    batches = accumulate if isinstance(accumulate, int) and accumulate > 0 else 1
    logged = len(stage.steps)
    if stage.name.startswith("finetune"):  # whose every batch is logged
        return [f"{-(-logged // batches):,}", f"{logged:,}", "0"]
    if not stage.is_search:
        return [f"{logged:,}", f"{logged * batches:,}", "0"]
    inner = run.config.get("inner_steps", run.config.get("interval"))
    gradients = f"{logged * inner * batches:,}" if isinstance(inner, int) else "–"
    hvps = stage.series.get("hvps")
    if hvps is None or not np.isfinite(drawable(hvps)).all():
        return [f"{logged:,}", gradients, "–"]
    return [f"{logged:,}", gradients, f"{int(hvps.sum()) * batches:,}"]


def _seconds(run: History, stage: Stage) -> str:
    value = run.seconds.get(stage.name)
    return "–" if value is None else f"{value:,.1f}"


def _settings(runs: Sequence[History]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    cells = {name: [_shown(run.config[name]) if name in run.config else "–" for run in runs] for name in names}
    titles = ["setting", *(run.name for run in runs)]
    apart = [[name, *row] for name, row in cells.items() if len(set(row)) > 1]
    parts: list[str] = []
    if len(runs) > 1:
        words = "What the runs differ in:" if apart else "The runs have the same settings."
        parts.append(paragraph(words))
        parts += [table(titles, apart, kind="value")] if apart else []
    whole = table(titles, [[name, *row] for name, row in cells.items()], kind="value")
    return [*parts, webpage.details("All settings", whole)]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)

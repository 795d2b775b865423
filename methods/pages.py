"""The page of a run: what was found, what it is worth on the test rows, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from methods import configuration, units
from methods.bench import Bench
from methods.integrity import CONFIG
from methods.runfolder import RunFolder
from methods.tasks import units as units_of
from methods.tasks import untaught

UNTRAINED = "pretrained"
"""The row of the model as it came."""


class Run(NamedTuple):
    """A finished run, as its page is made of it.

    Attributes:
      settings, bench: what it was given.
      folder: its folder.
      selection: what `selection.json` holds; {} where there is none.
      results: the rows of the models that were tested, by their names.
    """

    settings: Any
    bench: Bench
    folder: RunFolder
    selection: Mapping[str, Any]
    results: Mapping[str, dict[str, Any]]

    def figure(self, name: str) -> Path:
        """Where a figure of the page is."""
        return self.folder.path / "figures" / name


class Page(NamedTuple):
    """What a method tells on its page, in Markdown.

    Attributes:
      title: the method's name.
      found: what was found; "" where nothing was searched.
      figures: file name in `figures/` -> caption.
      made: what the method adds to what is said of every run of how it was made.
      trust: how far to trust what was found, a section of its own; "" for none.
      adapter: whether what is trained is LoRA, whose settings are told; or what to say in place of the settings.
      more: how other programs are told of it, a section of its own, line by line as it is; "" for none.
      said: what the command says of it at its end.
    """

    title: str
    found: str
    figures: Mapping[str, str]
    made: str
    trust: str = ""
    adapter: bool | str = True
    more: str = ""
    said: str = ""


def write(run: Run, page: Page) -> None:
    """`report.md`: what a method tells, with a table of the results and what is said of every run."""
    drawn = "\n\n".join(f"![{caption}](figures/{file})" for file, caption in page.figures.items())
    found = "\n\n".join(part for part in (page.found, drawn) if part)
    sections = {
        "What was found" if page.found else "The training": found,
        "What it is worth": _worth(run.bench, run.results) if run.results else "",
        "How far to trust it": page.trust,
        "How it was made": _made(run, page),
    }
    parts = [f"# {page.title} on {run.bench.task.name}, {Path(run.settings.model).name}"]
    parts += [f"## {name}\n\n{_joined(text)}" for name, text in sections.items() if text]
    parts += [f"## For other programs\n\n{page.more}"] if page.more else []
    run.folder.write_text("report.md", "\n\n".join(parts) + "\n")


def _joined(text: str) -> str:
    """Markdown whose paragraphs are a line each; tables and lists stay as they are."""
    parts = [part.strip() for part in text.split("\n\n")]
    return "\n\n".join(part if part.startswith(("|", "- ")) else " ".join(part.split()) for part in parts)


def _worth(bench: Bench, results: Mapping[str, Mapping[str, Any]]) -> str:
    meaning = units.told(next(iter(results.values()))["metrics"])
    text = f"""{table(results)}

Test: {tested(bench)} of {bench.source.tested_on} which no search or training saw. {_untested(bench)}
{meaning}"""
    if all(row.get("losses") for row in results.values()):
        text += f" {_compared_by_loss(results)}"
    elif all(row["right"] is not None for row in results.values()):
        width = max(row["accuracy"]["high"] - row["accuracy"]["low"] for row in results.values())
        text += f"""
Intervals are Wilson's 95 % binomial intervals; the widest is {100 * width:.0f} points across, and smaller differences
between two rows say nothing by themselves. {_compared(results)}"""
    return text.rstrip()


def _untested(bench: Bench) -> str:
    """A sentence on test rows that are not used, and one on classes that were not learned; "" for none."""
    more = len(bench.source.test) - len(bench.splits.test)
    unused = f"{more:,} more rows of it are in no split: no more were asked for. " if more else ""
    return f"{unused}{untaught(bench.task, bench.splits)}"


def _made(run: Run, page: Page) -> str:
    settings, bench = run.settings, run.bench
    chosen = " What was chosen: `selection.json`." if run.selection else ""
    train, outer = len(bench.splits.train), len(bench.splits.outer)
    lora = page.adapter
    if lora is True:
        lora = f"LoRA rank {settings.rank}, alpha {settings.lora_alpha:g} on {', '.join(bench.sites)}"
    adapter = f"{lora}; " if lora else ""
    kept = configuration.FILE if (run.folder.path / configuration.FILE).is_file() else CONFIG
    steps = ""
    if any(name != UNTRAINED for name in run.results):
        steps = f"{settings.finetune_steps} training steps, peak learning rate {settings.finetune_lr:g}."
    used = "Trained" if steps else "Searched"
    reasons, cut = bench.left_out.told(settings.length), bench.splits.cut
    reasons = f": {reasons}" if reasons else ""
    total = train + outer + bench.left_out.total + bench.splits.dropped
    if total != len(bench.source.train):
        reasons += f"; its {len(bench.source.train):,} texts are {total:,} pieces, which are the rows here"
    if cut:
        reasons += f"; one text is longer than all outer rows, and its last {cut:,} pieces are among these"
    return f"""{used} on {train} rows; what is outer, and every validation, on {outer} other rows of
{bench.source.trained_on} ({bench.left_out.total:,} of its rows were not considered{reasons};
{bench.splits.dropped} share a subject with the test).
{adapter}{steps} {page.made} All settings: `{kept}`; every step: `metrics.jsonl`.{chosen}"""


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: parameters, the task's metrics, and for classes the share that is right and its interval."""
    first = next(iter(results.values()))
    metrics = list(first["metrics"])
    titles = ["model", "layers", "trainable parameters", *metrics]
    share = units.share_of(first) if all(row.get("accuracy") for row in results.values()) else None
    titles += [f"95 % interval of {share}", "right"] if share else []
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for name, row in results.items():
        cells = [name, str(len(row["layers"])), f"{row['parameters']:,}"]
        cells += [units.shown(metric, row["metrics"][metric]) for metric in metrics]
        cells += [units.interval(row), "{correct}/{total}".format(**row["accuracy"])] if share else []
        lines.append(f"| {' | '.join(cells)} |")
    if cut := max(row.get("cut", 0) for row in results.values()):
        lines.append(f"\n**{cut} test texts were longer than the model takes and were cut.**")
    return "\n".join(lines)


def number(count: int, what: str) -> str:
    """So many of something, in words: "1 step", "3 steps"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def layers(which: Sequence[int]) -> str:
    """Layers in words, those that follow each other as a run: "layers 0 to 3, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(which):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    told = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"layer{'s' * (len(which) > 1)} {told}" if told else "no layer"


def optimizer(settings: Any) -> str:
    """What the final training's optimizer is called."""
    named = {"adamw": "AdamW", "sgd": "gradient descent", "momentum": "gradient descent with momentum"}
    name: str = settings.finetune_optimizer
    return named.get(name, name)


def tested(bench: Bench) -> str:
    """How much was tested, in words: rows, and where texts are written the prompts whose references they are."""
    rows, prompts = len(bench.splits.test), len(units_of(bench.task, bench.splits.test))
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


def loss_difference(first: Any, second: Any, counts: Any) -> tuple[float, float]:
    r"""The difference of two losses over the same tokens, and half of its 95 % interval.

    $$
    d = \frac{\sum_i a_i - b_i}{\sum_i n_i}, \qquad
      1.96\, \frac{\sqrt{\frac{N}{N-1} \sum_i (a_i - b_i - d\, n_i)^2}}{\sum_i n_i}
    $$

    with a_i and b_i the losses of row i, summed over its n_i tokens: the standard error of a ratio of sums over
    independent rows.

    Args:
      first, second: `[rows]`, in nats.
      counts: `[rows]`.
    """
    gap, counts = np.asarray(first, float) - np.asarray(second, float), np.asarray(counts, float)
    mean, rows = gap.sum() / counts.sum(), len(gap)
    spread = np.sqrt(rows / max(rows - 1, 1) * ((gap - mean * counts) ** 2).sum()) / counts.sum()
    return float(mean), float(1.96 * spread)


def _compared_by_loss(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each other row: its paired difference of losses from the first that was trained."""
    first, *others = _in_order(results)
    lines = []
    for name in others:
        mean, half = loss_difference(results[first]["losses"], results[name]["losses"], results[first]["tokens"])
        interval = f"{mean - half:+.4f} to {mean + half:+.4f}"
        lines.append(f"- against {name}: {mean:+.4f} nats a token, 95 % interval {interval}")
    return "\n".join([f"\n\nOn the same rows, the loss of {first} less that of another:\n", *lines]) if lines else ""


def _in_order(results: Mapping[str, Any]) -> list[str]:
    """The names of the rows, those that were trained first."""
    return [name for name in results if name != UNTRAINED] + [name for name in results if name == UNTRAINED]


def _compared(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each other row: its paired difference from the first that was trained."""
    first, *others = _in_order(results)
    lines = [
        f"- against {name}: {number(wins, 'question')} only {first} got right, {losses} only the other; p = {p:.2f} "
        "(exact sign test)"
        for name in others
        for wins, losses, p in [paired_difference(results[first]["right"], results[name]["right"])]
    ]
    return "\n".join(["On the same questions:\n", *lines]) if lines else ""

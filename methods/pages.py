"""The page of a run: what was found, what it is worth on the test rows, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from methods.bench import Bench
from methods.runfolder import RunFolder
from methods.tasks import units

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
      adapter: whether what is trained is LoRA, whose settings are told.
    """

    title: str
    found: str
    figures: Mapping[str, str]
    made: str
    trust: str = ""
    adapter: bool = True


def write(run: Run, page: Page) -> None:
    """`report.md`: what a method tells, with a table of the results and what is said of every run."""
    shown = "\n\n".join(f"![{caption}](figures/{file})" for file, caption in page.figures.items())
    found = "\n\n".join(part for part in (page.found, shown) if part)
    sections = {
        "What was found" if page.found else "The training": found,
        "What it is worth": _worth(run.bench, run.results),
        "How far to trust it": page.trust,
        "How it was made": _made(run, page),
    }
    parts = [f"# {page.title} on {run.bench.task.name}, {Path(run.settings.model).name}"]
    parts += [f"## {name}\n\n{_joined(text)}" for name, text in sections.items() if text]
    run.folder.write_text("report.md", "\n\n".join(parts) + "\n")


def _joined(text: str) -> str:
    """Markdown whose paragraphs are a line each; tables and lists stay as they are."""
    parts = [part.strip() for part in text.split("\n\n")]
    return "\n\n".join(part if part.startswith(("|", "- ")) else " ".join(part.split()) for part in parts)


def _worth(bench: Bench, results: Mapping[str, Mapping[str, Any]]) -> str:
    text = f"""{table(results)}

Test: {tested(bench)} of the published {bench.task.test} set, which no search or training saw. Metrics in per cent."""
    if all(row["right"] is not None for row in results.values()):
        width = max(row["accuracy"]["high"] - row["accuracy"]["low"] for row in results.values())
        text += f"""
Intervals are Wilson's 95 % binomial intervals; the widest is {100 * width:.0f} points across, and smaller differences
between two rows say nothing by themselves. {_compared(results)}"""
    return text.rstrip()


def _made(run: Run, page: Page) -> str:
    settings, bench = run.settings, run.bench
    chosen = " What was chosen: `selection.json`." if run.selection else ""
    train, outer = len(bench.splits.train), len(bench.splits.outer)
    rank, alpha = settings.rank, settings.lora_alpha
    adapter = f"LoRA rank {rank}, alpha {alpha:g} on {', '.join(bench.sites)}; " if page.adapter else ""
    return f"""Trained on {train} rows; what is outer, and every validation, on {outer} other rows of the published
training set ({bench.left_out:,} of its rows were not considered: longer than {settings.length} tokens, or beyond what
was asked for; {bench.splits.dropped} share a subject with the test). {adapter}{settings.finetune_steps} training steps,
peak learning rate {settings.finetune_lr:g}. {page.made} All settings: `config.json`; every step:
`metrics.jsonl`.{chosen}"""


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
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


def _compared(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each other row: its paired difference from the first that was trained."""
    first, *others = [name for name in results if name != UNTRAINED] + [name for name in results if name == UNTRAINED]
    lines = [
        "- against {}: {} questions only {first} got right, {} only the other; p = {:.2f} (exact sign test)".format(
            name, *paired_difference(results[first]["right"], results[name]["right"]), first=first
        )
        for name in others
    ]
    return "\n".join(["On the same questions:\n", *lines]) if lines else ""

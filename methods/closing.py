"""What a command says at its end: the models, what they are worth, and where things are."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from methods import units
from methods.pages import loss_difference, number

NARROWEST = 60
NAME, TITLE = 10, 14
"""Columns that a model's name has at least, and a line of a title at most."""
LEFT = {
    "report.md": "the page, with figures",
    "adapter": "the adapter, in PEFT's format",
    "peft": "its configuration, for other trainers",
    "config.yaml": "all settings: --config repeats the run",
}
"""What a run may leave, and what it is."""


def text(folder: Path, results: Mapping[str, Mapping[str, Any]], width: int | None = None) -> str:
    """A table of the results in plain characters, and the files of the run, no wider than a window.

    Args:
      folder: of the run.
      results: the rows of the models that were tested, by their names.
      width: columns; None takes the window's, 100 at most.
    """
    width = width or min(100, max(NARROWEST, shutil.get_terminal_size().columns))
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False)
    if results:
        tables = [_table(results, most, interval=beside) for most, beside in ((2, True), (1, True), (1, False))]
        folded = max(max(map(len, results)) - NAME, 0)  # names are folded, all other columns stay whole
        wide = Console(width=1000)
        fitting = [table for table in tables if wide.measure(table).maximum - folded <= width]
        shown = fitting[0] if fitting else tables[-1]
        console.print(shown)
        whole = _table(results, len(next(iter(results.values()))["metrics"]), interval=True)
        if left_out := len(whole.columns) - len(shown.columns):
            console.print(f"Left out here: {number(left_out, 'column')}; every metric is in report.md.\n")
    for name, what in LEFT.items():
        if (folder / name).exists():
            console.print(f"{folder / name}  ({what})", overflow="ignore", no_wrap=True, crop=False)
    return out.getvalue().rstrip()


def _table(results: Mapping[str, Mapping[str, Any]], most: int, *, interval: bool) -> Table:
    """With so many metrics at most, and with the intervals of those that have one."""
    first, *others = map(str, next(iter(results.values()))["metrics"])
    # An interval stands beside the number that it is of, and nowhere else.
    shares = {units.share_of(row) for row in results.values()}
    share = shares.pop() if len(shares) == 1 else None
    counted = share if share is not None and share in (first, *others) else None
    shown = [first, counted, *others] if counted else [first, *others]
    metrics = list(dict.fromkeys(shown))[:most]
    known = {counted: units.interval} if counted else {}
    known |= {"loss": _of_loss} if any(_of_loss(row) for row in results.values()) else {}
    known = known if interval else {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", overflow="fold", min_width=NAME)
    titles = [title for name in metrics for title in (name, *[f"95 % interval of {name}"] * (name in known))]
    for title in ("layers", "parameters", *titles):
        table.add_column("\n".join(textwrap.wrap(title, TITLE)), justify="right", no_wrap=True)
    for name, row in results.items():
        cells = [name, str(len(row["layers"])), f"{row['parameters']:,}"]
        for metric in metrics:
            cells.append(units.shown(metric, row["metrics"][metric]))
            cells += [known[metric](row) or "not known"] if metric in known else []
        table.add_row(*cells)
    return table


def _of_loss(row: Mapping[str, Any]) -> str:
    """The 95 % interval of a model's loss, as that of a difference from 0; "" where it is not known."""
    losses, counts = row.get("losses"), row.get("tokens")
    if not losses or not counts or len(losses) < 2 or not np.isfinite(losses).all():
        return ""
    mean, half = loss_difference(losses, np.zeros(len(losses)), counts)
    return f"{units.shown('loss', mean - half)} to {units.shown('loss', mean + half)}"

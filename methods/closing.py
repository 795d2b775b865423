"""What a command says at its end: the models, what they are worth, and where things are."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from methods import units

NARROWEST = 60
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
        console.print(_table(results))
    for name, what in LEFT.items():
        if (folder / name).exists():
            console.print(f"{folder / name}  ({what})", overflow="ignore", no_wrap=True, crop=False)
    return out.getvalue().rstrip()


def _table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    metrics = list(next(iter(results.values()))["metrics"])
    metrics = metrics[: 1 if any(len(name) > 12 for name in metrics) else 2]  # the page has them all
    # An interval stands beside the number that it is of, and nowhere else.
    counted = all(units.share_of(row) == metrics[0] for row in results.values())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold", min_width=10)
    titles = [*metrics[:1], *(["95 % interval"] if counted else []), *metrics[1:]]
    for title in ("layers", "parameters", *titles):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in results.items():
        cells = [name, str(len(row["layers"])), f"{row['parameters']:,}"]
        told = [units.shown(metric, row["metrics"][metric]) for metric in metrics]
        table.add_row(*cells, *told[:1], *([units.interval(row)] if counted else []), *told[1:])
    return table

"""What every example shares: its form (short, full or smoke), its data, its interval, its figures and its record."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import io
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
RECORDS = Path(__file__).resolve().parent / "records"
FORMS = ("short", "full", "smoke")
PACKAGES = ("bilevel", "jax", "optax", "numpy")

if str(ROOT) not in sys.path:  # a script finds what lies beside it, and the loader of the benchmarks lies elsewhere
    sys.path.append(str(ROOT))
plt.rcParams.update({"figure.dpi": 100, "figure.figsize": (7.2, 3.0), "figure.constrained_layout.use": True})
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

_folders: list[tempfile.TemporaryDirectory] = []


def _spent() -> float:
    """Processor seconds of this process, and of those that it has started and that have ended."""
    return sum(os.times()[:4])


_started = _spent()


def form() -> str:
    """`--full` or `--smoke` on the command line, or the variable GALLERY_FORM; otherwise the short form.

    Raises:
      SystemExit: for another name in GALLERY_FORM.
    """
    given = [name for name in FORMS if f"--{name}" in sys.argv[1:]]
    name = given[0] if given else os.environ.get("GALLERY_FORM", "short")
    if name not in FORMS:
        raise SystemExit(f"GALLERY_FORM={name}: must be one of {', '.join(FORMS)}.")
    return name


def sizes(**forms: dict[str, Any]) -> SimpleNamespace:
    """The sizes of this form: those of `short`, and what `full` or `smoke` has in their place."""
    global _started
    _started = _spent()
    return SimpleNamespace(**(forms["short"] | forms.get(form(), {})))


def data(name: str) -> dict[str, np.ndarray]:
    """The arrays of a data set, as the benchmarks load them.

    Raises:
      SystemExit: if they are not to be had: says in a sentence what to do.
    """
    from benchmarks.solvers.benchmark_utils.data import load

    try:
        if name != "omniglot":
            return load(name)
        path = Path(os.environ.get("BILEVEL_DATA", ".")) / "omniglot" / "omniglot28.npz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: set BILEVEL_DATA to the folder that holds omniglot/.")
        with np.load(path) as arrays:
            return dict(arrays)
    except FileNotFoundError as error:
        raise SystemExit(f"This example needs the data set {name}. {error}") from error


def checkpoints(name: str) -> Path | None:
    """Where the full form keeps its states, so that it goes on where it was stopped; None for the other forms."""
    return ROOT / "runs" / "gallery" / name if form() == "full" else None


def folder(name: str) -> Path:
    """A folder for what an example leaves: that of `checkpoints`, or an empty one that goes with the process."""
    if (kept := checkpoints(name)) is not None:
        return kept
    _folders.append(made := tempfile.TemporaryDirectory())
    return Path(made.name)


def interval(values: Any) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval of it (nan for a single value)."""
    values = np.asarray(values, float).ravel()
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def show(figure) -> None:
    """Displays a figure in a notebook; a script without a screen only closes it."""
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        figure.savefig(image := io.BytesIO(), format="png")
        display(Image(image.getvalue()))
    plt.close(figure)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: a number that is published, known or measured by other means, and ours.

    Args:
      what: what is measured, with its unit.
      published: the number, and `spread` the half-width that was published with it (0 if none).
      source: where it was found.
      ours: one value a seed.
      better: "higher", "lower", or "equal" where ours should be the number itself.
      tolerance: how far from it counts as equal, beside both half-widths.
      why: what the difference comes from, where there is one.
      unit: what there is one value of, where it is not a seed.
    """

    what: str
    published: float
    source: str
    ours: Any
    better: str = "equal"
    spread: float = 0.0
    tolerance: float = 0.0
    why: str = ""
    unit: str = "seed"

    def entry(self) -> dict[str, Any]:
        """The row as a record holds it, with the verdict that follows from its numbers."""
        mean, half = interval(self.ours)
        gap = {"higher": self.published - mean, "lower": mean - self.published}.get(
            self.better, abs(mean - self.published)
        )
        slack = self.spread + (0.0 if math.isnan(half) else half)
        verdict = "met" if gap <= self.tolerance else "missed" if gap > self.tolerance + slack else "within"
        entry = dataclasses.asdict(self) | {"ours": [float(x) for x in np.ravel(self.ours)], "mean": mean}
        return entry | {"half": None if math.isnan(half) else half, "missed_by": max(gap, 0.0), "verdict": verdict}


def record(name: str, title: str, rows: list[Row], *, gradients: int, notes: str = "") -> None:
    """Writes the record of this run, and prints its comparisons.

    The short form's is `records/NAME.json`, the full form's `records/NAME.full.json`; the smoke form writes into the
    folder GALLERY_OUT alone.
    """
    now = form()
    entries = [row.entry() for row in rows]
    found = {
        "name": name,
        "title": title,
        "form": now,
        "date": datetime.date.today().isoformat(),
        "processor_seconds": round(_spent() - _started, 1),
        "gradient_evaluations": int(gradients),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "notes": notes,
        "rows": entries,
    }
    for entry in entries:
        print(entry["what"])
        print(f"  published {number(entry['published'], entry['spread'])}, ours {ours(entry)}")
    folder = Path(os.environ["GALLERY_OUT"]) if "GALLERY_OUT" in os.environ else None if now == "smoke" else RECORDS
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ".full" if now == "full" else ""
        (folder / f"{name}{suffix}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def number(value: float, half: float | None = None) -> str:
    """A value with as many digits as its half-width allows."""
    if not half:
        return f"{value:.6g}"
    if abs(value) < 1e-4:
        return f"{value:.1e} ± {half:.1e}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def ours(entry: dict[str, Any]) -> str:
    """The mean of a row's values with its interval and the number of seeds."""
    count = len(entry["ours"])
    return f"{number(entry['mean'], entry['half'])} ({count} {entry['unit']}{'s' * (count > 1)})"

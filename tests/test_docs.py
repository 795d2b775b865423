"""What the pages show is run, and what the package offers is on a page."""

import contextlib
import io
import re
import types
from pathlib import Path

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
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_of_a_page_run_one_after_the_other(page):
    names: dict[str, object] = {}
    # As a reader has it: float32, JAX's own promotion rules.
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        for block in blocks(page):
            exec(compile(block, page.name, "exec"), names)


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

"""What the pages show is run, and what the package offers is on a page."""

import contextlib
import io
import re
import types
from pathlib import Path

import jax
import pytest

import bilevel
from tests.bilevel.conftest import quick_compilation  # noqa: F401

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


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


def public_names() -> list[str]:
    source = Path(bilevel.__file__).read_text(encoding="utf-8")
    return re.findall(r"^from \S+ import (\w+) as \1$", source, re.MULTILINE)


def test_every_public_name_is_in_the_reference_and_documented():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    # A module is its docstring, in front of what it describes.
    named = re.findall(r"^::: bilevel\.(\w+)$", page, re.MULTILINE)
    shown = [name for name in named if not isinstance(getattr(bilevel, name, types), types.ModuleType)]
    assert sorted(shown) == sorted(public_names())
    undocumented = [name for name in public_names() if not (getattr(bilevel, name).__doc__ or "").strip()]
    assert not undocumented

"""What the pages show is run, and what the package offers is on a page."""

import json
import pkgutil
import re
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from tests.installed import Installed, outside

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


class Reader:
    """Runs pages where only the wheel is installed (`tests/reader.py`)."""

    def __init__(self, wheel: Installed, tmp: Path):
        (tmp / "reader.py").write_text(Path(__file__).with_name("reader.py").read_text(encoding="utf-8"))
        self._errors = (tmp / "errors.txt").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [wheel.bin / "python", tmp / "reader.py"], cwd=tmp, env=outside(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self.found = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            self._errors.seek(0)
            raise AssertionError(f"the process ended with {self._process.wait()}: {self._errors.read()[-2000:]}")
        return json.loads(line)

    def read(self, page: Path, folder: Path) -> list[dict[str, str | None]]:
        assert self._process.stdin
        code = [block.code for block in blocks(page)]
        self._process.stdin.write(json.dumps({"folder": str(folder), "blocks": code}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()


@pytest.fixture(scope="module")
def reader(installed, tmp_path_factory) -> Iterator[Reader]:
    started = Reader(installed, tmp_path_factory.mktemp("reader"))
    for package in ("bilevel", "methods"):
        assert Path(started.found[package]).is_relative_to(installed.site)
    assert started.found["benchmarks"] is started.found["tests"] is None
    yield started
    started.close()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_of_a_page_run_one_after_the_other(page, reader, tmp_path):
    """From the wheel, in an empty folder. What a page says is printed, or warned of, is: `...` stands for anything."""
    for block, done in zip(blocks(page), reader.read(page, tmp_path), strict=False):
        assert done["error"] is None, f"{block.code}\n{done['error']}"
        if block.said:
            pattern = ".*?".join(re.escape(" ".join(part.split())) for part in block.said.split("..."))
            said = " ".join(f"{done['printed']} {done['warned']}".split())
            assert re.search(pattern, said), f"the page says\n{block.said}\nand it is\n{said}"
            assert not done["warned"] or "Warning" in block.said, done["warned"]


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


def test_the_reference_names_members_that_there_are():
    """Of an entry with `members: [...]`; the site is not built without them."""
    listed = re.findall(r"^::: ([\w.]+)\n(?:    .*\n)*?      members: \[([^\]]*)\]", REFERENCE, re.MULTILINE)
    assert len(listed) > 10
    members = [(path, name.strip()) for path, names in listed for name in names.split(",")]
    assert not [f"{path}.{name}" for path, name in members if not hasattr(pkgutil.resolve_name(path), name)]


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

"""What is public, and who may enter by which door: read from the sources, nothing is run."""

import ast
import graphlib
import re
import types
from pathlib import Path

import pytest

import bilevel
import bilevel.extend
import bilevel.nnx
import bilevel.testing

ROOT = Path(__file__).parents[1]
PUBLIC = ("bilevel", "bilevel.extend", "bilevel.nnx", "bilevel.testing")


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imported(text: str) -> set[str]:
    """Modules that a source imports, and names of packages that it imports from."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


def of_engine(text: str) -> set[str]:
    return {name for name in imported(text) if name == "bilevel" or name.startswith("bilevel.")}


@pytest.mark.parametrize("folder", ["methods", "benchmarks", "scripts"])
def test_others_enter_by_the_front_door(folder):
    wrong = {path.name: inside for path in sources(folder) if (inside := of_engine(path.read_text()) - {*PUBLIC})}
    assert not wrong


def test_so_do_the_pages():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            assert of_engine(block) <= {*PUBLIC}, page.name


def test_the_engine_knows_no_method():
    for path in sources("bilevel"):
        assert not {name.partition(".")[0] for name in imported(path.read_text())} & {
            "methods", "benchmarks", "transformers", "datasets"
        }, path  # fmt: skip


def test_what_is_exported_is_there_and_no_module():
    assert {"run", "fit", "compare", "variance", "Problem", "Unrolled", "SOBA"} <= {*bilevel.__all__}
    assert all(not isinstance(getattr(bilevel, name), types.ModuleType) for name in bilevel.__all__)
    for name in ("run", "fit", "compare", "variance"):
        assert isinstance(getattr(bilevel, name), types.FunctionType)
    assert re.fullmatch(r"\d+\.\d+\.\d+", bilevel.__version__)


INTERNALS = ("jax.extend", "jax.interpreters", "jax._src")


def test_one_room_knows_how_jax_writes_programs():
    for path in sources("bilevel"):
        text = path.read_text()
        inside = [name for name in imported(text) if name.startswith(INTERNALS)]
        if path.name == "tracing.py":
            assert inside
            continue
        assert not inside and ".primitive." not in text, path


ROOMS = ["measuring", "running", "solvers", "hypergradients", "linear_solvers", "differentiation"]
"""From the top down; below them are the files at the top of the package."""

BELOW = {
    "measuring": {"running", "solvers", "hypergradients", "linear_solvers", "differentiation"},
    "running": {"solvers", "hypergradients", "linear_solvers", "differentiation"},
    "solvers": {"hypergradients", "linear_solvers", "differentiation"},
    "hypergradients": {"linear_solvers", "differentiation"},
    "linear_solvers": set(),
    "differentiation": set(),
}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room):
    for path in sources(f"bilevel/{room}"):
        rooms = {name.split(".")[1] for name in of_engine(path.read_text()) if "." in name} & {*ROOMS}
        assert rooms <= BELOW[room] | {room}, path
    for path in (ROOT / "bilevel").glob("*.py"):
        if path.name not in ("__init__.py", "extend.py", "testing.py"):
            rooms = {name.split(".")[1] for name in of_engine(path.read_text()) if "." in name} & {*ROOMS}
            assert not rooms, path


def test_what_tests_share_is_in_no_file_of_tests():
    """Fixtures and helpers are in conftest.py or a module of their own."""
    pattern = re.compile(r"^\s*(?:from tests[\w.]*\.test_\w+ import|from tests[\w.]* import .*\btest_\w+)", re.M)
    found = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py") if pattern.search(p.read_text())]
    assert found == []


def room(file: Path) -> str:
    """The folder or file right below the package that a source of the engine is in."""
    return file.relative_to(ROOT / "bilevel").parts[0].removesuffix(".py")


def test_no_room_of_the_engine_stands_above_another_that_stands_above_it():
    """Not for types alone either: whoever reads one of them would have to read the other first."""
    below: dict[str, set[str]] = {}
    for file in sources("bilevel"):
        used = {name.split(".")[1] for name in of_engine(file.read_text(encoding="utf-8")) if "." in name}
        below.setdefault(room(file), set()).update(used - {room(file)})
    assert len(below) > 10
    tuple(graphlib.TopologicalSorter(below).static_order())  # raises CycleError, which names the circle


def test_no_files_of_the_methods_import_each_other():
    def name_of(file: Path) -> str:
        return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    modules = {name_of(file): file for file in sources("methods")}
    below: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                below[name] |= {each if each in modules else str(node.module) for each in inside} & set(modules)
    assert sum(map(len, below.values())) > 100
    tuple(graphlib.TopologicalSorter(below).static_order())

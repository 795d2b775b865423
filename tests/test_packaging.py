"""The wheel is what users get: it is built, installed where the checkout is out of reach, and imported."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("bilevel", "methods")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def call(*command, cwd) -> str:
    """Run outside the checkout, as a user would: nothing of it on the path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Installed(NamedTuple):
    wheel: Path
    bin: Path
    site: Path
    cwd: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """The wheel in an environment of its own. It is built from the sdist, which must be complete for that.

    The dependencies are borrowed by a .pth file from the environment that runs the tests: Python adds that
    folder to the path but does not read its .pth files, so an editable install of the checkout is not seen.
    """
    tmp = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", ROOT, cwd=tmp)
    (wheel,) = (tmp / "dist").glob("*.whl")
    venv.create(tmp / "env", with_pip=False)
    python = tmp / "env" / "bin" / "python"
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", python)
    call(sys.executable, *pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-c", code, cwd=tmp).strip())
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)), encoding="utf-8")
    return Installed(wheel, python.parent, site, tmp)


def test_wheel_holds_the_two_packages_and_nothing_else(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    shipped = {name for name in names if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped
    info = f"bilevel-{PROJECT['version']}.dist-info"
    assert {f"{info}/METADATA", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(names)


def test_installed_wheel_imports(installed):
    """Every module of it, so that none leans on something that only the checkout has."""
    code = """
import importlib, pkgutil
for package in ("bilevel", "methods"):
    module = importlib.import_module(package)
    print(module.__file__)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.endswith("__main__"):
            print(importlib.import_module(info.name).__file__)
"""
    files = call(installed.bin / "python", "-c", code, cwd=installed.cwd).splitlines()
    assert files
    assert all(Path(file).is_relative_to(installed.site) for file in files), files


def test_console_script(installed):
    assert "flexora" in call(installed.bin / "bilevel", "--help", cwd=installed.cwd)


def test_version(installed):
    code = "import importlib.metadata as m; print(m.version('bilevel'))"
    assert call(installed.bin / "python", "-c", code, cwd=installed.cwd).strip() == PROJECT["version"]


def test_slow_imports_are_lazy(installed):
    slow = {"datasets", "matplotlib", "torch", "transformers"}
    code = "import sys, bilevel, methods; print(*sys.modules)"
    assert not slow & set(call(installed.bin / "python", "-c", code, cwd=installed.cwd).split())


def imports(package: str) -> dict[str, set[str]]:
    """Top-level names that each file of a package imports, also inside functions."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        names = found[path.relative_to(ROOT).as_posix()] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_a_declared_dependency(package):
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in PROJECT["dependencies"]}
    providers = importlib.metadata.packages_distributions()
    for file, names in imports(package).items():
        for name in names - sys.stdlib_module_names - set(PACKAGES):
            distributions = {normal(provider) for provider in providers.get(name, [name])}
            assert distributions & declared, f"{file} imports {name}: no dependency in pyproject.toml has it"


def test_the_engine_knows_nothing_of_methods():
    for file, names in imports("bilevel").items():
        assert not names & {"methods", "transformers", "datasets"}, f"{file}: bilevel stands below these"

"""The wheel is what users get: it is built, installed where the checkout is out of reach, and imported."""

import ast
import email
import importlib.metadata
import re
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.installed import Installed, call, environment, ran

ROOT = Path(__file__).parents[1]
PACKAGES = ("bilevel", "methods")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def light(wheel, tmp_path_factory) -> Installed:
    """The wheel with what `pip install bilevel` brings, and nothing else, by links to where it is installed."""
    found = environment(wheel, tmp_path_factory.mktemp("light"))
    for distribution in map(importlib.metadata.distribution, brought(required(wheel))):
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (found.site / top).exists():  # two distributions may share a folder
                (found.site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return found


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
    slow = {"datasets", "flax", "matplotlib", "torch", "transformers"}
    code = "import sys, bilevel, methods; print(*sys.modules)"
    assert not slow & set(call(installed.bin / "python", "-c", code, cwd=installed.cwd).split())


class Import(NamedTuple):
    """A package that a file imports, and whether a sentence of ours stands in for it where it is not installed."""

    file: str
    name: str
    guarded: bool


def imports(package: str) -> list[Import]:
    """All imports in a package, also inside functions."""
    found = []
    for path in (ROOT / package).rglob("*.py"):
        tree, file = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
        tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and says_what_is_missing(node)]
        guarded = {id(inner) for node in tries for statement in node.body for inner in ast.walk(statement)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            found += [Import(file, name.partition(".")[0], id(node) in guarded) for name in names]
    return found


def says_what_is_missing(node: ast.Try) -> bool:
    """Whether the `try` ends in a ModuleNotFoundError of ours that names what to install."""
    return any(
        isinstance(handler.type, ast.Name)
        and handler.type.id == "ModuleNotFoundError"
        and isinstance(handler.body[-1], ast.Raise)
        and "pip install 'bilevel[" in ast.unparse(handler.body[-1]).replace('"', "'")
        for handler in node.handlers
    )


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(wheel: Path, extra: str = "") -> list[Requirement]:
    """What the wheel asks for by its metadata: always, or for an extra besides."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"bilevel-{PROJECT['version']}.dist-info/METADATA").decode()
    lines = map(Requirement, email.message_from_string(text).get_all("Requires-Dist", []))
    return [line for line in lines if (line.marker.evaluate({"extra": extra}) if line.marker else not extra)]


def names(requirements: list[Requirement]) -> set[str]:
    return {normal(requirement.name) for requirement in requirements}


def brought(requirements: list[Requirement]) -> set[str]:
    """What pip installs for these: them, what they ask for, and so on, with the extras that are asked for."""
    found, left = set(), [(normal(r.name), extra) for r in requirements for extra in ("", *r.extras)]
    while left:
        name, extra = each = left.pop()
        if each not in found:
            found.add(each)
            for r in map(Requirement, importlib.metadata.requires(name) or []):
                if r.marker is None or r.marker.evaluate({"extra": extra}):
                    left += [(normal(r.name), extra) for extra in ("", *r.extras)]
    return {name for name, _ in found}


def missing(package: str, declared: set[str]) -> set[Import]:
    """Imports of a package that none of the distributions brings, and that no sentence stands in for."""
    providers = importlib.metadata.packages_distributions()
    return {
        each
        for each in imports(package)
        if each.name not in {*sys.stdlib_module_names, *PACKAGES}
        and not each.guarded
        and not {normal(provider) for provider in providers.get(each.name, [each.name])} & declared
    }


def test_every_import_is_a_declared_dependency(wheel):
    engine = names(required(wheel))
    assert not missing("bilevel", engine)
    assert not missing("methods", engine | names(required(wheel, "lora")))
    # The guards are looked at, and the engine asks for no more than it imports.
    found = imports("bilevel")
    guarded = {"flax", "matplotlib", "mlflow", "optuna", "tensorboard", "wandb"}
    assert {each.name for each in found if each.guarded} == guarded
    assert engine <= {"orbax-checkpoint" if each.name == "orbax" else each.name for each in found}


def test_extras_that_need_the_methods_bring_them():
    extras = PROJECT["optional-dependencies"]
    for extra in ("check", "bench", "nlg"):
        assert "bilevel[lora]" in extras[extra], extra
    assert "bilevel[check]" in extras["test"]


def test_an_extra_within_another_asks_for_the_same():
    extras = PROJECT["optional-dependencies"]
    assert set(extras["nnx"]) <= set(extras["lora"])


def test_the_engine_needs_no_more_than_its_requirements(light, tmp_path):
    code = f"""
import bilevel, bilevel.extend, optax
from bilevel.testing import ridge
problem, train, val = ridge()
solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=5), optax.sgd(1.0))
data = {{"inner_data": train, "outer_data": val, "checkpoint_dir": {str(tmp_path / "run")!r}}}
for steps in (2, 4):  # the second call goes on from the checkpoint of the first
    result = bilevel.run(solver, steps=steps, **data)
print(len(result.history["outer_loss"]))
try:
    bilevel.Comparison((), "").plot()
except ModuleNotFoundError as error:
    print(error)
try:
    import bilevel.nnx
except ModuleNotFoundError as error:
    print(error)
"""
    said = call(light.bin / "python", "-c", code, cwd=light.cwd).splitlines()
    assert said == [
        "4",
        "matplotlib is not installed, which Comparison.plot needs: pip install 'bilevel[lora]'.",
        "flax is not installed, which bilevel.nnx needs: pip install 'bilevel[nnx]'.",
    ]


def test_the_command_without_the_extra_says_what_to_install(light):
    assert "flexora" in call(light.bin / "bilevel", "--help", cwd=light.cwd)
    # All in one program: each alone would import JAX anew.
    code = "from methods import cli; print({name: cli.run([name]) for name in cli.COMMANDS})"
    done = ran(light.bin / "python", "-c", code, cwd=light.cwd)
    codes, said = ast.literal_eval(done.stdout), done.stderr.splitlines()
    assert "flexora" in codes and set(codes.values()) == {2}
    for name, line in zip(codes, said, strict=True):
        needed = r"\w+, which is not installed: pip install 'bilevel\[lora\]'\."
        assert re.fullmatch(rf"bilevel: ({name} needs|The methods need) {needed}", line), line
    # And from Python, where no command is.
    python = ran(light.bin / "python", "-c", "from methods import flexora", cwd=light.cwd)
    assert re.search(rf"ModuleNotFoundError: The methods need {needed}", python.stderr.splitlines()[-1]), python.stderr


def test_the_engine_knows_nothing_of_methods():
    for each in imports("bilevel"):
        assert each.name not in {"methods", "transformers", "datasets"}, f"{each.file}: bilevel stands below these"

"""What the project says it runs on, and the two scripts that choose where CI looks."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oldest, pythons = script("oldest"), script("pythons")
RUN_TIME = oldest.run_time(PROJECT)


def test_the_oldest_are_the_lower_bounds_and_admitted():
    pins = oldest.oldest(RUN_TIME)
    assert len(pins) == len(RUN_TIME)
    for pin, requirement in zip(map(Requirement, pins), map(Requirement, RUN_TIME), strict=True):
        (version,) = (specifier.version for specifier in pin.specifier)
        assert pin.name == requirement.name and version in requirement.specifier
        lower = [s.version for s in requirement.specifier if s.operator in (">=", "==", "~=")]
        assert lower == [version]
    assert oldest.oldest(["a_b.c[x,y]>=1.2,<2; python_version < '4'"]) == ["a_b.c==1.2"]
    for unbounded in ("a", "a<2", "a; python_version > '3'"):
        with pytest.raises(ValueError, match="no lower bound: write name>=version"):
            oldest.oldest([unbounded])


def test_what_is_installed_is_admitted_and_printed(capsys):
    for requirement in map(Requirement, RUN_TIME):
        assert importlib.metadata.version(requirement.name) in requirement.specifier, requirement
    oldest.main(["--installed"])
    printed = capsys.readouterr().out
    for name in ("jax", "transformers"):
        assert f" {name} {importlib.metadata.version(name)}," in printed


def test_pythons_are_those_that_start(tmp_path, monkeypatch):
    versions = pythons.supported()
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")
    here = "{}.{}".format(*sys.version_info)
    assert here in versions, "this Python has no classifier"

    def put(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    path, root = tmp_path / "bin", tmp_path / "pyenv"
    put(path / "python3.12", "echo not chosen >&2; exit 127")  # what pyenv puts there
    put(root / "versions" / "3.12.4" / "bin" / "python3.12", "echo 3.12")
    put(path / "python3.13", "echo 3.9")  # another one under that name
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("PYENV_ROOT", str(root))
    assert pythons.find("3.12") == str(root / "versions" / "3.12.4" / "bin" / "python3.12")
    assert pythons.find("3.13") is None and pythons.find("3.11") is None
    put(path / "python3.13", "echo 3.13")
    assert pythons.find("3.13") == str(path / "python3.13")


def test_what_is_not_found_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert pythons.main("newest") == 1
    assert re.fullmatch(r"No Python 3\.12, .* was found on PATH or in pyenv's versions\.\n", capsys.readouterr().err)
    for version in pythons.supported():
        (tmp_path / f"python{version}").write_text(f"#!/bin/sh\necho {version}\n")
        (tmp_path / f"python{version}").chmod(0o755)
    assert pythons.main("newest") == 0 and pythons.main("oldest") == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / f"python{version}") for version in (pythons.supported()[-1], pythons.supported()[1])
    ]


def test_the_subset_names_files_that_are_there():
    make = subprocess.run(
        ["make", "--dry-run", "subset", "VENV=nowhere"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    named = [word for word in make.split() if word.startswith("tests/")]
    assert len(named) > 5
    for word in named:
        file, _, test = word.partition("::")
        assert (not test) or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), word

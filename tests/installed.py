"""The wheel as users get it: built from the checkout, and installed where the checkout is out of reach."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


def outside() -> dict[str, str]:
    """The environment of a user's process: nothing in it leads to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_"))}


def ran(*command, cwd) -> subprocess.CompletedProcess[str]:
    """Run outside the checkout, as a user would."""
    return subprocess.run([str(c) for c in command], cwd=cwd, env=outside(), capture_output=True, text=True)


def call(*command, cwd) -> str:
    """What such a run prints; it must end well."""
    done = ran(*command, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Installed(NamedTuple):
    wheel: Path
    bin: Path
    site: Path
    cwd: Path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """It is built from the sdist, which must be complete for that."""
    tmp = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", ROOT, cwd=tmp)
    (wheel,) = (tmp / "dist").glob("*.whl")
    return wheel


def environment(wheel: Path, tmp: Path) -> Installed:
    """The wheel in an environment of its own, without the packages that it needs."""
    venv.create(tmp / "env", with_pip=False)
    python = tmp / "env" / "bin" / "python"
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", python)
    call(sys.executable, *pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Installed(wheel, python.parent, Path(call(python, "-c", code, cwd=tmp).strip()), tmp)


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Installed:
    """The wheel with everything.

    The dependencies are borrowed by a .pth file from the environment that runs the tests: Python adds that
    folder to the path but does not read its .pth files, so an editable install of the checkout is not seen.
    """
    found = environment(wheel, tmp_path_factory.mktemp("whole"))
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (found.site / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)), encoding="utf-8")
    return found

"""The Pythons of this machine that the project supports: `python scripts/pythons.py [newest | oldest]`.

The versions are those of the classifiers in pyproject.toml. An interpreter is looked for on PATH and in pyenv's folder
of versions, and has to start: pyenv puts programs on PATH that only say that the version is not chosen. Without an
argument, all that were found, a line each; else the path of the one that runs the tests with the newest releases of the
dependencies, or with the oldest: the two last in the list, since the whole suite runs on the first.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def supported() -> list[str]:
    """Versions such as 3.12, oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"]]
    return sorted((match[1] for match in found if match), key=lambda version: int(version.split(".")[1]))


def find(version: str) -> str | None:
    """The path of a Python of that version that starts, or None."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    by_pyenv = sorted(root.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)
    for path in [shutil.which(f"python{version}"), *by_pyenv]:
        if path and _version(str(path)) == version:
            return str(path)
    return None


def _version(path: str) -> str | None:
    code = "import ensurepip, sys, venv; print(*sys.version_info[:2], sep='.')"
    try:
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main(which: str | None) -> int:
    found = {version: path for version in supported() if (path := find(version))}
    others = [path for version, path in found.items() if version != supported()[0]]
    if which is None:
        print("\n".join(f"{version} {path}" for version, path in found.items()))
    elif others:
        print(others[-1] if which == "newest" else others[0])
    else:
        wanted = ", ".join(supported()[1:])
        print(f"No Python {wanted} was found on PATH or in pyenv's versions.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))

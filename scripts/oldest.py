"""The oldest releases that pyproject.toml admits, as constraints for pip: `python scripts/oldest.py > oldest.txt`.

What a user may have installed is what must work. These are pins of the project's own requirements alone, of the engine
and of extra lora; what those need in turn, pip resolves as it likes. `--installed` prints what is installed of them
instead.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,.-]+\])?(?P<bounds>[^;]*)(;.*)?")


def run_time(project: dict[str, Any]) -> list[str]:
    """The requirements of all that is in the wheel: of the engine, and of extra lora."""
    return [*project["dependencies"], *project["optional-dependencies"]["lora"]]


def oldest(requirements: list[str]) -> list[str]:
    """`name==lower bound` for each of `requirements`.

    Raises:
      ValueError: for one without a lower bound.
    """
    pins = []
    for requirement in requirements:
        parts = REQUIREMENT.fullmatch(requirement)
        lower = parts and re.search(r"(?:>=|==|~=)\s*([\w.]+)", parts["bounds"])
        if not lower:
            raise ValueError(f"{requirement!r} has no lower bound: write name>=version.")
        pins.append(f"{parts['name']}=={lower[1]}")
    return pins


def main(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = oldest(run_time(project))
    if arguments == ["--installed"]:
        names = [pin.partition("==")[0] for pin in pins]
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        print(f"Python {sys.version.split()[0]}: {versions}")
    else:
        print("\n".join(pins))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The requirements of one extra of pyproject.toml, a line each: `python scripts/extra.py docs > docs.txt`.

`pip install '.[docs]'` would install the package too, with all that it needs.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = arguments
    print("\n".join(project["optional-dependencies"][extra]))


if __name__ == "__main__":
    main(sys.argv[1:])

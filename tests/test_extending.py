"""A new estimator, or a new solver, is one new file, one line of exports and one row of a table of the tests.

Each of the page's examples is made a part of a copy of this package, as the page says; what has changed there is
counted, and the tests of the table are run on the new row.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.M | re.S)


def block(name: str) -> str:
    """The code block of the page that defines the class `name`, without what uses it."""
    (found,) = (text for text in BLOCKS if f"\nclass {name}(" in text)
    return found.partition("\n\n\nsolver =")[0].rstrip() + "\n"


@dataclasses.dataclass(frozen=True)
class Example:
    """What is added: the class, its module, the table and the row there, and the tests that are run."""

    name: str
    module: str
    table: str
    row: str
    head: str
    tests: tuple[str, ...]

    @property
    def file(self) -> str:
        return self.module.replace(".", "/") + ".py"


ESTIMATOR = Example(
    "IdentityHessian",
    "bilevel.hypergradients.identity",
    "tests/bilevel/estimators.py",
    # At the trained point, Quadratic.first_order + C' A (w_K - c), and 0 for what acts inside training alone.
    """    Row(
        "IdentityHessian",
        bilevel.IdentityHessian,
        lambda q, outer, steps, **at: q.first_order(outer, steps)
        | {"tilt": outer["tilt"] + q.C.T @ q.A @ (q.trained(outer, steps, **at) - q.c)},
        blind=within,
    ),
""",
    "",
    ("hypergradients/test_estimators.py", "hypergradients/test_keys.py", "differentiation/test_loss_checks.py"),
)
SOLVER = Example(
    "OneStepDescent",
    "bilevel.solvers.one_step_descent",
    "tests/bilevel/solvers/table.py",
    """    Row(
        bilevel.OneStepDescent,
        lambda s, at: vars(s).update(
            w=s.w - at.rho * at.f[0].w(s.w, s.lam),
            lam=s.lam - at.gamma * (at.F[0].lam(s.w, s.lam) - at.rho * at.f[0].C(s.w, s.lam) @ at.F[0].w(s.w, s.lam)),
        ),
        lambda k, p: (1, 1, 0, 1),
    ),
""",
    # What its block takes from the blocks before.
    "import dataclasses\n\nfrom bilevel.extend import register\n",
    ("solvers/test_solver_steps.py", "solvers/test_solvers.py", "hypergradients/test_keys.py"),
)


def insert(path: Path, after: str, text: str) -> None:
    old = path.read_text(encoding="utf-8")
    assert old.count(after) == 1
    path.write_text(old.replace(after, after + text), encoding="utf-8")


def call(*command: str, cwd: Path) -> str:
    path = {"PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PYTEST_"))} | path
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copied(tmp: Path) -> Path:
    """The engine and its tests, under version control."""
    for folder in ("bilevel", "tests/bilevel"):
        shutil.copytree(ROOT / folder, tmp / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / file, tmp / file)
    call("git", "init", "--quiet", cwd=tmp)
    call("git", "add", ".", cwd=tmp)
    who = "-c", "user.name=test", "-c", "user.email=test@localhost"
    call("git", *who, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", "before", cwd=tmp)
    return tmp


@pytest.mark.slow
@pytest.mark.parametrize("example", [ESTIMATOR, SOLVER], ids=lambda example: example.name)
def test_one_file_one_export_and_one_row(example, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    tree, text = copied(tmp_path), example.head + block(example.name)
    (tree / example.file).write_text(text, encoding="utf-8")
    export = f"from {example.module} import {example.name} as {example.name}\n"
    insert(tree / "bilevel/__init__.py", "from bilevel.solvers.base import Solver as Solver\n", export)
    insert(tree / example.table, "\nTABLE = [\n", example.row)

    call("git", "add", "--intent-to-add", ".", cwd=tree)
    changed = {}
    for line in call("git", "diff", "--numstat", cwd=tree).splitlines():
        added, removed, name = line.split("\t")
        changed[name] = int(added), int(removed)
    assert changed == {
        example.file: (len(text.splitlines()), 0),
        "bilevel/__init__.py": (1, 0),
        example.table: (len(example.row.splitlines()), 0),
    }

    files = [f"tests/bilevel/{file}" for file in example.tests]
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"
    said = call(sys.executable, "-m", "pytest", *options, *files, "-k", example.name, cwd=tree)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 7

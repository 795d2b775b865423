"""A new estimator, solver or method is one new file, one line where it is registered, and one row of a test table.

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
    """The code block of the page that defines `name`, a class or a function, without what uses it."""
    (found,) = (text for text in BLOCKS if f"\nclass {name}(" in text)
    return found.partition("\n\n\nsolver =")[0].rstrip() + "\n"


EXPORTS = "bilevel/__init__.py", "from bilevel.solvers.base import Solver as Solver\n"


@dataclasses.dataclass(frozen=True)
class Example:
    """What is added.

    Attributes:
      name: the class that its block of the page defines.
      module: where it goes.
      registry: the file of its line, the line before, and the line.
      table: the file of its row, the line before, and the row.
      head: what its block takes from the blocks before.
      tests: the tests that are run on it.
      least: how many of them there are.
    """

    name: str
    module: str
    registry: tuple[str, str, str]
    table: tuple[str, str, str]
    head: str
    tests: tuple[str, ...]
    least: int = 7

    @property
    def file(self) -> str:
        return self.module.replace(".", "/") + ".py"


ESTIMATOR = Example(
    "IdentityHessian",
    "bilevel.hypergradients.identity",
    (*EXPORTS, "from bilevel.hypergradients.identity import IdentityHessian as IdentityHessian\n"),
    # At the trained point, Quadratic.first_order + C' A (w_K - c), and 0 for what acts inside training alone.
    (
        "tests/bilevel/estimators.py",
        "\nTABLE = [\n",
        """    Row(
        "IdentityHessian",
        bilevel.IdentityHessian,
        lambda q, outer, steps, **at: q.first_order(outer, steps)
        | {"tilt": outer["tilt"] + q.C.T @ q.A @ (q.trained(outer, steps, **at) - q.c)},
        blind=within,
    ),
""",
    ),
    "",
    (
        "tests/bilevel/hypergradients/test_estimators.py",
        "tests/bilevel/hypergradients/test_keys.py",
        "tests/bilevel/differentiation/test_loss_checks.py",
    ),
)
SOLVER = Example(
    "OneStepDescent",
    "bilevel.solvers.one_step_descent",
    (*EXPORTS, "from bilevel.solvers.one_step_descent import OneStepDescent as OneStepDescent\n"),
    (
        "tests/bilevel/solvers/table.py",
        "\nTABLE = [\n",
        """    Row(
        bilevel.OneStepDescent,
        lambda s, at: vars(s).update(
            w=s.w - at.rho * at.f[0].w(s.w, s.lam),
            lam=s.lam - at.gamma * (at.F[0].lam(s.w, s.lam) - at.rho * at.f[0].C(s.w, s.lam) @ at.F[0].w(s.w, s.lam)),
        ),
        lambda k, p: (1, 1, 0, 1),
    ),
""",
    ),
    "import dataclasses\n\nfrom bilevel.extend import register\n",
    (
        "tests/bilevel/solvers/test_solver_steps.py",
        "tests/bilevel/solvers/test_solvers.py",
        "tests/bilevel/hypergradients/test_keys.py",
    ),
)
METHOD = Example(
    "BestLinearSettings",
    "methods.best_linear",
    (
        "methods/cli.py",
        "\nCOMMANDS = {\n",
        '    "best-linear": Row("methods.best_linear", "find the linear that deserves LoRA"),\n',
    ),
    (
        "tests/methods/commands.py",
        "\nTABLE = {\n",
        '    "best-linear": Row("--inner-steps 2 --outer-steps 2", ("selection.json",), ("best-linear", "lora")),\n',
    ),
    "",  # its block is whole by itself
    ("tests/methods/test_commands.py", "tests/methods/test_misuse.py"),
    3,
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
    """The packages and their tests, under version control."""
    for folder in ("bilevel", "methods", "tests/bilevel", "tests/methods"):
        shutil.copytree(ROOT / folder, tmp / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/installed.py", "tests/tiny.py"):
        shutil.copy(ROOT / file, tmp / file)
    call("git", "init", "--quiet", cwd=tmp)
    call("git", "add", ".", cwd=tmp)
    who = "-c", "user.name=test", "-c", "user.email=test@localhost"
    call("git", *who, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", "before", cwd=tmp)
    return tmp


def test_a_method_beside_the_package_is_a_command(tmp_path):
    """By the page's own script, with nothing of the package edited."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```py\n(# run\.py.*?)^```", page, re.M | re.S)
    (tmp_path / "run.py").write_text(script, encoding="utf-8")
    (tmp_path / "best_linear.py").write_text(METHOD.head + block(METHOD.name), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "run.py", "best-linear", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--inner-steps" in done.stdout and "learn which deserves LoRA" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("example", [ESTIMATOR, SOLVER, METHOD], ids=lambda example: example.name)
def test_one_file_one_line_and_one_row(example, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    tree, text = copied(tmp_path), example.head + block(example.name)
    (tree / example.file).write_text(text, encoding="utf-8")
    for file, before, line in (example.registry, example.table):
        insert(tree / file, before, line)

    call("git", "add", "--intent-to-add", ".", cwd=tree)
    changed = {}
    for line in call("git", "diff", "--numstat", cwd=tree).splitlines():
        added, removed, name = line.split("\t")
        changed[name] = int(added), int(removed)
    assert changed == {
        example.file: (len(text.splitlines()), 0),
        example.registry[0]: (1, 0),
        example.table[0]: (len(example.table[2].splitlines()), 0),
    }

    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"
    chosen = "best-linear" if example is METHOD else example.name
    said = call(sys.executable, "-m", "pytest", *options, *example.tests, "-k", chosen, cwd=tree)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= example.least

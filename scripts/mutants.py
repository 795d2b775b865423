"""Mutation testing of `bilevel/`, folder by folder: python scripts/mutants.py [--sample 20] [--minutes 60] [FOLDER ...]

cosmic-ray changes one operator, number or branch at a time in a copy of the package; the tests of that folder should
fail, those of the changed module first. A sample of the changes is tried of each folder, the same one each time. What
was tried is kept in build/mutants, so that a second call goes on where the first one ended; changed sources or tests
start anew.
"""

import argparse
import ast
import hashlib
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("bilevel", "tests")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]


def in_code(source: str) -> Callable[[tuple[int, int]], bool]:
    """Whether a position (line, column) is code that runs: no test can see annotations, docstrings and imports."""
    quiet = []
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        parts += [node] if text or isinstance(node, ast.Import | ast.ImportFrom) else []
        quiet += [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if p]
    return lambda at: not any(start <= at < end for start, end in quiet)


def tests_of(folder: str) -> list[str]:
    """The tests that mirror a folder of the package; those of its own files only, where it has folders itself."""
    if folder == "bilevel/sharding":
        return ["tests/devices/test_mesh.py"]
    mirror = Path("tests") / folder
    if folder != "bilevel":
        return [str(mirror)]
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / mirror).glob("test_*.py"))


def ordered(module: Path, tests: list[str]) -> list[str]:
    """The tests with those of a module's own name first: `-x` ends at the first that fails, most often one of these."""
    own = Path("tests") / module.parent / f"test_{module.name}"
    return [str(own), *tests] if (ROOT / own).exists() else tests


def seconds_of(tests: list[str], place: Path) -> float:
    """What the tests take without any change: run once for these sources, then kept. Ends the process if one fails."""
    kept = place / "seconds.txt"
    if kept.exists():
        return float(kept.read_text())
    begun = time.monotonic()
    done = subprocess.run([*PYTEST, *tests], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The tests fail without any change:\n{done.stdout[-2000:]}")
    kept.write_text(str(time.monotonic() - begun))
    return float(kept.read_text())


def workplace(folder: str) -> Path:
    """A copy of package and tests, for this folder and these sources."""
    found = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    for path in sorted(path for name in ("bilevel", "tests/bilevel") for path in (ROOT / name).rglob("*.py")):
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    place = ROOT / "build" / "mutants" / f"{folder.replace('/', '-')}-{found.hexdigest()[:8]}"
    # Anew each time: a run that was killed leaves its last change behind.
    for name in COPIED:
        shutil.rmtree(place / name, ignore_errors=True)
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def session(folder: str, place: Path, sample: int) -> Any:
    """cosmic-ray's record of the sample, with what was tried before."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB

    record = WorkDB(place / f"{sample}.sqlite", WorkDB.Mode.create)
    if not record.num_work_items:
        files = sorted(Path(folder).glob("*.py"))
        code = {path: in_code(path.read_text(encoding="utf-8")) for path in files}
        init(files, record, {})
        items = [w for w in record.work_items if all(code[m.module_path](m.start_pos) for m in w.mutations)]
        items.sort(key=lambda w: [(str(m.module_path), m.operator_name, m.occurrence) for m in w.mutations])
        record.clear()
        record.add_work_items(random.Random(0).sample(items, min(sample, len(items))))
    return record


def tried(folder: str, sample: int, end: float) -> Counter[bool]:
    """How many changes of one folder were killed (True) or not, tried until `end`; prints those that no test saw."""
    from cosmic_ray.mutating import mutate_and_test

    place = workplace(folder)
    os.chdir(place)
    os.environ |= {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    if folder == "bilevel/sharding":  # as `make devices`
        os.environ |= {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_ENABLE_COMPILATION_CACHE": "false"
        }  # fmt: skip
    record = session(folder, place, sample)
    tests, pending = tests_of(folder), list(record.pending_work_items)
    if pending:
        print(f"{folder}: {len(pending)} of {record.num_work_items} changes to try; first the tests as they are")
        patience = 60 + 3 * seconds_of(tests, place)
    begun = time.monotonic()
    for i, item in enumerate(pending):
        if time.monotonic() > end:
            print("The time is over; the next call goes on from here.")
            break
        (change,) = item.mutations
        command = shlex.join([*PYTEST, *ordered(Path(change.module_path), tests)])
        result = mutate_and_test(item.mutations, command, patience)
        record.set_result(item.job_id, result)
        left = (time.monotonic() - begun) / (i + 1) * (len(pending) - i - 1) / 60
        said = f"{change.module_path}:{change.start_pos[0]} {change.operator_name} (about {left:.0f} min left)"
        print(f"{i + 1}/{len(pending)} {'killed  ' if result.is_killed else 'SURVIVED'} {said}", flush=True)
    results = [result for _, result in record.results]
    print(*(result.diff for result in results if not result.is_killed), sep="\n\n")
    return Counter(result.is_killed for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", help="of bilevel/; all of them if none is named")
    parser.add_argument("--sample", type=int, default=20, help="changes a folder")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it")
    options = parser.parse_args()
    every = ["bilevel", *(str(p.parent.relative_to(ROOT)) for p in sorted(ROOT.glob("bilevel/*/__init__.py")))]
    folders = [folder.rstrip("/") for folder in options.folders] or every
    if unknown := sorted(set(folders) - set(every)):
        parser.error(f"{', '.join(unknown)}: no folder of the package; there are {', '.join(every)}")
    end = time.monotonic() + 60 * options.minutes
    table = {folder: tried(folder, options.sample, end) for folder in folders}
    print(f"{'folder':28} {'killed':>6} {'survived':>8} {'score':>6}")
    for folder, outcomes in table.items():
        killed, survived = outcomes[True], outcomes[False]
        score = f"{killed / (killed + survived):6.0%}" if killed + survived else "     -"
        print(f"{folder:28} {killed:6} {survived:8} {score}")


if __name__ == "__main__":
    main()

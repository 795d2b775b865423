"""Run folders: what they are of, what is written whole, and what a torn or a strange file is answered with."""

import ast
import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods import cli, driver, files, fingerprint, locks, runfolder, seconds
from methods.runfolder import RunFolder
from tests.methods.small import arguments

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Made:
    """A run's settings."""

    seed: int = 0
    out: str = ""


ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    (folder / "README.md").write_text("read me")
    return folder


def opened(tmp_path, model, rows=ROWS, **settings):
    return RunFolder(tmp_path / "run", Made(**settings), {"training rows": fingerprint.rows(rows)}, model)


def test_a_run_of_the_same_goes_on(tmp_path, model):
    folder = opened(tmp_path, model)
    assert json.loads((folder.path / "config.json").read_text()) == {"seed": 0}
    told = json.loads((folder.path / "fingerprint.json").read_text())
    assert told["versions"]["jax"] == importlib.metadata.version("jax")
    assert set(told["model files"]) == {"config.json", "model.safetensors"}
    (model / "README.md").write_text("which nothing reads")
    os.utime(model / "model.safetensors")
    shutil.copy2(model / "config.json", model / "copy")  # the same bytes under the same name, another file
    (model / "copy").replace(model / "config.json")
    opened(tmp_path, model, [dict(reversed(row.items())) for row in ROWS])


def change_rows(tmp_path, model, monkeypatch):
    opened(tmp_path, model, [*ROWS[:1], {"text": "c", "label": 1}])


def add_a_row(tmp_path, model, monkeypatch):
    opened(tmp_path, model, [*ROWS, ROWS[0]])


def change_seed(tmp_path, model, monkeypatch):
    opened(tmp_path, model, seed=3)


def change_weights(tmp_path, model, monkeypatch):
    """Of the same size, and with the times set back."""
    status = (model / "model.safetensors").stat()
    (model / "model.safetensors").write_bytes(b"\1" * 100)
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    opened(tmp_path, model)


def add_a_file(tmp_path, model, monkeypatch):
    (model / "tokenizer.json").write_text("{}")
    opened(tmp_path, model)


def take_a_file_away(tmp_path, model, monkeypatch):
    (model / "config.json").unlink()
    opened(tmp_path, model)


def newer_version(tmp_path, model, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9" if name == "bilevel" else real(name))
    opened(tmp_path, model)


def other_floats(tmp_path, model, monkeypatch):
    import jax

    with jax.enable_x64(False):
        opened(tmp_path, model)


def folder_for_a_file(tmp_path, model, monkeypatch):
    (tmp_path / "run" / "report.md").mkdir()
    opened(tmp_path, model)


def no_fingerprint(tmp_path, model, monkeypatch):
    (tmp_path / "run" / "fingerprint.json").unlink()
    opened(tmp_path, model)


def damaged_fingerprint(tmp_path, model, monkeypatch):
    (tmp_path / "run" / "fingerprint.json").write_text("[]")
    opened(tmp_path, model)


def damaged_config(tmp_path, model, monkeypatch):
    (tmp_path / "run" / "config.json").write_bytes(b"\xff")
    opened(tmp_path, model)


def deep_config(tmp_path, model, monkeypatch):
    (tmp_path / "run" / "config.json").write_text("[" * 100_000)
    opened(tmp_path, model)


def file_for_a_folder(tmp_path, model, monkeypatch):
    (tmp_path / "run" / "results").write_text("x")
    opened(tmp_path, model)


ELSEWHERE = r": put the old one back, or make the run again in another folder\.$"
"""The remedy where deleting the file would leave no run."""
CHANGES = {
    change_rows: r"run of other rows: training rows was 2 rows, sha256 \w{16} and is 2 rows, sha256 \w{16}; put",
    add_a_row: r"training rows was 2 rows, .* and is 3 rows",
    change_seed: r"other settings \(seed\): seed was 0 and is 3; repeat them",
    change_weights: r"other model files: model.safetensors was sha256 \w{16} and is sha256 \w{16}",
    add_a_file: "tokenizer.json was not there and is sha256",
    take_a_file_away: "config.json was sha256 .* and is not there",
    newer_version: r"run of other versions: bilevel was [\d.]+ and is 9.9.9; continue it with those",
    other_floats: "float was 64 and is 32",
    no_fingerprint: "does not tell which data, model and versions it is of",
    damaged_fingerprint: f"fingerprint.json is damaged.*{ELSEWHERE}",
    damaged_config: f"config.json is damaged.*{ELSEWHERE}",
    deep_config: f"config.json is damaged.*{ELSEWHERE}",
    file_for_a_folder: "results is a file where a run has a folder",
    folder_for_a_file: r"report\.md is a folder where a run has a file: move it away, or name",
}


OF_ANOTHER_KIND = file_for_a_folder, folder_for_a_file


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_of_something_else_is_refused_with_what_was_and_is(change, tmp_path, model, monkeypatch):
    before = {file: file.read_bytes() for file in opened(tmp_path, model).path.iterdir()}
    with pytest.raises(ValueError, match=CHANGES[change]):
        change(tmp_path, model, monkeypatch)
    if change not in (no_fingerprint, damaged_fingerprint, damaged_config, deep_config, *OF_ANOTHER_KIND):
        assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("part", ["versions", "inputs", "model files"])
@pytest.mark.parametrize("told", [[1], "x", None, {"a": 1}])
def test_a_fingerprint_that_tells_a_part_otherwise_is_damaged(part, told, tmp_path, model):
    file = opened(tmp_path, model).path / "fingerprint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: told}))
    said = rf"fingerprint\.json is damaged \(it does not tell the {part} of the run\){ELSEWHERE}"
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, model)


def test_files_of_a_result_are_known_by_what_they_hold_or_only_by_their_names(tmp_path):
    folder = RunFolder(tmp_path, Made())
    made = folder.made_by(lambda: folder.write_text("adapter/a.json", "some"))
    assert made == {"adapter/a.json": "a6b46dd0d1ae5e86cbc8f37e75ceeb6760230c1ca4ffbcb0c97b96dd7d9c464b"}
    folder.write("new", {"files": made})
    folder.write("old", {"files": list(made)})  # as earlier versions wrote it
    assert folder.has_all("new") and folder.has_all("old")
    folder.write_text("adapter/a.json", "other")
    assert folder.has_all("old")
    with pytest.raises(ValueError, match=r"adapter/a\.json is not what it was when new was made: put .*, or delete it"):
        folder.once("new", dict)
    (tmp_path / "adapter" / "a.json").unlink()
    assert not folder.has_all("new") and not folder.has_all("old")


def test_files_of_a_result_are_those_of_a_run_that_was_not_interrupted(tmp_path):
    def made(path):
        folder = RunFolder(path, Made())
        assert folder.once("other", lambda: 0) == 0  # which is not made with it

        def make():
            folder.once("tried/a", lambda: 1)
            if not (path / "best.safetensors").is_file():
                folder.write_arrays("best", {"x": np.ones(2)})
            folder.read_arrays("best", {"x": np.ones(2)})
            folder.log("search")(1, None, {"loss": np.ones(1)})

        return folder.made_by(make)

    first = made(tmp_path / "run")
    assert list(first) == ["best.safetensors", "tried/a.json"] and made(tmp_path / "run") == first


def test_what_a_finished_run_read_and_was_deleted_is_made_again(tmp_path):
    """As a trial of which nothing is tested: the remedy for one that is damaged."""

    def run():
        folder = RunFolder(tmp_path, Made())
        if folder.finished() is None:
            tried = folder.once("tried/a", lambda: 1)
            folder.once("results/a", lambda: tried)
            folder.finish(["a"], False)

    run()
    for name in ("tried/a.json", "results/a.json"):
        (tmp_path / name).write_text("2")
        with pytest.raises(ValueError, match=rf"{name} is not what it was .*, or delete it to have it made again\."):
            run()
        (tmp_path / name).unlink()
        run()
        assert (tmp_path / name).read_text() == "1\n"


def test_weights_are_read_once_as_long_as_nobody_touched_them(tmp_path, model, monkeypatch):
    opened(tmp_path, model)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint.hashlib, "file_digest", lambda *_: pytest.fail("the weights were read again"))
        opened(tmp_path, model)
    before = fingerprint.model_files(model, {})
    (model / "model.safetensors").write_bytes(b"\1" * 100)
    assert fingerprint.difference(before, fingerprint.model_files(model, before)) is not None


def test_arrays_are_told_apart_by_shape_type_and_content():
    same, others = np.zeros((2, 3)), [np.zeros((3, 2)), np.zeros((2, 3), np.float32), np.eye(2, 3)]
    assert fingerprint.arrays(same) == fingerprint.arrays(np.zeros((3, 2)).T.copy(order="F"))
    for other in others:
        assert fingerprint.arrays(same)["sha256"] != fingerprint.arrays(other)["sha256"]


@pytest.mark.usefixtures("float32_by_default")
def test_a_command_refuses_its_folder_when_data_or_model_changed(tiny_model, tiny_glue, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "train", interrupted)
    model, data = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copytree(tiny_glue, tmp_path / "data")
    words = ["lora", *arguments(model, data, tmp_path / "run", "--task", "rte")]
    assert cli.run(words) == 130 and "the same command continues it" in capsys.readouterr().err
    assert cli.run(words) == 130
    capsys.readouterr()
    told = json.loads((tmp_path / "run" / "fingerprint.json").read_text())
    assert [len(shape) for shape in told["inputs"]["encoded training rows"]["shapes"]][:2] == [2, 2]

    test = data / "glue_rte" / "validation.jsonl"
    rows = test.read_text()
    test.write_text(rows.replace("wash", "eat").replace("soap", "pot"))
    assert cli.run(words) == 2
    assert "other rows: rte test rows was 6 rows" in capsys.readouterr().err
    test.write_text(rows)
    assert cli.run(words) == 130
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    capsys.readouterr()
    assert cli.run(words) == 2
    assert "other model files: config.json was sha256" in capsys.readouterr().err


def test_a_link_to_nothing_is_told_before_anything_is_read(tmp_path, model, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "link", tmp_path / "link" / "run"):
        for words in (["lora", "--model", "none"], ["report", str(tmp_path / "run")]):
            assert cli.run([*words, "--out", str(out)]) == 2
            why = f"{tmp_path / 'link'} is a link to nothing): remove it, or name another folder."
            assert capsys.readouterr().err == f"bilevel: --out {out} cannot be written ({why}\n"
    (tmp_path / "link").unlink()  # the remedy
    files.check_writable(tmp_path / "link")
    (tmp_path / "link").symlink_to(tmp_path / "there")  # and a link to a folder is none to nothing
    (tmp_path / "there").mkdir()
    files.check_writable(tmp_path / "link" / "run")
    for name in ("results", "metrics.jsonl"):
        place = opened(tmp_path, model).path / name
        place.symlink_to(tmp_path / "nowhere" / "x")
        with pytest.raises(ValueError, match=rf"run/{name} is a link to nothing: remove it, or name another folder"):
            runfolder.check(tmp_path / "run", Made())
        place.unlink()
    opened(tmp_path, model)


def test_half_a_character_in_a_file_of_a_run_is_read_as_its_escape(tmp_path):
    folder = RunFolder(tmp_path, Made())
    (tmp_path / "x.json").write_text(r'{"\ud800": ["a\udfff", "\ud83d\ude00", 1, {"b": "\u00e9"}]}')
    assert folder.read("x") == {"\\ud800": ["a\\udfff", "\U0001f600", 1, {"b": "\xe9"}]}
    folder.write_text("x.md", "\ud800 \xe9")
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == "\\ud800 \xe9"


# --- metrics ------------------------------------------------------------------------------------------------------


def logged(folder, step, *values):
    folder.log("search")(step, None, {"loss": np.asarray(values)})


def test_metrics_are_appended_repeated_and_replaced(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, Made())
    logged(folder, 2, 1.0, 2.0)
    file = tmp_path / "metrics.jsonl"
    inode, before = file.stat().st_ino, file.read_bytes()
    logged(folder, 3, 3.0)
    assert file.stat().st_ino == inode and file.read_bytes().startswith(before)  # appended, not written anew
    again = RunFolder(tmp_path, Made())
    logged(again, 3, 2.0, 3.0)  # as a run does that resumes from before them
    assert file.stat().st_ino == inode and len(again.rows("search")) == 3
    logged(again, 3, 7.0)
    assert [row["loss"] for row in again.rows("search")] == [1.0, 2.0, 7.0]
    assert RunFolder(tmp_path, Made()).rows("other") == []


def test_a_torn_last_line_is_dropped_and_a_damaged_one_is_named(tmp_path):
    logged(RunFolder(tmp_path, Made()), 2, 1.0, 2.0)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    folder = RunFolder(tmp_path, Made())
    assert [row["step"] for row in folder.rows("search")] == [1]
    logged(folder, 2, 2.0)
    assert file.read_bytes() == whole
    for damage in (b"{}\n", b"[1]\n", b"\xff\n", b"x\n", b"[" * 100_000 + b"\n"):
        file.write_bytes(damage + whole)
        with pytest.raises(ValueError, match=rf"metrics\.jsonl cannot be read \(.*\){ELSEWHERE}"):
            RunFolder(tmp_path, Made())


def spoil(file):
    """What can become of `metrics.jsonl`: a name, and what it holds then; None for nothing."""
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    return {
        "damaged": b'"x\n',
        "cut": whole[:-5],
        "shorter": b"".join(lines[:-1]),
        "changed": whole.replace(b'"inner_loss": ', b'"inner_loss": -1'),
        "without a name": lines[0].replace(b'"inner_loss"', b'"loss"') + b"".join(lines[1:]),
        "empty": b"",
        "gone": None,
    }


@pytest.mark.usefixtures("float32_by_default")
def test_steps_of_a_finished_run_that_are_not_what_they_were_are_told_and_its_page_stays(
    tiny_model, tiny_data, tmp_path, capsys
):
    out, again = tmp_path / "run", tmp_path / "again"
    words = ["lora", *arguments(tiny_model, tiny_data, out)]
    assert cli.run(words) == 0
    file, told = out / "metrics.jsonl", out / "finished.json"
    pages = {each: each.read_bytes() for each in out.rglob("*") if each.is_file() and each != file}
    whole = file.read_bytes()
    for what, held in spoil(file).items():
        file.unlink() if held is None else file.write_bytes(held)
        capsys.readouterr()
        assert cli.run(words) == 2, what
        verb = "is gone, which was there" if not held else "is not what it was"
        remedy = "put the old one back, or make the run again in another folder"
        assert capsys.readouterr().err == f"bilevel: {file} {verb} when the run was finished: {remedy}.\n"
        assert (file.read_bytes() if file.exists() else None) == held  # what is there is not cut either
        assert {each: each.read_bytes() for each in pages} == pages
        file.write_bytes(whole)
    for held, is_told in ((whole, False), (spoil(file)["changed"], True)):
        file.write_bytes(held)
        assert cli.run(["report", str(out), "--out", str(tmp_path / "page")]) == 0
        page = (tmp_path / "page" / "report.html").read_text()
        assert ("metrics.jsonl is not what it was when the run was finished" in page) is is_told
    # The two remedies: made again in another folder, and the old one put back.
    assert cli.run([str(again) if word == str(out) else word for word in words]) == 0
    assert (again / "metrics.jsonl").read_bytes() == whole
    (again / "metrics.jsonl").replace(file)
    assert cli.run(words) == 0
    # As an earlier version left it: it is read, and of the rows is known that there were some.
    finished = json.loads(told.read_text())
    assert finished.pop("metrics") == hashlib.sha256(whole).hexdigest()
    told.write_text(json.dumps(finished))
    assert cli.run(words) == 0
    figure = (out / "figures" / "training.png").read_bytes()
    sentences = {
        "damaged": "cannot be read (JSONDecodeError: Unterminated string",
        "without a name": "cannot be read (KeyError: 'inner_loss'): put",
        "gone": "is gone, which was there",
        "empty": "is gone, which was there",
    }
    for what, held in spoil(file).items():
        if what not in sentences:
            continue
        file.unlink() if held is None else file.write_bytes(held)
        capsys.readouterr()
        assert cli.run(words) == 2, what
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"bilevel: {file} {sentences[what]}"), said
        assert said.endswith("put the old one back, or make the run again in another folder.")
        assert (out / "figures" / "training.png").read_bytes() == figure
        file.write_bytes(whole)


def test_a_finished_run_that_goes_on_is_not_finished_until_it_is_again(tmp_path):
    """What is made again may differ, to rounding; a run that is interrupted meanwhile goes on all the same."""

    def made(loss):
        folder = RunFolder(tmp_path, Made())
        if folder.finished() is None:
            logged(folder, 1, loss)
            folder.once("results/a", lambda: {"loss": loss})
            return folder
        return None

    made(1.0).finish(["a"], False)
    assert made(2.0) is None
    (tmp_path / "results" / "a.json").unlink()
    made(2.0)  # and interrupted
    assert json.loads((tmp_path / "results" / "a.json").read_text()) == {"loss": 2.0}
    made(2.0).finish(["a"], False)
    assert made(2.0) is None


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    name = lambda handle: os.readlink(f"/proc/self/fd/{handle}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(name(handle)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append((str(a), str(b))), replace(a, b)))
    files.write_text(tmp_path / "x" / "a.txt", "text")
    part, target = done[1]
    assert done == [part, (part, target), str(tmp_path / "x")] and target == str(tmp_path / "x" / "a.txt")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x" / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask  # readable by whom others are


def test_a_folder_where_a_file_is_to_be_is_named_itself(tmp_path):
    (tmp_path / "page.md").mkdir()
    with pytest.raises(IsADirectoryError, match=r"page\.md is a folder where a file is to be written: move it away\.$"):
        files.write_text(tmp_path / "page.md", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_what_fails_in_the_middle_leaves_what_was_there(tmp_path):
    for name, writing in (("a.txt", files.replacing), ("b", files.replacing_folder)):
        target = tmp_path / name
        with writing(target) as part:
            (part if name == "a.txt" else part / "inside").write_text("old")
        with pytest.raises(RuntimeError):
            with writing(target) as part:
                (part if name == "a.txt" else part / "inside").write_text("new")
                raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b" / "inside").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"is not replaced, since it holds thesis\.tex\."):
        with files.replacing_folder(tmp_path / "b") as part:
            (part / "inside").write_text("new")
    assert (tmp_path / "b" / "inside").read_text() == "old"


def test_a_folder_killed_before_it_was_a_run_is_begun_anew(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fingerprint.json").write_text("{")
    (tmp_path / "run" / f"{files.PART}1234.json").write_text("{")
    runfolder.check(tmp_path / "run", Made())
    assert RunFolder(tmp_path / "run", Made()).rows("search") == []


WRITERS = {"write_text", "write_bytes", "savefig", "save_file", "dump", "save_pretrained", "tofile", "savez", "save"}
SAFE = {"files", "folder", "self", "slicing"}
"""`files`, or what writes by it: a `RunFolder`, and the module of sliced models."""


def writes(tree):
    """Lines that write a file in place."""

    def visit(node, inside):
        if isinstance(node, ast.With):
            names = {ast.unparse(item.context_expr).partition("(")[0].split(".")[-1] for item in node.items}
            inside = inside or bool(names & {"replacing", "replacing_folder"})
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")
            modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
            opens = name[-1] == "open" and any(m in ("w", "wb", "a", "ab", "x", "xb", "w+") for m in modes)
            if not inside and (opens or (name[-1] in WRITERS and len(name) > 1 and name[-2] not in SAFE)):
                yield node.lineno
            if not inside and name in (["save_file"], ["save_pretrained"]):
                yield node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(tree, False))


def test_the_scan_sees_what_it_looks_for():
    for line in ("path.write_text('x')", "save_file(x, path)", "open(path, 'w')", "path.open('wb')", "fig.savefig(p)"):
        assert writes(ast.parse(line)) == [1], line
    safe = "with files.replacing(p) as part:\n    part.write_text('x')\nfiles.write_text(p, 'x')"
    assert writes(ast.parse(safe)) == []


def test_nothing_in_the_methods_writes_a_file_in_place():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "methods").rglob("*.py"))
        if path.name != "files.py" and (lines := writes(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


def test_seconds_are_those_of_the_steps_however_often_they_were_computed(tmp_path, model, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(seconds.time, "perf_counter", lambda: now[0])
    file = tmp_path / "run" / "seconds.csv"

    def session(stage, *calls):
        """Of `(last step, steps, seconds)` each."""
        clock = opened(tmp_path, model).callbacks(stage)[1]
        for step, count, spent in calls:
            now[0] += spent
            clock(step, None, {"loss": np.ones(count)})
        return seconds.read(file)

    assert session("search", (1, 1, 5.0), (3, 2, 2.0), (7, 4, 4.0)) == {"search": 11.0}
    # Killed, and gone on with from after step 3: steps 4 to 7 are told once, with the seconds that they took now.
    assert session("search", (6, 3, 8.0), (8, 2, 1.0)) == {"search": 5.0 + 2.0 + 8.0 + 1.0}
    assert session('a "stage", named', (2, 2, 3.0)) == {"search": 16.0, 'a "stage", named': 3.0}
    # Within what one call told of: the steps that stay keep their share.
    assert session("search", (8, 3, 2.5))["search"] == pytest.approx(5.0 + 2.0 + 8.0 * 2 / 3 + 2.5)
    assert session("search", (8, 8, 1.5))["search"] == 1.5  # all of it anew, as of a finished run
    whole = file.read_bytes()
    session("search", (9, 1, 1.0))
    assert file.read_bytes().startswith(whole)  # added to, not written anew
    file.write_bytes(whole[:-3])  # torn in the last line
    assert session("search", (8, 8, 1.0)) == {"search": 1.0, 'a "stage", named': 3.0}
    opened(tmp_path, model).tell("told", {"loss": np.ones(2)})  # which has taken no time that is known
    assert "told" not in seconds.read(file)
    opened(tmp_path, model).finish(["x"], False)
    assert file.read_text() == 'stage,first,last,seconds\n"search",1,8,1.000\n"a ""stage"", named",1,2,3.000\n'
    assert session("search", (2, 2, 0.5)) == {"search": 0.5, 'a "stage", named': 3.0}  # a part of it begun anew
    file.write_bytes(b"\xff\nx,y,z\nsearch,1,2,1e999\nsearch,3,2,1\nsearch,2.5\n")
    assert seconds.read(file) == {}
    assert session("search", (3, 3, 2.0)) == {"search": 2.0}


# --- two processes ------------------------------------------------------------------------------------------------

HOLDS = """
import sys
from pathlib import Path
from methods.locks import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_in_a_run_folder_is_refused_and_a_dead_one_holds_nothing(tmp_path, model):
    folder = opened(tmp_path, model)
    again = opened(tmp_path, model)  # the same process
    refused, here = [sys.executable, "-c", HOLDS, str(folder.path)], os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(refused, capture_output=True, text=True, input="", env=here)
        assert done.returncode and done.stderr.splitlines()[-1].startswith(f"ValueError: {folder.path} is in use by")
        del again
        gc.collect()
        again = folder
    del folder, again
    gc.collect()
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(refused, env=here, **pipes) as other:
        try:
            told: Any = other.stdout
            assert told.readline() == "held\n"
            before = sorted(tmp_path.rglob("*"))
            for open_it in (lambda: runfolder.check(tmp_path / "run", Made()), lambda: opened(tmp_path, model)):
                with pytest.raises(ValueError, match=r"run is in use by another process.*another folder with --out\.$"):
                    open_it()
            assert sorted(tmp_path.rglob("*")) == before
        finally:
            other.kill()
            other.wait()
    opened(tmp_path, model)


def test_what_a_run_is_written_to_is_locked_whatever_becomes_of_the_lock_s_file(tmp_path, model):
    folder = opened(tmp_path, model)
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    second = [sys.executable, "-c", HOLDS, str(folder.path)]
    (folder.path / ".lock").unlink()
    done = subprocess.run(second, capture_output=True, text=True, input="", env=here)
    assert done.returncode and done.stderr.splitlines()[-1].startswith(f"ValueError: {folder.path} is in use by")
    logged(folder, 1, 1.0)  # and this one goes on
    opened(tmp_path, model)
    # The whole folder moved away, and another made in its place, by a process that finds it free.
    folder.path.rename(tmp_path / "old")
    folder.path.mkdir()
    done = subprocess.run(second, capture_output=True, text=True, input="", env=here)
    assert done.returncode == 0 and done.stdout == "held\n"
    moved = r"run was moved or removed while a run was written to .*: this one ends; start it again"
    for write in (lambda: logged(folder, 2, 1.0), lambda: folder.write("x", 1), lambda: folder.write_arrays("x", {})):
        with pytest.raises(ValueError, match=moved):
            write()
    assert [path.name for path in folder.path.iterdir()] == [".lock"]


def test_a_file_system_that_locks_no_folders_is_told_of_a_lock_that_is_gone(tmp_path, model, monkeypatch):
    real = locks.fcntl.flock

    def flock(handle, operation):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(9, "Bad file descriptor")
        real(handle, operation)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    folder = opened(tmp_path, model)
    logged(folder, 1, 1.0)
    (folder.path / ".lock").unlink()
    with pytest.raises(ValueError, match=r"\.lock was moved or removed while a run was written"):
        logged(folder, 2, 1.0)


def test_what_is_no_file_in_the_place_of_a_lock_is_named(tmp_path, model):
    path = opened(tmp_path, model).path
    gc.collect()
    (path / ".lock").unlink()
    (path / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"\.lock is no file where a run has its lock \(a folder\): remove it"):
        runfolder.check(path, Made())
    (path / ".lock").rmdir()
    (path / ".lock").symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(ValueError, match=r"\.lock is no file where a run has its lock \(a link to nothing\): "):
        opened(tmp_path, model)
    (path / ".lock").unlink()
    opened(tmp_path, model)


def test_a_folder_with_a_lock_and_nothing_else_is_begun_anew(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").write_bytes(b"")
    runfolder.check(tmp_path / "new", Made())


def test_a_system_without_locks_goes_without(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", refused)
        assert RunFolder(tmp_path / "a", Made()).rows("x") == []
    monkeypatch.setattr(locks, "fcntl", None)
    assert RunFolder(tmp_path / "b", Made()).rows("x") == []

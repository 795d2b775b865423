"""Rows and models off a hub, as a user's process fetches them: a hub of folders is served on this machine."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` and `datasets` ask of one: `<kind>/OWNER/NAME/...` below `root`, in one commit."""

    root: Path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answered(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def told(self, what: object, status: int = 200, **headers: str) -> None:
        self.answered(json.dumps(what).encode(), status, Content_Type="application/json", **headers)

    def answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        address = urlsplit(self.path)
        parts = unquote(address.path).strip("/").split("/")
        if parts[:1] == ["api"] and len(parts) >= 4:
            self.asked(parts[1], "/".join(parts[2:4]), parts[4:], parse_qs(address.query), sent)
        elif "resolve" in parts:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            file = self.root / kind / Path(*parts[:2], *parts[4:])
            if file.is_file():
                self.answered(file.read_bytes(), ETag=f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"')
            else:
                self.told({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")
        else:
            self.told({"error": "nothing here"}, 404)

    do_GET = do_HEAD = do_POST = answer

    def asked(self, kind: str, name: str, rest: list[str], query: dict[str, list[str]], sent: str) -> None:
        folder = self.root / kind / name

        def entry(path: Path) -> dict[str, object]:
            named: dict[str, object] = {"path": str(path.relative_to(folder)), "oid": "0"}
            return named | ({"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"})

        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if not folder.is_dir():
            self.told({"error": "no repository"}, 404, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["paths-info"]:
            paths = json.loads(sent)["paths"] if sent.startswith("{") else parse_qs(sent)["paths"]
            self.told([entry(folder / path) for path in paths if (folder / path).exists()])
        elif rest[:1] == ["tree"]:
            at = folder.joinpath(*rest[2:])
            deep = query.get("recursive", ["false"])[0].lower() == "true"
            if at.is_dir():
                self.told([entry(path) for path in sorted(at.rglob("*") if deep else at.iterdir())])
            else:
                self.told({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")
        else:
            named = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self.told({"_id": "1", "id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": named})


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_model):
    """The environment of a process that asks a hub with a few data sets and a model."""
    root = tmp_path_factory.mktemp("hub")

    def rows(file: str, records: list[dict]) -> None:
        path = root / "datasets" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))

    def texts(word: str, count: int) -> list[dict]:
        return [{"ask": f"wash {word} {i}", "reply": "it with soap"} for i in range(count)]

    rows("owner/three/data/train.jsonl", texts("pot", 30))
    rows("owner/three/data/validation.jsonl", texts("soap", 5))
    rows("owner/three/data/test.jsonl", texts("now", 7))
    rows("owner/one/train.jsonl", texts("pot", 30))
    rows("owner/unnamed/validation.jsonl", texts("pot", 30))
    rows("owner/hidden/train.jsonl", [{"text": f"wash {i}", "label": i % 2} for i in range(20)])
    rows("owner/hidden/validation.jsonl", [{"text": f"eat {i}", "label": i % 2} for i in range(6)])
    rows("owner/hidden/test.jsonl", [{"text": f"pot {i}", "label": -1} for i in range(6)])
    rows("owner/several/a.jsonl", texts("a", 30))
    rows("owner/several/b.jsonl", texts("b", 20))
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in "ab"]
    (root / "datasets/owner/several/README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    shutil.copytree(tiny_model, root / "models" / "owner" / "tiny")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(root / "cache")}
    yield os.environ | here | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    server.shutdown()
    server.server_close()


SOURCES = """
import json, sys
from methods import tasks
for data, given in json.load(sys.stdin):
    try:
        found = tasks.read_source(None, data, **given)
        said = [len(found.train), len(found.test), found.trained_on, found.tested_on]
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    print("said", json.dumps(said))
"""
NAMED = {"columns": "prompt=ask,answer=reply"}


def test_rows_of_a_hub(hub):
    """The data set's own split is tested on, as a file beside train.jsonl is; @SPLIT names another."""
    asked = {
        ("owner/three", ""): [30, 7, "owner/three train", "owner/three test,"],
        ("owner/three@validation", ""): [4, 1, "owner/three validation", "owner/three validation, held out,"],
        ("owner/three", "owner/three@validation"): [30, 5, "owner/three train", "owner/three validation,"],
        ("owner/three", "owner/three@train"): "owner/three@train is --data itself: name other rows",
        ("owner/three@valid", ""): "owner/three on the hub has no split valid, but train, validation, test: name one",
        ("owner/one", ""): [24, 6, "owner/one train", "owner/one train, held out,"],
        ("owner/unnamed", ""): "owner/unnamed on the hub has no split train, but validation: name one of these as",
        ("owner/several:b", ""): [16, 4, "owner/several:b train", "owner/several:b train, held out,"],
        ("owner/several", ""): "Please pick one among the available configs: ['a', 'b']",
        ("owner/hidden", ""): "row 1 has the label -1, which no training row has: 0, 1. Mend it, or name other rows",
        ("owner/hidden", "owner/hidden@validation"): [20, 6, "owner/hidden train", "owner/hidden validation,"],
        ("owner/none", ""): "'owner/none' is no file here, and the hub gave no data set of that name (Repository",
    }
    of = [(data, ({} if "hidden" in data else NAMED) | ({"test_data": test} if test else {})) for data, test in asked]
    code = (sys.executable, "-c", SOURCES)
    done = subprocess.run(code, input=json.dumps(of), env=hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line.removeprefix("said ")) for line in done.stdout.splitlines() if line.startswith("said ")]
    for (which, right), found in zip(asked.items(), said, strict=True):
        assert right in found if isinstance(right, str) else found == right, which


def test_a_model_and_rows_of_a_hub_from_the_command_line(hub, tmp_path):
    words = (
        "lora --model owner/tiny --data owner/three --columns prompt=ask,answer=reply --length 24 --batch-size 2 "
        "--rank 1 --finetune-steps 2 --outer-rows 6 --out run"
    )
    code = "import sys; from methods import cli; sys.exit(cli.run(sys.argv[1:]))"
    away = hub | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = (sys.executable, "-c", code, *words.split())
    done = subprocess.run(command, cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7 to test on" in done.stdout + done.stderr
    (config,) = (tmp_path / "run").rglob("adapter_config.json")
    assert json.loads(config.read_text())["base_model_name_or_path"] == "owner/tiny"


def test_without_a_hub_what_was_fetched_is_read(hub):
    """What a process fetched lies in the cache; where nothing answers, and nothing lies there, a sentence says so."""
    away = hub | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code = (sys.executable, "-c", SOURCES)
    subprocess.run(code, input=json.dumps([("owner/one", NAMED)]), env=hub, capture_output=True, check=True, text=True)
    asked = json.dumps([("owner/one", NAMED), ("owner/never", NAMED)])
    done = subprocess.run(code, input=asked, env=away, capture_output=True, text=True, timeout=60)
    said = [json.loads(line.removeprefix("said ")) for line in done.stdout.splitlines() if line.startswith("said ")]
    assert said[0] == [24, 6, "owner/one train", "owner/one train, held out,"]
    assert "'owner/never' is no file here, and the hub gave no data set of that name" in said[1]

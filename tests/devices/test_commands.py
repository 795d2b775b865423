"""A command on a mesh: the numbers of one device, and a run that goes on with another."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from methods import cli
from tests.devices.meshes import devices
from tests.methods.small import arguments, flexora_words


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_flexora_on_a_mesh_is_flexora_on_a_device(tiny_model, tiny_data, tmp_path, capsys):
    one, many = tmp_path / "one", tmp_path / "many"
    with jax.enable_x64(False):
        assert cli.run(flexora_words(tiny_model, tiny_data, one)) == 0
        mesh = "--mesh", "data=2,fsdp=2"
        assert cli.run(flexora_words(tiny_model, tiny_data, many, *mesh, "--keep-checkpoints")) == 0
        capsys.readouterr()
        (many / "results/flexora.json").unlink()  # its training is continued from its last state, on another mesh
        assert cli.run(flexora_words(tiny_model, tiny_data, many, "--mesh", "fsdp=4")) == 0
    assert capsys.readouterr().out.count("already finished") == 3
    selected = [json.loads((out / "selection.json").read_text())["layers"] for out in (one, many)]
    assert selected[0] == selected[1]
    for alone, split in zip(rows(one), rows(many), strict=True):
        assert alone.keys() == split.keys()
        for name in alone.keys() - {"stage"}:
            np.testing.assert_allclose(split[name], alone[name], rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("data=16", "--mesh data=16 wants 16 devices, but JAX finds 8 (cpu): name fewer (XLA_FLAGS="),
        ("data=3", "--batch-size 4 cannot be split over the 3 devices of --mesh: take a multiple of 3."),
        ("data=8", "--batch-size 4 cannot be split over the 8 devices"),
        ("rows=2", "--mesh 'rows=2': give each of the axes data and fsdp once at most"),
        ("data=2,data=2", "once at most"),
        ("data", "with a number of devices"),
        ("data=0", "with a number of devices"),
        ("data=-2", "with a number of devices"),
        ("data=2,", "with a number of devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_sentence(mesh, sentence, tiny_model, tiny_data, tmp_path, capsys):
    assert cli.run(flexora_words(tiny_model, tiny_data, tmp_path / "run", "--mesh", mesh)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_influences_on_a_mesh_are_those_of_a_device(tiny_model, tiny_data, tmp_path, capsys):
    words = ["attribute", "--questions", "0", "--subsets", "3", "--baselines", "cheap"]
    scores = {}
    with jax.enable_x64(False):
        for name, more in (("one", []), ("many", ["--mesh", "data=2,fsdp=2"])):
            command, *rest = words
            assert cli.run([command, *arguments(tiny_model, tiny_data, tmp_path / name, *rest, *more)]) == 0
            files = sorted((tmp_path / name / "scores").glob("*.json"))
            scores[name] = {file.stem: np.asarray(json.loads(file.read_text())) for file in files}
        capsys.readouterr()
        bad = arguments(tiny_model, tiny_data, tmp_path / "bad", "--questions", "2", "--mesh", "data=2")
        assert cli.run(["attribute", *bad]) == 2
    assert "give --questions 0, all outer rows as one question" in capsys.readouterr().err
    assert list(scores["one"]) == list(scores["many"]) == ["gradient-product", "random", "tracin", "unrolled"]
    for name, one in scores["one"].items():
        assert one.shape == (1, 16)
        np.testing.assert_allclose(scores["many"][name], one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


# --- several processes --------------------------------------------------------------------------------------------


def started(words, *own):
    """The command in two processes of two devices each, `own` options in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": devices(2), "JAX_ENABLE_X64": "0"}
    command = [sys.executable, "-m", "methods.cli", *words, "--coordinator", where, "--processes", "2", "--process"]
    return [
        subprocess.Popen(
            [*command, str(i), *(own[i] if own else ())],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip


def together(words, *own):
    """As `started`, to the end: `(status, output, errors)` of both."""
    processes = started(words, *own)
    try:
        return [(process.wait(600), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_a_command_in_two_processes_is_that_of_one(wide_model, tiny_data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = "--mesh", "data=2,fsdp=2", "--validate-every", "1"
    words = lambda out: ["lora", *arguments(wide_model, tiny_data, out), *more]  # noqa: E731
    both = together(words(two))
    assert [status for status, _, _ in both] == [0, 0], [error[-2000:] for _, _, error in both]
    assert "Done" in both[0][1] and "Done" not in both[1][1] and "fine-tuning" not in both[1][2]
    with jax.enable_x64(False):
        assert cli.run(words(one)) == 0
    for alone, split in zip(rows(one), rows(two), strict=True):
        for name in alone.keys() - {"stage"}:
            np.testing.assert_allclose(split[name], alone[name], rtol=1e-4, atol=1e-7, err_msg=name)
    written = [sorted(f.name for f in out.rglob("*.*") if "checkpoints" not in f.parts) for out in (one, two)]
    assert written[0] == written[1]
    for status, _, error in together(words(two), (), ("--seed", "1")):
        assert status == 2 and "The options differ from those of process 0 (seed is 1 and not 0)" in error


@pytest.fixture(scope="module")
def wide_model(tiny_model, tmp_path_factory):
    """`tiny_model` with weights that are large enough to be split over devices."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    factor = 16
    for name in ("hidden_size", "intermediate_size"):
        config[name] *= factor
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    vocabulary = config["vocab_size"]
    for name, tensor in tensors.items():
        shape = [size if size == vocabulary else factor * size for size in tensor.shape]
        drawn = np.ones(shape) if tensor.ndim == 1 else rng.normal(0, 0.06, shape)
        tensors[name] = drawn.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_where_no_processes_come_together_it_is_said_why(tiny_model, tiny_data, tmp_path, at_a_terminal):
    words = [sys.executable, "-m", "methods.cli", "lora", *arguments(tiny_model, tiny_data, tmp_path / "run")]
    free = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "PMI"))}
    said = subprocess.run([*words, "--coordinator", "auto"], env=free, capture_output=True, text=True, timeout=120)
    assert said.returncode == 2
    assert "there is no SLURM, GKE or MPI around this process: start it by srun or mpirun" in said.stderr
    # Ctrl-C is heard by one that waits.
    waits = subprocess.Popen(
        [*words, "--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "1"],
        env=free, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = waits.stderr.readline()
        assert line == "Process 1 of 2: waiting for the others at 127.0.0.1:1, for five minutes at most.\n"
        waits.send_signal(signal.SIGINT)
        _, said = waits.communicate(timeout=60)
    finally:
        waits.kill()
        waits.wait()
    assert waits.returncode == 130 and "nothing was written yet" in said


def test_the_death_of_one_is_a_sentence_of_the_other(tiny_model, tiny_data, tmp_path):
    words = arguments(tiny_model, tiny_data, tmp_path / "run", "--mesh", "data=4", "--finetune-steps", "200000")
    first, second = started(["lora", *words])
    try:
        for _ in range(1200):
            if (tmp_path / "run" / "metrics.jsonl").is_file() or first.poll() is not None:
                break
            time.sleep(0.1)
        second.kill()
        _, said = first.communicate(timeout=120)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    # It is in a sum with the dead one, which fails at once; or it waits elsewhere, until JAX misses a heartbeat and
    # ends it from a thread of its own, where nothing of ours is asked.
    words = "bilevel: Another of the 2 processes is gone" if first.returncode == 2 else "another task died"
    assert words in said and first.returncode in (2, -signal.SIGABRT), said
    assert "fault of bilevel" not in said and "Traceback" not in said
    assert "waiting for the others at 127.0.0.1" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--processes", "2"], "--processes is of several processes: give --coordinator HOST:PORT too"),
        (["--coordinator", "here"], "--coordinator 'here': give HOST:PORT"),
        (["--coordinator", "h:1", "--processes", "2", "--process", "2"], "--process 2 of --processes 2: they are"),
        (["--coordinator", "h:1"], "needs --processes and --process too: how many processes there are"),
        (["--coordinator", "h:1", "--processes", "2"], "--coordinator HOST:PORT needs --process too"),
        (["--coordinator", "h:1", "--processes", "1", "--process", "0"], "has no --coordinator; leave all three out"),
        (["--coordinator", "auto", "--process", "0"], "--coordinator auto asks the launcher: leave --processes and"),
        (["--coordinator", "h:1", "--process", "-1", "--processes", "2"], "--process -1 "),
    ],
)
def test_processes_that_cannot_be_are_one_sentence(words, sentence, tiny_model, tiny_data, tmp_path, capsys):
    assert cli.run(flexora_words(tiny_model, tiny_data, tmp_path / "run", *words)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

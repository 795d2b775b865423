"""Two processes of four devices each: the same answer as one, and the same end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from methods import models
from tests.devices.meshes import case, devices, nested, on, run


def start(folder, *scenarios):
    """Both processes, started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": devices(4), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.devices.one_of_two"]
    return [
        subprocess.Popen(
            [*command, str(process), port, str(folder), *scenarios],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip


def ended(processes, seconds=600):
    """`(exit status, standard output, standard error)` of each, which must come in time, on a busy machine too."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def found(folder, *scenarios):
    """What both processes found in each scenario."""
    both = ended(start(folder, *scenarios))
    assert [status for status, _, _ in both] == [0, 0], [error[-2000:] for _, _, error in both]
    lines = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for _, out, _ in both]
    return list(zip(*lines, strict=True))


def alone(steps=20, **settings):
    problem, data = case()
    result = run(nested(problem), data, steps, **settings)
    return {"outer": [float(result.outer["decay"])], "loss": result.history["outer_loss"].tolist(), "steps": steps}


def close(found, wanted, tolerance=1e-12):
    assert found["steps"] == wanted["steps"]
    np.testing.assert_allclose(found["outer"], wanted["outer"], rtol=tolerance)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=tolerance)


def test_numbers_are_those_of_one_device(tmp_path):
    scenarios = "whole", "rows", "split inner", "shared rows"
    (whole, other), (rows, other_rows), (split, other_split), (shared, _) = found(tmp_path, *scenarios)
    assert (whole, rows, split) == (other, other_rows, other_split)
    close(whole, alone())
    _, data = case()
    batches = lambda size: iter([tuple(a[i : i + size] for a in data) for i in range(0, 64, size)] * 12)  # noqa: E731
    close(rows, alone(6, inner_data=batches(16), outer_data=batches(32)))
    close(shared, rows)
    assert len(split["loss"]) == 4  # with Adam, whose numbers one device has to 1e-11 (test_mesh)


def test_checkpoints_go_on_in_as_many_processes_or_in_one(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    (part, _), = found(shared, "first part")  # fmt: skip
    close(part, alone(8))
    # In one process with eight devices; then from there in two.
    close(alone(14, sharding=on(), checkpoint_dir=str(shared)), alone(14))
    (whole, other), = found(shared, "all steps")  # fmt: skip
    assert whole == other
    close(whole, alone())
    _, (all_rows, _), (uninterrupted, _) = found(own, "first rows", "all rows", "rows")
    assert all_rows == uninterrupted | {"scenario": "all rows"}  # bit for bit
    with pytest.raises(ValueError, match=r"written by 2 processes with an iterator.*resume with as many"):
        alone(6, sharding=on(), checkpoint_dir=str(own))


def test_what_differs_between_processes_ends_all_of_them_in_a_sentence(tmp_path):
    scenarios = "same rows", "differs", "fails", "stops", "diverges", "command"
    same, differs, fails, stops, diverges, command = found(tmp_path, *scenarios)
    unlike = "rows differ", "weights differ", "records differ", "unshared", "uneven", "folder of one", "other mesh"
    sentences = (
        "inner_data in leaf [0] is another array in process 1 than in process 0",
        "['up'] is another array in process 1 than in process 0",
        "process 1 was given another record than process 0",
        "is another folder in process 1 than in process 0",
        "While reading inner_data, process 1 came by [0] float64[4, 16]",
        "process 1 was given another checkpoint_dir",
        "process 1 was given another sharding",
        "the devices of process 0 and 1 hold the same rows of a batch, but the iterator gave others in each",
    )
    for both, sentence in zip(found(tmp_path, *unlike, "shared rows differ"), sentences, strict=True):
        for told in both:
            assert sentence in told["error"]
    for told in same:
        assert "inner_data: the iterator gave the same first batch in process 0 and 1" in told["error"]
    for told in differs:
        assert "inner_data in leaf .arrays[0] is another array in process 1" in told["error"]
    assert "Process 1 of 2 failed while calling its callbacks" in fails[0]["error"]
    assert fails[1]["error"] == "KeyError: 'of mine'"
    assert [told["steps"] for told in stops] == [3, 3]
    own = "KeyError: 'of mine'"
    rows = "The rows differ from those of process 0 (rows is 1 and not 0): give all the same."
    for process, told in enumerate(command):
        other = f"ValueError: Process {1 - process} of 2 said: {own}"
        assert told["said"][:2] == ([other, own] if process else [own, other])
        assert told["said"][2] == (rows if process else f"Process 1 of 2 said: {rows}")
        assert told["decided"] == [0, {"a": None}, "\u00e9" * 300]
    for told in diverges:
        assert "inner_loss is nan at inner step 1" in told["error"]


def test_each_process_reads_its_part_of_a_model(tmp_path, tiny_model):
    def copies(name, **changed):
        """A folder of the model for each process; in the second one's some entries of tensors are others."""
        for process in (0, 1):
            own = shutil.copytree(tiny_model, tmp_path / f"{name}-{process}")
            tensors = load_file(own / "model.safetensors")
            for tensor, (place, value) in changed.items() if process else ():
                tensors[f"model.{tensor}.weight".replace("_of_", ".")][place] = value
            save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})

    copies("model")
    copies("other model", layers_of_1_of_mlp_of_up_proj=((3, -1), 9.0))
    copies("damaged model", layers_of_0_of_mlp_of_up_proj=((13, 3), np.nan))  # in the part of the second process
    scenarios = "model", "other model", "damaged model"
    same, other, damaged = found(tmp_path, *scenarios)
    whole = jax.tree.leaves(models.load(tiny_model).weights)
    for told in same:
        np.testing.assert_allclose(told["sum"], sum(float(np.sum(x, dtype=np.float64)) for x in whole), rtol=1e-12)
        assert told["read"] < 0.7 * sum(x.nbytes for x in whole)  # and the ends of each array, to compare them
    for told in other:
        assert "['blocks']['up_proj']['kernel'][1] is another array in process 1 than in process 0" in told["error"]
    assert "'model.layers.0.mlp.up_proj.weight' of " in damaged[1]["error"]
    assert "Process 1 of 2 said: tensor 'model.layers.0.mlp.up_proj.weight' of " in damaged[0]["error"]


def test_runs_of_each_process_alone_know_nothing_of_each_other(tmp_path):
    (first, second), saved = found(tmp_path, "local", "local, saved")
    close(first, alone(3))
    close(second, alone(4))
    assert all("one of 2 processes alone" in told["error"] for told in saved)


def test_a_signal_to_one_saves_and_ends_both(tmp_path):
    both = ended(start(tmp_path, "interrupted"))
    assert [status for status, _, _ in both] == [-signal.SIGTERM] * 2
    assert "interrupted after 3 of 2000, which are saved in" in both[0][2]
    assert "interrupted after" not in both[1][2]
    problem, data = case()
    solver = nested(problem)
    settings = {"sharding": on(), "checkpoint_dir": tmp_path, "callbacks": [lambda step, *_: step == 5]}
    assert int(run(solver, data, 2000, **settings).state.step) == 5


def test_the_death_of_one_ends_the_other(tmp_path):
    (status, _, said), (dead, _, _) = ended(start(tmp_path, "dies"))
    assert dead == 9 and status != 0
    assert "another task died" in said

"""One of two processes of four devices each; prints what it found, a line of JSON for each scenario.

`python -m tests.devices.one_of_two PROCESS PORT FOLDER SCENARIO...`; the tests of `test_processes` start both.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import bilevel
from bilevel.running import checkpoints
from methods import processes
from methods.models import checkpoints as checkpoints_of_models
from methods.models import loading
from tests.devices.meshes import case, nested, on, run


class OwnRows:
    """An iterator of the rows of one process: half of those that `whole` would give in each batch."""

    def __init__(self, data, size, process, processes):
        self.data, self.size, self.process, self.processes, self.at = data, size, process, processes, 0

    def __iter__(self):
        return self

    def __next__(self):
        first = self.at * self.size % len(self.data[0])
        part = self.size // self.processes
        rows = slice(first + self.process * part, first + (self.process + 1) * part)
        self.at += 1
        return tuple(a[rows] for a in self.data)

    def get_state(self):
        return self.at

    def set_state(self, at):
        self.at = at


def whole(steps=20, folder=None, **settings):
    problem, data = case()
    return run(nested(problem), data, steps, sharding=on(), checkpoint_dir=folder, **settings)


def rows(steps=6, folder=None, same=False, **settings):
    problem, data = case()
    process = 0 if same else jax.process_index()
    inner, outer = (OwnRows(data, size, process, jax.process_count()) for size in (16, 32))
    settings |= {"inner_data": inner, "outer_data": outer, "sharding": on(), "checkpoint_dir": folder}
    return run(nested(problem), data, steps, **settings)


def split_inner(steps=4):
    """The inner variable itself lies on the devices of both processes."""
    problem, data = case()
    split = lambda path, x: P(None, "fsdp") if path == ".b" else P()  # noqa: E731
    return run(nested(problem, optax.adam(0.1)), data, steps, sharding=on(inner=split))


def interrupted(folder):
    """A signal comes to the second process alone, while it computes."""

    def tell(step, state, metrics):
        if step == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return whole(2000, folder, callbacks=[tell])


def fails(folder=None):
    def callback(step, state, metrics):
        if step == 2 and jax.process_index() == 1:
            raise KeyError("of mine")

    return whole(4, folder, callbacks=[callback])


def stops(folder=None):
    return whole(9, callbacks=[lambda step, *_: step == 3 and jax.process_index() == 1])


def differs(folder=None):
    problem, data = case()
    data = jax.tree.map(lambda x: x + jax.process_index(), data)
    return run(nested(problem), data, 2, sharding=on())


def rows_differ(folder=None):
    """Of a full batch each process has a part: what it does not have is wrong in the other."""
    problem, (x, y) = case()
    return run(nested(problem), (x, y), 2, inner_data=(x + jax.process_index(), y), sharding=on())


def records_differ(folder=None):
    name = f"of {jax.process_index()}"
    return whole(2, record=lambda state: {name: state.outer["decay"]})


def unshared(folder):
    """The same name, but what one process writes the others do not see."""
    if jax.process_index():
        checkpoints._appears = lambda path: path.name == "nothing"
    return whole(2, folder)


def weights_differ(folder=None):
    problem, data = case()
    weights = problem.inner_loss.args[0] | {"up": problem.inner_loss.args[0]["up"] + jax.process_index()}
    loss = jax.tree_util.Partial(problem.inner_loss.func, weights)
    rule = lambda path, x: P("fsdp") if x.ndim == 2 else P()  # noqa: E731
    return run(nested(dataclasses.replace(problem, inner_loss=loss)), data, 2, sharding=on(weights=rule))


def uneven(folder=None):
    """A batch is shorter in one process than in the other."""

    class Shorter(OwnRows):
        def __next__(self):
            batch = super().__next__()
            return tuple(a[:4] for a in batch) if self.at > 2 and self.process else batch

    problem, data = case()
    inner = Shorter(data, 16, jax.process_index(), 2)
    return run(nested(problem), data, 4, inner_data=inner, sharding=on())


def shared_rows(folder=None, same=True):
    """Rows lie on the devices of both processes, which have to give the same."""

    class Later(OwnRows):
        def __next__(self):
            batch = super().__next__()
            return tuple(a + (not same and self.at > 2) * jax.process_index() for a in batch)

    problem, data = case()
    # Devices 0, 4, 1, 5, ...: each part of the rows is on one device of each process.
    order = [d for pair in zip(jax.devices()[:4], jax.devices()[4:], strict=True) for d in pair]
    mesh = jax.sharding.Mesh(np.asarray(order).reshape(4, 2), ("data", "fsdp"))
    inner, outer = (Later(data, size, 0, 1) for size in (16, 32))
    settings = {"inner_data": inner, "outer_data": outer, "sharding": bilevel.Sharding(mesh)}
    return run(nested(problem), data, 6, **settings)


def folder_of_one(folder):
    return whole(2, folder if jax.process_index() else None)


def other_mesh(folder=None):
    problem, data = case()
    return run(nested(problem), data, 2, sharding=on("data" if jax.process_index() else "both"))


def diverges(folder=None):
    problem, data = case()
    return run(nested(problem, optax.sgd(1e200)), data, 3, sharding=on())


def dies(folder=None):
    def callback(step, state, metrics):
        if step == 3 and jax.process_index() == 1:
            os._exit(9)

    return whole(10**6, callbacks=[callback])


def local(folder=None):
    """Each process has a run of its own, on its own devices."""
    problem, data = case()
    mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()), ("data",))
    settings = {"sharding": bilevel.Sharding(mesh), "checkpoint_dir": folder}
    return run(nested(problem), data, 3 + jax.process_index(), **settings)


def command(folder):
    """What the processes of a command tell each other: what each of them raises, and what the first decides."""
    # As `processes.start` leaves them, which connects the processes itself.
    processes._index, processes._count = jax.process_index(), jax.process_count()
    said = []
    for failing in (0, 1):
        try:
            with processes.attempt():
                if failing == jax.process_index():
                    raise KeyError("of mine")
        except (KeyError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    try:
        processes.agree("The rows", {"rows": jax.process_index(), "seed": 0})
    except ValueError as error:
        said.append(str(error))
    index = jax.process_index()
    return {"said": said, "decided": processes.decided(lambda: [index, {"a": None}, "\u00e9" * 300])}


def model(folder, name="model"):
    """A model of which each process reads its part, from a folder of its own."""
    processes._index, processes._count = jax.process_index(), jax.process_count()
    own = Path(folder) / f"{name}-{jax.process_index()}"
    read = []

    def counting(path):
        checkpoint = checkpoints_of_models.open_folder(path)

        def counted(tensor, part=()):
            array = checkpoint.read(tensor, part)
            read.append(array.nbytes)
            return array

        return dataclasses.replace(checkpoint, read=counted)

    loading.open_folder = counting
    rule = lambda path, x: P(*[None] * (x.ndim - 1), "fsdp") if x.ndim > 1 else P()  # noqa: E731
    weights = loading.load(own, sharding=on("fsdp", weights=rule)).weights
    total = jax.jit(lambda tree: sum(x.astype("float64").sum() for x in jax.tree.leaves(tree)))(weights)
    return {"read": sum(read), "sum": float(total)}


SCENARIOS = {
    "model": model,
    "other model": lambda folder: model(folder, "other model"),
    "damaged model": lambda folder: model(folder, "damaged model"),
    "whole": lambda folder: whole(),
    "rows": lambda folder: rows(),
    "same rows": lambda folder: rows(same=True),
    "shared rows": shared_rows,
    "shared rows differ": lambda folder: shared_rows(same=False),
    "first part": lambda folder: whole(8, folder),
    "all steps": lambda folder: whole(20, folder),
    "first rows": lambda folder: rows(3, folder),
    "all rows": lambda folder: rows(6, folder),
    "split inner": lambda folder: split_inner(),
    "interrupted": interrupted,
    "fails": fails,
    "stops": stops,
    "differs": differs,
    "rows differ": rows_differ,
    "weights differ": weights_differ,
    "records differ": records_differ,
    "unshared": unshared,
    "uneven": uneven,
    "folder of one": folder_of_one,
    "other mesh": other_mesh,
    "diverges": diverges,
    "dies": dies,
    "command": command,
    "local": lambda folder: local(),
    "local, saved": local,
}


def numbers(result):
    """What a run found, as lists."""
    outer = [np.asarray(x).tolist() for x in jax.tree.leaves(result.outer)]
    return {"outer": outer, "loss": result.history["outer_loss"].tolist(), "steps": int(result.state.step)}


def main(process, port, folder, *scenarios):
    """Runs the scenarios one after another; prints a line of JSON for each."""
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process), heartbeat_timeout_seconds=10)
    for scenario in scenarios:
        try:
            found = SCENARIOS[scenario](folder)
            found = found if isinstance(found, dict) else numbers(found)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"scenario": scenario} | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

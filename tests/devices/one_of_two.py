"""One of two processes of four devices each; prints what it found, a line of JSON for each scenario.

`python -m tests.devices.one_of_two PROCESS PORT FOLDER SCENARIO...`; the tests of `test_processes` start both.
"""

import json
import os
import signal
import sys

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import bilevel
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


SCENARIOS = {
    "whole": lambda folder: whole(),
    "rows": lambda folder: rows(),
    "same rows": lambda folder: rows(same=True),
    "first part": lambda folder: whole(8, folder),
    "all steps": lambda folder: whole(20, folder),
    "first rows": lambda folder: rows(3, folder),
    "all rows": lambda folder: rows(6, folder),
    "split inner": lambda folder: split_inner(),
    "interrupted": interrupted,
    "fails": fails,
    "stops": stops,
    "differs": differs,
    "diverges": diverges,
    "dies": dies,
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
            found = numbers(SCENARIOS[scenario](folder))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"scenario": scenario} | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What one device of a mesh holds: planned beside the compiled program."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import bilevel
from bilevel import Batches, Unrolled
from bilevel.differentiation import checkpointing
from bilevel.differentiation.schedules import choose
from bilevel.measuring.planning import temp_bytes
from bilevel.measuring.point import Point
from tests.devices.meshes import case, on

STEPS, ROWS = 16, 256
RNG = np.random.default_rng(0)
X = RNG.normal(size=(512, 16))
DATA = Batches((X, np.tanh(X @ RNG.normal(size=(16, 3)))), ROWS)
UNROLLED = Unrolled(optax.adam(0.1), STEPS)


def on_the_head(path, x):
    return P("fsdp") if path.endswith("['head']") else P()


def arguments(sharding):
    problem = case()[0] if sharding is None else sharding.problem(case()[0])
    return Point.of("plan", problem, None, None, DATA, DATA, None).arguments(STEPS)


def compiled_bytes(sharding, **settings):
    unrolled = dataclasses.replace(UNROLLED, **settings)
    return temp_bytes(lambda unrolled, *rest: unrolled.estimate(*rest), unrolled, *arguments(sharding))


SCHEDULES = [("mixed", "sqrt"), ("mixed", bilevel.Binomial(5)), ("reverse", "none")]


def test_planned_memory_is_that_of_one_device():
    sharding = on(inner=on_the_head)
    plan = bilevel.plan(case()[0], UNROLLED, inner_data=DATA, outer_data=DATA, sharding=sharding)
    for mode, checkpoint in SCHEDULES:
        measured = compiled_bytes(sharding, mode=mode, checkpoint=checkpoint)
        np.testing.assert_allclose(plan.row(mode, checkpoint).temp_bytes, measured, rtol=0.05, err_msg=str(checkpoint))


def chosen(budget, sharding):
    found = []

    def note(checkpoint, sizes, length):
        found.append(choose(checkpoint, sizes, length))
        return found[-1]

    unrolled = dataclasses.replace(UNROLLED, mode="reverse", checkpoint=bilevel.Auto(budget))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "choose", note)
        jax.eval_shape(lambda *rest: unrolled.estimate(*rest), *arguments(sharding))
    return found[-1]


def test_auto_counts_what_one_device_keeps():
    # In reverse mode a step leaves its activations behind: whole, as many times as there are steps, they are too many.
    sharding = on("data")
    none, step = (compiled_bytes(sharding, mode="reverse", checkpoint=c) for c in ("none", "step"))
    assert chosen(1.2 * (none - step), sharding) == "none"
    assert chosen(0.8 * (none - step), sharding) != "none"
    assert chosen(1.2 * (none - step), None) != "none"


def test_a_replay_is_not_planned_on_a_mesh():
    with pytest.raises(ValueError, match=r"plan\(sharding=...\) plans an Unrolled"):
        bilevel.plan(case()[0], bilevel.Replay(optax.sgd(0.1), 4), inner_data=DATA, outer_data=DATA, sharding=on())
    with pytest.raises(ValueError, match=r"plan\(sharding=.*must be a bilevel.Sharding"):
        bilevel.plan(case()[0], UNROLLED, inner_data=DATA, outer_data=DATA, sharding=jax.devices())

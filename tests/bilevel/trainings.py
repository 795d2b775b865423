"""A problem with data, keys and dropout, run and killed: for the tests of the host loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel import Batches, Nested, Unrolled
from tests.bilevel.helpers import KEY

TRAIN = {"x": jax.random.normal(jax.random.key(1), (11, 3)), "id": jnp.arange(11), "key": jax.random.split(KEY, 11)}
TEST = jax.random.normal(jax.random.key(2), (6, 3))


def inner_loss(w, outer, batch, key):
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(batch["key"])
    mask = jax.random.bernoulli(outer["key"], 0.5, (3,))
    return jnp.mean((jnp.where(mask, batch["x"] + 0.1 * noise, 0.0) @ w - outer["a"][batch["id"]]) ** 2)


def outer_loss(w, outer, batch, key):
    return jnp.mean((batch @ w - 1.0) ** 2) + 0.01 * jnp.sum(outer["a"] ** 2)


PROBLEM = bilevel.Problem(
    inner_loss, outer_loss, lambda key, outer: jnp.zeros(3), lambda key: {"a": jnp.full(11, 0.1), "key": key, "n": 5}
)
SOLVER = Nested(PROBLEM, Unrolled(optax.adam(0.1), 3, checkpoint="none"), optax.adam(0.05))
DATA: dict[str, Any] = {"inner_data": Batches(TRAIN, 4), "outer_data": Batches(TEST, 2)}


def run(solver: Any = SOLVER, steps: int = 6, **settings: Any) -> Any:
    return bilevel.run(solver, steps=steps, progress=False, **(settings or DATA))


class Killed(BaseException):
    pass


def killer(at):
    def callback(step, state, metrics):
        if step >= at:
            raise Killed

    return callback


class Counter:
    """An iterator of batches that can be put back where it was."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        rows = (np.arange(4) + 4 * self.at) % 11
        return jax.tree.map(lambda x: x[rows], TRAIN)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]

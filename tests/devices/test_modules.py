"""A module of nnx on a mesh of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import bilevel
import bilevel.nnx
from tests.devices.meshes import apart, on


class Network(nnx.Module):
    """A frozen layer that is split over the mesh, and a trained one with batch normalisation and dropout."""

    def __init__(self, rngs):
        self.base = nnx.Linear(8, 256, param_dtype=float, rngs=rngs)
        self.head, self.gate = nnx.LoRAParam(jnp.ones((256,))), bilevel.nnx.Outer(jnp.full(256, 0.5))
        self.norm = nnx.BatchNorm(256, use_bias=False, use_scale=False, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(256)), nnx.BatchStat(jnp.ones(256))

    def __call__(self, x):
        return self.drop(self.norm(self.base(x))) @ (self.head[...] * self.gate[...])


def loss(model, batch, key):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)


def quiet(model, batch, key):
    model.eval()
    return loss(model, batch, key)


def test_a_module_on_a_mesh_is_that_of_one_device():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        module = Network(nnx.Rngs(0))
    problem = bilevel.nnx.problem(module, loss, quiet, inner=nnx.LoRAParam, frozen=nnx.Param)
    solver = bilevel.Nested(problem, bilevel.Unrolled(optax.adam(0.05), 3), optax.adam(0.1))
    rows = np.random.default_rng(0).normal(size=(32, 8)), np.random.default_rng(1).normal(size=32)
    data = {"inner_data": bilevel.Batches(rows, 16), "outer_data": bilevel.Batches(rows, 16), "progress": False}
    alone = bilevel.run(solver, steps=4, **data)
    split = on("fsdp", weights=lambda path, x: P(None, "fsdp") if "kernel" in path else P())
    for sharding in (on("data"), split):
        found = bilevel.run(solver, steps=4, sharding=sharding, **data)
        assert apart((found.outer, found.inner.params), (alone.outer, alone.inner.params)) < 1e-12
    kernel = split.problem(problem).inner_loss.frozen["base"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.shape == (8, 32)

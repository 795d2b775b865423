r"""The planted-layer task: a student that misses what its teacher has on a few layers, and the ablation oracle.

A random decoder gets a low-rank update on a few of its layers, S*: the teacher. The student is the same decoder without
the update, with LoRA on all layers and Flexora's gate, trained towards the teacher's full distribution,

$$
L = \mathrm{mean}_{b,t}\ \mathrm{KL}(p_{teacher}(\cdot | x_{b, \le t}) \,\|\,
  p_{student}(\cdot | x_{b, \le t})),
$$

whose minimum 0 is reached by the planted update.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel
from methods import flexora
from methods.adapters.lora import LoRAConfig
from methods.models.decoder import Decoder, DecoderConfig
from methods.objective import of_hook


@dataclasses.dataclass(frozen=True)
class Setup:
    """The benchmark's numbers.

    Attributes:
      layers, width, vocab, tokens: shape of the decoder and of its sequences.
      per: what is planted and looked for, "layer" or "module" (q or v of a layer).
      planted: |S*|.
      rank: of the planted update and of LoRA.
      effect: KL(with one planted layer || without), the same for each of them.
      rows: sequences for training; as many for validation.
      batch, outer_batch: sequences an inner and an outer step.
      seeds: each draws weights, S*, update and data anew.
      total: N, inner steps of a search.
      unrolls: the K's; each divides N.
      oracle_steps: Adam steps of an ablation.
      sgd, adam: inner learning rates.
      reach: length of alpha's path.
      start: "cold" trains LoRA anew for each outer step, as the paper; "warm" goes on.
    """

    layers: int = 8
    width: int = 32
    vocab: int = 32
    tokens: int = 8
    per: str = "layer"
    planted: int = 3
    rank: int = 4
    effect: float = 0.15
    rows: int = 1024
    batch: int = 8
    outer_batch: int = 32
    seeds: int = 5
    total: int = 200
    unrolls: tuple[int, ...] = (1, 5, 20, 50)
    oracle_steps: int = 120
    sgd: float = 1.0
    adam: float = 1e-2
    reach: float = 2.0
    start: str = "cold"

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_layers=self.layers,
            num_heads=4,
            num_kv_heads=4,
            head_dim=self.width // 4,
            max_positions=self.tokens,
            tied=False,
        )

    @property
    def lora(self) -> LoRAConfig:
        return LoRAConfig(rank=self.rank, alpha=float(self.rank))

    @property
    def units(self) -> int:
        """Layers, or modules: q of every layer, then v of every layer."""
        return self.layers * (1 if self.per == "layer" else len(self.lora.targets))

    def spread(self, values: jax.Array) -> Any:
        """A gate or mask `[units]` as `LoRAConfig.bind` takes it."""
        if self.per == "layer":
            return values
        return dict(zip(self.lora.targets, values.reshape(-1, self.layers), strict=True))

    def gather(self, values: dict[str, jax.Array]) -> jax.Array:
        """What modules are worth, `{site: [layers]}`, by unit: the sum over a layer, or each by itself."""
        table = jnp.stack([values[site] for site in self.lora.targets])
        return table.sum(0) if self.per == "layer" else table.ravel()

    def start_lora(self, key: jax.Array) -> Any:
        return self.lora.init(key, self.config.site_shapes(), self.layers)

    def logits(self, weights: Any, adapt: Any, tokens: jax.Array) -> jax.Array:
        return Decoder(self.config, remat=False).apply({"params": weights}, tokens, None, adapt)


QUICK = Setup(layers=4, width=16, planted=1, rows=64, seeds=2, total=4, unrolls=(2,), oracle_steps=10)


class Task(NamedTuple):
    """One seed: frozen weights, S* as a mask `[units]`, and data `{"tokens", "target": log p_teacher}`."""

    weights: Any
    planted: jax.Array
    train: Any
    val: Any


GAINS = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 0.5, "down_proj": 0.5, "head": 1.5}
"""Standard deviation of a linear's output for input of unit variance (else 1). Sharp attention tells layers apart:
each then looks elsewhere, and a neighbour cannot stand in for a planted layer. Branches add little to the stream."""


def base_weights(setup: Setup, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, setup.tokens), jnp.int32)
    shapes = jax.eval_shape(Decoder(setup.config, remat=False).init, key, tokens)["params"]

    def draw(index, path, leaf):
        names = [str(entry.key) for entry in path]
        if names[-1] not in ("kernel", "embed", "head"):
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = {"kernel": leaf.shape[-2], "head": leaf.shape[-1], "embed": 1}[names[-1]]
        gain = next((GAINS[name] for name in names if name in GAINS), 1.0)
        return jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype) * (gain / fan_in**0.5)

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(structure, [draw(i, path, leaf) for i, (path, leaf) in enumerate(leaves)])


def make_task(setup: Setup, key: jax.Array) -> Task:
    """Weights, S*, teacher and its data.

    Every planted layer is scaled until its update alone moves the predictions by `effect`: layers differ in leverage,
    and one that hardly matters could not be found by anybody.
    """
    keys = jax.random.split(key, 6)
    weights = base_weights(setup, keys[0])
    planted = jax.random.permutation(keys[1], setup.units) < setup.planted
    leaves, structure = jax.tree.flatten(setup.start_lora(keys[2]))
    # [L, in, r] and [L, r, out] alike: variance 1 / fan-in.
    drawn = [
        jax.random.normal(k, x.shape, x.dtype) / x.shape[1] ** 0.5
        for k, x in zip(jax.random.split(keys[2], len(leaves)), leaves, strict=True)
    ]
    update = jax.tree.unflatten(structure, drawn)

    def tokens(key):
        return jax.random.randint(key, (setup.rows, setup.tokens), 0, setup.vocab, jnp.int32)

    def predict(gate, mask, tokens):
        adapt = setup.lora.bind(update, setup.spread(gate), setup.spread(mask))
        return {"tokens": tokens, "target": jax.nn.log_softmax(setup.logits(weights, adapt, tokens))}

    probe, each = tokens(keys[5])[:128], jnp.eye(setup.units, dtype=bool)
    base = setup.lora.bind(update, mask=jnp.zeros(setup.layers, bool))

    def rescale(gate, _):
        moved = jax.vmap(lambda mask: divergence(setup, weights, base, predict(gate, mask, probe)))(each)
        return jnp.clip(gate * jnp.sqrt(setup.effect / moved), 0.1, 10.0), None

    gate, _ = jax.lax.scan(rescale, jnp.ones(setup.units, jnp.float32), None, length=4)
    train, val = (predict(gate, planted, tokens(k)) for k in keys[3:5])
    return Task(weights, planted, train, val)


def divergence(setup: Setup, weights: Any, adapt: Any, batch: Any) -> jax.Array:
    """KL(teacher || student), mean over sequences and positions."""
    student = jax.nn.log_softmax(setup.logits(weights, adapt, batch["tokens"]))
    return jnp.mean(jnp.sum(jnp.exp(batch["target"]) * (batch["target"] - student), axis=-1))


def gated(setup: Setup, task: Task) -> bilevel.Problem:
    """Flexora's problem on this task."""
    return flexora.problem(of_hook(partial(divergence, setup), task.weights, setup.lora, setup.config))


def draw(data: Any, key: jax.Array, *shape: int) -> bilevel.Indexed:
    return bilevel.Indexed(data, jax.random.randint(key, shape, 0, len(data["tokens"])))


@partial(jax.jit, static_argnums=0)
def ablations(setup: Setup, tasks: Task, keys: jax.Array) -> dict[str, jax.Array]:
    """Validation loss `[seeds, 2 + 2 units]` with LoRA on: no unit, all, each alone, all but each."""
    each = jnp.eye(setup.units, dtype=bool)
    none = jnp.zeros((1, setup.units), bool)
    trainer = bilevel.FirstOrder(optax.adam(setup.adam), setup.oracle_steps)

    def one(task, key, mask):
        def loss(params, mask, batch, key):
            return divergence(setup, task.weights, setup.lora.bind(params, mask=setup.spread(mask)), batch)

        problem = bilevel.Problem(loss, loss, lambda key, mask: setup.start_lora(key), lambda key: mask)
        batches = draw(task.train, key, setup.oracle_steps, setup.batch)
        trained = trainer.solve(problem, None, mask, batches, key).params
        updates = setup.lora.delta(trained)
        size = {site: jnp.sum(delta**2, axis=(1, 2)) for site, delta in updates.items()}
        return {"loss": loss(trained, mask, task.val, key), "update": setup.gather(size)}

    over_masks = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(over_masks, in_axes=(0, 0, None))(tasks, keys, jnp.concatenate([none, ~none, each, ~each]))


@partial(jax.jit, static_argnums=0)
def sharpness(setup: Setup, tasks: Task, keys: jax.Array) -> jax.Array:
    r"""$\eta \lambda_{\max}$ of the inner loss `[seeds, 2]`, before and after max(K) SGD steps at alpha = 0."""

    def top(problem, params, alpha, batch):
        def turn(direction, _):
            gradient = lambda p: jax.grad(problem.inner_loss)(p, alpha, batch, None)  # noqa: E731
            image = jax.jvp(gradient, (params,), (direction,))[1]
            norm = optax.global_norm(image)
            return jax.tree.map(lambda x: x / norm, image), norm

        return setup.sgd * jax.lax.scan(turn, params, None, length=30)[1][-1]

    def one(task, key):
        problem, alpha = gated(setup, task), jnp.zeros(setup.layers)
        trainer = bilevel.FirstOrder(optax.sgd(setup.sgd), max(setup.unrolls))
        state = trainer.init(problem, alpha, key)
        after = trainer.solve(problem, state, alpha, draw(task.train, key, trainer.steps, setup.batch), key)
        batch = jax.tree.map(lambda x: x[:64], task.train)
        return jnp.stack([top(problem, params, alpha, batch) for params in (state.params, after.params)])

    return jax.vmap(one)(tasks, keys)

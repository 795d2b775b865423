"""What the baselines stand on: a setting that is the same for all, what each hands back, and the training they share.

Every file beside this one is a published way to spend a budget of adapter parameters, as one function,
`find(setting, key) -> Found`. Its docstring says what is published and what is our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.extend import PyTree
from methods import ranges
from methods.adapters.lora import LoRAConfig
from methods.models.hooks import Hook

PerSite = dict[str, Any]


class Setting(NamedTuple):
    """A model, its data and a budget.

    Attributes:
      loss: `loss(weights, adapt, head, batch) -> scalar`.
      weights: the frozen model.
      lora: rank, scale and targets of a module.
      shapes: `{site: (in, out)}` of the model's linears.
      num_layers: L.
      train: rows that adapters are trained on, arrays `[N, ...]`.
      outer: held-out rows, for the methods that look at some; never the test's.
      share: the budget, as a share of the parameters of LoRA everywhere; of its ranks, for methods that move ranks.
      steps, batch_size, learning_rate: of a training, by Adam.
      dtype: of the adapter.
      start_head: `start_head(key)`, a fresh head that is trained beside the adapter; {} where the model's own answers.
      callbacks: `callbacks(part)`, those of `bilevel.run` for a part of what is trained and searched; "" is the one
        training that a method has, or its last.
      sharding: likewise.
    """

    loss: Any
    weights: Any
    lora: LoRAConfig
    shapes: Mapping[str, tuple[int, int]]
    num_layers: int
    train: PyTree
    outer: PyTree
    share: float = 0.25
    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-3
    dtype: Any = jnp.float32
    start_head: Callable[[jax.Array], PyTree] = lambda key: {}
    callbacks: Callable[[str], Sequence[Any]] = lambda part: ()
    sharding: bilevel.Sharding | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        return self.lora.sites(self.shapes)

    def start(self, key: jax.Array) -> PyTree:
        """Fresh LoRA parameters."""
        return self.lora.init(key, self.shapes, self.num_layers, self.dtype)

    def with_head(self, key: jax.Array, adapter: PyTree) -> PyTree:
        """What is trained: `{"adapter": ..., "head": ...}`, the head fresh."""
        return {"adapter": adapter, "head": self.start_head(jax.random.fold_in(key, 1))}

    def costs(self) -> PerSite:
        """Trainable parameters of LoRA, r (in + out), for each module: `{site: [L]}`."""
        return {site: np.full(self.num_layers, float(self.lora.rank * sum(self.shapes[site]))) for site in self.sites}

    def budget(self) -> int:
        """Trainable parameters that may be spent.

        Raises:
          ValueError: for a share outside (0, 1].
        """
        if not 0 < self.share <= 1:
            raise ValueError(f"The share {self.share:g} of the budget must be above 0 and at most 1.")
        return ranges.part(self.share, sum(int(cost.sum()) for cost in self.costs().values()))

    def parts(self, count: int) -> list[int]:
        """The steps in so many parts, as equal as they can be, and of one step at least."""
        return [max(1, self.steps // count + (i < self.steps % count)) for i in range(count)]


class Found(NamedTuple):
    """A trained adapter.

    Attributes:
      adapt: the hook.
      head: the head's parameters.
      on: `{site: [L]}`, how much of a module is in use, between 0 and 1.
      parameters: trained numbers in use.
      exported: `(config, params, gate, mask)` for `save_peft`; None if it is no LoRA.
      scores: what modules were chosen by, `{site: [L]}`, larger being better; None if nothing was scored.
    """

    adapt: Hook
    head: PyTree
    on: PerSite
    parameters: int
    exported: tuple[LoRAConfig, PyTree, Any, Any] | None
    scores: PerSite | None = None


def found(setting: Setting, trained: PyTree, gate: Any, mask: PerSite, scores: Any = None) -> Found:
    """A `Found` that is plain LoRA, `trained["adapter"]`, with masks `{site: [L] or [L, r]}`."""
    params = trained["adapter"]
    on = {site: np.asarray(m, np.float64).reshape(setting.num_layers, -1).mean(1) for site, m in mask.items()}
    parameters = sum(float((on[site] * cost).sum()) for site, cost in setting.costs().items())
    exported = setting.lora, params, gate, mask
    return Found(setting.lora.bind(params, gate, mask), trained["head"], on, round(parameters), exported, scores)


def resized(lora: LoRAConfig, rank: int) -> LoRAConfig:
    """LoRA of another rank, its update scaled by the same factor s."""
    return dataclasses.replace(lora, rank=rank, alpha=lora.scale * (rank**0.5 if lora.rslora else rank))


def choose(setting: Setting, scores: PerSite, key: jax.Array) -> PerSite:
    """The modules of the best scores that fit the budget of parameters: bool `{site: [L]}`."""
    gates = jax.tree.map(lambda score: jnp.ones(score.shape), scores)
    allocate = bilevel.allocate(setting.budget(), setting.costs(), key=key)
    updates, _ = allocate.update(jax.tree.map(lambda s: -s.astype(float), scores), allocate.init(gates), gates)
    return jax.tree.map(lambda gate, update: gate + update > 0.5, gates, updates)


def fit(
    setting: Setting,
    key: jax.Array,
    start: Callable[[jax.Array], PyTree],
    bind: Callable[[PyTree], Hook],
    *,
    optimizer: Any = None,
    steps: int | None = None,
    part: str = "",
    penalty: Callable[[PyTree], jax.Array] = lambda params: jnp.zeros(()),
) -> Any:
    """Trains on `setting.train` for `steps` (`setting.steps`): the inner state, with `.params` and `.opt_state`.

    What is trained is `{"adapter": params, "head": ...}`.

    Args:
      start: `start(key) -> params`, any pytree.
      bind: `bind(params) -> hook`.
      optimizer: Adam at the setting's learning rate by default.
      part: what it is of all that is trained, as `Setting.callbacks` takes it.
      penalty: added to the loss.
    """

    def loss(weights, params, outer, batch, key):
        value = setting.loss(weights, bind(params["adapter"]), params["head"], batch)
        return value + penalty(params["adapter"]).astype(value.dtype)

    loss = jax.tree_util.Partial(loss, setting.weights)
    result = bilevel.fit(
        bilevel.Problem(loss, loss, lambda key, outer: setting.with_head(key, start(key)), lambda key: ()),
        (),
        optimizer=optimizer or optax.adam(setting.learning_rate),
        data=bilevel.Batches(setting.train, setting.batch_size),
        steps=steps or setting.steps,
        key=key,
        callbacks=setting.callbacks(part),
        progress=False,
        sharding=setting.sharding,
    )
    return result.inner


def search(
    setting: Setting,
    key: jax.Array,
    gated: Callable[..., jax.Array],
    outer: Callable[[], PyTree],
    estimator: Any,
    part: str = "",
) -> Any:
    """Alternates one inner step on `train` with one outer step on `outer`, both by Adam: a `bilevel.Result`.

    Args:
      gated: `gated(loss, params, outer, training) -> scalar`, `loss(adapt)` being the setting's; `training` says which
        level asks.
      outer: the outer variable at the start.
      estimator: the hypergradient.
      part: as of `fit`.
    """

    def level(training: bool) -> Any:
        def loss(weights, params, outer, batch, key):
            here = lambda adapt: setting.loss(weights, adapt, params["head"], batch)  # noqa: E731
            return gated(here, params["adapter"], outer, training)

        return jax.tree_util.Partial(loss, setting.weights)

    start = lambda key, outer: setting.with_head(key, setting.start(key))  # noqa: E731
    problem = bilevel.Problem(level(True), level(False), start, lambda key: outer())
    return bilevel.run(
        bilevel.Nested(problem, estimator, optax.adam(setting.learning_rate)),
        inner_data=bilevel.Batches(setting.train, setting.batch_size),
        outer_data=bilevel.Batches(setting.outer, setting.batch_size),
        steps=setting.steps,
        key=key,
        callbacks=setting.callbacks(part),
        progress=False,
        sharding=setting.sharding,
    )


def train_lora(setting: Setting, key: jax.Array, mask: PerSite, scores: Any = None) -> Found:
    """LoRA from scratch on the modules, or ranks, of a mask."""
    trained = fit(setting, key, setting.start, lambda params: setting.lora.bind(params, mask=mask)).params
    return found(setting, trained, None, mask, scores)


class Kind(Protocol):
    """A parametrisation of LoRA's factors with fewer numbers than they have entries."""

    def init(self, key: jax.Array, shapes: Mapping[str, tuple[int, int]], num_layers: int, dtype: Any) -> PyTree:
        """Fresh parameters, with an update of 0."""
        ...

    def factors(self, params: PyTree) -> tuple[LoRAConfig, PyTree]:
        """The LoRA they stand for, and its parameters `{site: {"a": [L, in, r], "b": [L, r, out]}}`."""
        ...


def train_kind(setting: Setting, key: jax.Array, kind: Kind) -> Found:
    """A kind of adapter on every module, trained from scratch; handed back as the plain LoRA that it stands for."""

    def bind(params: PyTree) -> Hook:
        config, factors = kind.factors(params)
        return config.bind(factors)

    def start(key: jax.Array) -> PyTree:
        return kind.init(key, setting.shapes, setting.num_layers, setting.dtype)

    trained = fit(setting, key, start, bind).params
    config, factors = kind.factors(trained["adapter"])
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trained["adapter"]))
    everywhere = {site: np.ones(setting.num_layers) for site in factors}
    return Found(config.bind(factors), trained["head"], everywhere, numbers, (config, factors, None, None))

r"""Stochastic gates on the rows and columns of frozen linears, as a hook; tied where the wiring of a block asks for it.

A gate has one number l, an activation $\omega \in [0, 1]$ that is random in training, and a probability P of
being open, whose sum is the smooth stand-in for the number of open gates:

    stg             mu = tanh(l),  omega = clip(mu + 1/2 + 0.1 e, 0, 1),  e ~ N(0, 1)   P = Phi((mu + 1/2) / 0.5)
    hard-concrete   s = sigmoid((logit(U) + l) / b),  omega = clip(s (zeta - gamma) + gamma, 0, 1)
                    P = sigmoid(l - b log(-gamma / zeta)),   b = 2/3, gamma = -0.1, zeta = 1.1

Without a key e = 0, and logit(U) = 0 with b = 1: the gate that stays when training is over. Where omega is clipped its
gradient is exactly 0. Both start open: without a key omega is exactly 1, but for one of 300,000 gates of stg.

"tied" gates can be cut out of a block: hidden features of the feed-forward layer (rows of up and gate with columns of
down), value features (rows of v with columns of o, for all heads that share a value head), and query-key features
(rows of q with rows of k, in the pairs that rotary positions turn, for all heads that share a key head). "untied"
gates, as published, are one for each row and each column of each linear; cutting these out of one matrix leaves the
next as large.

STG: Yamada et al. 2020, arXiv 1810.04247, with the parametrisation of FineGates' released code (Svirsky et al.,
arXiv 2412.12951). Hard concrete: Louizos et al. 2018, arXiv 1712.01312.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NOISE, WIDTH = 0.1, 0.5
"""sigma of STG's noise, and of its penalty: not the same number in the released code."""
STRETCH, LOW, HIGH = 2 / 3, -0.1, 1.1
"""b, gamma and zeta of the hard-concrete gate."""



class Family(NamedTuple):
    """A kind of gates.

    Attributes:
      start: mean of l where a gate starts.
      activation: `activation(l, key) -> omega`, random unless the key is None.
      probability: `probability(l) -> P`.
    """

    start: float
    activation: Callable[[jax.Array, jax.Array | None], jax.Array]
    probability: Callable[[jax.Array], jax.Array]


def _stg(l: jax.Array, key: jax.Array | None) -> jax.Array:
    noise = 0.0 if key is None else NOISE * jax.random.normal(key, l.shape, l.dtype)
    return jnp.clip(jnp.tanh(l) + 0.5 + noise, 0, 1)


def _hard_concrete(l: jax.Array, key: jax.Array | None) -> jax.Array:
    if key is None:
        s = jax.nn.sigmoid(l)
    else:
        s = jax.nn.sigmoid((jax.random.logistic(key, l.shape, l.dtype) + l) / STRETCH)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0, 1)


FAMILIES: dict[str, Family] = {
    "stg": Family(1.0, _stg, lambda l: jax.scipy.stats.norm.cdf((jnp.tanh(l) + 0.5) / WIDTH)),
    "hard-concrete": Family(
        3.0, _hard_concrete, lambda l: jax.nn.sigmoid(l - STRETCH * math.log(-LOW / HIGH))
    ),
}
"""By the name that the command line knows."""


class Structure(NamedTuple):
    """Gates that act together.

    Attributes:
      site: where the hook multiplies.
      shape: of the gates in one layer.
      axes, repeats: the gates as an array of `axes`, broadcast to `repeats`, are the factors of the site's features.
    """

    site: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    repeats: tuple[int, ...]

    @property
    def size(self) -> int:
        """Gates in a layer."""
        return math.prod(self.shape)

    def expand(self, gates: jax.Array) -> jax.Array:
        """Factors `[features]` of one layer's gates `[size]`."""
        return jnp.broadcast_to(gates.reshape(self.axes), self.repeats).reshape(-1)


def tied(config: Any) -> dict[str, Structure]:
    """The gates that can be cut out of a block of a model with this config: "ffn", "value" and "query_key".

    A model that normalises queries and keys over a head (Qwen3) has no "query_key": what is cut out would change the
    norm of what stays.
    """
    features = config.site_shapes()["up_proj"][1]
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    shared = heads // groups
    found = {
        "ffn": Structure("ffn_hidden", (features,), (features,), (features,)),
        "value": Structure("attention_hidden", (groups, size), (groups, 1, size), (groups, shared, size)),
    }
    if not getattr(config, "qk_norm", False):
        half = size // 2
        found["query_key"] = Structure("q_proj", (groups, half), (groups, 1, 1, half), (groups, shared, 2, half))
    return found


def untied(config: Any) -> dict[str, Structure]:
    """One gate for each row and column of each linear: "q_proj rows", "q_proj columns" and so on."""
    found = {}
    for site, (fan_in, fan_out) in config.site_shapes().items():
        found[f"{site} rows"] = Structure(site, (fan_out,), (fan_out,), (fan_out,))
        found[f"{site} columns"] = Structure(f"{site}.input", (fan_in,), (fan_in,), (fan_in,))
    return found


GATINGS: dict[str, Callable[[Any], dict[str, Structure]]] = {"tied": tied, "untied": untied}
"""What is gated in a model with a config, by name."""


def init(key: jax.Array, family: str, structures: dict[str, Structure], num_layers: int) -> dict[str, jax.Array]:
    """l of every gate, `{structure: [L, size]}`: N(1, 0.1^2) for stg, N(3, 0.1^2) for hard-concrete; all open."""
    mean = FAMILIES[family].start
    keys = dict(zip(structures, jax.random.split(key, len(structures)), strict=True))
    return {
        name: mean + 0.1 * jax.random.normal(keys[name], (num_layers, structure.size))
        for name, structure in structures.items()
    }


def activation(family: str, l: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """omega of gates l, any shape; random with a key."""
    return FAMILIES[family].activation(l, key)


def open_probability(family: str, l: jax.Array) -> jax.Array:
    """P of gates l, any shape."""
    return FAMILIES[family].probability(l)


def kept_shares(target: float, kappa: jax.Array) -> jax.Array:
    """Share of gates each layer should keep, `[L]`: 1 - target * L * softmax(kappa), at least 0; 1 - target at kappa=0.

    The removed shares have mean `target` as long as no layer reaches 0.
    """
    return jnp.maximum(1 - target * kappa.shape[0] * jax.nn.softmax(kappa), 0)


def penalty(gates: dict[str, jax.Array], family: str, keep: Any, width: float = 0.0) -> jax.Array:
    """mean over structures and layers of |mean_d P_d - keep|.

    Args:
      gates: `{structure: l [L, size]}`.
      family: of gates.
      keep: share of gates to keep, a scalar or `[L]`.
      width: w of sqrt(x^2 + w^2) - w in place of |x|, whose gradient is a sign and does not move with `keep`.
    """
    shares = jnp.stack([open_probability(family, l).mean(axis=1) for l in gates.values()])
    x = shares - jnp.broadcast_to(jnp.asarray(keep, shares.dtype), shares.shape[1:])[None]
    return jnp.abs(x).mean() if width == 0 else (jnp.sqrt(x**2 + width**2) - width).mean()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """The hook: multiplies each structure's site by its gates. Every leaf leads with the layer axis.

    Attributes:
      gates: `{structure: l [L, size]}`.
      keys: typed random keys `[L]`, or None for gates without noise.
      structures, family: what is gated, and how.
    """

    gates: dict[str, jax.Array]
    keys: jax.Array | None
    structures: Any = dataclasses.field(metadata={"static": True})
    family: str = dataclasses.field(metadata={"static": True})

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """y times the gates of this site; one draw serves all rows and positions."""
        del x
        for name, structure in self.structures:
            if structure.site == site:
                index = np.uint32(zlib.crc32(name.encode()))
                key = None if self.keys is None else jax.random.fold_in(self.keys, index)
                omega = structure.expand(activation(self.family, self.gates[name], key))
                y = y * omega.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def bind(
    gates: dict[str, jax.Array], structures: dict[str, Structure], family: str = "stg", key: jax.Array | None = None
) -> Gates:
    """The hook of gates `{structure: l [L, size]}`; random with a typed key.

    Raises:
      ValueError: for an unknown family, or gates of another shape than the structures'.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown gate family {family!r}: known are {', '.join(FAMILIES)}.")
    layers = {value.shape[0] for value in gates.values()}
    for name, structure in structures.items():
        if name not in gates or gates[name].shape[1:] != (structure.size,) or len(layers) != 1:
            got = {name: tuple(value.shape) for name, value in gates.items()}
            raise ValueError(f"Gates {got} do not fit: {name!r} needs one row of {structure.size} for each layer.")
    keys = None if key is None else jax.random.split(key, layers.pop())
    return Gates(gates, keys, tuple(structures.items()), family)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
    """The hook that adds `biases[site]` `[L, out]` to a linear's output."""

    biases: dict[str, jax.Array]

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """y + b, and y where there is no b."""
        del x
        if site not in self.biases:
            return y
        return y + self.biases[site].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

r"""Dropout inside a transformer, described by three words and learnable: where, in which pattern, compensated how.

    position            what is dropped                     also known as
    attention_logits    keys, before the softmax            DropKey (Li et al. 2023, arXiv 2208.02646)
    attention_weights   keys, after the softmax             DropAttention (Zehui et al. 2019, arXiv 1907.11065)
    ffn_hidden          hidden features of the feed-forward HiddenCut (Chen et al. 2021, arXiv 2106.00149)
    linear_input        what a linear reads
    linear_output       what a linear gives, its adapter's update included

    pattern        what goes together
    element        nothing: every entry by itself
    column         attention: a key, for all queries of its head; elsewhere: a feature, at all positions
    span           attention: neighbouring keys of one query; elsewhere: neighbouring positions, all features

    compensation   what makes up for it
    rescale                 weights are divided by their sum, features by 1 - p
    stop_gradient_rescale   the same, the divisor constant in the gradient
    none                    nothing
    kl, js                  rescale, and a term of the loss: any of `methods.tasks.loss.DIVERGENCES`

(At attention_logits the softmax that follows rescales whatever is dropped: there all five act alike on the hidden
states.) With p the rate of a position and U uniform on (0, 1), independent or shared as the pattern says, an entry
has the score $s = \mathrm{logit}(U) - \mathrm{logit}(p)$ and is kept by the factor

$$ z = [s \ge 0] \quad\text{(hard)}\qquad\text{or}\qquad z = \mathrm{sigmoid}(s / \tau) \quad\text{(relaxed)}; $$

P(s >= 0) = 1 - p. The relaxed factor (binary concrete: Maddison et al. 2017, arXiv 1611.00712) is what makes a rate
learnable: it is differentiable in p, and tends to the hard one, of the same U, as $\tau \to 0$. A query never
loses all its keys: where every visible score is below 0, all are raised until the best one is 0.

The unification is that of Wang et al. 2024, "LoRA Meets Dropout under a Unified Framework", arXiv 2403.00812.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from methods.held import held
from methods.tasks.loss import DIVERGENCES

POSITIONS = ("attention_logits", "attention_weights", "ffn_hidden", "linear_input", "linear_output")
"""Where something is dropped."""
PATTERNS = ("element", "column", "span")
"""What is dropped together."""
COMPENSATIONS = ("rescale", "stop_gradient_rescale", "none")
"""Those without a term of the loss; every name in `DIVERGENCES` is one more."""


class Rule(NamedTuple):
    """One dropout: a position, a pattern, a compensation."""

    position: str
    pattern: str
    compensation: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """The hook that a model calls; made by `DropoutConfig.bind`. Every leaf leads with the layer axis.

    Attributes:
      keys: typed random keys `[L]`.
      logits: for each rule, logit of its rate in each layer, `[L]`; -inf where nothing is dropped.
      config: the rules.
    """

    keys: jax.Array
    logits: tuple[jax.Array, ...]
    config: DropoutConfig = dataclasses.field(metadata={"static": True})

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """y with some of it dropped, by the rules that act at `site`."""
        for rule, logit in zip(self.config.rules, self.logits, strict=True):
            if site in self.config.sites(rule):
                # What a site draws depends on its name and the rule, not on what else is dropped.
                key = jax.random.fold_in(self.keys, np.uint32(zlib.crc32(" ".join((*rule, site)).encode())))
                y = (
                    _attention(rule, key, logit, self.config.temperature, x, y)
                    if y.ndim == 4
                    else _features(rule, key, logit, self.config.temperature, y)
                )
        return y


@dataclasses.dataclass(frozen=True)
class DropoutConfig:
    """What is fixed about a dropout.

    Args:
      rules: at most one a position; each three words, as a `Rule`, a tuple or a string.
      temperature: tau of the relaxed masks; 0 for hard ones.
      linears: sites of the linears that linear_input and linear_output speak of.

    Raises:
      ValueError: for an unknown word, two rules for a position, both loss terms, or a negative temperature.
    """

    rules: Sequence[Any]  # of `Rule` once made
    temperature: float = 0.0
    linears: Sequence[str] = ("q_proj", "v_proj")

    def __post_init__(self):
        object.__setattr__(self, "rules", tuple(_rule(rule) for rule in self.rules))
        object.__setattr__(self, "linears", tuple(self.linears))
        positions = self.positions
        if len(set(positions)) < len(positions):
            raise ValueError(f"Dropout has two rules for one position ({', '.join(positions)}): give one.")
        if len(terms := self._terms()) > 1:
            raise ValueError(
                f"The dropout rules ask for {' and '.join(terms)}: two passes are compared one way, choose one."
            )
        if not self.temperature >= 0:
            raise ValueError(f"Dropout temperature {self.temperature} must be 0 (hard masks) or positive.")

    @property
    def term(self) -> str | None:
        """The loss term that the rules ask for, a name in `DIVERGENCES`, or None."""
        return next(iter(self._terms()), None)

    def _terms(self) -> list[str]:
        asked = {rule.compensation for rule in self.rules}
        return [name for name in DIVERGENCES if name in asked]

    @property
    def positions(self) -> tuple[str, ...]:
        """Those of the rules, in their order."""
        return tuple(rule.position for rule in self.rules)

    def sites(self, rule: Any) -> tuple[str, ...]:
        """Where a rule acts."""
        if rule.position == "linear_input":
            return tuple(f"{site}.input" for site in self.linears)
        return tuple(self.linears) if rule.position == "linear_output" else (rule.position,)

    def bind(self, key: jax.Array, logits: Mapping[str, Any], num_layers: int, active: Any = True) -> Dropout:
        """The hook `adapt(site, x, y)`.

        Args:
          key: a typed random key; the same key, the same masks.
          logits: `{position: logit of the rate}`, a scalar or `[L]`; `logit(p)` makes one of a rate.
          num_layers: L.
          active: bool, a scalar or `[L]`; a layer where it is False drops nothing.

        Raises:
          ValueError: if `logits` is not of the rules' positions, or of another shape.
        """
        if set(logits) != set(self.positions):
            raise ValueError(
                f"Dropout rates are given for {', '.join(logits)}, but the rules are for {', '.join(self.positions)}."
            )
        full = tuple(_per_layer(position, logits[position], num_layers) for position in self.positions)
        on = jnp.broadcast_to(jnp.asarray(active), (num_layers,))
        full = tuple(jnp.where(on, value, -jnp.inf) for value in full)
        return Dropout(jax.random.split(key, num_layers), full, self)


def logit(rate: Any) -> jax.Array:
    """log p - log(1 - p); -inf for a rate of 0. Raises ValueError for a concrete rate outside [0, 1)."""
    if not isinstance(rate, Tracer) and not ((np.asarray(rate) >= 0) & (np.asarray(rate) < 1)).all():
        raise ValueError(f"Dropout rate {rate} must be at least 0 and below 1.")
    rate = jnp.asarray(rate, jnp.result_type(float))
    return jnp.log(rate) - jnp.log1p(-rate)


def uniform(key: jax.Array, pattern: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """U of every entry of an array `[..., queries, keys]` or `[..., positions, features]`, up to broadcasting.

    A span is drawn by its centre, uniform on the circle of the axis; U is twice the distance to it over the length of
    the axis. So it is uniform for each entry, and U < p is one block of a share p of the axis (which may go round).
    """
    attention = len(shape) == 4
    if pattern == "span":
        axis = len(shape) - (1 if attention else 2)
        length = shape[axis]
        # One centre a query, or one for all features.
        drawn = tuple(1 if i == len(shape) - 1 else n for i, n in enumerate(shape) if attention or i != axis)
        drawn = drawn if attention else (*drawn[:axis], 1, *drawn[axis:])
        centre = jax.random.uniform(key, drawn, dtype, 0.0, length)
        index = jnp.arange(length, dtype=dtype).reshape([length if i == axis else 1 for i in range(len(shape))])
        distance = jnp.abs(index - centre)
        u = 2 * jnp.minimum(distance, length - distance) / length
    else:
        u = jax.random.uniform(key, (*shape[:-2], 1 if pattern == "column" else shape[-2], shape[-1]), dtype)
    tiny = float(jnp.finfo(dtype).eps) / 2
    return jnp.clip(u, tiny, 1 - tiny)


def keep(score: jax.Array, temperature: float) -> jax.Array:
    """z of a score."""
    return jax.nn.sigmoid(score / temperature) if temperature else (score >= 0).astype(score.dtype)


def raised(score: jax.Array, visible: jax.Array) -> jax.Array:
    """`score`, raised in each row of visible keys so that its largest is at least 0."""
    best = jnp.max(jnp.where(visible, score, -jnp.inf), axis=-1, keepdims=True)
    return score + jnp.maximum(-best, 0)


def _rule(words: Any) -> Rule:
    words = tuple(words.split()) if isinstance(words, str) else tuple(words)
    known = (POSITIONS, PATTERNS, (*COMPENSATIONS, *DIVERGENCES))
    for word, among in zip(words, known, strict=False):
        if word not in among:
            raise ValueError(f"Dropout rule {' '.join(words)!r}: unknown word {word!r}, known are {', '.join(among)}.")
    if len(words) != len(known):
        raise ValueError(f"Dropout rule {' '.join(words)!r} needs three words: position, pattern, compensation.")
    return Rule(*words)


def _per_layer(position: str, value: Any, num_layers: int) -> jax.Array:
    if jnp.shape(value) not in ((), (num_layers,)):
        raise ValueError(
            f"Dropout rate at {position} has shape {jnp.shape(value)}: it must be a scalar, or ({num_layers},), one a "
            "layer."
        )
    return jnp.broadcast_to(jnp.asarray(value), (num_layers,))


def _score(rule: Rule, key: jax.Array, logit: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    u = uniform(key, rule.pattern, shape, logit.dtype)
    return jnp.log(u) - jnp.log1p(-u) - logit


def _divided(rule: Rule, y: jax.Array, by: jax.Array, logit: jax.Array) -> jax.Array:
    if rule.compensation == "none":
        return y
    return y / (held(by, logit) if rule.compensation == "stop_gradient_rescale" else by)


def _attention(rule: Rule, key: jax.Array, logit: jax.Array, temperature: float, visible: jax.Array, y: jax.Array):
    score = _score(rule, key, logit, y.shape)
    if rule.position == "attention_logits":
        score = raised(score, visible)
        if temperature:
            return y + jax.nn.log_sigmoid(score / temperature).astype(y.dtype)
        return jnp.where(score >= 0, y, float(jnp.finfo(y.dtype).min))
    # A key without weight, such as one that DropKey has dropped, is none that could be kept.
    score = raised(score, visible & (y > float(jnp.finfo(y.dtype).tiny)))
    y = y * keep(score, temperature).astype(y.dtype)
    total = y.sum(axis=-1, keepdims=True)
    if rule.compensation != "none":
        # A constant that cancels: without it the derivatives of a quotient overflow where next to nothing is left.
        scale = jax.lax.stop_gradient(jnp.where(total < 1e-3, total, 1))
        y, total = y / scale, total / scale
    return _divided(rule, y, total, logit)


def _features(rule: Rule, key: jax.Array, logit: jax.Array, temperature: float, y: jax.Array) -> jax.Array:
    y = y * keep(_score(rule, key, logit, y.shape), temperature).astype(y.dtype)
    return _divided(rule, y, (1 - jax.nn.sigmoid(logit)).astype(y.dtype), logit)

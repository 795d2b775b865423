r"""A low-rank edit of the features that a filter lets through, as a hook.

At a site with output h, `[..., d]`,

$$ y = h + a g\, ((c(h) \odot h)\, C)\, D, \qquad C \in R^{d \times q},\; D \in R^{q \times d}, $$

with a scale a and a gate g for each layer, and the filter c(h) one of

    cosine     clip(cos(h, t), 0, 1), a number a token; t the task vector, `[d]`
    sigmoid    sigmoid((<h, t> / sqrt(d) - tau) / T), likewise, with a threshold and a temperature
    channel    sigmoid((h U) V), a number a feature; U and V of rank q
    none       1: a second LoRA on the output side, which merges into the weights; a filter does not

`cosine` has no gradient where cos < 0, and is about 1/sqrt(d) for a random t: start from the data (`task_vectors`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from methods.models.hooks import Hook


class Filter(NamedTuple):
    """A way to say how much of a feature is let through.

    Attributes:
      relevance: `relevance(h, params, vector, scalars) -> c(h)` in [0, 1], `[..., 1]` or `[..., d]`, at one site of one
        layer. `params` and `scalars` are those of `Edit`; the vector is None for a filter without.
      vectors: whether it compares with a task vector.
      thresholds: whether it reads tau and log T.
      factors: whether it has matrices of its own, "u" `[d, q]` and "v" `[q, d]`.
    """

    relevance: Callable[[jax.Array, Any, Any, Any], jax.Array]
    vectors: bool = False
    thresholds: bool = False
    factors: bool = False


def _cosine(h: jax.Array, params: Any, t: jax.Array, scalars: Any) -> jax.Array:
    # A root that is smooth at h = 0, where the cosine is 0.
    norm = jnp.sqrt((h**2).sum(axis=-1, keepdims=True) * (t**2).sum() + jnp.finfo(h.dtype).eps)
    return jnp.clip((h @ t)[..., None] / norm, 0, 1)


def _sigmoid(h: jax.Array, params: Any, t: jax.Array, scalars: Any) -> jax.Array:
    scaled = (h @ t)[..., None] / h.shape[-1] ** 0.5 - scalars["tau"]
    return jax.nn.sigmoid(scaled / jnp.exp(scalars["log_temperature"]))


def _channel(h: jax.Array, params: Any, t: None, scalars: Any) -> jax.Array:
    return jax.nn.sigmoid((h @ params["u"]) @ params["v"])


def _none(h: jax.Array, params: Any, t: None, scalars: Any) -> jax.Array:
    return jnp.ones_like(h[..., :1])


FILTERS: dict[str, Filter] = {
    "cosine": Filter(_cosine, vectors=True),
    "sigmoid": Filter(_sigmoid, vectors=True, thresholds=True),
    "channel": Filter(_channel, factors=True),
    "none": Filter(_none),
}
"""By the name that the command line and an edit's folder know."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """The hook. Every leaf leads with the layer axis. It reads a linear's own output, so it comes before LoRA.

    Attributes:
      params: `{site: {"c": [L, d, q], "d": [L, q, d]}}`, for "channel" also "u" and "v" of the same shapes.
      vectors: `{site: [L, d]}`, t; empty for a filter without.
      scalars: `{"tau", "log_temperature", "log_scale", "gate"}`, each `[L]`.
      kind: of filter.
    """

    params: dict[str, dict[str, jax.Array]]
    vectors: dict[str, jax.Array]
    scalars: dict[str, jax.Array]
    kind: str = dataclasses.field(metadata={"static": True})

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """The edited output of one layer."""
        del x
        if site not in self.params:
            return y
        p, s = self.params[site], self.scalars
        h = y.astype(p["c"].dtype)
        edit = ((self.relevance(site, h) * h) @ p["c"]) @ p["d"]
        return y + (jnp.exp(s["log_scale"]) * s["gate"] * edit).astype(y.dtype)

    def relevance(self, site: str, h: jax.Array) -> jax.Array:
        """c(h) in [0, 1], `[..., 1]` or, by channel, `[..., d]`."""
        return FILTERS[self.kind].relevance(h, self.params[site], self.vectors.get(site), self.scalars)


def init(
    key: jax.Array, shapes: Mapping[str, int], num_layers: int, rank: int, kind: str
) -> dict[str, dict[str, jax.Array]]:
    """Fresh edits: C (and U, V) uniform in +-1/sqrt(d), D = 0.

    Args:
      key: a random key.
      shapes: `{site: d}`.
      num_layers: L.
      rank: q.
      kind: of filter.

    Raises:
      ValueError: for a rank below 1 or an unknown filter.
    """
    if rank < 1 or kind not in FILTERS:
        raise ValueError(
            f"An edit of rank {rank} with filter {kind!r}: the rank is >= 1, filters: {', '.join(FILTERS)}."
        )
    params = {}
    for index, (site, d) in enumerate(shapes.items()):
        keys = jax.random.split(jax.random.fold_in(key, index), 3)
        draw = lambda k, *shape, b=d**-0.5: jax.random.uniform(k, (num_layers, *shape), minval=-b, maxval=b)  # noqa: E731
        params[site] = {"c": draw(keys[0], d, rank), "d": jnp.zeros((num_layers, rank, d))}
        if FILTERS[kind].factors:
            params[site] |= {"u": draw(keys[1], d, rank), "v": draw(keys[2], rank, d)}
    return params


def scalars(num_layers: int) -> dict[str, jax.Array]:
    """The start values of tau (0), log T (0) and log a (0), `[L]` each."""
    return dict.fromkeys(("tau", "log_temperature", "log_scale"), jnp.zeros(num_layers))


def task_vectors(
    output: Callable[[Hook], jax.Array], weights: jax.Array, shapes: Mapping[str, int], num_layers: int
) -> dict[str, jax.Array]:
    """t from data: at each site and layer the sum over tokens of `weights` times the site's output, to length 1.

    Args:
      output: `output(adapt)`, what the model computes from a batch with this hook; it must depend on every site.
      weights: `[B, T]`; 1/n at the tokens of one class and -1/m at those of another make a difference of means.
      shapes: `{site: d}`.
      num_layers: L.

    Returns:
      `{site: [L, d]}`.
    """
    probes = {site: jnp.zeros((num_layers, d)) for site, d in shapes.items()}

    def read(probes):
        everywhere = jnp.broadcast_to(weights, (num_layers, *weights.shape))
        return output(jax.tree_util.Partial(_probe, probes, everywhere)).sum()

    sums = jax.grad(read)(probes)
    return jax.tree.map(lambda t: t / jnp.linalg.norm(t, axis=-1, keepdims=True), sums)


def _probe(probes: dict[str, jax.Array], weights: jax.Array, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return _read(probes[site], weights, y) if site in probes else y


@jax.custom_vjp
def _read(probe: jax.Array, weights: jax.Array, y: jax.Array) -> jax.Array:
    """y; the "derivative" in `probe` is the weighted sum of y: a way out of a scanned model that returns no more."""
    del probe, weights
    return y


def _read_forward(probe: jax.Array, weights: jax.Array, y: jax.Array):
    # In the precision of the weights: rounded to fewer bits, 1/n and -1/m would no longer add up to 0.
    return y, (jnp.einsum("bt,btd->d", weights, y.astype(weights.dtype)).astype(probe.dtype), weights)


_read.defvjp(_read_forward, lambda kept, cotangent: (kept[0], jnp.zeros_like(kept[1]), cotangent))

r"""What the models are built from: norms, linears, attention, look-ups, the scan over the layers.

Written for training that is itself differentiated: everything is smooth enough for third derivatives in both modes
(but for ReLU). Attention is an einsum and a softmax in the weights' precision, at least float32: the fused kernels
stop at first order and compute the softmax in float32 even in float64.
"""

import operator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel.extend import across, gathered, on_a_mesh, split_rows
from methods.models import hooks

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of `ACTIVATIONS`."""


def check_activation(name: str) -> None:
    """Raises ValueError unless `name` is a key of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose from {', '.join(ACTIVATIONS)}.")


def check_head(headless: bool) -> None:
    """Raises ValueError for logits of a model without a head."""
    if headless:
        raise ValueError(
            "this model has no language-model head (its checkpoint is of a base model or a classifier): it has no "
            'logits; use method="hidden" or "features".'
        )


def hf_activation(name: str) -> str:
    """The key of `ACTIVATIONS` behind transformers' name. Raises ValueError."""
    if name not in HF_ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported: {', '.join(HF_ACTIVATIONS)} are.")
    return HF_ACTIVATIONS[name]


class Precision(NamedTuple):
    """weights: the dtype that products are computed in. stream: that of their results, and of everything between."""

    weights: Any
    stream: Any


class Context(NamedTuple):
    """What all layers share, with T tokens that look at S slots: S = T without a cache.

    counts: bool [B or 1, S], the slots that hold a token that counts. turns: per kind of layer, cos and sin of the
    rotary angles [kinds, B, T, head_dim/2]; None without. bias: [1, H, T, S], added to the attention logits; None
    without. start: int32, the slot of the first of the T tokens, each of which sees what counts up to its own slot;
    None where all see all that counts.
    """

    counts: jax.Array
    turns: tuple[jax.Array, jax.Array] | None = None
    bias: jax.Array | None = None
    start: jax.Array | None = None

    def allowed(self, queries: jax.Array, window: jax.Array | None) -> jax.Array:
        """Who sees whom, bool [B or 1, 1, q, S], of those of the T tokens that `queries` int32 [q] numbers.

        window: how many slots up to its own a token sees, 0 for all; None for all.
        """
        seen = self.counts[:, None, None, :]
        if self.start is None:
            return jnp.broadcast_to(seen, (len(seen), 1, len(queries), seen.shape[-1]))
        slot = jnp.arange(seen.shape[-1], dtype=jnp.int32)[None, :]
        query = (self.start + queries)[:, None]
        seen = seen & (slot <= query)[None, None]
        if window is None:
            return seen
        return seen & (query - slot < jnp.where(window > 0, window, slot.shape[1]))[None, None]


def at_least_float32(dtype: Any) -> Any:
    """`dtype`, or float32 if it has fewer bits."""
    # promote_types refuses under strict promotion
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def product(spec: str, a: jax.Array, b: jax.Array, precision: Precision) -> jax.Array:
    """`einsum(spec, a, b)`, from factors of `precision.weights` to a result of `precision.stream`."""
    a, b = jnp.asarray(a, precision.weights), jnp.asarray(b, precision.weights)
    return jnp.einsum(spec, a, b, preferred_element_type=precision.stream)


def weighed(spec: str, x: jax.Array, weights: jax.Array, precision: Precision) -> jax.Array:
    """`product` with frozen or trained weights, which on a mesh may be split."""
    return gathered(lambda x, weights: product(spec, x, weights, precision), x, weights)


LONGEST_SUM = 384
"""Inputs of a linear that are summed at once in float32, see `linear`."""


def linear(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """x [B, T, in] times kernel [in, out].

    On a mesh the weights are gathered for as long as the product takes, and each device multiplies its own rows.

    In float32 on one CPU device the inputs are summed in parts of at most `LONGEST_SUM` and the parts pairwise. The
    products of XLA on CPU round 1.6 times as coarsely as torch's, which adds up to 1.4e-4 in SmolLM2's logits; in parts
    it is 9e-5, for 5 to 8 % of a training step's time. An accelerator would take a part's product for each whole one.
    """
    if on_a_mesh():
        return weighed("bti,io->bto", x, kernel, precision)
    size = x.shape[-1]
    in_parts = jnp.dtype(precision.weights) == jnp.float32 and jax.default_backend() == "cpu"
    count = max(-(-size // LONGEST_SUM), 1) if in_parts else 1
    ends = [size * part // count for part in range(count + 1)]
    sums = [product("bti,io->bto", x[..., start:end], kernel[start:end], precision) for start, end in pairwise(ends)]
    while len(sums) > 1:
        sums = [*map(operator.add, sums[::2], sums[1::2]), *sums[len(sums) // 2 * 2 :]]
    return sums[0]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w over the last axis, (1 + w) with `offset`; in at least float32."""

    eps: float
    offset: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        z = x.astype(at_least_float32(x.dtype))
        z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + self.eps)
        weight = _row(scale, z)
        return (z * (1 + weight if self.offset else weight)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b over the last axis; in at least float32."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        z = x.astype(at_least_float32(x.dtype))
        z = z - jnp.mean(z, axis=-1, keepdims=True)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + self.eps)
        return (z * _row(scale, z) + _row(bias, z)).astype(x.dtype)


def _row(weight: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.asarray(weight, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


class Linear(nn.Module):
    """x W (+ b), with the hook before it and after. The module's name is the site."""

    features: int
    use_bias: bool
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array, adapt: hooks.Hook) -> jax.Array:
        dtype, shape = self.precision.weights, (x.shape[-1], self.features)
        x = hooks.call(adapt, f"{self.name}.input", x, x)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, dtype)
        y = linear(x, kernel, self.precision)
        if self.use_bias:
            y = y + _row(self.param("bias", nn.initializers.zeros, (self.features,), dtype), y)
        return hooks.call(adapt, str(self.name), x, y)


LONGEST_MAP = 512
"""Queries whose attention maps are held at once, see `attend`."""


class _Attention(NamedTuple):
    """What attention is computed from, but for the queries: see `attend`."""

    k: jax.Array
    v: jax.Array
    adapt: hooks.Hook
    context: Context
    window: jax.Array | None

    def logits(self, q: jax.Array, queries: jax.Array, precision: Precision, scale: float, cap: float) -> jax.Array:
        """[B, H, q, S], of the tokens that `queries` int32 [q] numbers."""
        (batch, length, heads, size), (slots, groups) = q.shape, self.k.shape[1:3]
        # query heads that share a key head are neighbours
        q = q.reshape(batch, length, groups, heads // groups, size)
        wide = at_least_float32(precision.stream)
        logits = product("btkgh,bskh->bkgts", q, self.k, Precision(precision.weights, wide)) * scale
        logits = logits.reshape(batch, heads, length, slots)
        if cap:
            logits = cap * jnp.tanh(logits / cap)
        if self.context.bias is None:
            return logits
        return logits + jnp.take(self.context.bias, queries, axis=2, mode="clip").astype(wide)

    def __call__(self, q: jax.Array, queries: jax.Array, precision: Precision, scale: float, cap: float) -> jax.Array:
        """The heads side by side, [B, q, H * head_dim]."""
        logits, allowed = self.logits(q, queries, precision, scale, cap), self.context.allowed(queries, self.window)
        logits = hooks.call(self.adapt, "attention_logits", allowed, logits)
        # Finite, and lower than anything a hook returns: a row without any key (padding) is even rather than
        # NaN, and a row whose keys a hook has dropped attends to those, never to the future.
        lowest = float(jnp.finfo(logits.dtype).min)
        logits = jnp.where(allowed, jnp.maximum(logits, lowest / 2), lowest)
        weights = hooks.call(self.adapt, "attention_weights", allowed, jax.nn.softmax(logits, axis=-1))
        (batch, heads, length, slots), groups = weights.shape, self.k.shape[2]
        weights = weights.reshape(batch, groups, heads // groups, length, slots)
        return product("bkgts,bskh->btkgh", weights, self.v, precision).reshape(batch, length, -1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    x: jax.Array,
    adapt: hooks.Hook,
    context: Context,
    precision: Precision,
    *,
    scale: float,
    cap: float = 0.0,
    window: jax.Array | None = None,
) -> jax.Array:
    """softmax(cap(scale q k) + bias, over who may be seen) v, heads side by side: [B, T, H * head_dim].

    q [B, T, H, head_dim]; k and v [B, S, G, head_dim], each shared by H/G query heads. x: what hooks at
    "attention_hidden" are given. cap: the logits become cap * tanh(logits / cap); 0 for none. window: how many slots
    up to its own a token sees, 0 for all.

    The maps of more than `LONGEST_MAP` queries are not held at once, unless a hook acts on them: a block of the queries
    attends after the other, and is computed anew in the backward pass. Memory is then linear in T, and all of it can
    still be differentiated to any order in both modes, which fused kernels cannot.
    """
    settings = precision, scale, cap
    part = _Attention(k, v, adapt, context, window)
    queries = jnp.arange(q.shape[1], dtype=jnp.int32)
    if q.shape[1] <= LONGEST_MAP or _maps_are_read(part, q, queries, *settings):
        hidden = part(q, queries, *settings)
    else:
        hidden = _in_blocks(part, q, *settings)
    return hooks.call(adapt, "attention_hidden", x, hidden)


def _maps_are_read(part: _Attention, q: jax.Array, queries: jax.Array, *settings: Any) -> bool:
    logits = jax.eval_shape(lambda part, q: part.logits(q, queries, *settings), part, q)
    allowed = jax.eval_shape(lambda part: part.context.allowed(queries, part.window), part)
    sites = ("attention_logits", "attention_weights")
    return any(hooks.acts(part.adapt, site, allowed, logits) for site in sites)


def _in_blocks(part: _Attention, q: jax.Array, *settings: Any) -> jax.Array:
    """`part(q, all queries)`, half of `LONGEST_MAP` queries at a time. The last block is filled with queries of 0."""
    batch, length, *head = q.shape
    count = -(-length // (LONGEST_MAP // 2))
    size = -(-length // count)
    filled = jnp.pad(q, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    blocks = filled.reshape(batch, count, size, *head).swapaxes(0, 1)
    numbers = jnp.arange(count * size, dtype=jnp.int32).reshape(count, size)

    @partial(jax.checkpoint, prevent_cse=False)
    def attended(part: _Attention, q: jax.Array, queries: jax.Array) -> jax.Array:
        return part(q, queries, *settings)

    _, hidden = jax.lax.scan(lambda _, block: (None, attended(part, *block)), None, (blocks, numbers))
    return hidden.swapaxes(0, 1).reshape(batch, count * size, -1)[:, :length]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, heads, head_dim], its pairs (i, i + head_dim/2) turned by angles [B, T, heads or 1, head_dim/2]."""
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
    """table[index]; NaN where there is no such row, never another row."""
    table = jnp.asarray(table)
    found = across(table).at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return split_rows(found) if index.ndim > 1 else found


def check_input(tokens: jax.Array, mask: jax.Array | None, max_positions: int) -> None:
    """Raises ValueError on tokens that are not integers [B, T], too many of them, or a mask that is not bool [B, T]."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [batch, length], not {tokens.dtype}{list(tokens.shape)}.")
    length = tokens.shape[1]
    if length > max_positions:
        raise ValueError(
            f"the sequence has {length} tokens but the model was made for {max_positions} positions: "
            "truncate it, or raise max_positions in the config if you mean to extrapolate."
        )
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != jnp.bool_):
        raise ValueError(
            f"mask must be bool{list(tokens.shape)} like the tokens, not {mask.dtype}{list(mask.shape)}: "
            "give attention_mask.astype(bool)."
        )


def count_positions(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    """int32 [B, T]: the number of tokens that count before this one."""
    if mask is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def stack(block: type[nn.Module], length: int, remat: bool) -> Any:
    """`length` blocks in one scan: called with ((x, below), adapt, window, cache, context), it gives ((x, below),
    cache), x being the stream and `below` what the feed-forward branch of the block below started from; None where no
    hook reads it (`hooks.carries`).

    Weights, adapt, windows and cache lead with the layer axis; the context is every layer's. `remat` recomputes each
    block in the backward pass, and so keeps one residual stream a layer instead of every intermediate; results do
    not depend on it.
    """
    return nn.scan(
        nn.remat(block, prevent_cse=False) if remat else block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType] (flax says int)
        length=length,
    )


def rotary_turns(positions: jax.Array, frequencies: Any, scale: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`scale` times cos and sin of position * frequency, [kinds, B, T, head_dim/2]; frequencies [kinds, head_dim/2]."""
    frequencies = jnp.asarray(frequencies, dtype)[:, None, None, :]
    angles = positions[None, :, :, None].astype(dtype) * frequencies
    if scale == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return scale * jnp.cos(angles), scale * jnp.sin(angles)

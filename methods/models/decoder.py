r"""The Llama family of decoders in flax linen: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 1.

One block, with N the RMS norm, :math:`N(x) = x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot w`:

    x <- x + W_o attention(W_q N(x), W_k N(x), W_v N(x))
    x <- x + W_down (act(W_gate N(x)) * W_up N(x))

with rotary positions on q and k, grouped key/value heads, and causal attention, within a window where the
layer has one.
Written for training that is itself differentiated: the layers are stacked and scanned, each rematerialised,
and everything is smooth enough for third derivatives in both modes. Attention is an einsum and a softmax in
the weights' precision, at
least float32: the fused kernels stop at first order and compute the softmax in float32 even in float64.

Llama: https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783. Rotary positions:
https://arxiv.org/abs/2104.09864. Grouped heads: https://arxiv.org/abs/2305.13245. QK norm (Qwen3):
https://arxiv.org/abs/2505.09388.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from methods.models import hooks

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What distinguishes one decoder from another. Hashable.

    Raises ValueError if the numbers contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    norm_offset: bool = False
    """Norms multiply by 1 + w instead of w (Gemma)."""
    activation: str = "silu"
    """A key of `ACTIVATIONS`."""
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] = ()
    """What each of the head_dim / 2 rotary frequencies is divided by, for longer contexts; () for none."""
    windows: tuple[int, ...] = ()
    """For each layer, how many tokens up to its own a token sees, 0 for all; () if no layer has a window."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norms over head_dim on q and k, before the rotary positions (Qwen3)."""
    tied: bool = True
    """The head is the embedding."""
    embed_scale: float = 1.0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs.")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise ValueError(f"rope_factors has {len(self.rope_factors)} entries, not head_dim/2={self.head_dim // 2}.")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows has {len(self.windows)} entries, not one per layer ({self.num_layers}).")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}.")

    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear at each of `hooks.LINEAR_SITES`; kernels are [num_layers, in, out]."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "gate_proj": (d, f),
            "up_proj": (d, f),
            "down_proj": (f, d),
        }


def _at_least_float32(dtype: Any) -> Any:
    # promote_types refuses under strict promotion
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w over the last axis, (1 + w) with `offset`; in at least float32."""

    eps: float
    offset: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        z = x.astype(_at_least_float32(x.dtype))
        z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + self.eps)
        weight = scale.astype(z.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (z * (1 + weight if self.offset else weight)).astype(x.dtype)


class Linear(nn.Module):
    """x W (+ b), then the hook. The module's name is the site."""

    features: int
    use_bias: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, adapt: hooks.Hook) -> jax.Array:
        shape = (x.shape[-1], self.features)
        y = jnp.einsum("bti,io->bto", x, self.param("kernel", nn.initializers.normal(0.02), shape, self.param_dtype))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)[None, None, :]
        return hooks.call(adapt, str(self.name), x, y)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, heads, head_dim] with its pairs (i, i + head_dim/2) turned by angles [B, T, head_dim/2]."""
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention and feed-forward branch, each added to the residual stream [B, T, D]."""

    config: DecoderConfig
    param_dtype: Any

    def _linear(self, name: str, use_bias: bool, x: jax.Array, adapt: hooks.Hook) -> jax.Array:
        features = self.config.site_shapes()[name][1]
        return Linear(features, use_bias, self.param_dtype, name=name)(x, adapt)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, self.param_dtype, name=name)(x)

    def _attention(self, x, adapt, window, allowed, angles):
        c = self.config
        batch, length, _ = x.shape
        heads = (
            batch,
            length,
            c.num_kv_heads,
            -1,
            c.head_dim,
        )  # query heads that share a key head are neighbours
        q = self._linear("q_proj", c.qkv_bias, x, adapt).reshape(batch, length, c.num_heads, c.head_dim)
        k = self._linear("k_proj", c.qkv_bias, x, adapt).reshape(batch, length, c.num_kv_heads, c.head_dim)
        v = self._linear("v_proj", c.qkv_bias, x, adapt).reshape(batch, length, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        q, k = rotate(q, *angles).reshape(heads), rotate(k, *angles)

        wide = _at_least_float32(x.dtype)
        logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=wide) / math.sqrt(c.head_dim)
        logits = logits.reshape(batch, c.num_heads, length, length)
        if window is not None:
            index = jnp.arange(length, dtype=jnp.int32)
            near = index[:, None] - index[None, :] < jnp.where(window > 0, window, length)
            allowed = allowed & near[None, None]
        logits = hooks.call(adapt, "attention_logits", allowed, logits)
        # Finite, and lower than anything a hook returns: a row without any key (padding) is even rather than
        # NaN, and a row whose keys a hook has dropped attends to those, never to the future.
        lowest = float(jnp.finfo(wide).min)
        logits = jnp.where(allowed, jnp.maximum(logits, lowest / 2), lowest)
        weights = hooks.call(adapt, "attention_weights", allowed, jax.nn.softmax(logits, axis=-1))
        weights = weights.astype(v.dtype).reshape(batch, c.num_kv_heads, -1, length, length)
        hidden = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, c.num_heads * c.head_dim)
        hidden = hooks.call(adapt, "attention_hidden", x, hidden)
        return self._linear("o_proj", c.o_bias, hidden, adapt)

    def _feed_forward(self, x, adapt):
        c = self.config
        gate = self._linear("gate_proj", c.mlp_bias, x, adapt)
        up = self._linear("up_proj", c.mlp_bias, x, adapt)
        hidden = hooks.call(adapt, "ffn_hidden", x, ACTIVATIONS[c.activation](gate) * up)
        return self._linear("down_proj", c.mlp_bias, hidden, adapt)

    @nn.compact
    def __call__(self, x, adapt, window, allowed, angles):
        start = x
        branch = self._attention(self._norm("attention_norm", x), adapt, window, allowed, angles)
        x = x + hooks.call(adapt, "residual_attention", x, branch)
        branch = self._feed_forward(self._norm("ffn_norm", x), adapt)
        x = x + hooks.call(adapt, "residual_ffn", x, branch)
        return hooks.call(adapt, "block_hidden", start, x), None


class Decoder(nn.Module):
    """A causal language model: tokens [B, T] -> logits [B, T, V].

    `model.apply({"params": weights}, tokens, mask, adapt)`; the weights' dtype is the dtype of everything but
    the norms, the angles and the softmax, which are at least float32. `remat` recomputes each block in the
    backward pass, and so keeps one residual stream per layer instead of every intermediate; results do not
    depend on it.
    """

    config: DecoderConfig
    remat: bool = True
    param_dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embed = self.param("embed", init, (c.vocab_size, c.hidden_size), self.param_dtype)
        if not c.tied:
            self.head_kernel = self.param("head", init, (c.vocab_size, c.hidden_size), self.param_dtype)
        self.blocks = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] (flax says int)
            length=c.num_layers,
        )(c, self.param_dtype)
        self.norm = RMSNorm(c.norm_eps, c.norm_offset, self.param_dtype)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        adapt: hooks.Hook = hooks.identity,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V]: `head(hidden(...))`."""
        return self.head(self.hidden(tokens, mask, adapt, positions))

    def hidden(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        adapt: hooks.Hook = hooks.identity,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states [B, T, D], after the last norm: `model.apply(..., method="hidden")`.

        tokens: integers [B, T]. One outside the vocabulary makes its sequence NaN, not another token's.
        mask: bool [B, T], True at tokens that count; padding may be on either side. What comes out at padding
        means nothing. None: all count.
        adapt: the hook, see `methods.models.hooks`.
        positions: int32 [B, T]; by default the number of tokens that count before this one.

        Raises ValueError on tokens that are not integers [B, T], a mask of another shape or dtype, a sequence
        longer than `config.max_positions`, and a hook without the layer axis.
        """
        c = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [batch, length], not {tokens.dtype}{list(tokens.shape)}.")
        batch, length = tokens.shape
        if length > c.max_positions:
            raise ValueError(
                f"the sequence has {length} tokens but the model was made for {c.max_positions} positions: "
                "truncate it, or raise max_positions in the config if you mean to extrapolate."
            )
        if mask is not None and (mask.shape != tokens.shape or mask.dtype != jnp.bool_):
            raise ValueError(
                f"mask must be bool{list(tokens.shape)} like the tokens, not {mask.dtype}{list(mask.shape)}: "
                "give attention_mask.astype(bool)."
            )
        hooks.check(adapt, c.num_layers)

        x = jnp.asarray(self.embed).at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        index = jnp.arange(length, dtype=jnp.int32)
        allowed = (index[None, :] <= index[:, None])[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None, :]
        if positions is None:
            if mask is None:
                positions = jnp.broadcast_to(index[None, :], (batch, length))
            else:
                positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        windows = jnp.asarray(c.windows, jnp.int32) if c.windows else None
        x, _ = self.blocks(x, adapt, windows, allowed, self._angles(positions))
        return self.norm(x)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of final hidden states [..., D], for instance only those of the answer's positions.

        The head costs a fifth of the FLOPs of a small model: `model.apply(variables, hidden, method="head")`.
        """
        return jnp.einsum("...d,vd->...v", hidden, self.embed if self.config.tied else self.head_kernel)

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin of position * theta^(-2i/head_dim) / factor_i, [B, T, head_dim/2]."""
        c = self.config
        dtype = _at_least_float32(self.embed.dtype)
        frequencies = c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        if c.rope_factors:
            frequencies = frequencies / np.asarray(c.rope_factors)
        angles = positions[:, :, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None, :]
        return jnp.cos(angles), jnp.sin(angles)

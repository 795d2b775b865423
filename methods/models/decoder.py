r"""The Llama family of decoders in flax linen: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 1, 2 and 3.

One block, with N the RMS norm, $N(x) = x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot w$:

    x <- x + W_o attention(W_q N(x), W_k N(x), W_v N(x))
    x <- x + W_down (act(W_gate N(x)) * W_up N(x))

with rotary positions on q and k, grouped key/value heads, and causal attention, within a window where the
layer has one. Gemma 2 and 3 put one more norm behind each branch; Gemma 2 caps logits softly, l <- c tanh(l / c).

Llama: https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783. Rotary positions:
https://arxiv.org/abs/2104.09864. Grouped heads: https://arxiv.org/abs/2305.13245. QK norm (Qwen3):
https://arxiv.org/abs/2505.09388. Gemma 2 and 3: https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from methods.models import hooks
from methods.models.cache import remember
from methods.models.causal import Causal
from methods.models.layers import (
    ACTIVATIONS,
    Linear,
    Precision,
    RMSNorm,
    at_least_float32,
    attend,
    check_activation,
    check_head,
    lookup,
    product,
    rotary_turns,
    rotate,
    stack,
)


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
    branch_norms: bool = False
    """One more norm on what each branch gives (Gemma 2 and 3)."""
    activation: str = "silu"
    """A key of `ACTIVATIONS`."""
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] = ()
    """What each of the head_dim / 2 rotary frequencies is divided by, for longer contexts; () for none."""
    rope_scale: float = 1.0
    """Factor of q and k after the rotary positions (YaRN)."""
    local_rope_theta: float = 0.0
    """The theta of layers that have a window, without `rope_factors` (Gemma 3); 0 for the same as all."""
    windows: tuple[int, ...] = ()
    """For each layer, how many tokens up to its own a token sees, 0 for all; () if no layer has a window."""
    query_scalar: float = 0.0
    """Attention logits are q k / sqrt(query_scalar); 0 for head_dim."""
    attention_cap: float = 0.0
    """Soft cap on attention logits, before the mask; 0 for none."""
    logit_cap: float = 0.0
    """Soft cap on the model's logits; 0 for none."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norms over head_dim on q and k, before the rotary positions (Qwen3, Gemma 3)."""
    tied: bool = True
    """The head is the embedding."""
    headless: bool = False
    """There is no head (a base model or a classifier): no logits, only hidden states."""
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
        check_activation(self.activation)

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


class Block(nn.Module):
    """One layer: attention and feed-forward branch, each added to the residual stream [B, T, D]."""

    config: DecoderConfig
    precision: Precision

    def _linear(self, name: str, use_bias: bool, x: jax.Array, adapt: hooks.Hook) -> jax.Array:
        features = self.config.site_shapes()[name][1]
        return Linear(features, use_bias, self.precision, name=name)(x, adapt)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, self.precision.weights, name=name)(x)

    def _attention(self, x, adapt, window, cache, context):
        c = self.config
        q = self._linear("q_proj", c.qkv_bias, x, adapt).reshape(*x.shape[:2], c.num_heads, c.head_dim)
        k = self._linear("k_proj", c.qkv_bias, x, adapt).reshape(*x.shape[:2], c.num_kv_heads, c.head_dim)
        v = self._linear("v_proj", c.qkv_bias, x, adapt).reshape(*x.shape[:2], c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        turns = [jnp.where(window > 0, turn[1], turn[0]) if len(turn) > 1 else turn[0] for turn in context.turns]
        turns = [turn[:, :, None, :] for turn in turns]
        q, k = rotate(q, *turns), rotate(k, *turns)
        (k, v), cache = remember(cache, k, v, context.start)
        scale = 1 / math.sqrt(c.query_scalar or c.head_dim)
        options = {"scale": scale, "cap": c.attention_cap, "window": window}
        hidden = attend(q, k, v, x, adapt, context, self.precision, **options)
        return self._linear("o_proj", c.o_bias, hidden, adapt), cache

    def _feed_forward(self, x, adapt):
        c = self.config
        gate = self._linear("gate_proj", c.mlp_bias, x, adapt)
        up = self._linear("up_proj", c.mlp_bias, x, adapt)
        hidden = hooks.call(adapt, "ffn_hidden", x, ACTIVATIONS[c.activation](gate) * up)
        return self._linear("down_proj", c.mlp_bias, hidden, adapt)

    @nn.compact
    def __call__(self, carry, adapt, window, cache, context):
        start, below = carry
        branch, cache = self._attention(self._norm("attention_norm", start), adapt, window, cache, context)
        if self.config.branch_norms:
            branch = self._norm("attention_out_norm", branch)
        middle = start + hooks.call(adapt, "residual_attention", start, branch)
        middle = middle if below is None else hooks.call(adapt, "ffn_input", below, middle)
        branch = self._feed_forward(self._norm("ffn_norm", middle), adapt)
        if self.config.branch_norms:
            branch = self._norm("ffn_out_norm", branch)
        x = middle + hooks.call(adapt, "residual_ffn", middle, branch)
        return (hooks.call(adapt, "block_hidden", start, x), None if below is None else middle), cache


class Decoder(Causal):
    """A causal language model: tokens [B, T] -> logits [B, T, V]. See `Causal` for its methods."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embed = self.param("embed", init, (c.vocab_size, c.hidden_size), self.param_dtype)
        if not c.tied and not c.headless:
            self.head_kernel = self.param("head", init, (c.vocab_size, c.hidden_size), self.param_dtype)
        precision = self.precision()
        self.blocks = stack(Block, c.num_layers, self.remat)(c, precision)
        self.norm = RMSNorm(c.norm_eps, c.norm_offset, precision.weights)

    def precision(self) -> Precision:
        dtype = jnp.asarray(self.embed).dtype
        return Precision(dtype, self.accumulate or dtype)

    def embedded(self, tokens, positions):
        x = lookup(self.embed, tokens).astype(self.precision().stream)
        scale = self.config.embed_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def finished(self, x):
        return self.norm(x)

    def head(self, hidden):
        check_head(self.config.headless)
        kernel = self.embed if self.config.tied else self.head_kernel
        logits = product("...d,vd->...v", hidden, kernel, self.precision())
        cap = self.config.logit_cap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def turns(self, positions):
        """Of angles position * theta^(-2i/head_dim) / factor_i; a second kind for layers with a window."""
        c = self.config
        exponents = -(np.arange(0, c.head_dim, 2) / c.head_dim)
        kinds = [c.rope_theta**exponents / np.asarray(c.rope_factors or 1.0)]
        if c.local_rope_theta:
            kinds.append(c.local_rope_theta**exponents)
        return rotary_turns(positions, np.stack(kinds), c.rope_scale, at_least_float32(self.embed.dtype))

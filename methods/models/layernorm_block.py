r"""The block of GPT-2, OPT, BERT, RoBERTa and MPNet: LayerNorms, one head size, a feed-forward layer of two matrices.

With N the layer norm and the norms in front of the branches (GPT-2, OPT) or behind them (BERT and its kin):

    x <- x + attention(N(x))            x <- N(x + attention(x))
    x <- x + W_down act(W_up N(x))      x <- N(x + W_down act(W_up x))
"""

import dataclasses

import flax.linen as nn
import jax

from methods.models import hooks
from methods.models.cache import remember
from methods.models.layers import ACTIVATIONS, LayerNorm, Linear, Precision, attend, check_activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    """What such models have in common. Hashable. Raises ValueError if the numbers contradict each other.

    max_positions: the longest sequence. position_offset: rows of the table of positions before the first that is used.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    position_offset: int = 0
    norm_eps: float = 1e-5
    activation: str = "gelu"
    """A key of `ACTIVATIONS`."""
    norm_first: bool = False
    """The norms are in front of the branches."""
    bias: bool = True
    """The linears have one."""

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}.")
        if self.max_positions < 1:
            raise ValueError(f"max_positions={self.max_positions} must be at least 1.")
        check_activation(self.activation)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear at each site, in the order of `hooks.LINEAR_SITES`; there is no gate_proj."""
        d, f = self.hidden_size, self.intermediate_size
        return dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (d, d)) | {
            "up_proj": (d, f),
            "down_proj": (f, d),
        }


class LayerNormBlock(nn.Module):
    """One layer on the residual stream [B, T, D]."""

    config: LayerNormConfig
    precision: Precision

    def _linear(self, name: str, x: jax.Array, adapt: hooks.Hook) -> jax.Array:
        return Linear(self.config.site_shapes()[name][1], self.config.bias, self.precision, name=name)(x, adapt)

    def _attention(self, x, adapt, cache, context):
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = (self._linear(name, x, adapt).reshape(heads) for name in ("q_proj", "k_proj", "v_proj"))
        (k, v), cache = remember(cache, k, v, context.start)
        scale = self.config.head_dim**-0.5
        return self._linear("o_proj", attend(q, k, v, x, adapt, context, self.precision, scale=scale), adapt), cache

    def _feed_forward(self, x, adapt):
        hidden = ACTIVATIONS[self.config.activation](self._linear("up_proj", x, adapt))
        return self._linear("down_proj", hooks.call(adapt, "ffn_hidden", x, hidden), adapt)

    @nn.compact
    def __call__(self, carry, adapt, window, cache, context):
        del window
        (start, below), first = carry, self.config.norm_first
        attention_norm, ffn_norm = (
            LayerNorm(self.config.norm_eps, self.precision.weights, name=name)
            for name in ("attention_norm", "ffn_norm")
        )
        branch, cache = self._attention(attention_norm(start) if first else start, adapt, cache, context)
        middle = start + hooks.call(adapt, "residual_attention", start, branch)
        middle = middle if first else attention_norm(middle)
        middle = middle if below is None else hooks.call(adapt, "ffn_input", below, middle)
        branch = self._feed_forward(ffn_norm(middle) if first else middle, adapt)
        x = middle + hooks.call(adapt, "residual_ffn", middle, branch)
        x = x if first else ffn_norm(x)
        return (hooks.call(adapt, "block_hidden", start, x), None if below is None else middle), cache

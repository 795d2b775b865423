r"""BERT, RoBERTa and MPNet in flax linen: every token sees every other.

The stream starts as N(token + position (+ token type)), N the layer norm; the blocks are those of
`methods.models.layernorm_block`, the norms behind the branches. MPNet adds to the attention logits of head h a learned
bias b_h(j - i) of query i and key j, one for each bucket of distances, the same in all layers.

BERT: https://arxiv.org/abs/1810.04805. RoBERTa: https://arxiv.org/abs/1907.11692. MPNet:
https://arxiv.org/abs/2004.09297. Buckets of distances (T5): https://arxiv.org/abs/1910.10683.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from methods.models import hooks
from methods.models.layernorm_block import LayerNormBlock, LayerNormConfig
from methods.models.layers import Context, LayerNorm, Precision, check_input, count_positions, lookup, stack, weighed


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(LayerNormConfig):
    """What distinguishes one encoder from another."""

    norm_eps: float = 1e-12
    token_types: int = 0
    """Rows of the table of token types; 0 for none (MPNet)."""
    relative_buckets: int = 0
    """Rows of the table of relative position biases; 0 for none."""
    pooler: bool = False
    """A linear and a tanh on the first token, pretrained, in front of a classification head (BERT)."""


class Encoder(nn.Module):
    """An encoder: tokens [B, T] -> hidden states [B, T, D].

    `model.apply({"params": weights}, tokens, mask, adapt)`; dtypes and `remat` as in `methods.models.causal.Causal`.
    """

    config: EncoderConfig
    remat: bool = True
    param_dtype: Any = jnp.float32
    accumulate: Any = None

    def setup(self):
        c, init = self.config, nn.initializers.normal(0.02)

        def table(name: str, rows: int, columns: int) -> jax.Array:
            return self.param(name, init, (rows, columns), self.param_dtype)

        self.embed = table("embed", c.vocab_size, c.hidden_size)
        self.positions = table("positions", c.position_offset + c.max_positions, c.hidden_size)
        if c.token_types:
            self.types = table("types", c.token_types, c.hidden_size)
        if c.relative_buckets:
            self.relative = table("relative", c.relative_buckets, c.num_heads)
        precision = self.precision()
        self.embed_norm = LayerNorm(c.norm_eps, precision.weights)
        self.blocks = stack(LayerNormBlock, c.num_layers, self.remat)(c, precision)
        if c.pooler:
            self.pooler_kernel = table("pooler_kernel", c.hidden_size, c.hidden_size)
            self.pooler_bias = self.param("pooler_bias", nn.initializers.zeros, (c.hidden_size,), self.param_dtype)

    def precision(self) -> Precision:
        """The dtypes of this call: those of the weights it was given."""
        dtype = jnp.asarray(self.embed).dtype
        return Precision(dtype, self.accumulate or dtype)

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        """`features`, with every weight in use."""
        return self.features(*args, **options)

    def hidden(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        adapt: hooks.Hook = hooks.identity,
        positions: jax.Array | None = None,
        token_types: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] after the last block: `model.apply(..., method="hidden")`.

        tokens, mask, adapt, positions: as for `Causal.hidden`; relative positions are those in the array.
        token_types: integers [B, T], such as 1 in the second of two sentences; None: all 0. Like tokens, one that the
        model does not have makes its sequence NaN.

        Raises ValueError as `Causal.hidden`, on token types of another shape than the tokens, and if the model has
        none.
        """
        c, stream = self.config, self.precision().stream
        check_input(tokens, mask, c.max_positions)
        hooks.check(adapt, c.num_layers)
        if token_types is not None and (token_types.shape != tokens.shape or not c.token_types):
            raise ValueError(
                f"token_types of shape {tuple(token_types.shape)} were given for tokens {tuple(tokens.shape)} and a "
                f"model with {c.token_types} token types: give one a token, or none to a model without them."
            )
        length = tokens.shape[1]
        positions = count_positions(tokens, mask) if positions is None else positions
        x = lookup(self.embed, tokens) + lookup(self.positions, positions + jnp.int32(c.position_offset))
        if c.token_types:
            x = x + lookup(self.types, jnp.zeros_like(tokens) if token_types is None else token_types)
        counts = jnp.ones((1, length), bool) if mask is None else mask
        bias = None
        if c.relative_buckets:
            distances = np.arange(length)[None, :] - np.arange(length)[:, None]
            bias = jnp.asarray(self.relative)[relative_bucket(distances, c.relative_buckets)]
            bias = bias.transpose(2, 0, 1)[None]
        x = self.embed_norm(x.astype(stream))
        (x, _), _ = self.blocks((x, hooks.carries(adapt, x)), adapt, None, None, Context(counts, bias=bias))
        return x

    def features(self, tokens: jax.Array, mask: jax.Array | None = None, *args: Any, **options: Any) -> jax.Array:
        """What a classification head reads, [B, D]: the first token that counts, through the pooler if there is one.

        Called as `hidden`.
        """
        hidden = self.hidden(tokens, mask, *args, **options)
        first = jnp.zeros(tokens.shape[:1], jnp.int32) if mask is None else jnp.argmax(mask, axis=1)
        first = jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0]
        if not self.config.pooler:
            return first
        out = weighed("bi,io->bo", first, self.pooler_kernel, self.precision())
        return jnp.tanh(out + jnp.asarray(self.pooler_bias, out.dtype)[None, :])


def relative_bucket(distance: np.ndarray, buckets: int, furthest: int = 128) -> np.ndarray:
    """The row of the bias for key position minus query position.

    Half of the rows are for keys after the query. Of each half, one half is for the distances 0, 1, ... one by one, the
    other for bands that grow geometrically up to `furthest`; what is further is in the last.
    """
    side = buckets // 2
    exact = side // 2
    away = np.abs(distance)
    # float32, as in the models' own training: the edges of bands are integers
    bands = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(furthest / exact))
    far = np.minimum(exact + (bands * np.float32(side - exact)).astype(np.int64), side - 1)
    return np.where(distance > 0, side, 0) + np.where(away < exact, away, far)

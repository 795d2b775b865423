r"""GPT-2 and OPT in flax linen: causal attention, learned positions.

The stream starts as token + position; the blocks are those of `methods.models.layernorm_block`. OPT-350m's embedding is
narrower than its stream, with a matrix before and behind the blocks.

GPT-2: https://openai.com/index/better-language-models. OPT: https://arxiv.org/abs/2205.01068.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from methods.models.causal import Causal
from methods.models.layernorm_block import LayerNormBlock, LayerNormConfig
from methods.models.layers import LayerNorm, Precision, check_head, lookup, product, stack, weighed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig(LayerNormConfig):
    """What distinguishes one of these from another."""

    norm_first: bool = True
    final_norm: bool = True
    """A norm behind the last block."""
    embed_size: int = 0
    """Width of the embedding; 0 for the stream's."""
    tied: bool = True
    """The head is the embedding."""
    headless: bool = False
    """There is no head (a base model or a classifier): no logits, only hidden states."""

    @property
    def windows(self) -> tuple[int, ...]:
        """No layer has a window."""
        return ()


class GPT(Causal):
    """A causal language model: tokens [B, T] -> logits [B, T, V]. See `Causal` for its methods."""

    config: GPTConfig

    def setup(self):
        c, init = self.config, nn.initializers.normal(0.02)
        width = c.embed_size or c.hidden_size
        self.embed = self.param("embed", init, (c.vocab_size, width), self.param_dtype)
        if not c.tied and not c.headless:
            self.head_kernel = self.param("head", init, (c.vocab_size, width), self.param_dtype)
        shape = (c.position_offset + c.max_positions, c.hidden_size)
        self.positions = self.param("positions", init, shape, self.param_dtype)
        if c.embed_size:
            self.project_in = self.param("project_in", init, (width, c.hidden_size), self.param_dtype)
            self.project_out = self.param("project_out", init, (c.hidden_size, width), self.param_dtype)
        precision = self.precision()
        self.blocks = stack(LayerNormBlock, c.num_layers, self.remat)(c, precision)
        if c.final_norm:
            self.norm = LayerNorm(c.norm_eps, precision.weights)

    def precision(self):
        dtype = jnp.asarray(self.embed).dtype
        return Precision(dtype, self.accumulate or dtype)

    def embedded(self, tokens, positions):
        x, stream = lookup(self.embed, tokens), self.precision().stream
        if self.config.embed_size:
            x = weighed("btd,de->bte", x, self.project_in, self.precision())
        return x.astype(stream) + lookup(self.positions, positions + self.config.position_offset).astype(stream)

    def turns(self, positions):
        return None

    def finished(self, x):
        x = self.norm(x) if self.config.final_norm else x
        return weighed("btd,de->bte", x, self.project_out, self.precision()) if self.config.embed_size else x

    def head(self, hidden):
        check_head(self.config.headless)
        kernel = self.embed if self.config.tied else self.head_kernel
        return product("...d,vd->...v", hidden, kernel, self.precision())

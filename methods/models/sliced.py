r"""A model with features cut out of its blocks, each layer with its own sizes: smaller matrices, not masks.

`Sliced(model)` is used as the model it came from, `sliced.apply({"params": weights}, ...)`, with weights that hold the
layers one by one: `{..., "layers": {"0": {"q_proj": {"kernel", "bias"}, ..., "attention_norm": ...}}}`. Of layer i
there may be fewer

    heads     "heads" [H'] and "groups" [G'], the indices of the query and the key-value heads that are left
    features  of values (columns of v, rows of o), of queries and keys ("pairs" [G', h'], which rotary pair of its head
              each is; padded where another head keeps more), and of the feed-forward layer

than in the dense model, whose own code computes all the rest. It has no cache: it scores and classifies. The indices
are integers among the weights, which `jax.grad` refuses to differentiate: train the rest.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from methods.models import hooks
from methods.models.decoder import Block
from methods.models.layernorm_block import LayerNormBlock
from methods.models.layers import Linear, Precision, attend, rotate, weighed


@dataclasses.dataclass(frozen=True)
class Sliced:
    """The dense model's module, run with weights whose layers are of their own sizes."""

    model: nn.Module

    @property
    def config(self) -> Any:
        """Of the dense model."""
        return self.model.config  # pyright: ignore[reportAttributeAccessIssue]

    def apply(self, variables: Any, *args: Any, method: Any = None, **options: Any) -> Any:
        """As `self.model.apply`, but for `extend`. Hooks are sliced as in a scan: leaves lead with the layer axis."""
        weights = dict(variables["params"])
        layers = weights.pop("layers")

        def sliced(model, *args, **options):
            stack = model.blocks  # linen runs `setup`, which makes the scan that a loop now takes the place of
            object.__setattr__(model, "blocks", partial(_blocks, stack, layers))
            return getattr(type(model), method or "__call__")(model, *args, **options)

        return self.model.apply({"params": weights}, *args, method=sliced, **options)


def _blocks(stack: Any, layers: dict[str, Any], carry: Any, adapt: hooks.Hook, windows: Any, cache: Any, context: Any):
    """What the scan over the blocks does, in a loop."""
    if cache is not None:
        raise ValueError("A sliced model keeps no cache: generate with the dense one.")
    kind = next(c for c in type(stack).__mro__ if c in (Block, LayerNormBlock))
    block = kind(stack.config, stack.precision, parent=None)
    for i in range(stack.config.num_layers):
        here, window = jax.tree.map(lambda leaf, i=i: leaf[i], (adapt, windows))
        with nn.intercept_methods(_layer(layers[str(i)])):
            carry, _ = block.apply({"params": layers[str(i)]}, carry, here, window, None, context)
    return carry, None


def _layer(weights: dict[str, Any]) -> Any:
    """Runs one block's linears and its attention with `weights`."""

    def intercept(next_method, args, options, call):
        module = call.module
        if isinstance(module, Linear) and call.method_name == "__call__":
            x, adapt = args
            return _linear(weights, str(module.name), x, adapt, module.precision)
        if isinstance(module, (Block, LayerNormBlock)) and call.method_name == "_attention":
            x, adapt, *window, _, context = args  # a decoder's block has a window
            return _attention(module, weights, x, adapt, window[0] if window else None, context)
        return next_method(*args, **options)

    return intercept


def _linear(weights: dict[str, Any], site: str, x: jax.Array, adapt: hooks.Hook, precision: Precision) -> jax.Array:
    x = hooks.call(adapt, f"{site}.input", x, x)
    # In one sum, not in parts as `layers.linear`: outside a scan each part of a kernel would be a copy of its own.
    y = weighed("bti,io->bto", x, weights[site]["kernel"], precision)
    if "bias" in weights[site]:
        y = y + jnp.asarray(weights[site]["bias"], y.dtype)[None, None, :]
    return hooks.call(adapt, site, x, y)


def _attention(block: Any, weights: dict[str, Any], x: jax.Array, adapt: hooks.Hook, window: Any, context: Any):
    config, precision, heads, groups = block.config, block.precision, weights["heads"].size, weights["groups"].size
    if not heads:
        hidden = jnp.zeros((*x.shape[:2], 0), precision.stream)
        return _linear(weights, "o_proj", hidden, adapt, precision), None

    def split(site: str, number: int) -> jax.Array:
        return _linear(weights, site, x, adapt, precision).reshape(*x.shape[:2], number, -1)

    q, k, v = split("q_proj", heads), split("k_proj", groups), split("v_proj", groups)
    if getattr(config, "qk_norm", False):
        q, k = block._norm("q_norm", q), block._norm("k_norm", k)
    if context.turns is not None:
        turns = [jnp.where(window > 0, turn[1], turn[0]) if len(turn) > 1 else turn[0] for turn in context.turns]
        turns = [turn[:, :, weights["pairs"]] for turn in turns]  # [B, T, G', h']
        k = rotate(k, *turns)
        q = rotate(q, *(jnp.repeat(turn, heads // groups, axis=2) for turn in turns))
    if context.bias is not None:
        context = context._replace(bias=context.bias[:, weights["heads"]])
    scale = (getattr(config, "query_scalar", 0.0) or config.head_dim) ** -0.5
    options = {"scale": scale, "cap": getattr(config, "attention_cap", 0.0), "window": window}
    return _linear(weights, "o_proj", attend(q, k, v, x, adapt, context, precision, **options), adapt, precision), None

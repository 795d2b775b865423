"""Heads for classification and regression: small, trained in full, and no part of the frozen model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Classifier(nn.Module):
    """Features [B, D] -> logits [B, num_labels]; with one label, a number to regress on.

        W_out tanh(W_dense f + b_dense) + b_out        with `dense` (RoBERTa, MPNet)
        W_out f + b_out                                else (BERT, whose features are such a tanh already)

    b_out is left out without `use_bias` (decoders). `head.apply({"params": params}, features)`, with features from the
    model's method of that name; computed in `param_dtype`.
    """

    num_labels: int
    dense: bool = False
    use_bias: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        def linear(name: str, size: int, use_bias: bool, x: jax.Array) -> jax.Array:
            init, dtype = nn.initializers.normal(0.02), self.param_dtype
            return nn.Dense(size, use_bias, dtype=dtype, param_dtype=dtype, kernel_init=init, name=name)(x)

        x = features
        if self.dense:
            x = jnp.tanh(linear("dense", x.shape[-1], True, x))
        return linear("out", self.num_labels, self.use_bias, x)

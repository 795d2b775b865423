"""What all decoders share: tokens [B, T] -> hidden states [B, T, D] -> logits [B, T, V], with or without a cache."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from methods.models import cache as caches
from methods.models import hooks
from methods.models.layers import Context, Precision, check_input, count_positions


class Causal(nn.Module):
    """A causal language model. A family's class gives `setup`, with the `stack` of its blocks, and the four below.

    `model.apply({"params": weights}, tokens, mask, adapt)`. Everything is computed in the dtype of the weights, but for
    norms, angles and softmax, which are at least float32. With `accumulate`, such as float32 for bfloat16 weights, only
    the products are: their sums, and all that lies between them, are of that dtype. `remat` recomputes each block in
    the backward pass.
    """

    config: Any
    remat: bool = True
    param_dtype: Any = jnp.float32
    accumulate: Any = None

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The stream [B, T, D] that the first block starts from."""
        raise NotImplementedError

    def turns(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """`Context.turns`."""
        raise NotImplementedError

    def finished(self, x: jax.Array) -> jax.Array:
        """What the head reads, from the stream [B, T, D] after the last block."""
        raise NotImplementedError

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of final hidden states [..., D], for instance only those of the answer's positions.

        The head costs a fifth of the FLOPs of a small model: `model.apply(variables, hidden, method="head")`.
        """
        raise NotImplementedError

    def __call__(self, *args: Any, **options: Any) -> jax.Array:
        """Logits [B, T, V]: `head(hidden(...))`."""
        return self.head(self.hidden(*args, **options))

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
        check_input(tokens, mask, self.config.max_positions)
        counts = jnp.ones((1, tokens.shape[1]), bool) if mask is None else mask
        if positions is None:
            positions = count_positions(tokens, mask)
        return self._run(tokens, positions, adapt, None, counts, jnp.int32(0))[0]

    def features(
        self, tokens: jax.Array, mask: jax.Array | None = None, adapt: hooks.Hook = hooks.identity
    ) -> jax.Array:
        """What a classification head reads: the hidden state [B, D] of the last token that counts."""
        hidden = self.hidden(tokens, mask, adapt)
        if mask is None:
            return hidden[:, -1]
        last = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

    def extend(
        self, tokens: jax.Array, mask: jax.Array, cache: caches.Cache, adapt: hooks.Hook = hooks.identity
    ) -> tuple[jax.Array, caches.Cache]:
        """Hidden states [B, T, D] of T more tokens, which see those in the cache; and the cache with them.

        `cache` must have T free slots. Hooks see T tokens, and S slots on the last axis of the attention maps.
        Raises as `hidden`.
        """
        check_input(tokens, mask, self.config.max_positions)
        start, length = cache.length, tokens.shape[1]
        counts = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, start, axis=1)
        positions = jax.lax.dynamic_slice_in_dim(count_positions(counts, counts), start, length, axis=1)
        hidden, layers = self._run(tokens, positions, adapt, cache.layers, counts, start)
        return hidden, caches.Cache(layers, counts, start + jnp.int32(length))

    def empty_cache(self, batch: int, slots: int) -> caches.Cache:
        """A cache for `slots` tokens of `batch` sequences: `model.apply(variables, B, S, method="empty_cache")`."""
        return caches.empty(self.config, batch, slots, self.precision().stream)

    def precision(self) -> Precision:
        """The dtypes of this call: those of the weights it was given."""
        raise NotImplementedError

    def _run(self, tokens, positions, adapt, layers, counts, start):
        hooks.check(adapt, self.config.num_layers)
        windows = jnp.asarray(self.config.windows, jnp.int32) if self.config.windows else None
        context = Context(counts, self.turns(positions), None, start)
        x = self.embedded(tokens, positions)
        (x, _), layers = self.blocks((x, hooks.carries(adapt, x)), adapt, windows, layers, context)  # pyright: ignore
        return self.finished(x), layers

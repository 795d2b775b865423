"""Keys and values of the tokens a decoder has read, so that the next token costs one token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

KeysValues = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """What a decoder remembers of S slots, of which `length` are filled.

    layers: keys and values, each [L, B, S, G, head_dim]. mask: bool [B, S], True at tokens that count. length: int32.
    """

    layers: KeysValues
    mask: jax.Array
    length: jax.Array


def empty(config: Any, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache of `slots` tokens for each of `batch` sequences, none of them filled."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    layers = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return Cache(layers, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def remember(layer: KeysValues | None, k: jax.Array, v: jax.Array, start: Any) -> tuple[KeysValues, KeysValues | None]:
    """The keys and values to attend to, and the layer's new cache: k and v written from slot `start` on.

    Without a cache these are k and v themselves, and None.
    """
    if layer is None:
        return (k, v), None
    write = jax.lax.dynamic_update_slice_in_dim
    layer = (write(layer[0], k, start, axis=1), write(layer[1], v, start, axis=1))
    return layer, layer

r"""Where a method enters a model.

A model knows no method. At every *site* of every block it calls a hook,

    y = adapt(site, x, y),

and goes on with what comes back. `adapt` is a callable pytree and a call argument of the model (it holds
traced arrays, so it cannot be a module attribute). Every array leaf leads with the layer axis, [L, ...]: the
layers are scanned, and block l is given `adapt` with each leaf cut to its slice l. What is the same for all
layers is broadcast to [L, ...].

What a hook is given, with B sequences, T tokens, D the width, H heads, E = H * head_dim, F the width of the
feed-forward layer, and N [B, T, D] what the branch starts from: the normalised stream, or the stream itself in
encoders, whose norms are behind the branches:

    site                     x                            y
    q_proj, k_proj, v_proj   N                            x W (+ b)                   [B, T, out]
    attention_logits         who sees whom, bool          q k / sqrt(head_dim) ...    [B, H, T, T]
    attention_weights        who sees whom, bool          softmax of masked logits    [B, H, T, T]
    attention_hidden         N                            the heads, side by side     [B, T, E]
    o_proj                   attention_hidden             x W (+ b)                   [B, T, D]
    residual_attention       stream before the branch     the branch's output         [B, T, D]
    ffn_input                its result one block below   stream before the branch    [B, T, D]
    gate_proj, up_proj       N                            x W (+ b)                   [B, T, F]
    ffn_hidden               N                            activation(gate) * up       [B, T, F]
    down_proj                ffn_hidden                   x W (+ b)                   [B, T, D]
    q_proj.input and so on   what the linear reads        the same                    [B, T, in]
    residual_ffn             stream before the branch     the branch's output         [B, T, D]
    block_hidden             the block's input            the block's output          [B, T, D]

Only the Llama family has a gate_proj; elsewhere ffn_hidden's y is activation(up). What comes back at a linear's
".input" is what the linear reads, and x at its own site. The residual sites return what the block then adds to the
stream; `ffn_input` returns the stream itself, and its x is the one thing that blocks hand on beside it: what the
feed-forward branch of the block below started from, 0 in the first block. The attention logits are what the mask and
the softmax are applied to, with a soft cap and relative position biases where the model has them. "Who sees whom" is
[B or 1, 1, T, T]: causality, window and padding together (B is 1 where no padding mask is given). In the two attention
maps the third axis is the query, the fourth the key; they are at least float32, whatever the weights are. With a cache
of S tokens the fourth axis is S. The mask is applied after `attention_logits`, so nothing done there can let a token
see the future: a key dropped with -inf or any large negative number gets no weight, unless the row has nothing else,
which then attends evenly to what it may see. (`attention_weights` comes after the mask: multiply there, or use x.)

A hook returns an array of y's shape and dtype; the model raises a ValueError where it does not.

Two things are made only for a hook that acts on them, see `acts`: the maps of long sequences, which are otherwise never
whole (`methods.models.layers.attend`), and the x of `ffn_input`. A hook that returns the very y it was given there,
without a single operation, is asked once while the model is traced, and not called in the blocks.
"""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

LINEAR_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears: y = x W (+ b). A model's `config.site_shapes()` gives those it has, with (in, out) of each."""

ACTIVATION_SITES = (
    "attention_logits",
    "attention_weights",
    "attention_hidden",
    "residual_attention",
    "ffn_input",
    "ffn_hidden",
    "residual_ffn",
    "block_hidden",
)
"""What else a hook sees, beside the linears' inputs."""

SITES = LINEAR_SITES + ACTIVATION_SITES
"""All sites, but for the inputs of linears."""

_T = TypeVar("_T")


@runtime_checkable
class Hook(Protocol):
    """A callable pytree whose array leaves lead with the layer axis, [L, ...].

    `jax.tree_util.Partial(function, arrays)` is one, so is any registered dataclass with a `__call__`.
    """

    def __call__(self, site: str, x: jax.Array, y: jax.Array, /) -> jax.Array:
        """What the block goes on with in place of `y`; same shape and dtype."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity:
    """The hook that changes nothing: y. It has no leaves."""

    def __call__(self, site: str, x: jax.Array, y: jax.Array, /) -> jax.Array:
        del site, x
        return y


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """Several hooks, applied in order: y <- hook(site, x, y) for each, all with the same x."""

    hooks: tuple[Hook, ...]

    def __call__(self, site: str, x: jax.Array, y: jax.Array, /) -> jax.Array:
        for hook in self.hooks:
            y = hook(site, x, y)
        return y


identity = Identity()
"""The one `Identity` anybody needs."""


def call(adapt: Hook, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`adapt(site, x, y)`, checked: what comes back has y's shape and dtype. Raises ValueError."""
    if not callable(adapt):
        raise ValueError(f"adapt must be a hook, called with (site, x, y), not {adapt!r}: leave it out for none.")
    out = adapt(site, x, y)
    if getattr(out, "shape", None) != y.shape or out.dtype != y.dtype:
        got = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        raise ValueError(
            f"the hook {type(adapt).__name__} returned {got} at site {site!r}, which needs "
            f"{y.dtype}{list(y.shape)}: return an array of y's shape and dtype."
        )
    return out


def acts(adapt: Hook, site: str, x: Any, y: Any) -> bool:
    """Whether `adapt` does anything at a site: whether it computes, prints, or returns anything but y itself.

    Read in its trace, so nothing is computed; arrays may be given as shapes. Raises as `call`.
    """
    traced = jax.make_jaxpr(lambda adapt, x, y: call(adapt, site, x, y))(adapt, x, y)
    return bool(traced.eqns) or traced.jaxpr.outvars[0] is not traced.jaxpr.invars[-1]


def carries(adapt: Hook, x: jax.Array) -> jax.Array | None:
    """What the first block is given as "its result one block below": 0 like the stream, None where no hook reads it.

    `adapt` leads with the layer axis. A second stream that nobody reads would double what is kept of each block.
    """
    one = jax.tree.map(lambda leaf: jax.eval_shape(lambda leaf: leaf[0], leaf), adapt)
    return jnp.zeros_like(x) if acts(one, "ffn_input", x, x) else None


def check(adapt: _T, num_layers: int) -> _T:
    """`adapt` itself, once every leaf is known to lead with the layer axis. Raises ValueError."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapt):
        where = jax.tree_util.keystr(path) or "adapt itself"
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"adapt has a leaf that is no array ({where} is a {type(leaf).__name__}): wrap a plain "
                "function as jax.tree_util.Partial(function, arrays) and mark other settings as static fields."
            )
        shape: Any = leaf.shape
        if not shape or shape[0] != num_layers:
            raise ValueError(
                f"adapt's leaf {where} has shape {tuple(shape)}, but leaves lead with the layer axis of this "
                f"model, {num_layers}: stack one slice per layer, or broadcast what all layers share."
            )
    return adapt

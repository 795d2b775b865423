r"""Where a method enters a model.

A model knows no method. At every *site* of every block it calls a hook,

    y = adapt(site, x, y),

and goes on with what comes back. `adapt` is a callable pytree and a call argument of the model (it holds traced arrays,
so it cannot be a module attribute). Every array leaf leads with the layer axis, [L, ...]: the layers are scanned, and
block l is given `adapt` with each leaf cut to its slice l. What is the same for all layers is broadcast to [L, ...].

What is passed, with B sequences, T tokens, D the width, H heads, E = H * head_dim, F the width of the feed-forward layer
(shapes are those of the decoder family; N is the normalised residual stream that a branch starts from):

| site                            | x                                   | y                                                 |
|---------------------------------|-------------------------------------|---------------------------------------------------|
| q_proj, k_proj, v_proj          | N, [B, T, D]                        | x W (+ b), [B, T, out]                            |
| attention_logits                | who may be attended, bool, [B or 1, 1, T, T] | q k / sqrt(head_dim), before the mask, [B, H, T, T] |
| attention_weights               | as above                            | softmax of the masked logits, [B, H, T, T]        |
| attention_hidden                | N, [B, T, D]                        | the heads' outputs, side by side, [B, T, E]       |
| o_proj                          | attention_hidden, [B, T, E]         | x W (+ b), [B, T, D]                              |
| residual_attention              | stream before the branch, [B, T, D] | output of the branch; the block adds what returns |
| gate_proj, up_proj              | N, [B, T, D]                        | x W (+ b), [B, T, F]                              |
| ffn_hidden                      | N, [B, T, D]                        | activation(gate) * up, [B, T, F]                  |
| down_proj                       | ffn_hidden, [B, T, F]               | x W (+ b), [B, T, D]                              |
| residual_ffn                    | stream before the branch, [B, T, D] | output of the branch; the block adds what returns |
| block_hidden                    | the block's input, [B, T, D]        | the block's output, [B, T, D]                     |

The queries are the third axis of the two attention maps, the keys the fourth; both maps are at least float32. The mask is
applied after `attention_logits`, so no hook can let a token see the future: a key dropped with -inf (or any large negative
number) is lost to the row unless the row has nothing else, which then attends evenly to what it may see.

A hook returns an array of y's shape and dtype; the model raises a ValueError where it does not.
"""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax

LINEAR_SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears: y = x W (+ b). A model's `config.site_shapes()` gives (in, out) of each."""

ACTIVATION_SITES = (
    "attention_logits",
    "attention_weights",
    "attention_hidden",
    "residual_attention",
    "ffn_hidden",
    "residual_ffn",
    "block_hidden",
)
"""Everything else a hook sees."""

SITES = LINEAR_SITES + ACTIVATION_SITES
"""All sites of the decoder family."""

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
    out = adapt(site, x, y)
    if getattr(out, "shape", None) != y.shape or out.dtype != y.dtype:
        got = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        raise ValueError(
            f"the hook {type(adapt).__name__} returned {got} at site {site!r}, which needs {y.dtype}{list(y.shape)}: "
            "return an array of y's shape and dtype."
        )
    return out


def check(adapt: _T, num_layers: int) -> _T:
    """`adapt` itself, once every leaf is known to lead with the layer axis. Raises ValueError."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapt):
        where = jax.tree_util.keystr(path) or "adapt itself"
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"adapt has a leaf that is no array ({where} is a {type(leaf).__name__}): wrap a plain function as "
                "jax.tree_util.Partial(function, arrays) and mark other settings as static fields."
            )
        shape: Any = leaf.shape
        if not shape or shape[0] != num_layers:
            raise ValueError(
                f"adapt's leaf {where} has shape {tuple(shape)}, but leaves lead with the layer axis of this model, "
                f"{num_layers}: stack one slice per layer, or broadcast what all layers share."
            )
    return adapt

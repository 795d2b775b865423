"""What a training's gradient does not see, and a hypergradient does."""

from __future__ import annotations

from typing import Any

import jax

from bilevel.extend import is_marked


@jax.custom_vjp
def held(tree: Any, hyper: Any) -> Any:
    """`tree`, constant in the gradient of a loss, though not in the derivative of that gradient.

    What `jax.lax.stop_gradient` also hides from a hypergradient, which differentiates the training and so must see
    every way in which a gradient depends on its point. A training with it follows no gradient field, so that its
    derivative is that of `Unrolled(mode="reverse")`, not of "mixed" mode, which counts on a symmetric Hessian.

    Args:
      tree: floating-point arrays.
      hyper: what the loss depends on beside its variable, by which mixed mode is known.

    Raises:
      ValueError: in mixed mode.
    """
    del hyper
    return tree


def _held(tree: Any, hyper: Any):
    if any(leaf.perturbed for leaf in jax.tree.leaves(hyper, is_leaf=is_marked)):
        raise ValueError(
            "This training stops a gradient (a second pass, or the divisor of a rescaling), so that it follows no "
            'gradient field: differentiate it with Unrolled(mode="reverse").'
        )
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=is_marked), None


held.defvjp(_held, lambda _, cotangent: (None, None), symbolic_zeros=True)

"""Arrays in a few words, by which they can be told apart."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel.sharding.processes import digest, on_host
from bilevel.trees import is_key


def described(array: Any) -> str:
    """Dtype, shape and a hash of an array; the number itself where it is one."""
    if np.ndim(array) == 0 and not is_key(array):
        return f"{shortest(array)} ({jnp.result_type(array)})"
    return f"{array.dtype}{list(array.shape)} with hash {digest(array)}"


def shortest(number: Any) -> str:
    """A number, or an array of one, by the fewest digits that stand for it in its own dtype."""
    value = on_host(number)
    if not jnp.issubdtype(value.dtype, jnp.floating) or not np.isfinite(wide := float(value)):
        return repr(value.item())
    texts = (f"{wide:.{digits}g}" for digits in range(1, 18))
    return repr(next((float(text) for text in texts if np.asarray(float(text)).astype(value.dtype) == value), wide))

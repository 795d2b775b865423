"""What the tests of the models share: tokens, drawn weights, a hook, compiled calls, oracles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from methods import models
from tests.conftest import require

TOKENS = np.asarray([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 3]], np.int32)
MASK = np.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def logits(model, weights, tokens=TOKENS, mask=None, adapt=models.identity, method=None, **options):
    """model's logits, compiled once for each structure of the arguments."""
    return model.apply({"params": weights}, tokens, mask, adapt, method=method, **options)


def draw(model, dtype=np.float64):
    """Weights far from their initial values, so that every one of them matters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    leaves, structure = jax.tree.flatten_with_path(shapes)
    rng = np.random.default_rng(0)
    drawn = [
        (0.3 * rng.standard_normal(leaf.shape) + ("scale" in jax.tree_util.keystr(path))).astype(dtype)
        for path, leaf in leaves
    ]
    return jax.tree.unflatten(structure, drawn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """y * (1 + s), a slice of s for each layer, at one site or at all."""

    s: jax.Array
    only: str = dataclasses.field(default="", metadata={"static": True})

    def __call__(self, site, x, y, /):
        del x
        if self.only != site and (self.only or site.endswith(".input")):
            return y
        return y * (1 + self.s.astype(y.dtype))


def record_sites(model, **options):
    """{site: (shape of x, shape of y)} of what a hook is given on TOKENS and MASK."""
    seen = {}

    def record(layer, site, x, y):
        if site.endswith(".input"):
            shapes = model.config.site_shapes()
            assert x.shape == y.shape == (*TOKENS.shape, shapes[site.removesuffix(".input")][0])
            return y
        assert layer.shape == () and seen.setdefault(site, (x.shape, y.shape)) == (x.shape, y.shape)
        return y

    adapt = jax.tree_util.Partial(record, jnp.arange(model.config.num_layers, dtype=jnp.int32))
    weights = draw(model)
    jax.eval_shape(lambda a: model.clone(remat=False).apply({"params": weights}, TOKENS, MASK, a, **options), adapt)
    return seen


def check_derivatives(loss, at, direction):
    """Second and third derivatives of a smooth scalar: both modes, and central differences."""

    def forward(f):
        return lambda g: jax.jvp(f, (g,), (direction,))[1]

    def reverse(f):
        return jax.grad(lambda g: jnp.vdot(f(g), direction))

    def central(f, step=1e-5):
        return (f(at + step * direction) - f(at - step * direction)) / (2 * step)

    first = jax.grad(loss)
    functions = first, forward(first), reverse(first), reverse(forward(first))
    gradient, hvp, hvp_reverse, third = map(jax.jit, functions)
    np.testing.assert_allclose(hvp(at), hvp_reverse(at), rtol=1e-10)
    np.testing.assert_allclose(hvp(at), central(gradient), rtol=1e-6)
    np.testing.assert_allclose(third(at), central(hvp), rtol=1e-6)


def random_oracle(kind, config):
    """transformers' model `kind` (torch, float32), every parameter moved from its initial value."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    oracle = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return oracle

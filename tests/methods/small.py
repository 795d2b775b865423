"""A small decoder in float64 with LoRA, as the methods are given it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from methods.adapters.lora import LoRAConfig
from methods.models.decoder import Decoder, DecoderConfig
from methods.objective import Bound, of_hook
from methods.tasks.loss import Prediction

LAYERS = 4
LORA = LoRAConfig(rank=2, alpha=4.0)
CONFIG = DecoderConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=32,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_positions=16,
)
MODEL = Decoder(CONFIG, param_dtype=jnp.float64)
SMALL = MODEL.clone(remat=False)


@functools.cache
def setting():
    """`(weights, loss, train batch, validation batch)`; `loss(weights, hook, batch)`."""
    tokens = [jax.random.randint(jax.random.key(i), (4, 10), 0, CONFIG.vocab_size) for i in range(2)]
    weights = MODEL.init(jax.random.key(2), tokens[0])["params"]
    weights = jax.tree.map(lambda w: 4.0 * w if w.ndim > 1 else w, weights)

    def loss(weights, hook, batch):
        logits = MODEL.apply({"params": weights}, batch, None, hook)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()

    return weights, loss, *tokens


def adapter(key):
    """Fresh parameters of LoRA."""
    return LORA.init(key, CONFIG.site_shapes(), LAYERS, jnp.float64)


def start(key):
    """What is trained: the adapter, and no head."""
    return {"lora": adapter(key), "head": {}}


def trained(key=3, by=0.3):
    """Parameters with B != 0."""
    return {"lora": jax.tree.map(lambda x: x + by, adapter(jax.random.key(key))), "head": {}}


def predict(weights, bound, batch):
    """The next tokens."""
    logits = SMALL.apply({"params": weights}, batch, None, bound.adapt)
    return Prediction(logits[:, :-1], batch[:, 1:], jnp.ones_like(batch[:, 1:], bool))


def given():
    """What a method is given of it."""
    weights, loss, *_ = setting()
    return of_hook(loss, weights, LORA, CONFIG, adapter)._replace(predict=predict)


def predicted(weights, params, hook, batch):
    """`predict` of parameters, with a hook after LoRA's; of the bare model where the parameters are None."""
    bound = Bound(hook, {}) if params is None else given().bind(weights, params, after=hook)
    return predict(weights, bound, batch)


def closed(structures, share, seed=0):
    """Gates of which a share is at 0, the others between 0 and 1."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, structure in structures.items():
        open_ = rng.uniform(-0.3, 0.4, (LAYERS, structure.size))
        out[name] = jnp.asarray(np.where(rng.uniform(size=open_.shape) < share, -2.0, open_))
    return out


PLACES = {
    "linears": {site: CONFIG.site_shapes()[site][1] for site in ("q_proj", "v_proj")},
    "stream": {"block_hidden": CONFIG.hidden_size},
}
"""What LoRATRF edits."""


def vectors(place, seed=0):
    """Task vectors of these places."""
    keys = dict(zip(PLACES[place], jax.random.split(jax.random.key(seed), 2), strict=False))
    return {site: jax.random.normal(keys[site], (LAYERS, d)) for site, d in PLACES[place].items()}


def arguments(model, data, out, *more):
    """Sizes for a command on `tiny_model`."""
    sizes = "--train-rows 16 --outer-rows 8 --test-rows 0 --batch-size 4 --length 24".split()
    steps = "--finetune-steps 3 --rank 2".split()
    return ["--model", str(model), "--data", str(data), "--out", str(out), *sizes, *steps, *more]


def flexora_words(model, data, out, *more):
    """A short search by Flexora on `tiny_model`."""
    steps = "--inner-steps 2 --outer-steps 3".split()
    return ["flexora", *arguments(model, data, out), *steps, *more]

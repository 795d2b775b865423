"""Cutting out of a model what closed gates have closed, counting it, and keeping the smaller model in a file.

`cut` folds what is trained (LoRA, biases) and the values of open gates into the kernels, and leaves out the rows and
columns of closed ones: the sliced model computes what the gated one does. Only `gates.tied` can be cut.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from methods.adapters import peft_folder
from methods.adapters.gates import Structure, activation
from methods.adapters.patterns import shortened
from methods.files import replacing_folder
from methods.models.sliced import Sliced

Weights = dict[str, Any]
_MODELS = ("Decoder", "Encoder", "GPT")


def cut(
    model: Any,
    weights: Weights,
    gates: Mapping[str, jax.Array],
    structures: Mapping[str, Structure],
    family: str = "stg",
    biases: Mapping[str, jax.Array] | None = None,
) -> tuple[Sliced, Weights]:
    """The sliced model and its weights.

    Args:
      model: the dense model.
      weights: its weights, LoRA merged (`LoRAConfig.merge`).
      gates: `{structure: l [L, size]}`.
      structures: what they gate: `gates.tied(config)`, or some of it.
      family: of gates.
      biases: `{site: [L, out]}`, added to those the model has.

    Raises:
      ValueError: for gates that are not tied.
    """
    if not set(structures) <= {"ffn", "value", "query_key"}:
        raise ValueError("Only tied gates can be cut out: a row of one linear is no row of the next.")
    blocks: Any = weights["blocks"]
    omega = {name: np.asarray(activation(family, jnp.asarray(gates[name]))) for name in structures}
    added = {site: np.asarray(value) for site, value in (biases or {}).items()}
    layers = {}
    for i in range(model.config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), blocks)
        for site, bias in added.items():
            layer[site] = {"kernel": layer[site]["kernel"], "bias": layer[site].get("bias", 0) + bias[i]}
        here = {name: value[i] for name, value in omega.items()}
        layers[str(i)] = _feed_forward(layer, here) | _attention(layer, here, model.config)
    shared = {name: value for name, value in weights.items() if name != "blocks"}
    return Sliced(model), jax.tree.map(jnp.asarray, shared | {"layers": layers})


def removed(gates: Mapping[str, jax.Array], structures: Mapping[str, Structure], family: str, config: Any) -> float:
    """Share of the blocks' linear weights that closed gates take away, counted: in [0, 1].

    A weight counts once, however many gates close it: of q and k what neither its query-key nor its value head keeps
    (a value head without an open gate takes its queries and keys along), of a linear with rows and columns all but the
    open rows times the open columns.
    """
    shapes = config.site_shapes()
    is_open = {name: np.asarray(activation(family, jnp.asarray(l))) > 0 for name, l in gates.items()}
    layers = next(iter(is_open.values())).shape[0]
    kept = 0
    for layer in range(layers):
        rows, columns = _kept_features({name: value[layer] for name, value in is_open.items()}, structures, config)
        kept += sum(int(rows[site].sum()) * int(columns[site].sum()) for site in shapes)
    return 1.0 - kept / whole(config)


def whole(config: Any) -> int:
    """Numbers in the kernels of all linears of a model that is not sliced."""
    return config.num_layers * sum(a * b for a, b in config.site_shapes().values())


def parameters(weights: Weights) -> int:
    """Numbers in the kernels of all layers' linears."""
    layers = weights["layers"].values()
    return sum(linear["kernel"].size for layer in layers for site, linear in layer.items() if site.endswith("_proj"))


def save(folder: Path, sliced: Sliced, weights: Weights) -> None:
    """Writes `model.safetensors` and `config.json`; `load` reads them."""
    from safetensors.numpy import save_file

    flat = {".".join(k.key for k in path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(weights)}
    accumulate: Any = sliced.model.accumulate  # pyright: ignore[reportAttributeAccessIssue]
    config = {"model": type(sliced.model).__name__, "config": dataclasses.asdict(sliced.config)}
    config["accumulate"] = None if accumulate is None else jnp.dtype(accumulate).name
    with replacing_folder(folder) as fresh:
        save_file(flat, fresh / "model.safetensors", metadata={"format": "bilevel-sliced"})
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Sliced, Weights]:
    """What `save` wrote.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is damaged, or of a model that is not known.
    """
    from methods import models

    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no sliced model in {folder}: {name} is missing.")
    flat = peft_folder.read_tensors(folder / "model.safetensors", as_stored=True, integers=True)
    description = peft_folder.read_json(folder / "config.json", "a sliced model is a folder with it")
    try:
        if set(description) != {"model", "config", "accumulate"} or description["model"] not in _MODELS:
            raise ValueError(f"config.json is not that of one of {', '.join(_MODELS)}")
        kind = getattr(models, description["model"])
        config_type = getattr(models, f"{description['model']}Config")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
        accumulate = None if description["accumulate"] is None else jnp.dtype(description["accumulate"])
        dtype = next(v.dtype for k, v in flat.items() if k == "embed")
        model = kind(config_type(**values), param_dtype=dtype, accumulate=accumulate)
        dense = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
        shapes = {".".join(k.key for k in path): x.shape for path, x in jax.tree.leaves_with_path(dense)}
        _check(flat, shapes, model.config)
    except (ValueError, KeyError, AttributeError, TypeError, StopIteration, ArithmeticError) as error:
        reason = " ".join(str(error)[:300].split())
        raise ValueError(f"The sliced model in {folder} is damaged ({reason}): save it again.") from None
    weights: Weights = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = weights
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(value)
    return Sliced(model), weights


def _check(flat: Mapping[str, np.ndarray], dense: Mapping[str, tuple[int, ...]], config: Any) -> None:
    """Raises ValueError unless there is every array that the model has, of a size that slicing may leave, and no other.

    dense: shapes of the dense model's arrays. JAX clips an index that is out of range, so these are looked at too.
    """
    shared = config.num_heads // config.num_kv_heads
    wanted: dict[str, Any] = {name: shape for name, shape in dense.items() if not name.startswith("blocks.")}
    biased = {name.split(".")[2] for name in flat if name.startswith("layers.") and name.endswith("_proj.bias")}
    for i in range(config.num_layers):
        at = f"layers.{i}."
        if f"{at}heads" not in flat:  # before a number out of a file is counted up to
            raise ValueError(f"{at}heads is missing")
        groups, pairs = flat.get(f"{at}groups", np.zeros(0)), flat.get(f"{at}pairs", np.zeros((0, 0)))
        query, heads, hidden = 2 * pairs.shape[-1], groups.size * shared, config.hidden_size
        value = flat.get(f"{at}v_proj.kernel", np.zeros((0, 0))).shape[-1]
        ffn = flat.get(f"{at}down_proj.kernel", np.zeros(0)).shape[0]
        inside = value // max(groups.size, 1) * heads
        sizes = {"q_proj": (hidden, heads * query), "k_proj": (hidden, groups.size * query), "v_proj": (hidden, value)}
        sizes |= {"o_proj": (inside, hidden), "down_proj": (ffn, hidden)}
        sizes |= dict.fromkeys(("up_proj", "gate_proj"), (hidden, ffn))
        for name, shape in dense.items():
            if name.startswith("blocks."):
                site, _, leaf = name.removeprefix("blocks.").partition(".")
                cut = {"kernel": sizes[site], "bias": sizes[site][1:]}[leaf] if site in sizes else shape[1:]
                wanted[f"{at}{site}.{leaf}" if leaf else f"{at}{site}"] = cut
        # Trained biases may have come where the dense model has none, in all layers.
        wanted |= {f"{at}{site}.bias": size[1:] for site, size in sizes.items() if site in biased}
        for name, shape, below in (
            ("heads", (heads,), config.num_heads),
            ("groups", (groups.size,), config.num_kv_heads),
            ("pairs", (groups.size, query // 2), config.head_dim // 2),
        ):
            wanted[at + name] = shape
            index = flat.get(at + name)
            if index is None or index.dtype.kind != "i" or ((index < 0) | (index >= below)).any():
                raise ValueError(f"{at}{name} is no array of indices below {below}")
    for name in sorted(set(wanted) | set(flat)):
        found = flat[name].shape if name in flat else "no array"
        if wanted.get(name) != found:
            raise ValueError(f"{shortened(name)} is {found} where {wanted.get(name, 'none')} is to be")


def _take(linear: Weights, axis: int, keep: np.ndarray, factor: np.ndarray | None = None) -> Weights:
    """A linear with the features `keep` of one axis (0: in, 1: out), times `factor` each."""
    out = {"kernel": np.take(linear["kernel"], keep, axis)}
    if factor is not None:
        shape = [-1, 1] if axis == 0 else [1, -1]
        out["kernel"] = out["kernel"] * factor.reshape(shape).astype(out["kernel"].dtype)
    if "bias" in linear:
        bias = linear["bias"] if axis == 0 else linear["bias"][keep]
        out["bias"] = bias if factor is None or axis == 0 else bias * factor.astype(bias.dtype)
    return out


def _feed_forward(layer: Weights, omega: Mapping[str, np.ndarray]) -> Weights:
    """The layer, its feed-forward features cut."""
    if "ffn" not in omega:
        return layer
    keep = np.flatnonzero(omega["ffn"] > 0)
    cut = {site: _take(layer[site], 1, keep) for site in ("gate_proj", "up_proj") if site in layer}
    return layer | cut | {"down_proj": _take(layer["down_proj"], 0, keep, omega["ffn"][keep])}


def _attention(layer: Weights, omega: Mapping[str, np.ndarray], config: Any) -> Weights:
    """The cut linears of attention, and which heads and rotary pairs are left."""
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    shared, half = heads // groups, size // 2
    value = omega.get("value", np.ones(groups * size)).reshape(groups, size)
    query = omega.get("query_key", np.ones(groups * half)).reshape(groups, half)
    kept = np.flatnonzero((value > 0).any(axis=1))
    left = (kept[:, None] * shared + np.arange(shared)).reshape(-1)
    # Heads side by side in one array: each keeps as many features as the one that keeps most, the rest times 0.
    v_at, v_factor = _padded(value[kept])
    q_at, q_factor = _padded(query[kept])
    o_in = (left[:, None] * size + np.repeat(v_at, shared, axis=0)).reshape(-1)
    k_pairs = np.stack([q_at, q_at + half], axis=1).reshape(kept.size, 2 * q_at.shape[1])
    q_out = (left[:, None] * size + np.repeat(k_pairs, shared, axis=0)).reshape(-1)
    q_by = np.repeat(np.tile(q_factor, 2), shared, axis=0).reshape(-1)
    return {
        "q_proj": _take(layer["q_proj"], 1, q_out, q_by),
        "k_proj": _take(layer["k_proj"], 1, (kept[:, None] * size + k_pairs).reshape(-1)),
        "v_proj": _take(layer["v_proj"], 1, (kept[:, None] * size + v_at).reshape(-1)),
        "o_proj": _take(layer["o_proj"], 0, o_in, np.repeat(v_factor, shared, axis=0).reshape(-1)),
        "heads": left.astype(np.int32),
        "groups": kept.astype(np.int32),
        "pairs": q_at.astype(np.int32),
    }


def _padded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For `[n, m]` values: `[n, width]` indices of the positive ones of each row, and these values; 0 where padded."""
    width = max(int((values > 0).sum(axis=1).max(initial=0)), 1)
    at = np.argsort(values <= 0, axis=1, kind="stable")[:, :width]
    return at, np.where(np.take_along_axis(values, at, axis=1) > 0, np.take_along_axis(values, at, axis=1), 0)


def _kept_features(
    is_open: Mapping[str, np.ndarray], structures: Mapping[str, Structure], config: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For one layer's open gates, bool `[out]` rows and `[in]` columns of each linear that stay: `(rows, columns)`."""
    shapes = config.site_shapes()
    rows = {site: np.ones(out, bool) for site, (_, out) in shapes.items()}
    columns = {site: np.ones(fan_in, bool) for site, (fan_in, _) in shapes.items()}
    for name, structure in structures.items():
        gates, site = is_open[name].reshape(structure.shape), structure.site
        factors = np.broadcast_to(is_open[name].reshape(structure.axes), structure.repeats).reshape(-1)
        if name == "ffn":
            columns["down_proj"] &= factors
            for linear in ("up_proj", "gate_proj"):
                if linear in rows:
                    rows[linear] &= factors
        elif name == "value":
            columns["o_proj"] &= factors
            rows["v_proj"] &= gates.reshape(-1)
            for linear in ("q_proj", "k_proj"):
                share = rows[linear].size // gates.shape[0]
                rows[linear] &= np.repeat(gates.any(axis=1), share)
        elif name == "query_key":
            rows["q_proj"] &= factors
            rows["k_proj"] &= np.repeat(gates[:, None], 2, axis=1).reshape(-1)
        elif site.endswith(".input"):
            columns[site.removesuffix(".input")] &= factors
        else:
            rows[site] &= factors
    return rows, columns

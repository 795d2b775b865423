r"""LoRATRF, *reconstructed*: LoRA with a low-rank edit of the features that a task vector points at.

The paper's text and code are not to be had; its abstract names a task-aware filter on hidden representations, task
vectors, and a low-rank edit beside LoRA. What follows is our reading. At a site with output h, `[..., d]`, and LoRA's
update s B A x,

$$ y = h + s B A x + a\, D\, C\, (c(h) \odot h), \qquad C \in R^{q \times d},\; D \in R^{d \times q}, $$

D = 0 at the start, so that training starts from the pretrained model, and c(h) the filter: the similarity of h with a
task vector, or another of `methods.adapters.filters`.
What is outer, that is, chosen on validation rows while A, B, C, D train on others:

    none         nothing: all is trained together
    vectors      the task vectors, and so what is relevant
    thresholds   tau, log T and log a of each layer
    layers       one logit a layer; the edit is multiplied by the gate n softmax, as in `methods.flexora`

After Li, Ding, Luan, Di, "Low-Rank Adaptation with Task-Relevant Feature Enhancement for Fine-tuning Language Models",
AAAI 2025 workshop CoLoRAI, arXiv 2412.09827.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import figures, lora, objective
from methods.adapters.edit_folder import save_edit
from methods.adapters.filters import FILTERS, Edit, init, scalars, task_vectors
from methods.adapters.lora import LoRAConfig
from methods.bench import Bench, check_rank
from methods.driver import Arm, Chosen, Method, Search, Tried, finetuning, searching
from methods.flexora import gate
from methods.objective import Bound, Given
from methods.pages import Page, Run
from methods.ranges import Count, Kept, Positive, one_of
from methods.runfolder import RunFolder
from methods.settings import NO_DROPOUT, NO_OUTER, Settings

Outer = Literal["none", "vectors", "thresholds", "layers"]

def bind(params: Any, hyper: Any, num_layers: int, kind: str, outer: Outer) -> Edit:
    """The hook of the problem's inner and outer variable; it comes before LoRA's."""
    numbers = scalars(num_layers) | {"gate": jnp.ones(num_layers)}
    numbers |= hyper if outer == "thresholds" else {"gate": gate(hyper)} if outer == "layers" else {}
    return Edit(params["edit"], hyper if outer == "vectors" else params["vectors"], numbers, kind)


def problem(
    given: Given,
    vectors: dict[str, jax.Array],
    shapes: Mapping[str, int],
    *,
    rank: int = 8,
    kind: str = "cosine",
    outer: Outer = "vectors",
) -> bilevel.Problem:
    """LoRATRF's problem; with outer="none" one for `bilevel.fit`.

    The inner variable is `{"adapter", "edit"}`, with `"vectors"` where these are not outer.

    Args:
      given: the model and its loss.
      vectors: where the task vectors start, `{site: [L, d]}`; `{}` for a filter without.
      shapes: `{site: d}` of what is edited: outputs of linears, or of "block_hidden", the stream after a block.
      rank: q.
      kind: of filter.
      outer: see the module.

    Raises:
      ValueError: for an outer variable that the filter does not have.
    """
    _check_outer(outer, kind)
    layers = given.num_layers

    def loss(weights, params, hyper, batch, key):
        del key
        edit = bind(params, hyper, layers, kind, outer)
        return given.loss(weights, given.bind(weights, params["adapter"], before=edit), batch)

    def init_inner(key, hyper):
        keys = jax.random.split(key)
        params = {"adapter": given.start(keys[0]), "edit": init(keys[1], shapes, layers, rank, kind)}
        return params if outer == "vectors" else params | {"vectors": vectors}

    def init_outer(key):
        none = jnp.zeros(layers)
        return {"vectors": vectors, "thresholds": scalars(layers), "layers": none, "none": ()}[outer]

    both = jax.tree_util.Partial(loss, given.weights)
    return bilevel.Problem(both, both, init_inner, init_outer)


@dataclasses.dataclass(frozen=True)
class LoRATRFSettings(Settings):
    """LoRATRF, reconstructed: train LoRA and an edit, of which a part is outer.

    Attributes:
      filter: how the edited features are chosen.
      place: "linears" edits what the adapted linears give, "stream" the residual stream after each block.
      vectors: where task vectors start: "data" is the difference of class means (the mean, without classes).
      outer: what is chosen on the outer rows; "none" trains all on the training rows.
      edit_rank: q, the rank of an edit.
      inner_steps: K, training steps between two outer steps.
      outer_steps: T, updates of the outer variable.
      inner_lr: learning rate of the search's Adam.
      outer_lr: learning rate of the Adam on the outer variable.
    """

    filter: Annotated[str, one_of(FILTERS)] = "cosine"
    place: Literal["linears", "stream"] = "linears"
    vectors: Literal["data", "random"] = "data"
    outer: Outer = "vectors"
    edit_rank: Count = 8
    inner_steps: Kept = 4
    outer_steps: Count = 6
    inner_lr: Positive = 1e-3
    outer_lr: Positive = 1e-2


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "evidence": {"train_rows": 1000, "outer_rows": 400, "test_rows": 0, "batch_size": 16, "outer_batch_size": 64}
    | {"length": 96, "finetune_steps": 400, "inner_steps": 10, "outer_steps": 60},
}
"""Settings that differ from the defaults, by preset."""


def unused(settings: LoRATRFSettings) -> dict[str, str]:
    """Options without effect, and why."""
    search = ("inner_steps", "outer_steps", "inner_lr", "outer_lr", *NO_OUTER)
    none = dict.fromkeys(search, "--outer none searches nothing") if settings.outer == "none" else {}
    without = {} if FILTERS[settings.filter].vectors else {"vectors": f"--filter {settings.filter} has no task vectors"}
    return NO_DROPOUT | none | without


def check(settings: LoRATRFSettings) -> None:
    """What is wrong with the settings whatever the model is.

    Raises:
      ValueError: for DoRA, which would turn the edit with the weights, and for an outer variable that the filter does
        not have.
    """
    if settings.adapter == "dora":
        raise ValueError("--adapter dora: the edit stands beside LoRA or rsLoRA.")
    _check_outer(settings.outer, settings.filter)


def _check_outer(outer: Outer, kind: str) -> None:
    if outer not in ("vectors", "thresholds"):
        return
    having = [name for name, filter in FILTERS.items() if getattr(filter, outer)]
    if kind not in having:
        raise ValueError(f"Outer {outer!r} needs a filter that has them, {' or '.join(having)}, not {kind!r}.")


def places(settings: LoRATRFSettings, config: Any, lora: LoRAConfig) -> dict[str, int]:
    """`{site: d}` of what is edited in a model of that config."""
    if settings.place == "stream":
        return {"block_hidden": config.hidden_size}
    return {site: config.site_shapes()[site][1] for site in lora.sites(config.site_shapes())}


def start_vectors(settings: LoRATRFSettings, bench: Bench) -> dict[str, jax.Array]:
    """Where the task vectors start, `{site: [L, d]}`; from at most 64 training rows.

    Raises:
      ValueError: if these are all of one class.
    """
    layers = bench.num_layers
    if not FILTERS[settings.filter].vectors:
        return {}
    if settings.vectors == "random":
        shapes = places(settings, bench.pretrained.config, bench.lora)
        keys = jax.random.split(jax.random.key(settings.seed), len(shapes))
        return {site: jax.random.normal(key, (layers, shapes[site])) for site, key in zip(shapes, keys, strict=True)}
    batch = jax.tree.map(lambda rows: rows[:64], bench.train)
    if bench.head is not None:
        batch = objective.single_texts(batch)
    marked, types = _share(batch.mask), {}
    if bench.head is not None:
        types = objective.token_types(bench.pretrained.model, batch)
        labels = batch.labels.astype(jnp.float32)
        first = (labels > labels.mean())[:, None] & batch.mask
        if not first.any():
            raise ValueError(
                f"The {len(labels)} training rows that task vectors start from are all of one class: give more "
                "(--train-rows), or --vectors random."
            )
        marked = _share(first) - _share(batch.mask & ~first)
    shapes = places(settings, bench.pretrained.config, bench.lora)
    variables = {"params": bench.pretrained.weights}

    def output(adapt) -> Any:
        return bench.pretrained.model.apply(variables, batch.tokens, batch.mask, adapt, method="hidden", **types)

    return task_vectors(output, marked, shapes, layers)


def _share(which: jax.Array) -> jax.Array:
    return which.astype(jnp.float32) / which.sum().astype(jnp.float32)


def of(settings: LoRATRFSettings, bench: Bench) -> bilevel.Problem:
    """The problem of these settings.

    Raises:
      ValueError: as `check` and `start_vectors`.
    """
    check(settings)
    vectors, edited = start_vectors(settings, bench), places(settings, bench.pretrained.config, bench.lora)
    options = {"rank": settings.edit_rank, "kind": settings.filter, "outer": settings.outer}
    return problem(bench.given(), vectors, edited, **options)


def solver(settings: LoRATRFSettings, problem: bilevel.Problem) -> bilevel.Nested:
    """The search as a solver."""
    estimator = bilevel.Unrolled(optax.adam(settings.inner_lr), settings.inner_steps, checkpoint="step")
    return bilevel.Nested(problem, estimator, optax.adam(settings.outer_lr))


def searches(settings: LoRATRFSettings, bench: Bench) -> list[Search]:
    """One for the outer variable, if there is one."""
    problem = of(settings, bench)  # refuses what does not fit also where nothing is searched
    return [] if settings.outer == "none" else [searching(settings, bench, solver(settings, problem))]


def choose(settings: LoRATRFSettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """What the search left of the outer variable, and LoRA beside it."""
    del tried
    problem = of(settings, bench)
    hyper = found[0].outer if found else problem.start_outer(jax.random.key(settings.seed))
    told = {"thresholds": lambda: {name: np.asarray(value) for name, value in hyper.items()}}
    told |= {"layers": lambda: {"logits": np.asarray(hyper), "gates": np.asarray(gate(hyper))}}
    selection = told.get(settings.outer, dict)()  # task vectors are in the adapter
    return Chosen(selection, [edited(settings, bench, problem, hyper), lora.control(settings, bench)])


def edited(settings: LoRATRFSettings, bench: Bench, problem: bilevel.Problem, hyper: Any) -> Arm:
    """LoRA and the edit, trained at an outer variable; it leaves the two in `adapter/`."""
    given = bench.given()

    def edit(params: Any) -> Edit:
        return bind(params, hyper, given.num_layers, settings.filter, settings.outer)

    def bound(params: Any) -> Bound:
        return given.bind(given.weights, params["adapter"], before=edit(params))

    def count(params: Any) -> dict[str, Any]:
        numbers = sum(leaf.size for leaf in jax.tree.leaves((params, hyper)))
        return {"on": lora.on(lora.everywhere(given)), "parameters": numbers}

    def export(folder: RunFolder, params: Any) -> None:
        plain, names = params["adapter"], bench.hf_names
        save_edit(folder.path / "adapter", edit(params), bench.lora, plain["lora"], names, plain["head"])

    return Arm("loratrf", finetuning(settings, bench, problem, hyper, bound), bound, count, export)


def check_model(settings: LoRATRFSettings, config: Any, lora: LoRAConfig) -> None:
    """Raises ValueError for an edit of a larger rank than what it edits."""
    widths = places(settings, config, lora)
    check_rank("--edit-rank", settings.edit_rank, {s: (d, d) for s, d in widths.items()}, list(widths))


def page(run: Run) -> Page:
    """That it is a reconstruction, its training losses and its settings."""
    settings = run.settings
    file = run.figure("training.png")
    figures.training(file, run.folder, list(run.results))
    found = (
        "This is a reconstruction: the paper's text and code were not to be had (see `methods.loratrf`). An edit "
        "behind a filter depends on its input and does not merge into the weights."
    )
    made = (
        f"Filter {settings.filter} on {settings.place}, vectors from {settings.vectors}, edit rank "
        f"{settings.edit_rank}; outer: {settings.outer}."
    )
    return Page("LoRATRF (reconstructed)", found, {file.name: "training loss"}, made)


COMMAND = Method(
    LoRATRFSettings,
    PRESETS,
    choose=choose,
    page=page,
    searches=searches,
    unused=unused,
    check=check,
    check_model=check_model,
)

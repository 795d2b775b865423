r"""FineGates: adaptation by closing gates on the rows and columns of frozen weights, which then are cut out.

Every frozen linear becomes

$$ y = \omega_r \odot (W (\omega_c \odot x) + b), \qquad W = W_0 + s B A \text{ with LoRA}, $$

with trained biases b and stochastic gates $\omega \in [0, 1]$ (`methods.adapters.gates`), and the loss

$$ L_{task} + \lambda_s \,\mathrm{mean}_{layers, structures}\, |\mathrm{mean}_d P_d - \kappa|, $$

P_d being the probability that gate d is open and kappa the share that should be. What a gate of exactly 0 closes is
taken out of the model: `methods.adapters.slicing`. The penalty can be met without one closed gate (P = 1/2 is a gate at
0), so that only counted weights are reported. Three levels:

    outer "none"       everything is trained on the training rows; as published
    outer "gates"      gates minimise the validation loss and the penalty; biases (and LoRA) are inner
    outer "sparsity"   gates are inner too; log lambda_s, and how the layers share the budget, are outer. Both
                       act in training alone, so a first-order gradient of them is exactly 0; |x| is smoothed

Svirsky, Refael, Lindenbaum, "LLMs Finetuning with (Compression using) Stochastic Gates", arXiv 2412.12951. Penalty,
gate parametrisation and start values are those of the authors' released code; tied gates are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import figures, lora
from methods.adapters import gates, slicing
from methods.adapters.gates import Bias, Structure
from methods.bench import Bench, recipe
from methods.driver import Arm, Chosen, Method, Search, Tried, finetuning, searching
from methods.models.hooks import Chain, Hook, identity
from methods.objective import Bound, Given, single_texts
from methods.pages import Page, Run
from methods.ranges import Count, Kept, NotNegative, Positive, Range, one_of
from methods.runfolder import RunFolder
from methods.settings import NO_DROPOUT, NO_OUTER, Settings

Outer = Literal["none", "gates", "sparsity"]
WIDTH = 0.05
"""Of the smoothed penalty where the layers' shares are outer: the gradient of |x| does not depend on the share."""


def hook(params: Any, values: dict[str, jax.Array], structures: dict[str, Structure], family: str, key: Any) -> Hook:
    """What comes after LoRA: biases, then gates; random with a key."""
    return Chain((Bias(params["bias"]), gates.bind(values, structures, family, key)))


def problem(
    given: Given,
    structures: dict[str, Structure],
    *,
    with_lora: bool = False,
    outer: Outer = "none",
    family: str = "stg",
    target: float = 0.4,
    weight: float = 50.0,
) -> bilevel.Problem:
    """FineGates' problem; with outer="none" one for `bilevel.fit`, whose outer variable stays as it starts.

    The inner variable is `{"adapter", "bias"}`, and `"gates"` unless they are outer; the outer one `{"gates", "key"}`,
    or `{"log_weight", "kappa", "key"}`.

    Args:
      given: the model and its loss.
      structures: what is gated: `gates.tied(config)` or `gates.untied(config)`.
      with_lora: whether LoRA is trained beside.
      outer: see the module.
      family: "stg" or "hard-concrete".
      target: share of gates to close.
      weight: lambda_s; where it is outer, its start, and its value in the outer loss.
    """
    layers, shapes = given.num_layers, given.config.site_shapes()

    def task(weights, params, values, key, batch):
        gated = hook(params, values, structures, family, key)
        return given.loss(weights, given.bind(weights, params["adapter"], after=gated), batch)

    def init_inner(key, outer_variable):
        keys = jax.random.split(key)
        adapter = given.start(keys[0]) | ({} if with_lora else {"lora": {}})
        params = {"adapter": adapter, "bias": {s: jnp.zeros((layers, out)) for s, (_, out) in shapes.items()}}
        return params if outer == "gates" else params | {"gates": gates.init(keys[1], family, structures, layers)}

    if outer == "gates":

        def inner_loss(weights, params, hyper, batch, key):
            return task(weights, params, hyper["gates"], hyper["key"], batch)

        def outer_loss(weights, params, hyper, batch, key):
            value = inner_loss(weights, params, hyper, batch, key)
            return value + weight * gates.penalty(hyper["gates"], family, 1 - target)

        def init_outer(key):
            keys = jax.random.split(key)
            return {"gates": gates.init(keys[0], family, structures, layers), "key": keys[1]}

    else:

        def inner_loss(weights, params, hyper, batch, key):
            keep, width = gates.kept_shares(target, hyper["kappa"]), 0.0 if outer == "none" else WIDTH
            loss = task(weights, params, params["gates"], hyper["key"], batch)
            return loss + jnp.exp(hyper["log_weight"]) * gates.penalty(params["gates"], family, keep, width)

        def outer_loss(weights, params, hyper, batch, key):
            # Without noise: the model as it will be used.
            loss = task(weights, params, params["gates"], None, batch)
            return loss + weight * gates.penalty(params["gates"], family, 1 - target)

        def init_outer(key):
            first = jnp.log(jnp.asarray(weight, jnp.result_type(float)))
            return {"log_weight": first, "kappa": jnp.zeros(layers), "key": key}

    losses = [jax.tree_util.Partial(loss, given.weights) for loss in (inner_loss, outer_loss)]
    return bilevel.Problem(losses[0], losses[1], init_inner, init_outer)


@dataclasses.dataclass(frozen=True)
class FineGatesSettings(Settings):
    """FineGates: close gates on frozen weights in training, cut out what is closed.

    Attributes:
      outer: "none" trains gates and biases together, as published; "gates" and "sparsity" are bilevel.
      target_sparsity: shares of gates to close, one model each.
      gating: "tied" gates can be cut out of the blocks; "untied" are the published rows and columns.
      family: of gates.
      lora: whether LoRA is trained beside.
      weight: lambda_s, of the sparsity penalty.
      gate_lr: learning rate of the gates' Adam, in training or in the search.
      inner_steps: K, training steps between two outer steps.
      outer_steps: T, updates of the outer variable.
      inner_lr: learning rate of the search's Adam on biases (and LoRA).
      outer_lr: learning rate of the Adam on log lambda_s and the layers' shares.
    """

    outer: Outer = "none"
    target_sparsity: Annotated[tuple[float, ...], Range(0, 1, below=True)] = (0.4,)
    gating: Annotated[str, one_of(gates.GATINGS)] = "tied"
    family: Annotated[str, one_of(gates.FAMILIES)] = "stg"
    lora: bool = False
    weight: NotNegative = 50.0
    gate_lr: Positive = 0.1
    inner_steps: Kept = 4
    outer_steps: Count = 6
    inner_lr: Positive = 1e-3
    outer_lr: Positive = 0.1


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "evidence": {"target_sparsity": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "gate_lr": 0.02}
    | {"train_rows": 1000, "outer_rows": 400, "test_rows": 0, "batch_size": 16, "outer_batch_size": 64, "length": 96}
    | {"finetune_steps": 400, "finetune_lr": 1e-3, "inner_steps": 10, "outer_steps": 60},
}
"""Settings that differ from the defaults, by preset."""


def unused(settings: FineGatesSettings) -> dict[str, str]:
    """Options without effect, and why."""
    search = ("inner_steps", "outer_steps", "inner_lr", "outer_lr", *NO_OUTER)
    return NO_DROPOUT | {
        "none": dict.fromkeys(search, "--outer none searches nothing"),
        "gates": {"outer_lr": "with --outer gates what is outer learns at --gate-lr"},
        "sparsity": {},
    }[settings.outer]


def check(settings: FineGatesSettings) -> None:
    """What is wrong with the settings whatever the model is.

    Raises:
      ValueError: for targets that would be one model, and for a weight of 0 where its logarithm is searched.
    """
    names = [f"{target:g}" for target in settings.target_sparsity]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--target-sparsity has {twice} twice: each target is a model, which is called by its number.")
    if settings.outer == "sparsity" and not settings.weight:
        raise ValueError("--weight 0 must be above 0 with --outer sparsity, which searches its logarithm.")


def of(settings: FineGatesSettings, bench: Bench, target: float) -> bilevel.Problem:
    """The problem of these settings at one target."""
    level = {"with_lora": settings.lora, "outer": settings.outer, "family": settings.family, "weight": settings.weight}
    return problem(bench.given(), structures(settings, bench), target=target, **level)


def structures(settings: FineGatesSettings, bench: Bench) -> dict[str, Structure]:
    """What is gated."""
    return gates.GATINGS[settings.gating](bench.pretrained.config)


def optimizer(rest: optax.GradientTransformation, gate_lr: float) -> optax.GradientTransformation:
    """Adam on what is under "gates", `rest` on everything else."""

    def labels(params):
        return {name: jax.tree.map(lambda _, name=name: name == "gates", value) for name, value in params.items()}

    return optax.partition({True: optax.adam(gate_lr), False: rest}, labels)


def solver(settings: FineGatesSettings, problem: bilevel.Problem) -> bilevel.Nested:
    """The search of a bilevel problem as a solver."""
    gated, rest = settings.outer == "gates", optax.adam(settings.inner_lr)
    inner = rest if gated else optimizer(rest, settings.gate_lr)
    estimator = bilevel.Unrolled(inner, settings.inner_steps, checkpoint="step")
    return bilevel.Nested(problem, estimator, optax.adam(settings.gate_lr if gated else settings.outer_lr))


def searches(settings: FineGatesSettings, bench: Bench) -> list[Search]:
    """One for each target, if anything is outer."""
    if settings.outer == "none":
        return []
    solvers = {target: solver(settings, of(settings, bench, target)) for target in settings.target_sparsity}
    return [searching(settings, bench, each, name=f"search {_name(target)}") for target, each in solvers.items()]


def _name(target: float) -> str:
    return f"sparsity-{target:g}"


def choose(settings: FineGatesSettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """A model for each target, at what its search found, and LoRA beside.

    Where the sparsity weight is learned, the selection tells it, and the share of gates that each layer is to keep.
    """
    del tried
    key = jax.random.key(settings.seed)
    problems = [of(settings, bench, target) for target in settings.target_sparsity]
    at = [result.outer for result in found] or [problem.start_outer(key) for problem in problems]
    models = zip(settings.target_sparsity, problems, at, strict=True)
    arms = [gated(settings, bench, problem, outer, target) for target, problem, outer in models]
    selection = {}
    if settings.outer == "sparsity":
        for arm, target, outer in zip(arms, settings.target_sparsity, at, strict=True):
            kept = np.asarray(gates.kept_shares(target, outer["kappa"]))
            selection[arm.name] = {"weight": float(jnp.exp(outer["log_weight"])), "kept": kept}
    return Chosen(selection, [lora.control(settings, bench), *arms])


def gated(settings: FineGatesSettings, bench: Bench, problem: bilevel.Problem, outer: Any, target: float) -> Arm:
    """The gated model of a target: trained, counted, cut, and saved where it can be cut."""
    given, what, family, config = bench.given(), structures(settings, bench), settings.family, bench.pretrained.config
    together = recipe(settings).optimizer()
    if settings.outer != "gates":
        together = optimizer(together, settings.gate_lr)

    def values(params: Any) -> dict[str, jax.Array]:
        return outer["gates"] if settings.outer == "gates" else params["gates"]

    def bind(params: Any) -> Bound:
        gated = hook(params, values(params), what, family, None)
        return given.bind(given.weights, params["adapter"], after=gated)

    def penalty(params: Any) -> float:
        return settings.weight * float(gates.penalty(values(params), family, 1 - target))

    def cut(params: Any) -> tuple[Any, Any]:
        weights = merged(bench, params["adapter"]["lora"])
        return slicing.cut(bench.pretrained.model, weights, values(params), what, family, params["bias"])

    def count(params: Any) -> dict[str, Any]:
        trained = params, () if "gates" in params else values(params)
        row: dict[str, Any] = {
            "on": lora.on(lora.everywhere(given)),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
            "removed": slicing.removed(values(params), what, family, config),
            "open": {s: np.asarray((gates.activation(family, l) > 0).mean(axis=1)) for s, l in values(params).items()},
        }
        if settings.gating == "tied":
            model, weights = cut(params)
            row["sliced_removed"] = 1 - slicing.parameters(weights) / slicing.whole(config)
            row["sliced_differs_by"] = difference(bench, bind(params), model, weights)
        return row

    def export(folder: RunFolder, params: Any) -> None:
        if settings.gating == "tied":
            model, weights = cut(params)
            slicing.save(folder.path / f"sliced-{target:g}", model, weights | {"classifier": params["adapter"]["head"]})

    train = finetuning(settings, bench, problem, outer, bind, optimizer=together, penalty=penalty)
    return Arm(_name(target), train, bind, count, export)


def merged(bench: Bench, params: Any) -> dict[str, Any]:
    """The model's weights with LoRA's parameters merged, if there are any."""
    weights = bench.pretrained.weights
    if not params:
        return weights
    kernels = {site: weights["blocks"][site]["kernel"] for site in bench.shapes}
    kernels = bench.lora.merge(kernels, params)
    blocks = {site: weights["blocks"][site] | {"kernel": kernel} for site, kernel in kernels.items()}
    return weights | {"blocks": weights["blocks"] | blocks}


def difference(bench: Bench, bound: Bound, model: Any, weights: Any) -> float:
    """Largest difference between the outputs of the model with a hook and of another without, on eight outer rows."""
    rows = jax.tree.map(lambda leaf: leaf[:8], bench.outer)
    rows = rows if bench.head is None else single_texts(rows)

    def outputs(model, weights, adapt):
        method = "hidden" if bench.head is None else "features"
        return np.asarray(model.apply({"params": weights}, rows.tokens, rows.mask, adapt, method=method))

    one = outputs(bench.pretrained.model, bench.pretrained.weights, bound.adapt)
    return float(np.abs(one - outputs(model, weights, identity)).max())


def page(run: Run) -> Page:
    """What was removed, where gates are open, and what the metric says to it."""
    settings = run.settings
    shown, found = {"sparsity.png": "metric against removed weights"}, []
    figures.sparsity_curve(run.figure("sparsity.png"), run.results, f"{run.bench.task.name}: what removed weights cost")
    for name, row in run.results.items():
        if "open" not in row:
            continue
        figures.gate_map(run.figure(f"gates-{name}.png"), row["open"], f"Open gates, {name}")
        shown[f"gates-{name}.png"] = f"open gates, {name}"
        text = f"- {name}: {100 * row['removed']:.1f} % of the blocks' linear weights removed (counted)"
        if "sliced_removed" in row:
            text += (
                f"; the sliced model has {100 * row['sliced_removed']:.1f} % fewer, since all heads of a layer are as "
                f"wide as the widest, and differs from the gated one by {row['sliced_differs_by']:.1e}"
            )
        found.append(text)
    level = {
        "none": "trained with the biases",
        "gates": "chosen on the outer rows",
        "sparsity": "trained at a learned sparsity weight",
    }
    made = (
        f"Gates ({settings.gating}, {settings.family}) {level[settings.outer]}, "
        f"{'with' if settings.lora else 'without'} LoRA; lambda_s {settings.weight:g}."
    )
    return Page("FineGates", "\n".join(found), shown, made)


COMMAND = Method(
    FineGatesSettings,
    PRESETS,
    choose=choose,
    page=page,
    searches=searches,
    unused=unused,
    check=check,
)

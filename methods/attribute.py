"""`bilevel attribute`: which training rows made the model answer as it does; see `methods.attribution`.

The training whose rows are judged is AdamW with a warm-up and a cosine decay, as every final training, but for two
things: its batches are whole rows in a random order, and the square root in its update is smoothed by `eps_root`,
without which the derivative of a training says little of its neighbours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods import figures, lora, pages, processes, tasks
from methods.attribution import SCORES, Training, numbered, problem
from methods.bench import Bench, recipe
from methods.datamodeling import datamodeling_score, subsets
from methods.driver import Arm, Chosen, Method, Tried
from methods.logs import LOGGER
from methods.models.hooks import identity
from methods.objective import Bound, row_losses, token_losses
from methods.pages import Page, Run
from methods.ranges import CountOrNone, NotNegative, RepeatsOrNone, Share, one_of
from methods.runfolder import RunFolder
from methods.settings import NO_DROPOUT, NO_OUTER, Settings
from methods.tasks.task import handed

SHOWN = 5
"""Rows that the page shows of those that help, and of those that harm."""
ALIKE = 30
"""Characters that all texts may begin with and are shown all the same; more of them are a template's."""
CHEAP = "gradient-product", "tracin", "random"


@dataclasses.dataclass(frozen=True)
class AttributeSettings(Settings):
    """Attribution: how much each training row helps or harms answers to questions.

    Attributes:
      train: what is trained: LoRA, or all weights of the model.
      per: a weight for each row, or for each answer token of each row.
      by: how influences are computed; "unrolled" differentiates through all steps, "replay" does so segment by segment.
      questions: so many outer rows are a question each; 0: all of them are one question.
      eps_root: what AdamW adds under its square root: larger is smoother.
      subsets: trainings on random subsets of the rows, by which the influences are tested; 0: none.
      subset_share: the share of the rows in such a subset.
      baselines: other scores beside: "cheap" are products of gradients and random numbers, "all" every one there is,
        which takes several times as long as the rest.
    """

    train: Literal["lora", "full"] = "lora"
    per: Literal["row", "token"] = "row"
    by: Annotated[str, one_of(SCORES)] = "unrolled"
    questions: CountOrNone = 10
    eps_root: NotNegative = 1e-5
    subsets: RepeatsOrNone = 0
    subset_share: Share = 0.5
    baselines: Literal["none", "cheap", "all"] = "none"


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"train_rows": 64, "outer_rows": 16},
    "evidence": {"train_rows": 256, "outer_rows": 16, "finetune_steps": 128, "subsets": 40, "baselines": "all"},
}
"""Settings that differ from the defaults, by preset."""


def unused(settings: AttributeSettings) -> dict[str, str]:
    """Options without effect, and why."""
    kept = dict.fromkeys(("validate_every", "patience"), "the training that is judged ends with its last step")
    single = {"accumulate": "a step of the training that is judged has one batch"}
    none = {} if settings.subsets else dict.fromkeys(("subset_share", "baselines"), "it takes --subsets to test scores")
    adapter = ("adapter", "targets", "rank", "lora_alpha")
    whole = dict.fromkeys(adapter, "--train full has no adapter") if settings.train == "full" else {}
    plain = {"eps_root": f"--finetune-optimizer {settings.finetune_optimizer} takes no square root"}
    plain = {} if settings.finetune_optimizer == "adamw" else plain
    return NO_OUTER | NO_DROPOUT | kept | single | none | whole | plain


def check(settings: AttributeSettings) -> None:
    """What is wrong with the settings whatever the model is.

    Raises:
      ValueError: for more questions than there are outer rows, for questions of one row on a mesh, which would split
        them, and for too few subsets to correlate.
    """
    if settings.mesh is not None and settings.questions:
        raise ValueError(
            f"--mesh splits the rows of a question over the devices, and each of --questions {settings.questions} is "
            "one row: give --questions 0, all outer rows as one question, or leave --mesh out."
        )
    if settings.outer_rows is not None:
        _check_questions(settings, settings.outer_rows)
    if 0 < settings.subsets < 3:
        raise ValueError(f"--subsets {settings.subsets} have no rank correlation to speak of: train on 3 or more.")


def _check_questions(settings: AttributeSettings, rows: int) -> None:
    """Raises ValueError for more questions than there are outer rows."""
    if settings.questions > rows:
        raise ValueError(f"--questions {settings.questions} are more than --outer-rows {rows}: each is one of these.")


def of(settings: AttributeSettings, bench: Bench) -> bilevel.Problem:
    """The problem of these settings. Raises ValueError for tokens of rows that have labels, and too many questions."""
    _check_questions(settings, len(bench.splits.outer))
    if settings.per == "token" and bench.head is not None:
        raise ValueError(f"--per token weighs answer tokens, but a row of {bench.task.name} is answered by a label.")
    given, whole, rows = bench.given(), settings.train == "full", len(jax.tree.leaves(bench.train)[0])
    each = token_losses if settings.per == "token" else row_losses
    each = partial(each, bench.pretrained.model, bench.head, bench.width)

    def model(weights: Any, params: Any) -> tuple[Any, Bound]:
        if whole:
            return params["weights"], Bound(identity, params["head"])
        return weights, given.bind(weights, params)

    def losses(weights: Any, params: Any, outer: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return each(*model(weights, params), batch)

    def question(weights: Any, params: Any, outer: Any, batch: Any) -> jax.Array:
        return given.loss(*model(weights, params), batch)

    def start(key: jax.Array) -> Any:
        if not whole:
            return given.start(key)
        return {
            "weights": jax.tree.map(lambda x: x.astype(jnp.float32), given.weights),
            "head": given.start(key)["head"],
        }

    shape = (rows, bench.width) if settings.per == "token" else rows
    return problem(losses, question, start, shape, weights=() if whole else given.weights)


def training(settings: AttributeSettings, bench: Bench) -> Training:
    """The training whose rows are judged, with its questions."""
    plan = dataclasses.replace(recipe(settings), eps_root=settings.eps_root)
    count = settings.questions or 1
    asked = jax.tree.map(lambda x: x[: settings.questions or None], bench.outer)
    return Training(
        of(settings, bench),
        plan.optimizer(),
        plan.steps,
        bilevel.Batches(numbered(bench.train), settings.batch_size),
        jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), asked),
        jax.random.key(settings.seed),
        bench.sharding,
    )


def choose(settings: AttributeSettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """Nothing: the influences are of the one training there is, which is tested."""
    del found, tried
    judged = training(settings, bench)
    given, whole = bench.given(), settings.train == "full"

    def train(folder: RunFolder, name: str) -> Any:
        found = judged.answers(judged.outer)
        folder.tell(f"finetune {name}", {"inner_loss": found.inner})
        unseen = np.setdiff1d(np.arange(len(judged.data.arrays.number)), np.asarray(judged.batches.index))
        folder.write("questions", {"loss": found.losses, "rows in no batch": unseen})
        influence(settings, judged, folder)
        return found.params

    def bind(params: Any) -> Bound:
        return Bound(identity, params["head"]) if whole else given.bind(given.weights, params)

    def count(params: Any) -> dict[str, Any]:
        everywhere = lora.everywhere(given)
        size = sum(leaf.size for leaf in jax.tree.leaves(params)) if whole else lora.parameters(bench, everywhere)
        return {"on": lora.on(everywhere), "parameters": size}

    def export(folder: RunFolder, params: Any) -> None:
        if not whole:
            lora.export_adapter(folder.path / "adapter", bench, params)

    weights = (lambda params: params["weights"]) if whole else None
    trained = Arm("trained", train, bind, count, export, weights)
    return Chosen({}, [*lora.untrained(bench), trained])


def influence(settings: AttributeSettings, judged: Training, folder: RunFolder) -> None:
    """The scores, and how well they foretell trainings on subsets; each is kept in the folder as it is found."""
    others = {"none": (), "cheap": CHEAP, "all": tuple(SCORES)}[settings.baselines]
    names = dict.fromkeys((settings.by, *others))
    scores = {}
    for number, name in enumerate(names, 1):
        if processes.is_first():
            LOGGER.info("scores by %s, %d of %d", name, number, len(names))
        scores[name] = np.asarray(folder.once(f"scores/{name}", partial(_scored, name, judged)))
    if not settings.subsets:
        return
    kept = subsets(settings.subsets, len(judged.data.arrays.number), settings.subset_share, settings.seed)
    losses = []
    for number in processes.watched("training on subsets", range(len(kept))):
        if not folder.has(name := f"subsets/{number}"):
            answers = judged.answers_without(~kept[number])
            if not np.isfinite(answers).all():
                raise FloatingPointError(
                    f"A question's loss is not finite after the training on subset {number}: lower --finetune-lr."
                )
            folder.write(name, answers)
        losses.append(folder.read(name))
    found = {name: datamodeling_score(by_row(each), kept, losses) for name, each in scores.items()}
    folder.write("datamodeling", {name: dataclasses.asdict(each) for name, each in found.items()})


def _scored(name: str, judged: Training) -> np.ndarray:
    scores = SCORES[name](judged)
    if not np.isfinite(scores).all():
        raise FloatingPointError(
            f"The scores by {name} are not finite: the training is too rough for them; lower --finetune-lr, or raise "
            "--eps-root."
        )
    return scores


def by_row(scores: np.ndarray) -> np.ndarray:
    """Scores `[Q, N]` of rows, or `[Q, N, T]` of their tokens, as those of rows."""
    return scores.reshape(*scores.shape[:2], -1).sum(axis=-1)


def page(run: Run) -> Page:
    """The rows that help and harm most, how they are spread, and how well scores foretell trainings."""
    settings = run.settings
    scores = np.asarray(run.folder.read(f"scores/{settings.by}"))
    of_rows = by_row(scores)
    mean = of_rows.mean(axis=0)
    texts, places = texts_of(run.bench), [getattr(row, "where", None) for row in run.bench.splits.train]
    lines = []
    for i in np.argsort(mean, kind="stable").tolist():
        line = {"row": i, "influence": float(mean[i]), "questions": of_rows[:, i].tolist(), "text": texts[i]}
        line |= {"where": places[i]} if places[i] else {}
        # Of the answer's tokens, from the first on.
        tokens = {"tokens": scores[:, i].mean(axis=0).tolist()} if scores.ndim == 3 else {}
        lines.append(json.dumps(line | tokens))
    run.folder.write_text("influences.jsonl", "\n".join(lines) + "\n")
    figures.influences(run.figure("influences.png"), of_rows)
    shown, trust = {"influences.png": "influence of each training row"}, ""
    if settings.subsets:
        table = run.folder.read("datamodeling")
        figures.datamodeling(run.figure("datamodeling.png"), table)
        shown["datamodeling.png"] = "linear datamodeling score"
        trust = _trust(settings, table)
    count = len(of_rows)
    asked = f"{count} questions, a validation row each" if settings.questions else "the loss on all validation rows"
    found = f"""The influence of each of {len(mean)} training rows on {asked}: by how much the loss rises for a unit of
the row's weight in training, to first order. A row below 0 helps; without it the loss would rise. Taken by
`{settings.by}`.

{rows_table(mean, texts, places)}

Of all rows, from the most helpful on, with the influence on each question: `influences.jsonl`.{_unseen(run)}"""
    smoothed = f", with eps_root {settings.eps_root:g}" if settings.finetune_optimizer == "adamw" else ""
    made = (
        f"What is judged is the training of {'LoRA' if settings.train == 'lora' else 'all weights'}, with batches of "
        f"{settings.batch_size} rows, by {pages.optimizer(settings)}{smoothed}."
    )
    return Page("Attribution", found, shown, made, trust, adapter=settings.train == "lora")


def _unseen(run: Run) -> str:
    """A sentence where the training does not come by every row."""
    unseen = run.folder.read("questions")["rows in no batch"]
    counted = f"{pages.number(len(unseen), 'row')} {'was' if len(unseen) == 1 else 'were'}"
    return f" {counted} in no batch of so short a training, with an influence of 0." if unseen else ""


def rows_table(mean: np.ndarray, texts: Sequence[str], places: Sequence[str | None]) -> str:
    """The rows that help and harm most; of texts that all begin alike, as by a template, what comes after that."""
    order: list[int] = np.argsort(mean, kind="stable").tolist()
    shown = min(SHOWN, len(order) // 2)
    alike = _beginning(texts)
    lines = ["| row | influence | text |", "|---:|---:|---|"]
    for i in [*order[:shown], *order[len(order) - shown :]]:
        place = places[i]
        where = f" ({_cell(Path(place).name)})" if place else ""
        lines.append(f"| {i}{where} | {mean[i]:+.2e} | {'…' if alike else ''}{_cell(texts[i][len(alike) :])} |")
    begins = f"\n\nWhere a text begins with … here, all rows begin alike: {_cell(alike)}" if alike else ""
    return "\n".join(lines) + begins


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with, up to the end of a line or else of a word; "" for less than a template has."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    alike = first[:length]
    return alike[: alike.rfind("\n") + 1 or alike.rfind(" ") + 1] if length > ALIKE else ""


def _cell(text: str, most: int = 90) -> str:
    """A text as a cell of a table in Markdown."""
    words = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return words if len(words) <= most else words[: most - 1] + "…"


def texts_of(bench: Bench) -> list[str]:
    """The training rows as they are read, in their order."""
    task: Any = bench.task
    rows = bench.splits.train
    if isinstance(task, tasks.LanguageModelling):
        tokenizer = bench.pretrained.tokenizer
        parts = [task.spans(handed(task.spans, row), tokenizer) for row in rows]
        return ["".join(span.text for span in row) for row in parts]
    if not isinstance(task, tasks.Classification):  # of a question the right choice alone
        return [pair.prompt + pair.answer for pair in tasks.training_pairs(task, rows, stopped=False)]
    label = lambda value: task.classes[value] if task.classes else f"{value:g}"  # noqa: E731
    return [" / ".join(str(row[field]) for field in task.fields) + f" -> {label(row['label'])}" for row in rows]


def _trust(settings: AttributeSettings, table: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| scores | linear datamodeling score | 95 % interval |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} |" for name, row in table.items()]
    return f"""The model was trained anew on {settings.subsets} random subsets of {settings.subset_share:.0%} of the
rows. The linear datamodeling score is the rank correlation, over these trainings, of a question's loss with the sum of
the influences of the rows that were there: 1 where scores foretell the order of the trainings, 0 where they know
nothing. The interval is by the bootstrap over the trainings.

""" + "\n".join(lines)


COMMAND = Method(AttributeSettings, PRESETS, choose=choose, page=page, unused=unused, check=check)

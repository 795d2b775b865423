"""What every command does with a method: search, choose, train the arms, test them, write the page.

A method is a `Method`: its settings, and functions that say what is searched, what is chosen of what was found, and
what its page tells. All else is here, once, and all of it is kept in the run folder: the same command continues a run
that was interrupted, at any moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

import bilevel
from methods import configuration, evaluation, mesh, pages, processes
from methods.bench import Bench, open_run, prepare, recipe, settled, unsettled
from methods.objective import Bound
from methods.pages import Page, Run
from methods.ranges import finite
from methods.results import checked, of_one_run
from methods.runfolder import FREE, RunFolder
from methods.settings import Settings
from methods.tasks import Buckets
from methods.tasks.batches import POOL
from methods.training import Recipe, train


class Search(NamedTuple):
    """A search that the driver runs.

    Attributes:
      name: of its rows in `metrics.jsonl`, of its checkpoints and of its progress bar.
      solver: what searches.
      steps: outer steps.
      key: as of `bilevel.run`.
      inner_data, outer_data: likewise.
      record: likewise.
    """

    name: str
    solver: Any
    steps: int
    key: jax.Array
    inner_data: Any
    outer_data: Any
    record: Callable[[Any], dict[str, Any]] | None = None


BATCH, OUTER_BATCH = "--batch-size", "--outer-batch-size"
Later = Callable[[Sequence[Any], RunFolder], Any]
"""A `Search` that is made of the results of those before it and of what it keeps in the run folder, or its result."""


class Train(Protocol):
    """A training, kept in the run folder under a name and continued from there."""

    def __call__(self, folder: RunFolder, name: str, /) -> Any:
        """What was trained."""
        ...


def _nothing(folder: RunFolder, trained: Any) -> None:
    del folder, trained


class Arm(NamedTuple):
    """A model that is trained, tested and told of: a row of the results.

    Attributes:
      name: of the row, and of the training.
      train: what makes it, as `finetuning` gives it.
      bind: `bind(trained) -> Bound`, the model that is tested.
      count: `count(trained) -> row`, what the row tells beside the test: "on", the share of each module in use,
        `{site: [L]}`; "parameters", how many were trained; and what else the method counts.
      export: `export(folder, trained)` writes what others read.
      weights: `weights(trained)`, the model's weights where these were trained; None where they are frozen.
    """

    name: str
    train: Train
    bind: Callable[[Any], Bound]
    count: Callable[[Any], dict[str, Any]]
    export: Callable[[RunFolder, Any], None] = _nothing
    weights: Callable[[Any], Any] | None = None


class Chosen(NamedTuple):
    """What came of the searches.

    Attributes:
      selection: what `selection.json` holds; there is none where it is {}.
      arms: what is trained with it, and what that is compared with.
    """

    selection: Mapping[str, Any]
    arms: Sequence[Arm]


Tried = Callable[[Arm, Mapping[str, Any]], dict[str, Any]]
"""`tried(arm, words)`: `words`, and the "validation_loss" of the arm after its training; to choose by trying."""


class Finished(NamedTuple):
    """A finished run, and what its page tells."""

    run: Run
    page: Page


def _no_search(settings: Any, bench: Bench) -> Sequence[Search | Later]:
    del settings, bench
    return ()


def _no_check(*_: Any) -> None:
    pass


def _no_options(settings: Any) -> dict[str, Any]:
    del settings
    return {}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, as the driver and the command line read it.

    Args:
      settings: a dataclass of the options, a subclass of `Settings`.
      presets: by name, the options that differ from their defaults; "demo" is one of them.
      choose: `choose(settings, bench, found, tried) -> Chosen`, `found` holding a `bilevel.Result` for each search.
      page: `page(run) -> Page`, which also draws its figures.
      searches: `searches(settings, bench)`; none by default.
      used: `used(settings)`, settings in which nothing is left open. Raises ValueError.
      unused: `unused(settings)`, options without effect, and why.
      check: `check(settings)` raises ValueError for what is wrong whatever the model is.
      check_model: `check_model(settings, config, lora)`, for what is wrong with that model, before it is loaded.
      reads: `reads(settings)`, options of `bench.prepare`.
      name: on the command line, where `bilevel NAME --config` repeats a run; "" is that of the module of `settings`.
    """

    settings: type[Settings]
    presets: Mapping[str, Mapping[str, Any]]
    choose: Callable[[Any, Bench, list[bilevel.Result], Tried], Chosen]
    page: Callable[[Run], Page]
    searches: Callable[[Any, Bench], Sequence[Search | Later]] = _no_search
    used: Callable[[Any], Any] = lambda settings: settings
    unused: Callable[[Any], Mapping[str, str]] = _no_options
    check: Callable[[Any], None] = _no_check
    check_model: Callable[[Any, Any, Any], None] = _no_check
    reads: Callable[[Any], Mapping[str, Any]] = _no_options
    name: str = ""

    def prepare(self, settings: Any) -> Bench:
        """The bench of settings, once all that can be wrong with them has been looked at.

        Raises:
          ValueError, FileNotFoundError: one sentence on what is wrong.
        """
        setup = self.used(settings)
        self.check(setup)
        reads = {"unused": self.unused(setup), **self.reads(setup)}
        return prepare(setup, lambda config, lora: self.check_model(setup, config, lora), **reads)

    @property
    def command(self) -> str:
        """Its name on the command line."""
        return self.name or self.settings.__module__.rpartition(".")[2].replace("_", "-")

    def main(self, settings: Any) -> Finished:
        """Search, choice, training, test, page: all in `settings.out`, and returned.

        Of a run that is finished there only the page is made again.

        Args:
          settings: an object of `self.settings`.

        Raises:
          ValueError, FileNotFoundError: one sentence on what is wrong.
          FloatingPointError: if a training diverges; names step and leaf.
        """
        setup = self.used(settings)
        bench, found = self.prepare(setup), unsettled(setup)
        setup = settled(setup, bench)
        searches = [
            accumulated(each, setup, bench) if isinstance(each, Search) else each
            for each in self.searches(setup, bench)
        ]
        for each in searches:  # what does not fit is refused before anything is written
            if isinstance(each, Search):
                jax.eval_shape(_start, each.solver.problem, jax.random.key(0))
            else:  # it is made later, and as a rule of these rows
                larger(bilevel.Batches(bench.train, setup.batch_size), setup.accumulate, BATCH)
                if "outer_batch_size" not in self.unused(setup):
                    larger(bilevel.Batches(bench.outer, setup.outer_batch_size), setup.accumulate, OUTER_BATCH)
        folder = open_run(setup, bench, found)
        file = folder.path / configuration.FILE
        if processes.decided(lambda: not file.exists()):
            folder.write_text(configuration.FILE, configuration.text(self.command, setup, self.settings))
        else:
            processes.decided(lambda: configuration.check(file, self.command, setup, self.settings, (*FREE, "out")))
        told = folder.finished()
        arms, selected = told or self._carry_out(setup, bench, searches, folder)
        results = {name: _result(folder, name) for name in arms}
        of_one_run({folder.path / "results" / f"{name}.json": row for name, row in results.items()})
        run = Run(setup, bench, folder, folder.read("selection") if selected else {}, results)
        page = self.page(run)
        pages.write(run, page)
        if told is None:
            with processes.attempt():
                folder.finish(arms, selected)
        if not setup.keep_checkpoints:
            folder.forget_checkpoints()
        return Finished(run, page)

    def _carry_out(
        self, setup: Any, bench: Bench, searches: Sequence[Search | Later], folder: RunFolder
    ) -> tuple[list[str], bool]:
        """Searches, chooses, trains and tests what is not in the folder yet: as `RunFolder.finished`."""
        found: list[Any] = []
        for each in searches:
            made = each if isinstance(each, Search) else each(found, folder)
            if made is not each and isinstance(made, Search):
                made = accumulated(made, setup, bench)
            if isinstance(made, Search):
                made = search(made, folder, bench.sharding, progress=not setup.quiet)
            found.append(made)
        chosen = self.choose(setup, bench, found, trying(bench, folder))
        if chosen.selection:
            with processes.attempt():
                folder.write("selection", chosen.selection)
        for arm in chosen.arms:
            folder.once(f"results/{arm.name}", partial(row, arm, bench, folder))
        return [arm.name for arm in chosen.arms], bool(chosen.selection)


def _start(problem: bilevel.Problem, key: jax.Array) -> Any:
    outer = problem.start_outer(key)
    return problem.start_inner(key, outer), outer


def searching(settings: Any, bench: Bench, solver: Any, *, name: str = "search", **other: Any) -> Search:
    """A search by the settings: `outer_steps` of batches from the training rows and the outer rows, by `seed`.

    `other` replaces what `Search` has.
    """
    by_settings: dict[str, Callable[[], Any]] = {
        "key": lambda: jax.random.key(settings.seed),
        "inner_data": lambda: bilevel.Batches(bench.train, settings.batch_size),
        "outer_data": lambda: bilevel.Batches(bench.outer, settings.outer_batch_size),
        "steps": lambda: settings.outer_steps,
    }
    return Search(name, solver, **{name: make() for name, make in by_settings.items() if name not in other}, **other)


def accumulated(each: Search, settings: Settings, bench: Bench) -> Search:
    """A search each of whose losses is over `--accumulate` batches at once, with the memory of one.

    Raises:
      ValueError: if there are not so many rows.
    """
    if settings.accumulate == 1:
        return each
    problem = each.solver.problem
    losses = {name: over_batches(getattr(problem, name), settings, bench) for name in ("inner_loss", "outer_loss")}
    solver = dataclasses.replace(each.solver, problem=dataclasses.replace(problem, **losses))
    return each._replace(
        solver=solver,
        inner_data=larger(each.inner_data, settings.accumulate, BATCH),
        outer_data=larger(each.outer_data, settings.accumulate, OUTER_BATCH),
    )


def over_batches(loss: Any, settings: Settings, bench: Bench) -> Any:
    """A loss over `--accumulate` batches at once, with the memory of one."""
    if settings.accumulate == 1:
        return loss
    # The mean over all answer tokens is that of the batches' means, each counted by its tokens.
    by_rows = bench.head is not None or bench.row_means
    weight = None if by_rows else lambda batch: getattr(batch, "rows", batch).answer_mask.sum()
    return bilevel.MicroBatches(loss, settings.accumulate, weight=weight)


def larger(data: Any, count: int, option: str) -> Any:
    """Batches of `count` times as many rows.

    Raises:
      ValueError: if there are not so many rows; `option` is what the size of a batch was given by.
    """
    rows = len(jax.tree.leaves(data.arrays)[0])
    if 1 < count and count * data.size > rows:
        raise ValueError(
            f"--accumulate {count} batches of {option} {data.size} are more than the {rows} rows they are drawn "
            "from: lower one of the two, or give more rows."
        )
    return type(data)(data.arrays, count * data.size)


def search(
    each: Search, folder: RunFolder, sharding: bilevel.Sharding | None = None, *, progress: bool = True
) -> bilevel.Result:
    """Runs a search; kept in the run folder and continued from there."""
    processes.tell(f"compiling {each.name}")
    return bilevel.run(
        each.solver,
        inner_data=mesh.shared(each.inner_data, sharding),
        outer_data=mesh.shared(each.outer_data, sharding),
        steps=each.steps,
        key=each.key,
        callbacks=folder.callbacks(each.name),
        checkpoint_dir=folder.path / "checkpoints" / each.name.replace(" ", "-"),
        record=each.record,
        title=each.name,
        sharding=sharding,
        progress=progress,
    )


def finetuning(
    settings: Settings,
    bench: Bench,
    problem: bilevel.Problem,
    outer: Any,
    bind: Callable[[Any], Bound],
    *,
    optimizer: optax.GradientTransformation | None = None,
    plan: Recipe | None = None,
    penalty: Callable[[Any], float] = lambda params: 0.0,
) -> Train:
    """The final training: the inner loss of `problem` at a constant `outer`; gives the inner variable.

    Args:
      settings, bench: of the run.
      problem, outer: what is trained, and where.
      bind: the model whose loss over all outer rows a validation looks at, where the settings ask for some.
      optimizer: in place of the recipe's.
      plan: in place of the settings' recipe.
      penalty: what a validation adds to that loss.
    """
    plan = recipe(settings) if plan is None else plan

    def train_at(folder: RunFolder, name: str) -> Any:
        return train(
            problem,
            outer,
            Buckets(bench.train, settings.batch_size, seed=settings.seed, pool=POOL if plan.by_length else 1),
            plan,
            folder,
            name,
            key=jax.random.key(settings.seed + 1),
            validate=lambda params: evaluation.validation_loss(bench, bind(params)) + penalty(params),
            optimizer=optimizer,
            sharding=bench.sharding,
            progress=not settings.quiet,
        )

    return train_at


def row(arm: Arm, bench: Bench, folder: RunFolder) -> dict[str, Any]:
    """Trains, exports and tests an arm: its row of the results."""
    trained: Any = None

    def make() -> None:
        nonlocal trained
        trained = arm.train(folder, arm.name)
        arm.export(folder, trained)

    left = folder.made_by(make)
    processes.tell(f"testing {arm.name} on {pages.tested(bench)}")
    test = evaluation.evaluate(_with_weights(arm, bench, trained), arm.bind(trained))
    counted = arm.count(trained)
    made: dict[str, Any] = {"layers": _layers(counted["on"])} | counted | evaluation.row(test)
    sizes = {"layers": len(made["layers"]), "parameters": made["parameters"]}
    folder.track(f"test {arm.name}", {**made["metrics"], **sizes})
    return made | ({"files": left} if left else {})


def _result(folder: RunFolder, name: str) -> dict[str, Any]:
    """A row of the results as the page of the run needs it.

    Raises:
      ValueError: if it is not.
    """
    found, file = folder.read(f"results/{name}"), folder.path / "results" / f"{name}.json"
    try:
        made = checked(file, found)
        if not made.get("metrics") or not isinstance(made.get("layers"), list):
            raise ValueError(f"{file} is no result of this program: it lacks its layers or its metrics.")
        if "right" not in made:
            raise ValueError(f"{file} is no result of this program: it does not tell what it got right.")
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; delete it to have it made again.") from None
    return made


def _with_weights(arm: Arm, bench: Bench, trained: Any) -> Bench:
    if arm.weights is None:
        return bench
    return bench._replace(pretrained=dataclasses.replace(bench.pretrained, weights=arm.weights(trained)))


def _layers(on: Mapping[str, Any]) -> list[int]:
    """The layers in which any module is in use, of `{site: [L]}`."""
    return np.flatnonzero(np.any([np.asarray(each) > 0 for each in on.values()], axis=0)).tolist()


def trying(bench: Bench, folder: RunFolder) -> Tried:
    """What trains an arm and tells its validation loss, `tried/<name>.json`."""

    def tried(arm: Arm, words: Mapping[str, Any]) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            bound = arm.bind(arm.train(folder, arm.name))
            return {**words, "validation_loss": evaluation.validation_loss(bench, bound)}

        found = folder.once(f"tried/{arm.name}", make)
        if not isinstance(found, dict) or not finite(found.get("validation_loss")):
            file = folder.path / "tried" / f"{arm.name}.json"
            raise ValueError(f"{file} tells no validation loss: delete it to have it made again.")
        return found

    return tried

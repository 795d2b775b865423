"""Optuna: a trial is told how its run goes, and ends it where it is not worth going on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilevel.running.trackers.base import Tracker
from bilevel.settings.fields import checked
from bilevel.settings.numeric import integer


class _UnknownMetric(ValueError):
    """The user's error, and not a failure of the service."""


class OptunaPruning(Tracker):
    r"""Reports the outer loss of a run to an Optuna trial, which may end it: a study that prunes, around `run`.

    Optuna searches what has no gradient (inner steps, ranks, optimizers, batch sizes); inside each trial the engine
    finds the rest by its hypergradient. At every step s that is a multiple of `every` the trial is told

    $$ \frac{1}{n} \sum_{i = s - n + 1}^{s} \text{metric}_i, \qquad n = \text{every}, $$

    the mean since the last report: the outer loss of one mini-batch is too noisy to prune by. (Where a run is resumed
    between two reports, the mean is over the steps since then.) If the study's pruner then says so, the run ends
    between two steps. With `checkpoint_dir` its state is saved, as after an interrupt. Where the run is called with
    `callback_every=n`, rows come n at a time, and a run may go on for up to n - 1 steps after the step that ends it.

    Args:
      trial: the trial, as `study.ask()` or an objective function gives it.
      metric: a name in `Result.history`.
      every: steps between two reports.

    Returns:
      A callback of `run` or `fit`. The settings of the solver are kept as the trial's user attribute "settings".

    Raises:
      ModuleNotFoundError: if optuna is not installed; says how to install it.
      ValueError: for a study of several objectives, which Optuna does not prune; in the run, for a metric that it does
        not have.
      optuna.TrialPruned: by the run, when the trial should be pruned.

    Examples:
      >>> import importlib.util, bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> def objective(trial):
      ...     inner = bilevel.Unrolled(optax.sgd(0.5), trial.suggest_int("inner_steps", 1, 20))
      ...     solver = bilevel.Nested(problem, inner, optax.sgd(1.0))
      ...     watch = [bilevel.OptunaPruning(trial, every=5)]
      ...     data = {"inner_data": train, "outer_data": val, "progress": False}
      ...     return float(bilevel.run(solver, steps=10, callbacks=watch, **data).history["outer_loss"][-1])
      >>> if importlib.util.find_spec("optuna"):  # pip install 'bilevel[bench]'
      ...     import optuna
      ...     optuna.logging.set_verbosity(optuna.logging.WARNING)
      ...     study = optuna.create_study(pruner=optuna.pruners.MedianPruner())
      ...     study.optimize(objective, n_trials=2)
      >>> callable(bilevel.OptunaPruning)
      True
    """

    def __init__(self, trial: Any, metric: str = "outer_loss", *, every: int = 1):
        try:
            import optuna
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "optuna is not installed, which bilevel.OptunaPruning reports to: pip install 'bilevel[bench]'."
            ) from None
        self._every = checked("OptunaPruning", "every", every, integer(1))
        if len(getattr(getattr(trial, "study", None), "directions", ())) > 1:
            raise ValueError("OptunaPruning(trial=...): its study has several objectives, and Optuna prunes by one.")
        self._trial, self._metric, self._pruned = trial, metric, optuna.TrialPruned
        self._values: list[float] = []
        self.stops = (optuna.TrialPruned, _UnknownMetric)

    def begin(self, settings: Mapping[str, Any], start: int) -> int:
        """Keeps the settings with the trial; the storage knows the last report."""
        self._values = []
        self._trial.set_user_attr("settings", dict(settings))
        study = getattr(self._trial, "study", None)  # a trial of fixed values has none
        known = study.get_trials(deepcopy=False)[self._trial.number].intermediate_values if study else {}
        return max(known, default=0)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Reports at every so many steps, and asks whether to go on."""
        if self._metric not in row:
            raise _UnknownMetric(
                f"OptunaPruning(metric={self._metric!r}): the run has no such metric; it has {', '.join(row)}."
            )
        self._values.append(row[self._metric])
        if step % self._every:
            return
        mean = sum(self._values) / len(self._values)
        self._values = []
        self._trial.report(mean, step)
        if self._trial.should_prune():
            raise self._pruned(f"{self._metric} is {mean:.4g} after step {step}.")

    def end(self, error: BaseException | None) -> None:
        """Nothing: the study tells the trial's end."""

"""Weights & Biases: a run of a project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilevel.running.trackers.base import Tracker


class WandB(Tracker):
    """Logs the metrics of a run to Weights & Biases, and its settings as the run's config.

    Who is logged in, and where to, is W&B's own matter (`wandb login`, `WANDB_MODE=offline`).

    Args:
      project: the project; made if it is not there.
      name: of the run there; one is drawn by W&B if None.
      group: runs of the same group stand together.
      id: what the run is known by. The same id goes on with the run of that id, so give one where a run is resumed
        from a `checkpoint_dir`; None is a new run at each start. A run that is only on this disk (offline) does not
        know what an earlier process has logged: rows that a resumed run comes by again are then logged again.
      settings: what is told beside the solver's own settings.

    Raises:
      ModuleNotFoundError: if wandb is not installed; names the extra that brings it.

    As every `bilevel.extend.Tracker` it is told each step once, arrays by their norm, and a failure is one warning.

    Examples:
      >>> import bilevel
      >>> def callbacks(id):  # W&B asks who you are when the first row is logged, not here
      ...     return [bilevel.WandB("ridge", name="soba", id=id)]
      >>> issubclass(bilevel.WandB, bilevel.extend.Tracker)
      True
    """

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        group: str | None = None,
        id: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        try:
            import wandb  # pyright: ignore
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "wandb is not installed, which bilevel.WandB logs with: pip install 'bilevel[wandb]'."
            ) from None
        self.settings = dict(settings or {})
        self._service, self._id = wandb, id
        self._arguments = {"project": project, "name": name, "group": group, "id": id}
        self._run: Any = None

    def begin(self, settings: Mapping[str, Any], start: int) -> int:
        """Starts the run, or goes on with that of the same id; W&B knows its next step."""
        resume = None if self._id is None else "allow"
        config = dict(settings)
        # A run of its own, even where the user's program has one open already.
        self._run = self._service.init(**self._arguments, config=config, resume=resume, reinit="create_new")
        return max(0, self._run.step - 1) if self._run.resumed else 0

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Logs the numbers at that step."""
        self._run.log(dict(row), step=step)

    def end(self, error: BaseException | None) -> None:
        """Finishes the run there."""
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
            self._run = None

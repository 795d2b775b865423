"""MLflow: a run of an experiment."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from bilevel.running.trackers.base import Tracker

TAG = "bilevel.id"
"""Of a run there, under which the id that was given is kept: MLflow gives runs ids of its own."""
_MOST_METRICS, _MOST_PARAMS, _LONGEST = 1000, 100, 500
"""What MLflow takes in one request, and of one value."""


class MLflow(Tracker):
    """Logs the metrics of a run to MLflow, and its settings as the run's parameters.

    Args:
      experiment: its name; made if it is not there.
      name: of the run there; one is drawn by MLflow if None.
      id: what the run is known by, kept as its tag `bilevel.id`. The same id goes on with the run of that id, so give
        one where a run is resumed from a `checkpoint_dir`; None is a new run at each start.
      uri: of the server or the store; None is what MLflow takes by itself: `MLFLOW_TRACKING_URI`, or a local file.
      settings: what is told beside the solver's own settings.

    Raises:
      ModuleNotFoundError: if mlflow is not installed; names the extra that brings it.

    Rows are sent together, once a call of the callback: with a server give `run(callback_every=...)`. Characters in a
    name that MLflow does not take become "_". As every `bilevel.extend.Tracker` it is told each step once, arrays by
    their norm, and a failure is one warning.

    Examples:
      >>> import bilevel
      >>> def callbacks(id):  # nothing is sent before the first row
      ...     return [bilevel.MLflow("ridge", name="soba", id=id, uri="sqlite:///runs.db")]
      >>> issubclass(bilevel.MLflow, bilevel.extend.Tracker)
      True
    """

    def __init__(
        self,
        experiment: str,
        *,
        name: str | None = None,
        id: str | None = None,
        uri: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        try:
            import mlflow  # pyright: ignore
            import mlflow.entities  # pyright: ignore
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "mlflow is not installed, which bilevel.MLflow logs with: pip install 'bilevel[mlflow]'."
            ) from None
        self.settings = dict(settings or {})
        self._service, self._experiment, self._name, self._uri = mlflow, experiment, name, uri
        self._id = None if id is None else id.replace("'", "_")  # it stands between quotes in a query
        self._client: Any = None
        self._run: str | None = None
        self._waiting: list[Any] = []

    def begin(self, settings: Mapping[str, Any], start: int) -> int:
        """Makes the run, or goes on with that of the same id."""
        self._waiting, self._run = [], None
        client = self._client = self._service.MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        known = []
        if self._id is not None:
            wanted = f"tags.`{TAG}` = '{self._id}'"
            known = client.search_runs([experiment], filter_string=wanted, max_results=1)
        if known:
            self._run = known[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            name = min(known[0].data.metrics, default=None)  # every row has all names
            return 0 if name is None else max(m.step for m in client.get_metric_history(self._run, name))
        tags = {} if self._id is None else {TAG: self._id}
        self._run = client.create_run(experiment, run_name=self._name, tags=tags).info.run_id
        entities = self._service.entities
        params = [entities.Param(_name(name), str(value)[:_LONGEST]) for name, value in settings.items()]
        for i in range(0, len(params), _MOST_PARAMS):
            client.log_batch(self._run, params=params[i : i + _MOST_PARAMS])
        return 0

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Keeps the numbers until `flush`."""
        now = round(1000 * time.time())
        self._waiting += [self._service.entities.Metric(_name(name), x, now, step) for name, x in row.items()]

    def flush(self) -> None:
        """Sends the rows."""
        while self._waiting:
            self._client.log_batch(self._run, metrics=self._waiting[:_MOST_METRICS])
            del self._waiting[:_MOST_METRICS]

    def end(self, error: BaseException | None) -> None:
        """Ends the run there."""
        if self._run is not None:
            self._client.set_terminated(self._run, "FINISHED" if error is None else "FAILED")


def _name(name: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", name)

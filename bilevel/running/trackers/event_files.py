"""TensorBoard: event files in a folder, written by tensorboard's own writer, without TensorFlow or torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel.running.trackers.base import Tracker


class TensorBoard(Tracker):
    """Writes the metrics of a run as event files, which `tensorboard --logdir folder` shows while it goes.

    Args:
      folder: where the files are; made with the first row. One folder is of one run. A run that is resumed adds what
        is not there yet; one that begins anew takes the place of what is there, which is then hidden, not deleted.
      settings: what is told beside the solver's own settings, in the tab "Text".

    Raises:
      ModuleNotFoundError: if tensorboard is not installed; names the extra that brings it.

    As every `bilevel.extend.Tracker` it is told each step once, arrays by their norm, and a failure is one warning.

    Examples:
      >>> import importlib.util, tempfile, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.SOBA(problem, inner_step=0.5, outer_step=0.5)
      >>> there = importlib.util.find_spec("tensorboard") is not None  # pip install 'bilevel[tensorboard]'
      >>> callbacks = [bilevel.TensorBoard(tempfile.mkdtemp())] if there else []
      >>> data = {"inner_data": train, "outer_data": val, "progress": False}
      >>> len(bilevel.run(solver, steps=3, callbacks=callbacks, **data).history["outer_loss"])
      3
    """

    def __init__(self, folder: str | Path, *, settings: Mapping[str, Any] | None = None):
        try:
            import tensorboard.backend.event_processing.event_file_loader as loading  # pyright: ignore
            import tensorboard.compat.proto.event_pb2 as events  # pyright: ignore
            import tensorboard.compat.proto.summary_pb2 as summaries  # pyright: ignore
            import tensorboard.compat.proto.tensor_pb2 as tensors  # pyright: ignore
            import tensorboard.summary.writer.event_file_writer as writing  # pyright: ignore
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "tensorboard is not installed, which bilevel.TensorBoard writes with: "
                "pip install 'bilevel[tensorboard]'."
            ) from None
        self.folder, self.settings = Path(folder), dict(settings or {})
        self._loader, self._writer_of = loading.LegacyEventFileLoader, writing.EventFileWriter
        self._events, self._summaries, self._tensors = events, summaries, tensors
        self._writer: Any = None

    def begin(self, settings: Mapping[str, Any], start: int) -> int:
        """Opens a new event file, after the older ones of the folder have been read for their last step."""
        last = self._last_step() if start else 0
        self._writer = self._writer_of(str(self.folder))
        if not start:
            # What lies in older files from this step on is no longer shown.
            session = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=1, session_log=session)
        table = "\n".join(["| setting | value |", "|---|---|", *(f"| {n} | {v} |" for n, v in settings.items())])
        self._add(step=start, summary=self._summaries.Summary(value=[self._text("settings", table)]))
        return last

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """One event with the row's numbers."""
        values = [self._summaries.Summary.Value(tag=name, simple_value=x) for name, x in row.items()]
        self._add(step=step, summary=self._summaries.Summary(value=values))

    def flush(self) -> None:
        """Puts the rows into the file."""
        self._writer.flush()

    def end(self, error: BaseException | None) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, **parts: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), **parts))

    def _text(self, tag: str, text: str) -> Any:
        """A summary that the tab "Text" shows."""
        of_plugin = self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        # 7 is the number of the type of strings.
        tensor = self._tensors.TensorProto(dtype=7, string_val=[text.encode()])
        metadata = self._summaries.SummaryMetadata(plugin_data=of_plugin)
        return self._summaries.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)

    def _last_step(self) -> int:
        """The last step of which the event files of the folder hold numbers."""
        last = 0
        # Their names begin with the second in which they were made, and end with a number that grows.
        for file in sorted(self.folder.glob("events.out.tfevents.*")):
            for event in self._loader(str(file)).Load():
                if event.HasField("session_log") and event.session_log.status == self._events.SessionLog.START:
                    last = 0
                elif any(value.HasField("simple_value") for value in event.summary.value):
                    last = max(last, event.step)
        return last

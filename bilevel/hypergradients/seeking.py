"""An iterator that can go back, as a function of the step: what a replay of a training asks again for its batches."""

from __future__ import annotations

from typing import Any


def is_seekable(source: Any) -> bool:
    """Whether it is an iterator with `get_state` and `set_state`."""
    return all(hasattr(source, name) for name in ("__next__", "get_state", "set_state"))


class Seeking:
    """`batch(step)` of an iterator: step 0 is the batch that it would give now.

    Before the first time of each step the iterator's state is noted, whatever it is made of; a step that is asked for
    again is read from there. A step that is far ahead is reached by reading those before it.

    Args:
      source: the iterator. Nobody else may move it meanwhile.
    """

    def __init__(self, source: Any):
        self.source, self._states = source, [source.get_state()]

    def __call__(self, step: int) -> Any:
        for known in range(len(self._states) - 1, step):
            self._read(known)
        return self._read(step)

    def _read(self, step: int) -> Any:
        self.source.set_state(self._states[step])
        try:
            found = next(self.source)
        except StopIteration:
            raise ValueError(f"The iterator of inner batches has no batch of inner step {step}: it ended.") from None
        if step + 1 == len(self._states):
            self._states.append(self.source.get_state())
        return found

    def leave(self, steps: int) -> None:
        """Sets the iterator to where reading `steps` batches leaves it, if they were read."""
        self.source.set_state(self._states[min(steps, len(self._states) - 1)])

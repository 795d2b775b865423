"""Results of trained models, as `results/<arm>.json` holds them: read with care, and those of many as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from methods import units
from methods.figures import DRAWN
from methods.integrity import read_json
from methods.pages import UNTRAINED, loss_difference
from methods.ranges import finite

LARGEST = 2**53
"""Most parameters of a model: integers up to here are floats too, which figures are drawn of."""


class Row(NamedTuple):
    """One trained model of one run: what `results/<arm>.json` holds, and where it comes from.

    Attributes:
      run: the name of its folder.
      arm: its own name.
      config: the settings of the run.
      result: what it is worth.
      method: the command that made the run; "" where that is not known.
      path: the folder; None where that does not matter.
      place: which of the runs it is of, as they were given, and which of that run's models it is.
      made_of: what decides the result but for the seed, with the settings as they were asked for and with those that
        were used; None where that is not known.
    """

    run: str
    arm: str
    config: dict[str, Any]
    result: dict[str, Any]
    method: str = ""
    path: Path | None = None
    place: tuple[int, int] = (0, 0)
    made_of: tuple[str, str] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What it is measured by, what ranks it first; the share of right answers where a result names no metrics."""
        score = self.result.get("accuracy")
        named = self.result.get("metrics") or ({"accuracy": score["value"]} if score else {})
        return {name: float(value) for name, value in named.items()}

    @property
    def worth(self) -> tuple[str, float]:
        """The metric that ranks it, and its value."""
        return next(iter(self.metrics.items()), ("accuracy", float("nan")))

    @property
    def base(self) -> str:
        """The name of the model it was trained from."""
        return Path(self.config["model"]).name


class Read(NamedTuple):
    """What was found in run folders.

    Attributes:
      rows: every finished model, run by run.
      left_out: a sentence for each folder, or file in it, that gives none.
      unfinished: runs whose own page is not written yet, so that models may be missing.
    """

    rows: list[Row]
    left_out: list[str]
    unfinished: list[Path]


def read(file: Path) -> dict[str, Any]:
    """What a file holds, `checked`. Raises ValueError."""
    return checked(file, read_json(file))


def checked(file: Path, result: Any) -> dict[str, Any]:
    """A result out of a file, all of which that pages show is what it should be.

    Raises:
      ValueError: if it is not, by the file and what is wrong in it.
    """
    if not isinstance(result, dict) or not _is_count(result.get("parameters")):
        raise ValueError(f"{file} is no result of this program: it counts no parameters.")
    score, metrics, on = (result.get(name) for name in ("accuracy", "metrics", "on"))
    parts = ("value", "low", "high", "correct", "total")
    if score is not None and not (
        isinstance(score, Mapping)
        and all(_is_share(score.get(name)) for name in parts[:3])
        and all(_is_count(score.get(name)) for name in parts[3:])
    ):
        raise ValueError(f"{file} is no result of this program: its accuracy lacks one of {', '.join(parts)}.")
    if metrics is not None and not (isinstance(metrics, Mapping) and all(map(_is_number, metrics.values()))):
        raise ValueError(f"{file} is no result of this program: its metrics are no numbers.")
    if on is not None and not (isinstance(on, Mapping) and all(map(_are_shares, on.values()))):
        raise ValueError(f"{file} is no result of this program: its modules are no lists of numbers.")
    right, losses, tokens = (result.get(name) for name in ("right", "losses", "tokens"))
    if right is not None and not _are_answers(right):
        raise ValueError(f"{file} is no result of this program: what it got right is no list of 0 and 1.")
    if right is not None and (score is None or (score["correct"], score["total"]) != (sum(right), len(right))):
        raise ValueError(f"{file} is no result of this program: its accuracy is not that of what it got right.")
    if not (losses is None and tokens is None) and not _are_losses(losses, tokens, right):
        raise ValueError(f"{file} is no result of this program: its losses and tokens are not a number for each row.")
    if not _is_count(result.get("cut", 0)):
        raise ValueError(f"{file} is no result of this program: it does not count the texts that were cut.")
    return result


def of_one_run(results: Mapping[Path, Mapping[str, Any]]) -> None:
    """Makes sure that the models of a run were tested by the same metrics, on the same rows.

    Args:
      results: `checked`, by their files.

    Raises:
      ValueError: if they were not, by the two files that differ.
    """
    parts = {
        "metrics": lambda row: sorted(row["metrics"]),
        "test rows": lambda row: (len(row.get("right") or ()), row.get("tokens")),
    }
    if not results:  # of a run that only searched
        return
    first = next(iter(results))
    for what, told in parts.items():
        for file, row in results.items():
            if told(row) != told(results[first]):
                raise ValueError(
                    f"{file} tells of other {what} than {first.name}: delete the one of them that was changed to have "
                    "it made again."
                )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _are_answers(right: Any) -> bool:
    """Whether it says of each question, of which there are some, whether the answer was right: 0 or 1."""
    return isinstance(right, list) and bool(right) and all(_is_count(each) and each <= 1 for each in right)


def _are_losses(losses: Any, tokens: Any, right: list[int] | None) -> bool:
    """Whether they are a loss and a count of tokens for each of some rows; a loss may be infinite, or NaN."""
    if not isinstance(losses, list) or not isinstance(tokens, list) or not 0 < len(losses) == len(tokens):
        return False
    if right is not None and len(right) != len(losses):
        return False
    return all(map(_is_number, losses)) and all(map(_is_count, tokens)) and sum(tokens) > 0


def _is_share(value: Any) -> bool:
    """Whether it is near a share: what is asked for is that it can be drawn."""
    return finite(value) and -1 <= value <= 2


def _are_shares(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_share, values))


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can be; one that is not finite is told as such."""
    return finite(value) or isinstance(value, float)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(finite(value) and abs(value) < DRAWN for value in values)


class Table(NamedTuple):
    """Models as a table.

    Attributes:
      titles: of the columns.
      rows: a cell for each of them.
      numbers: which columns are numbers.
      notes: a sentence on each kind of what is shown.
    """

    titles: list[str]
    rows: list[list[str]]
    numbers: list[int]
    notes: list[str]


NAMES = ("run", "method", "model", "base", "task")


def table(rows: Sequence[Row]) -> Table:
    """A line for each model, and a column for each metric that any of them has."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    shares = list(dict.fromkeys(share for row in rows if (share := units.share_of(row.result)) is not None))
    differences = _differences(rows)
    titles = [*NAMES, "adapter parameters", *metrics, *(f"95 % interval of {share}" for share in shares)]
    titles += ["right"] * bool(shares) + ["difference in loss"] * bool(differences)
    cells = []
    for row in rows:
        line = [row.run, row.method, row.arm, row.base, row.config["task"], f"{row.result['parameters']:,}"]
        line += [units.of(name).alone(row.metrics[name]) if name in row.metrics else "" for name in metrics]
        own = units.share_of(row.result)
        line += [units.interval(row.result, " %") if share == own else "" for share in shares]
        if shares:
            line.append("{correct}/{total}".format(**row.result["accuracy"]) if own else "")
        if differences:
            line.append(differences.get((row.place[0], row.arm), ""))
        cells.append(line)
    notes = []
    if any(name in units.UNITS for name in metrics):
        notes.append(units.told(metrics))
    if shares:
        notes.append("Intervals of shares are Wilson's 95 % binomial intervals.")
    if differences:
        notes.append(
            "Difference in loss: from the first model that the run trained, over the same test rows, in nats a token, "
            "with its paired 95 % interval; below 0 the model is better than that one."
        )
    if len({row.place[0] for row in rows}) > 1:
        notes.append("Runs on the same data with the same --test-rows share test rows, whatever their seeds.")
    return Table(titles, cells, list(range(len(NAMES), len(titles))), notes)


def _differences(rows: Sequence[Row]) -> dict[tuple[int, str], str]:
    """By run and name, how much the loss of a model is beyond that of the first that its run trained."""
    found: dict[tuple[int, str], str] = {}
    for run in dict.fromkeys(row.place[0] for row in rows):
        measured = sorted((row for row in rows if row.place[0] == run and _has_losses(row)), key=lambda row: row.place)
        measured.sort(key=lambda row: row.arm == UNTRAINED)  # what was trained first
        for row in measured[1:]:
            first, counts = measured[0], row.result["tokens"]
            if first.result["tokens"] == counts:  # the same rows
                gap, half = loss_difference(row.result["losses"], first.result["losses"], counts)
                found[run, row.arm] = f"{gap:+.4f} ({gap - half:+.4f} to {gap + half:+.4f})"
    return found


def _has_losses(row: Row) -> bool:
    return _are_numbers(row.result.get("losses"))

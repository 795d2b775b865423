"""What was measured: one JSON object a line, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PACKAGES = ("jax", "optax", "torch", "torchopt", "higher", "jaxopt", "optimistix", "equinox")


class Record:
    """The rows of a file. A last line that was cut short is dropped, and measured again.

    Raises:
      ValueError: for a line that is no JSON object, or no text.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if not path.exists():
            return
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON: remove the line, and it is measured again."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number} is {row!r:.40} and no row: remove the line, and it is measured again."
                )
            self.rows.append(row)
        if cut:  # otherwise left alone, for another process may be adding to it
            self._write("w", self.rows)

    def add(self, rows: list[Row]) -> None:
        """Appends rows, to the file as well."""
        self.rows += rows
        self._write("a", rows)

    def find(self, **wanted: Any) -> list[Row]:
        """The rows that have all these entries."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())]

    def one(self, **wanted: Any) -> Row | None:
        """The last measured row with these entries; None if there is none."""
        found = [row for row in self.find(**wanted) if "seconds" in row or "temporary" in row]
        return found[-1] if found else None

    def _write(self, mode: str, rows: list[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(short(row)) + "\n" for row in rows)


def seconds_left(record: Record, jobs: Iterable[Row], *alike: str) -> float:
    """What `jobs` will take: each the mean of the rows that are `alike` in these entries, or of all; NaN without."""

    def mean(rows: list[Row]) -> float:
        times = [row["seconds"] for row in rows if "seconds" in row]
        return sum(times) / len(times) if times else float("nan")

    each = mean(record.rows)
    return sum(mean(found) if (found := record.find(**{k: job[k] for k in alike})) else each for job in jobs)


def clock(seconds: float) -> str:
    """`1:05 h`; a question mark for NaN."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d} h" if seconds == seconds else "? h"


def machine() -> Row:
    """When and where it is measured, and with which versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    system = f"{platform.machine()}, {platform.system()}"
    today = datetime.date.today().isoformat()
    return {"section": "machine", "date": today, "system": system, "versions": versions}


def short(value: Any) -> Any:
    """Six digits are more than a measurement has; gradients and settings, which are compared, keep all."""
    if isinstance(value, dict):
        return {k: v if k in ("grad", "settings") else short(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [short(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value

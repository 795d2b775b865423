"""Records out of files and off the hub, one by one, each with the place that it is from.

A record is what one line of a JSON Lines file holds, one object of a JSON array, one line of a CSV file under the names
of its first, or one row of a Parquet file: names and values. What they mean is `methods.tasks.own`'s.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Records = Iterator[tuple[str, Record]]
"""`(where, record)`, `where` naming the file and the line or row."""

MOST_BYTES = 4_000_000
"""Of a record: no text that long fits any model."""


def json_lines(file: Path, skip_blank: bool = False) -> Records:
    """The objects of a JSON Lines file; with `skip_blank`, lines of nothing but spaces are passed over.

    Raises:
      ValueError: for a line that is no JSON object or longer than a row can be, with file and line.
    """
    with file.open("rb") as lines:
        # Never more of a line than a row can have: what comes from a stranger may be of any size.
        for number, line in enumerate(iter(partial(lines.readline, MOST_BYTES + 1), b""), 1):
            where = f"{file} line {number}"
            if len(line) > MOST_BYTES:
                raise ValueError(f"{where} is longer than a row can be, {MOST_BYTES / 1e6:.0f} MB.")
            if skip_blank and not line.strip():
                continue
            try:
                stored = _loaded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or brackets without end
                raise ValueError(f"{where} is not a JSON row ({error}).") from error
            yield where, _object(stored, where)


def json_array(file: Path) -> Records:
    """The objects of one JSON array.

    Raises:
      ValueError: if the file is something else; it names JSON Lines where it is that.
    """
    try:
        stored = _loaded(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        lines = " (a file with one object a line is JSON Lines: call it .jsonl)" if "Extra data" in str(error) else ""
        raise ValueError(f"{file} is not JSON ({error}){lines}.") from error
    if not isinstance(stored, list):
        raise ValueError(f"{file} is not a JSON array of rows but {type(stored).__name__}.")
    for number, record in enumerate(stored, 1):
        where = f"{file} row {number}"
        yield where, _object(record, where)


def delimited(file: Path, delimiter: str = ",") -> Records:
    """The lines of a CSV file by the names in its first; every value is a text.

    Raises:
      ValueError: for a line with more or fewer values than there are names, a name that is there twice, and for what
        is no UTF-8 or no CSV.
    """
    csv.field_size_limit(MOST_BYTES)
    with file.open(encoding="utf-8-sig", newline="") as text:
        lines, before = csv.reader(text, delimiter=delimiter, strict=True), 1
        try:
            names = next(lines, [])
            if "" in names:
                raise ValueError(f"{file} line 1 has a column without a name: give it one, or take it out.")
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{file} has two columns called {twice!r}.")
            for values in lines:
                where = f"{file} line {lines.line_num}"
                # A quotation mark that stands alone would swallow the lines up to the next one.
                if delimiter == "\t" and lines.line_num > before + 1:
                    raise ValueError(f"{where} ends a value in quotation marks that began on line {before + 1}.")
                before = lines.line_num
                if not values:
                    continue
                if len(values) != len(names):
                    raise ValueError(f"{where} has {len(values)} values for the {len(names)} columns of the file.")
                yield where, dict(zip(names, values, strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not written in UTF-8 ({error}): save it so.") from error
        except csv.Error as error:
            raise ValueError(f"{file} line {lines.line_num} cannot be read as a table ({error}).") from error


def parquet(file: Path) -> Records:
    """The rows of a Parquet file.

    Raises:
      ValueError: if it is none, or damaged.
    """
    from pyarrow import ArrowException, parquet  # a fifth of a second; what `datasets` stands on

    try:
        number = 0
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if twice := next((name for name in columns if columns.count(name) > 1), None):
                raise ValueError(f"{file} has two columns called {twice!r}.")
            for part in table.iter_batches():
                for record in part.to_pylist():
                    number += 1
                    yield f"{file} row {number}", record
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file, or it is damaged ({error}).") from error


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": partial(json_lines, skip_blank=True),
    ".json": json_array,
    ".csv": delimited,
    ".tsv": partial(delimited, delimiter="\t"),
    ".parquet": parquet,
}
"""How files are read, by the ends of their names."""


def read(file: Path) -> Records:
    """The records of a file, read as the end of its name says.

    Raises:
      ValueError: for an end that is not known, and for what the reader finds damaged.
    """
    if file.suffix.lower() not in READERS:
        raise ValueError(f"{file} is of no kind that is read: its name must end in {', '.join(READERS)}.")
    yield from READERS[file.suffix.lower()](file)


def from_hub(path: str, name: str | None, split: str | None = None) -> Any:
    """A data set on the Hugging Face hub, or its copy in the cache.

    Returns:
      A `datasets.Dataset`, the split that is named; a dictionary of all of them where none is.
    """
    import datasets  # half a second, and of no use with local files

    with _asked_once(path):
        return datasets.load_dataset(path, name, split=split)


@contextlib.contextmanager
def _asked_once(path: str) -> Iterator[None]:
    """Where the hub does not answer one question about a data set, only what is in the cache is loaded inside.

    `datasets` would ask again for half a minute where there is no network. That there is no such data set, or none
    that this user may read, is an answer.
    """
    import huggingface_hub
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    flags = [(constants, "HF_HUB_OFFLINE"), (config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in flags]
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
    except RepositoryNotFoundError:
        pass
    except Exception:  # whatever stops the hub
        for module, name in flags:
            setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)


def _loaded(text: bytes) -> Any:
    """What JSON says. Raises ValueError where an object has a name twice, of which only the last would be heard."""

    def once(pairs: list[tuple[str, Any]]) -> Record:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ValueError(f"{twice[:60]!r} is there twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def _object(stored: Any, where: str) -> Record:
    if not isinstance(stored, dict):
        raise ValueError(f"{where} is not a JSON object but {type(stored).__name__}.")
    return stored

"""Where rows of one's own lie: in a file, in a folder of splits, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from methods.tasks.records import READERS, Records, from_hub, read
from methods.tasks.registry import TASKS

TESTED = ("test", "validation")
"""The splits that may be tested on, the first that is there."""


class Where(NamedTuple):
    """Rows of one's own: `title` says where they are, and `records` reads them."""

    title: str
    records: Records


def is_own(data: str) -> bool:
    """Whether `--data` names rows of one's own, and not a folder that holds a folder for each task.

    The folder of a built-in task itself is neither: whoever reads it says that the one above it is wanted.
    """
    path = Path(data)
    return not path.is_dir() or (not is_built_in(path) and in_folder(path, "train") is not None)


def is_built_in(folder: Path) -> bool:
    """Whether a folder has the name of a built-in task's."""
    return folder.absolute().name in {task.folder or task.name for task in TASKS.values()}


def lacks_train(folder: Path) -> bool:
    """Whether a folder has neither a file of rows called train nor a folder of a built-in task, nor is one."""
    if is_built_in(folder) or not folder.is_dir():
        return False
    return not any(is_built_in(each) for each in folder.iterdir() if each.is_dir())


def in_folder(folder: Path, split: str) -> Path | None:
    """The file of a split that lies in a folder itself. Raises ValueError for several."""
    files = sorted(file for end in READERS for file in folder.glob(f"{split}{end}") if file.is_file())
    if len(files) > 1:
        raise ValueError(f"{folder} has several files called {split}, {files[0].name} and {files[1].name}: name one.")
    return files[0] if files else None


def trained_on(data: str) -> Where:
    """The rows that `--data` names. Raises FileNotFoundError, ValueError."""
    return _where(data, ("train",))


def tested_on(data: str) -> Where:
    """The rows that `--test-data` names. Raises FileNotFoundError, ValueError."""
    return _where(data, TESTED)


def beside(data: str) -> Where | None:
    """The rows to test on that `--data` brings with it; None where some of its rows are to be held out.

    They lie beside a file called train, but not beside one of another name, which may lie anywhere; and so on the hub,
    beside a split that was not asked for by its name.
    """
    path = Path(data)
    if not path.exists():
        on_hub = _OnHub.named(data)
        split = None if on_hub.split else on_hub.first(TESTED)
        return None if split is None else on_hub.rows(split)
    folder = path.parent if path.is_file() and path.stem == "train" else path
    found = next((file for file in (in_folder(folder, split) for split in TESTED) if file is not None), None)
    return None if found is None else _file(found)


def are_the_same(data: str, test_data: str) -> bool:
    """Whether two names are of the same rows, so that what is trained on would be tested on."""
    if Path(data).exists() and Path(test_data).exists():
        return Path(test_data).samefile(data)
    if Path(data).exists() or Path(test_data).exists():
        return False
    of, by = _OnHub.named(data), _OnHub.named(test_data)
    return (of.name, of.configuration) == (by.name, by.configuration) and by.split == (of.split or "train")


def _where(data: str, splits: tuple[str, ...]) -> Where:
    path = Path(data)
    if path.is_dir():
        file = next((file for file in (in_folder(path, split) for split in splits) if file is not None), None)
        if file is None:
            raise FileNotFoundError(f"{path} has no file {splits[0]} with one of the ends {', '.join(READERS)}.")
        return _file(file)
    if path.is_file():
        return _file(path)
    on_hub = _OnHub.named(data)
    split = on_hub.split or on_hub.first(splits)
    if split is None or split not in on_hub.splits():
        there = ", ".join(on_hub.splits())
        raise FileNotFoundError(
            f"{on_hub.name} on the hub has no split {split or ' or '.join(splits)}, but {there}: name one of these as "
            f"{on_hub.title}@SPLIT."
        )
    return on_hub.rows(split)


def _file(file: Path) -> Where:
    return Where(str(file), read(file))


class _OnHub(NamedTuple):
    """What OWNER/NAME, OWNER/NAME:CONFIGURATION or either of them with @SPLIT names."""

    name: str
    configuration: str | None
    split: str | None

    @classmethod
    def named(cls, data: str) -> _OnHub:
        whole, _, split = data.partition("@")
        name, _, configuration = whole.partition(":")
        if name.count("/") != 1 or name.startswith(("/", ".", "~")) or Path(data).suffix.lower() in READERS:
            raise FileNotFoundError(
                f"There is no {data}: name a file whose name ends in {', '.join(READERS)}, a folder, or a data set on "
                "the hub as OWNER/NAME."
            )
        return cls(name, configuration or None, split or None)

    @property
    def title(self) -> str:
        return f"{self.name}:{self.configuration}" if self.configuration else self.name

    def splits(self) -> Mapping[str, Iterable[Any]]:
        """All splits of the data set: `datasets` fetches them together, and keeps them in its cache."""
        try:
            return from_hub(self.name, self.configuration)
        except Exception as error:  # whatever stops the hub, the remedy is the same
            reason = " ".join(str(error).split()).removesuffix(".")[:300] or "no reason given"
            raise FileNotFoundError(
                f"{self.title!r} is no file here, and the hub gave no data set of that name ({type(error).__name__}: "
                f"{reason}): check the name and the network, or name a file."
            ) from error

    def first(self, splits: Iterable[str]) -> str | None:
        there = self.splits()
        return next((split for split in splits if split in there), None)

    def rows(self, split: str) -> Where:
        title = f"{self.title} {split}"
        return Where(title, ((f"{title} row {i}", record) for i, record in enumerate(self.splits()[split], 1)))

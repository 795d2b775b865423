"""The tasks that are known by name."""

from __future__ import annotations

from typing import TypeVar

from methods.tasks import arithmetic, e2e, glue, multiple_choice
from methods.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (*multiple_choice.TASKS, *glue.TASKS, *arithmetic.TASKS, *e2e.TASKS)
}
"""The tasks that every command knows, by name; `register` adds one."""

T = TypeVar("T", bound=Task)


def get(name: str) -> Task:
    """The task called `name`.

    Raises:
      ValueError: if there is none; the sentence lists those there are.
    """
    if name not in TASKS:
        raise ValueError(
            f"Unknown task {name!r}: known are {', '.join(sorted(TASKS))}; one of your own is FILE.py:NAME."
        )
    return TASKS[name]


def register(task: T) -> T:
    """Makes a task known by its name, to `get` and to every command that runs in this process; returns it.

    Raises:
      ValueError: if another task has that name.
    """
    if TASKS.get(task.name, task) != task:
        raise ValueError(f"There is a task called {task.name!r} already: give yours another name.")
    TASKS[task.name] = task
    return task

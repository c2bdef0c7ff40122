"""A task in another process: the one that its module makes there, or one that is made like it."""

from __future__ import annotations

import copyreg
import importlib
from typing import Any

from rivetq import UsageError

from ..typedjson import Codec
from .app import App
from .task import Task


def _reduced(task: Task[..., Any]) -> tuple[Any, ...]:
    place = task.function.__module__, task.function.__qualname__, task.name
    if _task_at(*place) is not None:
        return _find, place
    # It was made of a function of a module, but not there: in another process another app has to stand for its own.
    if task.app.around_hooks:
        raise UsageError(
            f"task {task.name!r}: its app has hooks; a child process finds them if the module has the task"
        )
    return _make, (*place, task.time_limit, task.app.codec)


def _task_at(module: str, function: str, name: str) -> Task[..., Any] | None:
    """The task of this name that a module makes of this function of its own."""
    found = _part_of(module, function)
    known = [found] if isinstance(found, Task) else list(vars(importlib.import_module(module)).values())
    for each in known:
        if isinstance(each, Task) and (each is found or each.function is found):
            task = each.app.tasks.get(name)
            if task is not None and task.function is each.function:
                return task
    return None


def _part_of(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _find(module: str, function: str, name: str) -> Task[..., Any]:
    """A task by its function and name, in another process."""
    found = _task_at(module, function, name)
    if found is None:
        raise UsageError(f"{module}.{function} is no task {name!r} there")
    return found


def _make(module: str, function: str, name: str, time_limit: float | None, codec: Codec) -> Task[..., Any]:
    """The same for one that its module does not make."""
    key = module, function, name
    if key not in _made:
        app = App(":memory:", codec=codec)
        _made[key] = app.task(name=name, time_limit=time_limit, pool="process")(_part_of(module, function))
    return _made[key]


_made: dict[tuple[str, str, str], Task[..., Any]] = {}


copyreg.pickle(Task, _reduced)

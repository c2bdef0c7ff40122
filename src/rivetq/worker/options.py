"""How many handlers run at a time, and what a listener is told of a job."""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

from rivetq import UsageError

from ..texts import quoted


@attrs.frozen(kw_only=True)
class Concurrency:
    """Handlers that run at a time, by kind."""

    threads: int = 8
    processes: int = attrs.field(factory=lambda: os.cpu_count() or 1)
    tasks: int = 100
    """Async handlers."""

    def __attrs_post_init__(self) -> None:
        for name, number in attrs.asdict(self).items():
            counted(number, f"concurrency[{quoted(name)}]")

    @classmethod
    def of(cls, value: Concurrency | Mapping[str, int] | int | None) -> Concurrency:
        """A number is that of each kind, but for processes no more than there are processors."""
        if value is None:
            return cls()
        if isinstance(value, Concurrency):
            return value
        if isinstance(value, Mapping):
            unknown = value.keys() - {"threads", "processes", "tasks"}
            if unknown:
                raise UsageError(f"concurrency: threads, processes and tasks expected, got {quoted(list(unknown))}")
            return cls(**value)
        number = counted(value, "concurrency")
        return cls(threads=number, processes=min(number, os.cpu_count() or 1), tasks=number)


@attrs.frozen
class Settled:
    """A job that was run and answered: for metrics and logs."""

    queue: str
    task: str
    ending: str
    """ "ack", "nack", "release" or "reject"; "lost" if there was nothing to answer any more."""
    seconds: float
    """That the handler ran."""


def counted(value: object, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}: an int of at least {least} expected, got {quoted(value)}")
    return value


def counted_or_none(value: int | None, name: str) -> int | None:
    return None if value is None else counted(value, name)

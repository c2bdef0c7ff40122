"""The state of a directory to look at, even while a process has it open."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

from ..broker import requests
from ..engine import Configure, Get, Queues, Stats
from ..engines.view import MovedError, ViewEngine
from ..errors import StorageError
from ..model import Job, JobState, QueueConfig, QueueStats
from ..storage.disk import SystemDisk
from ..units import checked_int
from .directory import Path, Progress, directory_of, disk_of, readable

T = TypeVar("T")
LOOKS = 10
"""How often a look is repeated because the payloads that it reads were moved meanwhile."""


class Look:
    """A directory as it is on disk, while a broker may have it open; see `look`. Its methods are those of `Broker`.

    It shows one moment. Only if the owner moved a payload that is asked for, or its job ended, does it read the files
    again, and goes on with a later moment, `as_of`: what one call returns is always of one moment.
    """

    def __init__(self, directory: str, engine: ViewEngine) -> None:
        self._directory = directory
        self._show(engine)

    def _show(self, engine: ViewEngine) -> None:
        self._engine = engine
        self.as_of: datetime = engine.as_of
        """The moment of the last record that was read."""
        self.record: int = engine.record
        """Its number."""

    def _with_payloads(self, read: Callable[[ViewEngine], T]) -> T:
        """What is read of the engine, or of a later one if payloads were moved."""
        for _ in range(LOOKS):
            try:
                return read(self._engine)
            except MovedError:
                with readable(self._directory):
                    later = ViewEngine(SystemDisk(), self._directory)
                self._engine.close()
                self._show(later)
        try:
            return read(self._engine)
        except MovedError as error:
            raise StorageError(
                f"{self._directory}: job {error}: its payload was moved {LOOKS + 1} times while it was read; ask for "
                f"fewer jobs at a time"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the copy of the index that it reads from."""
        self._engine.close()

    def queues(self) -> list[str]:
        """See `Broker.queues`."""
        return self._engine.call(Queues())

    def stats(self, queue: str | None = None) -> QueueStats:
        """See `Broker.stats`; `oldest_age` is that at `as_of`."""
        return self._engine.call(Stats(queue))

    def config(self, queue: str) -> QueueConfig:
        """The configuration in force, with `paused`."""
        return self._engine.call(Configure(queue))

    def jobs(
        self,
        queue: str,
        *,
        state: JobState | str | None = None,
        after: int = 0,
        limit: int = 100,
        payloads: bool = True,
    ) -> list[Job]:
        """See `Broker.jobs`."""
        request = requests.jobs(queue, state, after, limit, payloads)
        return self._with_payloads(lambda engine: engine.call(request))

    def get(self, job_id: int) -> Job | None:
        """See `Broker.get`."""
        request = Get(checked_int(job_id, "job_id", 0))
        return self._with_payloads(lambda engine: engine.call(request))


def look(path: Path, *, progress: Progress | None = None) -> Look:
    """Look into a directory, whether a broker has it open or not: ``with look("data") as found``. Nothing is changed.

    It shows the state after the last record that is in the files: the index of the last checkpoint, copied to a
    temporary directory, and the log behind it. Delays and deadlines that passed since are for the owner to notice.

    Raises:
        StorageError: there is no log, or it cannot be read.
        CorruptLogError, FormatError: as at an opening.
    """
    directory = directory_of(path)
    with readable(directory):
        return Look(directory, ViewEngine(disk_of(directory, progress), directory))

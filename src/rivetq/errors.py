"""The error tree: what a caller can do differs per class, the facts are attributes, the message says what to do now.

    RivetQError
      UsageError(ValueError)      the call itself is wrong; fix the program
      JobError                    about one job: JobNotFoundError, LeaseLostError, DuplicateJobError
      CapacityError               try later or elsewhere: QueueFullError, RateLimitedError, DiskFullError
      StorageError                the directory: CorruptLogError, BrokerFailedError, BrokerLockedError, FormatError
      BrokerClosedError           the broker was closed
      ForkedBrokerError           the broker belongs to the parent process

Every error has ``outcome``: "not_done" (nothing changed) or "unknown" (the failure hit while the call waited for the
disk: the change may or may not be there after reopening). The rule for a retry is the same for every engine: after
"not_done" retry freely, after "unknown" retry with an idempotency key.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

Outcome = Literal["not_done", "unknown"]


class RivetQError(Exception):
    """Base of every error that RivetQ raises on purpose."""

    outcome: Outcome = "not_done"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only facts do not survive Exception's own pickling, which replays args positionally.
        return _restore, (type(self), self.args, dict(self.__dict__))


def _restore(kind: type[RivetQError], args: tuple[object, ...], facts: dict[str, object]) -> RivetQError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class UsageError(RivetQError, ValueError):
    """An argument or a call that can never work; nothing was changed."""


class JobError(RivetQError):
    """Something about one job."""


class JobNotFoundError(JobError):
    """No such job in the state that the call needs."""

    def __init__(self, message: str, *, job_id: int) -> None:
        super().__init__(message)
        self.job_id = job_id


class LeaseLostError(JobError):
    """The lease is no longer yours: it expired, or the job was settled already."""

    def __init__(self, message: str, *, job_id: int, token: int) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.token = token


class DuplicateJobError(JobError):
    """The idempotency key stands for another job already (``on_duplicate="raise"``)."""

    def __init__(self, message: str, *, job_id: int, queue: str, key: str, state: str | None = None) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.queue = queue
        self.key = key
        self.state = state
        """Of that job, as in `Job.state`; None if it is done, or was not there yet."""


class CapacityError(RivetQError):
    """There is no room or no allowance now; the same call may work later."""


class QueueFullError(CapacityError):
    """The queue holds ``max_jobs`` ready, scheduled and leased jobs."""

    def __init__(self, message: str, *, queue: str, max_jobs: int) -> None:
        super().__init__(message)
        self.queue = queue
        self.max_jobs = max_jobs


class RateLimitedError(CapacityError):
    """The queue's enqueue rate is used up; ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, queue: str, retry_after: float) -> None:
        super().__init__(message)
        self.queue = queue
        self.retry_after = retry_after


class DiskFullError(CapacityError):
    """No space for another record; the broker lives on and takes jobs again once there is space."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class StorageError(RivetQError):
    """The directory or a file in it cannot be used."""


class CorruptLogError(StorageError):
    """The log is damaged, or a file of it is missing or too short. ``offset`` is in bytes from the file's start."""

    def __init__(self, message: str, *, file: str, offset: int) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset


class BrokerFailedError(StorageError):
    """A write or sync of the log failed (see ``__cause__``); close this broker and open the directory again."""


class BrokerLockedError(StorageError):
    """Another live broker owns the directory. ``pid`` and ``since`` are None if the owner's note is unreadable."""

    def __init__(self, message: str, *, path: str, pid: int | None, since: datetime | None) -> None:
        super().__init__(message)
        self.path = path
        self.pid = pid
        self.since = since


class FormatError(StorageError):
    """An intact file names a format version that this RivetQ does not read."""


class BrokerClosedError(RivetQError):
    """The broker was closed."""


class ForkedBrokerError(RivetQError):
    """The broker was opened by the parent process; open one of your own, in a directory of your own."""

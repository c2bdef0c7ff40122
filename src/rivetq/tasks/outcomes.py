"""What a handler may end with."""

from __future__ import annotations

from rivetq import Duration, UsageError

from ..texts import quoted
from ..units import seconds_of


class Outcome(Exception):  # it is no error, it is raised to get out of the handler
    """What a handler raises, or returns, to say how its job ends."""


class Retry(Outcome):
    """The attempt failed: again by the retry policy, or after `delay` seconds; a dead letter at max_attempts."""

    def __init__(self, delay: Duration | None = None, *, error: str | None = None) -> None:
        super().__init__(delay, error)
        if delay is not None:
            seconds_of(delay, "delay")
        if error is not None and not isinstance(error, str):
            raise UsageError(f"error: a str expected, got {quoted(error)}")
        self.delay = delay
        self.error = error

    def __str__(self) -> str:
        return self.error or "the task asked for a retry"


class Snooze(Outcome):
    """Not now: again after `delay` seconds, and this attempt is not counted."""

    def __init__(self, delay: Duration) -> None:
        super().__init__(delay)
        seconds_of(delay, "delay")
        self.delay = delay

    def __str__(self) -> str:
        return "the task asked to come later"


class Reject(Outcome):
    """It will never work: a dead letter now."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        if not isinstance(reason, str):
            raise UsageError(f"reason: a str expected, got {quoted(reason)}")
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def is_name(value: object) -> bool:
    """A str that is not empty and can be written as UTF-8."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False

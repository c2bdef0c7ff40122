"""Seconds, moments and numbers that callers give: checked, and in the units that are used inside."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from .errors import UsageError

MAX_DURATION_MS = 100 * 366 * 86_400_000
"""100 years, the longest duration a call accepts (leap days rounded up)."""
Duration = int | float | timedelta


def duration_ms(value: object, name: str) -> int:
    """Milliseconds of a caller's duration: seconds (int, float) or timedelta, 0 to 100 years, rounded up.

    Rounded up, so that a delay is never shorter than was asked for.
    """
    if type(value) is int and 0 <= value <= 86_400:
        return value * 1000
    if isinstance(value, timedelta):
        seconds: float = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    else:
        raise UsageError(f"{name}: seconds (int, float) or a timedelta expected, got {shown_value(value)}")
    if not 0 <= seconds <= MAX_DURATION_MS / 1000:
        raise UsageError(f"{name}: 0 seconds to 100 years expected, got {quoted(value)}")
    return _whole_ms(seconds)


def moment_ms(value: object, name: str) -> int:
    """Epoch milliseconds of a caller's moment: an aware datetime or epoch seconds."""
    if isinstance(value, datetime):
        if value.tzinfo is None or value.utcoffset() is None:
            raise UsageError(f"{name}: an aware datetime expected, got the naive {value!r}; add tzinfo")
        return math.ceil((value - _EPOCH) / _MILLISECOND)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 <= value <= _LAST_MOMENT_S:
            raise UsageError(f"{name}: epoch seconds from 0 to {_LAST_MOMENT_S} expected, got {quoted(value)}")
        return _whole_ms(value)
    raise UsageError(f"{name}: an aware datetime or epoch seconds expected, got {shown_value(value)}")


def _whole_ms(seconds: float) -> int:
    """Milliseconds, rounded up; but a float that means a whole one, as 8528207.31 does, is that one."""
    ms = seconds * 1000
    near = round(ms)
    return near if abs(ms - near) <= 1e-6 + ms * 4e-16 else math.ceil(ms)


def moment(at_ms: int) -> datetime:
    """The aware UTC datetime of epoch milliseconds."""
    if at_ms < _EXACT_MS:
        return datetime.fromtimestamp(at_ms / 1000, UTC)
    try:
        return _EPOCH + timedelta(milliseconds=at_ms)
    except OverflowError:  # an eta in the year 9999, postponed: shown as the last moment there is
        return datetime.max.replace(tzinfo=UTC)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


_MILLISECOND = timedelta(milliseconds=1)


_EXACT_MS = 2**41
"""Below this (the year 2039) a float of seconds is closer to its millisecond than half a microsecond."""


_LAST_MOMENT_S = 253_402_300_799  # 9999-12-31T23:59:59Z, the last second that a datetime can show


def quoted(value: object) -> str:
    """A value in the message of an error. Any value: it may be the very reason of the error."""
    try:
        text = repr(value)
    except Exception as trouble:  # an int of more digits than Python prints, say
        text = "very many digits" if isinstance(value, int) else f"(its text cannot be made: {type(trouble).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


def shown_value(value: object) -> str:
    return f"{type(value).__name__} {quoted(value)}"


def checked_int(value: object, name: str, low: int, high: int | None = None) -> int:
    """A true int (no bool, no float) of at least `low` and at most `high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name}: an int expected, got {shown_value(value)}")
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise UsageError(f"{name}: {span} expected, got {quoted(value)}")
    return int(value)


def checked_number(value: object, name: str, low: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UsageError(f"{name}: a number expected, got {shown_value(value)}")
    if not low <= value <= 1e15:  # nan fails as well
        raise UsageError(f"{name}: a number of at least {low:g} expected, got {quoted(value)}")
    return float(value)


def seconds_of(value: Duration, name: str) -> float:
    """Seconds of a duration that a caller gave. Raises UsageError."""
    duration_ms(value, name)
    return value.total_seconds() if isinstance(value, timedelta) else float(value)

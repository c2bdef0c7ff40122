"""When a task runs by itself: intervals, cron lines in a time zone, and what becomes of missed ticks."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Literal, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import attrs

from rivetq import (
    Duration,
    UsageError,
)

from ..texts import quoted

SCHEDULES = "rivetq.schedules"
TICK_HEADER = "rivetq-tick"
"""The tick of a job, in ISO 8601."""
Misfire = Literal["skip", "once", "all"]
TICKS = 100
"""Missed ticks that one transaction enqueues at most."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Spec(Protocol):
    """When something is due."""

    @property
    def text(self) -> str:
        """Says all about it: another text is another schedule."""
        ...

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The ticks after a moment, ascending, without end."""
        ...


@attrs.frozen
class Every:
    """Ticks at all multiples of a time, counted from 1970: the same after each restart."""

    seconds: float

    @property
    def text(self) -> str:
        return f"every {round(self.seconds * 1000)} ms"

    def after(self, moment: datetime) -> Iterator[datetime]:
        """See `Spec.after`."""
        step = timedelta(milliseconds=round(self.seconds * 1000))
        tick = _EPOCH + (moment - _EPOCH) // step * step
        while True:
            tick += step
            yield tick


def every(seconds: Duration) -> Every:
    """A schedule for `App.periodic`: every so many seconds (or a timedelta), a tenth of one at least."""
    number = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0.1 <= number <= 1e9:
        raise UsageError(f"every: from 0.1 to 1e9 seconds, or a timedelta, expected, got {quoted(seconds)}")
    return Every(float(number))


@attrs.frozen
class Cron:
    """Ticks of a cron expression in a time zone, as Debian's cron has them.

    When clocks are set forward, a tick at a fixed time in the hour that is missing comes right after it; when they are
    set back, one in the hour that comes twice comes once. Expressions whose minute or hour begins with a star, and
    those with seconds, go by what the clock shows: nothing in the hour that is missing, twice in the one that comes
    twice.
    """

    expression: str
    zone: str

    @property
    def text(self) -> str:
        return f"{self.expression} {self.zone}"

    def after(self, moment: datetime) -> Iterator[datetime]:
        """See `Spec.after`."""
        # cronsim tells what clocks without changes would show; which moments those are is found here, since what it
        # does by itself misses ticks where clocks are changed by half an hour.
        zone = _zone(self.zone)
        fields = self.expression.split()
        is_fixed = len(fields) == 5 and not fields[0].startswith("*") and not fields[1].startswith("*")
        shown = moment.astimezone(zone).replace(tzinfo=None, fold=0)
        start = shown - max(timedelta(0), _set_back(shown, zone))  # what it shows it may show again
        last, again = moment, deque[datetime]()
        for tick in _cronsim().CronSim(self.expression, start):
            back = _set_back(tick, zone)
            if back < timedelta(0):  # clocks never show it
                if not is_fixed:
                    continue
                while _set_back(tick, zone) < timedelta(0):
                    tick += timedelta(minutes=1)
            found = tick.replace(tzinfo=zone).astimezone(UTC)
            while again and again[0] < found:
                yield (last := again.popleft())
            if back > timedelta(0) and not is_fixed and found + back > moment:
                again.append(found + back)
            if found > last:
                yield (last := found)
        yield from again


def _set_back(shown: datetime, zone: tzinfo) -> timedelta:
    """By how much clocks of a zone are set back, so that they show this twice; below 0: forward, so never."""
    first, second = (shown.replace(tzinfo=zone, fold=fold).utcoffset() for fold in (0, 1))
    assert first is not None
    assert second is not None
    return first - second


_NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


def _cronsim() -> Any:
    try:
        import cronsim
    except ImportError:
        raise UsageError("periodic: cron expressions need cronsim: pip install rivetq[schedules]") from None
    return cronsim


def _zone(name: str | tzinfo) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        if not isinstance(name, str):
            raise TypeError("a name expected")
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError) as error:
        raise UsageError(
            f"timezone: {quoted(name)} is not known here; where the system has no time zones: pip install tzdata"
        ) from error


def spec_of(when: object, timezone: str | tzinfo) -> Spec:
    """A checked schedule. Raises UsageError."""
    zone = timezone.key if isinstance(timezone, ZoneInfo) else "UTC" if timezone is UTC else timezone
    _zone(zone)
    if isinstance(when, Every):
        return when
    if not isinstance(when, str):
        raise UsageError(f"periodic: a cron expression or every(seconds) expected, got {quoted(when)}")
    words = " ".join(when.split())
    spec = Cron(_NICKNAMES.get(words, words), str(zone))
    cronsim = _cronsim()
    try:
        next(spec.after(datetime.now(UTC)))
    except cronsim.CronSimError as error:
        raise UsageError(f"periodic: {when!r} is no cron expression: {error}") from error
    except StopIteration:
        raise UsageError(f"periodic: {when!r} is never due") from None
    return spec


@attrs.frozen(kw_only=True)
class Schedule:
    """A task and when it is due."""

    name: str
    spec: Spec
    misfire: Misfire
    grace: float
    """Seconds that a tick may be late and still be on time."""
    put: Callable[[Any, datetime], object]
    """Enqueues the job of a tick in a transaction."""

    def due(self, first: datetime, now: datetime) -> tuple[list[datetime], datetime]:
        """Of the ticks from `first` to `now`: those to enqueue now, and the one to wait for then."""
        ticks = [first] if self.misfire == "all" else [self._last(first, now)]
        for tick in self.spec.after(ticks[0]):
            if tick > now or len(ticks) == TICKS:
                break
            ticks.append(tick)
        if self.misfire == "skip" and (now - ticks[-1]).total_seconds() > self.grace:
            ticks = []
        return ticks, tick

    def _last(self, first: datetime, now: datetime) -> datetime:
        """The last tick up to `now`, found by binary search: since `first` there may have been years of seconds."""
        low, high = first, now
        while high - low > timedelta(minutes=1):
            middle = low + (high - low) / 2
            if next(self.spec.after(middle)) <= now:
                low = middle
            else:
                high = middle
        for tick in self.spec.after(low):
            if tick > now:
                return first
            first = tick
        raise AssertionError("ticks have no end")


def key(name: str, tick: datetime) -> str:
    """The idempotency key of a tick; of a name that is too long for one its hash."""
    data = name.encode()
    return f"{name if len(data) <= 200 else hashlib.sha256(data).hexdigest()}@{ms_of(tick)}"


def ms_of(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)

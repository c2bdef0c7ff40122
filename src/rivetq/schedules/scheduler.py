"""Schedules: tasks that are enqueued by the clock.

A schedule is one record, itself a job: it waits in the queue `SCHEDULES` until its next tick is due. Then one
transaction acks it, enqueues the tick's job, and enqueues the record of the tick that follows: all three or none. So a
tick that was fired is never fired again, whatever dies in between, and the chain does not break. As a second guard each
tick's job has an idempotency key of schedule and tick.

Ticks are moments of the wall clock. What is missed while no worker runs is found at the next opening, in the record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary, WeakSet
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import attrs

from rivetq import (
    Broker,
    BrokerClosedError,
    BrokerFailedError,
    CapacityError,
    DiskFullError,
    Duration,
    Job,
    JobState,
    Lease,
    LeaseLostError,
    UsageError,
)

from ..texts import quoted

logger = logging.getLogger("rivetq.worker")

SCHEDULES = "rivetq.schedules"
TICK_HEADER = "rivetq-tick"
"""The tick of a job, in ISO 8601."""
Misfire = Literal["skip", "once", "all"]
LOOK_MS = 300_000
"""A record looks at the wall clock this often at least, however far its tick is: when that clock is set forward, a tick
comes so late at most."""
EARLY_MS = 1000
"""The queue's time line and the wall clock may differ a little; a larger difference is a clock that was set back."""
TICKS = 100
"""Missed ticks that one transaction enqueues at most."""
AGAIN_S = 1.0
"""After a queue that was full or over its rate."""


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


class Scheduler:
    """Fires what is due, in one thread. For workers.

    Each of those of one broker fires the schedules of all of them: several workers, and several apps, share the queue.

    Args:
        schedules: of an app, by name.

    Raises:
        UsageError: another app on this broker, whose worker runs, has a schedule of such a name.
    """

    def __init__(self, broker: Broker, schedules: dict[str, Schedule]) -> None:
        self._broker = broker
        self._schedules = schedules
        self._strangers: dict[int, int] = {}  # records of schedules that nobody has: seen first at boot_ms
        self._inbox: queue.SimpleQueue[tuple[list[Lease] | None, BaseException | None] | None] = queue.SimpleQueue()
        with _lock:
            for other in _live.setdefault(broker, WeakSet()):
                if other._schedules is not schedules and (both := schedules.keys() & other._schedules.keys()):
                    raise UsageError(
                        f"schedule {min(both)!r}: another app on this broker has one of this name; give it a name="
                    )
            _live[broker].add(self)

    def close(self) -> None:
        """Its schedules are not fired by others any more."""
        with _lock:
            _live.get(self._broker, WeakSet[Scheduler]()).discard(self)

    def run(self) -> None:
        """Until `stop`, or until the broker fails or is closed, which it raises."""
        try:
            while True:
                try:
                    self.reconcile()
                    break
                except CapacityError as full:
                    if self._pause(full):
                        return
            self._run()
        finally:
            self.close()

    def _run(self) -> None:
        while True:
            try:
                waiting = self._broker.lease_soon(SCHEDULES, TICKS, self._told)
            except DiskFullError as full:
                if self._pause(full):
                    return
                continue
            told = self._inbox.get()
            stopping = told is None
            if told is None:
                if waiting.cancel():
                    return
                told = self._inbox.get()
                assert told is not None, "stopped twice"
            leases, error = told
            if isinstance(error, DiskFullError):
                if stopping or self._pause(error):
                    return
                continue
            if error is not None:
                raise error
            for lease in leases or ():
                if stopping:
                    with suppress(LeaseLostError, DiskFullError):  # then it comes again by itself
                        self._broker.release(lease)
                else:
                    self.fire(lease)
            if stopping:
                return

    def _told(self, leases: list[Lease] | None, error: BaseException | None) -> None:
        self._inbox.put((leases, error))

    def _pause(self, error: BaseException) -> bool:
        """Before it is tried again, since that passes; whether to stop instead."""
        logger.warning("no room to fire schedules; again in %s s: %s", AGAIN_S, error)
        with suppress(queue.Empty):
            return self._inbox.get(timeout=AGAIN_S) is None
        return False

    def stop(self) -> None:
        """Let `run` return, soon."""
        self._inbox.put(None)

    def step(self) -> None:
        """Fire what is due now, in this thread."""
        while leases := self._broker.lease_many(SCHEDULES, TICKS):
            for lease in leases:
                self.fire(lease)

    def moments_ms(self) -> list[int]:
        """When there is something to fire or to end, by the wall clock; a record that only looks at it is left out.

        For tests, in which the clock is set by hand and a year may pass at once.
        """
        now_ms, moments = self._broker.clock.wall_ms(), list[int]()
        for job in self._broker.jobs(SCHEDULES, limit=10_000):
            content = _content(job.payload)
            known = None if content is None else self._known(content["schedule"])
            if known is not None and content["spec"] == known.spec.text and content["tick_ms"] > now_ms:
                moments.append(content["tick_ms"])
            elif job.due_at is not None:
                moments.append(_ms(job.due_at))
        return moments

    def reconcile(self) -> None:
        """One record for each schedule, as the program has it now; those of others stay until they are due."""
        # A key ends with its record: one that was cancelled may come back.
        self._broker.configure_queue(SCHEDULES, idempotency_ttl=0)
        records: dict[str, list[tuple[Job, Any]]] = {}
        after = 0
        while jobs := self._broker.jobs(SCHEDULES, after=after, limit=1000):
            after = jobs[-1].id
            for job in jobs:
                content = _content(job.payload)
                if content is not None:
                    records.setdefault(content["schedule"], []).append((job, content))
        for schedule in self._schedules.values():
            known = records.get(schedule.name, [])
            valid = [job for job, content in known if content["spec"] == schedule.spec.text]
            if not valid:
                first = next(schedule.spec.after(self._now()))
                self._enqueue(self._broker, schedule, first)
            for job, _ in known:
                if job not in valid[-1:]:
                    self._broker.cancel(job.id)
                elif job.state == JobState.DEAD:  # somebody took it for a job of theirs
                    self._broker.redrive(SCHEDULES, job_ids=[job.id])

    def fire(self, lease: Lease) -> None:
        """Enqueue what a record is due for, and the record that follows it."""
        try:
            self._fire(lease)
        except LeaseLostError:
            pass  # it was held for too long, and is there again
        except (BrokerClosedError, BrokerFailedError):
            raise
        except Exception:
            logger.exception("schedule record %s cannot be fired; it is tried again", lease.id)
            with suppress(LeaseLostError, DiskFullError):  # then its lease expires
                self._broker.release(lease, delay=AGAIN_S)

    def _fire(self, lease: Lease) -> None:
        content = _content(lease.payload)
        schedule = None if content is None else self._known(content["schedule"])
        if content is None or (schedule is not None and content["spec"] != schedule.spec.text):
            lease.ack()  # no record, or one of before the program was changed
            return
        if schedule is None:
            self._end_stranger(lease)
            return
        self._strangers.pop(lease.id, None)
        now, first = self._now(), datetime.fromtimestamp(content["tick_ms"] / 1000, UTC)
        left_ms = (first - now).total_seconds() * 1000
        if left_ms > EARLY_MS:  # it only looked at the wall clock
            self._broker.release(lease, delay=min(left_ms, LOOK_MS) / 1000)
            return
        ticks, following = schedule.due(first, max(now, first))
        while True:
            try:
                with self._broker.transaction() as tx:
                    tx.ack(lease)
                    for tick in ticks:
                        schedule.put(tx, tick)
                    self._enqueue(tx, schedule, following)
                return
            except (CapacityError, UsageError) as error:  # of a batch of ticks a rate limit may allow one
                if len(ticks) < 2:
                    logger.warning("schedule %r waits: %s", schedule.name, error)
                    self._broker.release(lease, delay=AGAIN_S)
                    return
                ticks, following = ticks[:1], ticks[1]

    def _known(self, name: str) -> Schedule | None:
        with _lock:
            for scheduler in _live.get(self._broker, ()):
                if name in scheduler._schedules:
                    return scheduler._schedules[name]
        return None

    def _end_stranger(self, lease: Lease) -> None:
        """Of a schedule that nobody has: another app's whose worker is about to start, or one that is there no more."""
        now_ms = self._broker.clock.boot_ms()
        if now_ms - self._strangers.setdefault(lease.id, now_ms) < LOOK_MS:
            self._broker.release(lease, delay=AGAIN_S)
            return
        logger.info("a schedule that this program does not have any more ends: %r", lease.payload)
        lease.ack()
        del self._strangers[lease.id]

    def _enqueue(self, to: Any, schedule: Schedule, tick: datetime) -> None:
        tick_ms = _ms(tick)
        now_ms = self._broker.clock.wall_ms()
        to.enqueue(
            SCHEDULES,
            {"schedule": schedule.name, "spec": schedule.spec.text, "tick_ms": tick_ms},
            delay=max(0, min(tick_ms - now_ms, LOOK_MS)) / 1000,
            idempotency_key=key(f"{schedule.name}@{schedule.spec.text}", tick),
            max_attempts=2**31 - 1,
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._broker.clock.wall_ms() / 1000, UTC)


_live: WeakKeyDictionary[Broker, WeakSet[Scheduler]] = WeakKeyDictionary()
_lock = threading.Lock()  # guards _live


def key(name: str, tick: datetime) -> str:
    """The idempotency key of a tick; of a name that is too long for one its hash."""
    data = name.encode()
    return f"{name if len(data) <= 200 else hashlib.sha256(data).hexdigest()}@{_ms(tick)}"


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def _content(payload: bytes) -> Any:
    """What a record says; None if it is none."""
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    kinds = {"schedule": str, "spec": str, "tick_ms": int}
    is_one = isinstance(content, dict) and all(type(content.get(name)) is kind for name, kind in kinds.items())
    return content if is_one else None

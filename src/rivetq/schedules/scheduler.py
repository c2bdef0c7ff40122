"""Schedules: tasks that are enqueued by the clock.

A schedule is one record, itself a job: it waits in the queue `SCHEDULES` until its next tick is due. Then one
transaction acks it, enqueues the tick's job, and enqueues the record of the tick that follows: all three or none. A
tick that was fired is never fired again, even after a crash in between, and the chain does not break. As a second guard
each tick's job has an idempotency key of schedule and tick.

Ticks are moments of the wall clock. What is missed while no worker runs is found at the next opening, in the record.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from rivetq import (
    Broker,
    BrokerClosedError,
    BrokerFailedError,
    CapacityError,
    DiskFullError,
    Job,
    JobState,
    Lease,
    LeaseLostError,
    UsageError,
)

from .when import SCHEDULES, TICKS, Schedule, key, ms_of

logger = logging.getLogger("rivetq.worker")

LOOK_MS = 300_000
"""A record looks at the wall clock this often at least, however far its tick is: when that clock is set forward, a tick
comes so late at most."""
EARLY_MS = 1000
"""The queue's time line and the wall clock may differ a little; a larger difference is a clock that was set back."""
AGAIN_S = 1.0
"""After a queue that was full or over its rate."""


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
        self._strangers: dict[int, int] = {}  # records whose schedule no app has: seen first at boot_ms
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
                moments.append(ms_of(job.due_at))
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
                elif job.state == JobState.DEAD:  # a worker took it for one of its own jobs
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
        """For a record whose schedule no app has: its app's worker is about to start, or the schedule was removed."""
        now_ms = self._broker.clock.boot_ms()
        if now_ms - self._strangers.setdefault(lease.id, now_ms) < LOOK_MS:
            self._broker.release(lease, delay=AGAIN_S)
            return
        logger.info("a schedule that this program does not have any more ends: %r", lease.payload)
        lease.ack()
        del self._strangers[lease.id]

    def _enqueue(self, to: Any, schedule: Schedule, tick: datetime) -> None:
        tick_ms = ms_of(tick)
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


def _content(payload: bytes) -> Any:
    """What a record says; None if it is none."""
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    kinds = {"schedule": str, "spec": str, "tick_ms": int}
    is_one = isinstance(content, dict) and all(type(content.get(name)) is kind for name, kind in kinds.items())
    return content if is_one else None

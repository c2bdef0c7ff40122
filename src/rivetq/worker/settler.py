"""The settler: takes all endings that have come and answers them in one commit, so that one sync covers them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from rivetq import DiskFullError

from ..engine import Ack, Lost, Nack, Operation, Reject, Release
from ..tasks.running import ACK, GIVEN_BACK, Delivery, Ending
from ..units import duration_ms
from .children import memory_bytes
from .held import CANCELLED, RETRY_S, Held, log_lost
from .options import Settled
from .pools import SHUTDOWN

logger = logging.getLogger("rivetq.worker")


class Settler:
    """Answers for the jobs that a worker ran or gives back.

    Args:
        held: what the worker has in hand.
        listeners: called with a `Settled` for each job that ran.
        max_jobs, max_memory: jobs and bytes of the process after which the worker is to stop.
    """

    def __init__(
        self,
        held: Held,
        listeners: Sequence[Callable[[Settled], None]],
        max_jobs: int | None,
        max_memory: int | None,
    ) -> None:
        self._held = held
        self._listeners = listeners
        self._max_jobs = max_jobs
        self._max_memory = max_memory
        self.jobs = 0
        """That ran and were answered, or were lost."""

    def run(self) -> None:
        held = self._held
        try:
            self._run()
        finally:
            with held.changed:
                held.is_settled = True
                held.changed.notify_all()

    def _run(self) -> None:
        held = self._held
        unclear: list[Delivery] = []  # of which `finish` is under way elsewhere: it says what becomes of the job
        while True:
            held.poked.wait()
            held.poked.clear()
            settling = held.is_settling  # first: what came before the end is answered
            while held.endings or unclear:
                ended = [*unclear, *(held.endings.popleft() for _ in range(len(held.endings)))]
                unclear = [delivery for delivery in ended if delivery.job.finishing]
                if len(unclear) == len(ended):
                    break
                self._answer([delivery for delivery in ended if delivery not in unclear] if unclear else ended)
            for delivery in unclear:
                delivery.job.when_finished(held.poked.set)
            if not settling and not unclear:
                return

    def _answer(self, batch: list[Delivery]) -> None:
        """Answer all of them in one commit, except those whose leases were lost meanwhile."""
        held = self._held
        # Each once: at a stop a job may be given back while its handler ends, and it comes here twice.
        batch = [delivery for delivery in dict.fromkeys(batch) if not delivery.is_answered]
        self._make_room(batch)  # first, so that the next jobs are leased while this waits for the disk
        endings, lost = self._write(batch)
        for delivery in batch:
            delivery.is_answered = True
        held.let_go(batch)
        self._remove_cancelled([*(each for each, ending in endings.items() if ending.verb != "ack"), *lost])
        if held.cancels:
            held.note_over(batch)
        told: list[tuple[Delivery, str]] = [
            (each, ending.verb) for each, ending in endings.items() if not each.is_untouched
        ]
        told += [(each, "lost") for each in lost if not each.is_untouched]
        if self._listeners:
            for delivery, verb in told:
                self._tell(delivery, verb)
        self.jobs += len(told)
        self._check_limits()

    def _make_room(self, batch: list[Delivery]) -> None:
        held = self._held
        with held.changed:
            rooms = held.rooms
            for delivery in batch:
                if not delivery.is_untouched:
                    rooms[delivery.kind].ran(delivery)
                elif delivery.is_in_pool:  # its pool saw that it must not begin
                    held.undo(delivery)
            for room in held.rooms.values():
                room.waits_since()  # it learns from those that began
            if held.is_stopping or any(room.is_wanting() for room in held.rooms.values()):
                held.changed.notify_all()

    def _write(self, batch: list[Delivery]) -> tuple[dict[Delivery, Ending], list[Delivery]]:
        """Commit how they ended. Returns the ending of each, and those whose leases were lost."""
        # Use the ending as it is now: the handler may have ended after the job was given back.
        in_hand = self._held.deliveries
        finished = {each for each in batch if each.job.finished and _was_finished(each)}
        endings = {each: _ending(each) for each in batch if each.lease.token in in_hand}
        lost = [] if len(endings) == len(batch) else [delivery for delivery in batch if delivery not in endings]
        left = {each: ending for each, ending in endings.items() if each not in finished}
        endings.update(dict.fromkeys(finished & endings.keys(), ACK))
        while left:
            try:
                fates = self._commit(left)
            except DiskFullError:
                logger.warning("no space to write down how %s jobs ended; again in %s s", len(left), RETRY_S)
                if not self._held.is_settling:  # its leases expire
                    break
                time.sleep(RETRY_S)
                continue
            for delivery, fate in zip(left, fates, strict=True):
                if fate is None:
                    continue
                if _was_finished(delivery):
                    endings[delivery] = ACK
                else:
                    log_lost(delivery)
                    lost.append(delivery)
                    del endings[delivery]
            break
        return endings, lost

    def _remove_cancelled(self, deliveries: Iterable[Delivery]) -> None:
        """Cancelled jobs that were not done: dead letters now, or they wait again."""
        for delivery in deliveries:
            if delivery.job.reason == CANCELLED:
                with suppress(DiskFullError):
                    delivery.is_removed = self._held.cancel(delivery.lease.id)

    def _commit(self, endings: Mapping[Delivery, Ending]) -> list[Lost | None]:
        return self._held.broker.settle_many([_answer_of(delivery, ending) for delivery, ending in endings.items()])

    def _tell(self, delivery: Delivery, ending: str) -> None:
        for listener in self._listeners:
            try:
                listener(Settled(delivery.lease.queue, delivery.task.name, ending, delivery.seconds))
            except BaseException:  # even SystemExit: the answers of other jobs must go on
                logger.exception("a listener of the worker failed")

    def _check_limits(self) -> None:
        if (self._max_jobs is not None and self.jobs >= self._max_jobs) or (
            self._max_memory is not None and memory_bytes() > self._max_memory
        ):
            self._held.begin_to_stop()
            self._held.wanted.set()


def _ending(delivery: Delivery) -> Ending:
    """What becomes of the job, since its handler may have been told to stop."""
    ending, reason = delivery.ending, delivery.job.reason
    assert ending is not None
    if reason is None or ending.verb == "ack":
        return ending
    if reason == SHUTDOWN:
        return GIVEN_BACK
    if reason == CANCELLED:
        return Ending("reject", CANCELLED)
    return ending


def _was_finished(delivery: Delivery) -> bool:
    """Whether `CurrentJob.finish` acked the job while another answer to it was under way. Waits for such a commit."""
    is_over = threading.Event()
    delivery.job.when_finished(is_over.set)
    is_over.wait()
    return delivery.job.finished


def _answer_of(delivery: Delivery, ending: Ending) -> Operation:
    job_id, token = delivery.lease.id, delivery.lease.token
    match ending.verb:
        case "ack":
            return Ack(job_id, token)
        case "nack":
            delay_ms = None if ending.delay is None else duration_ms(ending.delay, "delay")
            return Nack(job_id, token, ending.error, delay_ms)
        case "release":
            return Release(job_id, token, duration_ms(ending.delay or 0, "delay"))
        case "reject":
            return Reject(job_id, token, ending.error)

"""What a worker has in hand: the jobs that it leased and has not answered, and the rooms of its pools.

The threads of the worker share this and nothing else. `changed` guards the counts and flags; handlers tell their end
without it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from rivetq import Broker

from ..tasks.running import GIVEN_BACK, Delivery, fields
from .order import Room

logger = logging.getLogger("rivetq.worker")

LEASE_LOST = "the lease was lost"
CANCELLED = "cancelled"
LEAST_S = 0.05
"""The least time that an async handler gets to end after it was cancelled, even if the grace time is shorter."""
RENEWALS = 3
"""How often a lease is extended in its time. If one extension comes late, the next still saves the lease."""
RETRY_S = 1.0
"""The pause after an answer that found the disk full."""


class Cancel:
    """A cancellation under way."""

    def __init__(self, job_id: int) -> None:
        self.job_id = job_id
        self.is_told = False  # it was leased meanwhile and does not begin
        self.is_let_go = False  # a delivery of it ended meanwhile


class Held:
    """Jobs in hand.

    Args:
        max_jobs: that may be begun; None: any number.
    """

    broker: Broker
    """Where the jobs come from. There since the start."""

    def __init__(self, max_jobs: int | None) -> None:
        self.changed = threading.Condition()
        """Guards the counts of the rooms and the flags below."""
        self.rooms: dict[str, Room] = {}
        """By the kind of the pool."""
        self.deliveries: dict[int, Delivery] = {}
        """Leased and not answered; by token, since a job may come again at once."""
        self.came_back: deque[Delivery] = deque()
        """Given back, of which the order does not know yet."""
        self.left = math.inf if max_jobs is None else max_jobs
        """Jobs that may still be begun."""
        self.cancels: list[Cancel] = []
        self.endings: deque[Delivery] = deque()
        self.poked = threading.Event()
        """There are endings."""
        self.is_stopping = False
        self.is_settling = True
        """More endings may come."""
        self.is_settled = False
        """The settler has ended."""
        self.is_fetching = False
        self.asked = self.reached = 0
        """How often all leased jobs were wanted in `deliveries`, and up to which it was so."""
        self.wanted = threading.Event()
        """Something wants the worker to stop."""
        self.renewer_poked = threading.Event()
        self.is_watching = False
        """Something waits in a pool, and the renewer knows."""
        self.shortest = math.inf
        """Visibility timeout, of the jobs in hand."""

    def begin_to_stop(self) -> None:
        """No more jobs are leased."""
        with self.changed:
            self.is_stopping = True
            self.changed.notify_all()

    def cancel(self, job_id: int) -> bool:
        """See `Worker.cancel`."""
        this = Cancel(job_id)
        with self.changed:
            self.cancels.append(this)
        try:
            while True:
                if self.broker.cancel(job_id) or self._cancel_held(job_id):
                    return True
                self.wait_for_fetcher()  # it may be leased and not be in `deliveries` yet
                if this.is_told or self._cancel_held(job_id):
                    return True
                if not this.is_let_go:
                    return False
                this.is_let_go = False  # and may wait again
        finally:
            with self.changed:
                self.cancels.remove(this)

    def _cancel_held(self, job_id: int) -> bool:
        for token, delivery in list(self.deliveries.items()):
            ending = delivery.ending
            if delivery.lease.id == job_id and (ending is None or ending.verb != "ack"):
                self.tell_handler(delivery, CANCELLED)
                if token in self.deliveries:  # so the settler will see the reason, now or behind its commit
                    return True
                with self.changed:  # it may have seen the reason, and be removing the job
                    while delivery.is_removed is None and not self.is_settled:
                        self.changed.wait(LEAST_S)
                if delivery.is_removed:
                    return True
        return False

    def let_go(self, deliveries: Sequence[Delivery]) -> None:
        """Remove answered or lost deliveries. A call that cancels one finds it in `deliveries`, or learns its end."""
        if self.cancels:
            gone = {delivery.lease.id for delivery in deliveries}
            with self.changed:
                for cancel in self.cancels:
                    cancel.is_let_go = cancel.is_let_go or cancel.job_id in gone
        for delivery in deliveries:
            self.deliveries.pop(delivery.lease.token, None)

    def note_over(self, deliveries: Iterable[Delivery]) -> None:
        """For calls that cancel them."""
        with self.changed:
            for delivery in deliveries:
                delivery.is_removed = delivery.is_removed or False
            self.changed.notify_all()

    def wait_for_fetcher(self) -> None:
        """Return when every job that was leased so far is in `deliveries`, or was there."""
        with self.changed:
            self.asked += 1
            ticket = self.asked
            self.changed.notify_all()
            while self.is_fetching and self.reached < ticket:
                self.changed.wait()

    def tell_handler(self, delivery: Delivery, reason: str) -> None:
        delivery.job.cancel(reason)
        self.rooms[delivery.kind].pool.cancel(delivery)

    def take_back(self, room: Room) -> bool:
        """Give back the jobs that wait in a pool. Returns whether there were any."""
        # Caller holds self.changed. If a thread of the pool takes a job at this moment, either it or this gets the job.
        found = room.pool.take_back()
        for delivery in found:
            self.give_back(delivery)
        return bool(found)

    def give_back(self, delivery: Delivery) -> None:
        # Caller holds self.changed.
        self.undo(delivery)
        self.end(delivery)

    def undo(self, delivery: Delivery) -> None:
        """It did not begin: as if it had not been leased."""
        # Caller holds self.changed.
        delivery.is_untouched = True
        self.came_back.append(delivery)
        if delivery.is_in_pool:
            delivery.is_in_pool = False
            self.rooms[delivery.kind].left(delivery)
            self.left += 1

    def done(self, delivery: Delivery) -> None:
        """In a thread of a pool: the handler has ended."""
        # No lock: with many short jobs every thread would wait for it, and for the interpreter, at each of them.
        delivery.is_told = True
        self.endings.append(delivery)
        if not self.poked.is_set():
            self.poked.set()

    def end(self, delivery: Delivery) -> None:
        """End a delivery on behalf of its pool: it did not begin, or cannot be ended, and is given back."""
        delivery.ending = delivery.ending or GIVEN_BACK
        self.done(delivery)


def log_lost(delivery: Delivery) -> None:
    logger.warning("job %s: %s", delivery.lease.id, LEASE_LOST, extra=fields(delivery))

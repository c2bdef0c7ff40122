"""The fetcher: waits for room in the pools and for jobs, leases up to the room there is, and hands the jobs out."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rivetq import DiskFullError, Lease, LeaseLostError

from ..tasks.app import App
from ..tasks.outcomes import Reject
from ..tasks.running import Delivery
from .children import ProcessPool
from .held import CANCELLED, RENEWALS, RETRY_S, Held
from .limits import Limits
from .options import Concurrency
from .order import Room
from .pools import LoopPool, Pool, ThreadPool
from .queues import Queues, kind_of

logger = logging.getLogger("rivetq.worker")

CAREFUL_JOBS = 100
"""None is leased in advance from a queue until so many came of it that have another attempt."""


class Group(NamedTuple):
    """Queues whose tasks run in the same pools."""

    kinds: frozenset[str]
    names: list[str]
    rooms: list[Room]


class Fetcher:
    """Leases jobs for the pools of a worker.

    Args:
        app: whose tasks are run.
        held: what the worker has in hand.
        queues: from where.
        limits: is told of handlers in threads whose time is limited.
        concurrency: slots of each pool.
        prefetch: jobs leased in advance for each pool at most.
        visibility: seconds; None: as the job or its queue says.
        child_limits: see `ProcessPool`.
    """

    def __init__(
        self,
        app: App,
        held: Held,
        queues: Queues,
        limits: Limits,
        *,
        concurrency: Concurrency,
        prefetch: int,
        visibility: float | None,
        child_limits: Mapping[str, int | None],
    ) -> None:
        self._app = app
        self._held = held
        self._queues = queues
        self._limits = limits
        self._concurrency = concurrency
        self._prefetch = prefetch
        self._visibility = visibility
        self._child_limits = child_limits
        self._served: dict[str, int] = {}  # by pool: a number that grows, of its last turn
        self._numbers = itertools.count()
        self._careful: dict[str, int] = {}  # see CAREFUL_JOBS

    def run(self) -> None:
        held = self._held
        try:
            while (groups := self._next_groups()) is not None:
                try:
                    leases = self._lease(groups)
                except DiskFullError as error:  # it passes, as it does for an answer
                    logger.warning("no space to lease jobs; again in %s s: %s", RETRY_S, error)
                    with held.changed:
                        held.changed.wait_for(lambda: held.is_stopping or held.reached != held.asked, RETRY_S)
                    continue
                self._hand_out(leases)
        finally:
            with held.changed:
                held.is_fetching = False
                held.changed.notify_all()

    def _next_groups(self) -> list[Group] | None:
        """Wait until there is room for jobs; None: no more are wanted."""
        held = self._held
        with held.changed:
            while True:
                held.is_fetching = not held.is_stopping
                if held.reached != held.asked:  # nothing is leased that is not in `deliveries`
                    held.reached = held.asked
                    held.changed.notify_all()
                if held.is_stopping:
                    return None
                if held.left > 0 and (groups := self._open_groups()):
                    return groups
                held.changed.wait()

    def _lease(self, groups: list[Group]) -> list[Lease]:
        """Jobs for pools that have room: at once if there are any, else as soon as there are."""
        while self._held.came_back:
            delivery = self._held.came_back.popleft()
            self._queues.order.took_back(delivery.lease.queue, 1, self._queues.pools_of(delivery.lease.queue))
        turns: dict[frozenset[str], tuple[str, list[str], list[Group]]] = {}
        for kind in sorted(set().union(*(group.kinds for group in groups)), key=lambda kind: self._served.get(kind, 0)):
            mine = [group for group in groups if kind in group.kinds]
            names = self._queues.order.turns(kind, self._names_of(mine))
            turns.setdefault(frozenset(names), (kind, names, mine))
        if len(turns) == 1:
            [(_, names, _)] = turns.values()
            return self._wait_for_leases(names, groups)
        for kind, names, mine in turns.values():  # as many as the pools of each have room for
            most, max_bytes = self._bounds(names, mine)
            if most and (leases := self._lease_now(names, most, max_bytes)):
                self._served[kind] = next(self._numbers)
                return leases
        return self._wait_for_leases(self._names_of(groups), groups)

    def _names_of(self, groups: Sequence[Group]) -> list[str]:
        """Their queues, as they were given."""
        if len(groups) == 1:
            return groups[0].names
        names = set().union(*(group.names for group in groups))
        return [name for name in list(self._queues.order.names) if name in names]

    def _bounds(self, names: Sequence[str], groups: Sequence[Group]) -> tuple[int, int | None]:
        """How many may be leased, and of how many bytes together if that matters.

        None if a room that was wanting became smaller meanwhile, as handlers took longer.
        """
        rooms = [room for group in groups for room in group.rooms]
        free = min(room.free() for room in rooms)
        most = max(0, int(min(self._held.left, self._queues.order.most(names, free))))
        if most <= min(room.free_slots() for room in rooms):
            return most, None
        return most, min(room.free_bytes() for room in rooms)

    def _lease_now(self, names: list[str], most: int, max_bytes: int | None) -> list[Lease]:
        leases = self._held.broker.lease_many(
            names, most, visibility_timeout=self._visibility, begun=False, max_bytes=max_bytes
        )
        self._note_given(names, most, max_bytes, leases)
        return leases

    def _note_given(self, names: Sequence[str], most: int, max_bytes: int | None, leases: Sequence[Lease]) -> None:
        given = Counter(lease.queue for lease in leases)
        if max_bytes is not None and 2 * sum(len(lease.payload) for lease in leases) > max_bytes:
            most = len(leases)  # perhaps there were more, too large ones
        self._queues.order.gave(names, given, most, self._queues.pools_of)
        for name in [name for name in self._careful if name in self._queues.order.idle]:
            self._forget_care(name)

    def _open_groups(self) -> list[Group]:
        """The queues whose jobs there is room for: those that run in the same pools together."""
        # Caller holds self._held.changed.
        held = self._held
        found = []
        for kinds, names in self._queues.grouped(self.add_room).items():
            rooms = [held.rooms[kind] for kind in kinds]
            if min(rooms, key=Room.free).is_wanting():
                found.append(Group(kinds, names, rooms))
        return found

    def _wait_for_leases(self, names: list[str], groups: Sequence[Group]) -> list[Lease]:
        """Until there is a job, or none is wanted any more, or other pools have room: then none."""
        held = self._held
        most, max_bytes = self._bounds(names, groups)
        if not most:
            return []
        told: list[tuple[list[Lease] | None, BaseException | None]] = []
        wanted = [group.names for group in groups]

        def tell(leases: list[Lease] | None, error: BaseException | None) -> None:
            with held.changed:
                told.append((leases, error))
                held.changed.notify_all()

        waiting = held.broker.lease_soon(
            names, most, tell, visibility_timeout=self._visibility, begun=False, max_bytes=max_bytes
        )
        with held.changed:
            while (
                not told
                and not held.is_stopping
                and held.reached == held.asked
                and [each.names for each in self._open_groups()] == wanted
            ):
                held.changed.wait()
        if not told and waiting.cancel():
            return []
        with held.changed:
            while not told:
                held.changed.wait()
        leases, error = told[0]
        if error is not None:
            raise error
        if leases:
            self._note_given(names, most, max_bytes, leases)
        return leases or []

    def _hand_out(self, leases: list[Lease]) -> None:
        """Give each job to the pool of its task; what is no call of a task is answered at once."""
        held = self._held
        now = time.monotonic()
        batches: dict[str, list[Delivery]] = {}
        for lease in leases:
            try:
                task, args, kwargs = self._app.find(lease)
            except Reject as error:
                logger.error(
                    "job %s is rejected: %s", lease.id, error, extra={"job_id": lease.id, "queue": lease.queue}
                )
                self._reject(lease, str(error))
                continue
            kind = kind_of(task)
            if kind not in held.rooms:  # the first such task of the app came after the start
                self.add_room(kind)
            delivery = Delivery(lease, task, args, kwargs)
            delivery.broker, delivery.kind = held.broker, kind
            seconds = lease.granted
            delivery.visibility = seconds
            delivery.renew_at = now + seconds / RENEWALS
            held.deliveries[lease.token] = delivery
            for cancel in list(held.cancels) if held.cancels else ():
                if cancel.job_id == lease.id:
                    delivery.job.cancel(CANCELLED)
                    cancel.is_told = True
            if seconds < held.shortest:
                held.shortest = seconds
                held.renewer_poked.set()
            if kind == "thread" and task.time_limit is not None:
                self._limits.watch(delivery, now + task.time_limit)
            batches.setdefault(kind, []).append(delivery)
        for kind, batch in batches.items():
            room = held.rooms[kind]
            with held.changed:
                batch = self._fitting(kind, room, batch)
                room.took(batch)
                for delivery in batch:
                    delivery.is_in_pool = True
                held.left -= len(batch)
                if not held.is_watching and room.waits_since() is not None:
                    held.is_watching = True
                    held.renewer_poked.set()
                room.pool.submit(batch)  # with the lock: what is taken back meanwhile is not a part of them

    def _fitting(self, kind: str, room: Room, batch: list[Delivery]) -> list[Delivery]:
        """Those for which there is a place in the room; the others are given back at once."""
        # Caller holds self._held.changed.
        slots, places = room.free_slots(), room.free()
        kept: list[Delivery] = []
        surplus: list[Delivery] = []
        plain: set[str] = set()  # queues whose other jobs fit without a further question: nearly all of a batch
        for delivery in batch:
            lease, queue = delivery.lease, delivery.lease.queue
            is_last = lease.max_attempts is not None and lease.attempt >= lease.max_attempts
            if queue in plain and not is_last:
                kept.append(delivery)
                continue
            is_known = kind in self._queues.pools_of(queue)
            if len(kept) < slots or (not is_last and (is_known or len(kept) < places)):
                kept.append(delivery)
            else:
                surplus.append(delivery)
            if not is_known or not self._queues.kinds.get(queue):
                self._queues.saw(queue, kind)
            if is_last and (queue not in self._queues.order.idle or surplus):
                self._careful[queue] = CAREFUL_JOBS
                room.careful.add(queue)
            elif queue in self._careful:
                self._careful[queue] -= 1
                if not self._careful[queue]:
                    self._forget_care(queue)
            elif is_known and not is_last and self._queues.kinds.get(queue):
                plain.add(queue)
        for delivery in surplus:
            self._held.give_back(delivery)
        return kept

    def _forget_care(self, queue: str) -> None:
        del self._careful[queue]
        for room in self._held.rooms.values():
            room.careful.discard(queue)

    def _reject(self, lease: Lease, error: str) -> None:
        held = self._held
        while True:
            try:
                held.broker.reject(lease, error=error)
            except LeaseLostError:
                return
            except DiskFullError as full:
                logger.warning("no space to reject job %s; again in %s s: %s", lease.id, RETRY_S, full)
                with held.changed:
                    if held.changed.wait_for(lambda: held.is_stopping, RETRY_S):
                        return
            else:
                return

    def add_room(self, kind: str) -> None:
        held = self._held
        many, done = self._concurrency, held.done
        pool: Pool
        if kind == "loop":
            pool = LoopPool(self._app, many.tasks, done)
        elif kind == "process":
            pool = ProcessPool(self._app, many.processes, done, **self._child_limits)
        else:
            pool = ThreadPool(self._app, many.threads, done)
        with held.changed:
            held.rooms[kind] = Room(pool, self._prefetch)
            self._queues.regroup()
        pool.start()  # behind that: what has begun of it when it cannot begin more is known to `stop`

"""What a worker leases next: from which queue, and how many jobs beyond the free slots of a pool.

`Order` and `Room` are told what was leased and how it ended. They neither lock nor wait; the worker guards them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

from rivetq import UsageError

from ..schedules.when import SCHEDULES
from ..tasks.outcomes import is_name
from ..tasks.running import Delivery
from ..texts import quoted
from ..units import seconds_of
from .pools import Pool

PREFETCH_S = 0.02
"""A job that was leased in advance and has not begun after this time is given back, if none before it still begins."""
LONGEST_WAIT_S = 3 * PREFETCH_S
"""After this time it is given back in any case. A process that got no processor for a moment keeps its jobs."""
AIM_S = PREFETCH_S / 2
"""How long jobs that are leased in advance should wait: enough to keep a pool busy while the next batch is leased, but
only half of the allowed time, since handlers do not all take the same time."""
PREFETCH_JOBS = 512
"""The most jobs leased in advance, for each pool."""
PREFETCH_BYTES = 4 * 2**20
"""The most bytes of payloads, including those of the pool's running jobs. A handler that reads a larger payload takes
so long that leasing in advance gains nothing."""
FIRST_JOBS = 64
"""The most jobs at first, before it is known how long they wait."""
LONGEST_QUIET_S = 1.0
"""The longest time without leasing in advance after jobs had to be given back."""
TURN_JOBS = 32
"""The longest turn of the queue with the largest weight, while others wait for theirs: a few turns fill a pool, and
shares are right within a few hundred jobs."""
OWED_JOBS = 64
"""The most jobs at once for a queue that could not be served for long because a pool of its tasks was full."""
SHOWN_QUEUES = 10


class Order:
    """Whose turn it is.

    A sequence of queues is in order of preference. With weights each queue gets its share of the jobs, in each pool
    that its tasks use: the next turn is that of the queue that was given the least for its weight (start-time fair
    queueing). A share that a queue does not use, being empty, paused or limited, goes to the others by their weights;
    it is neither saved up nor owed.
    """

    def __init__(self, queues: Sequence[str] | Mapping[str, float]) -> None:
        if isinstance(queues, str) or not isinstance(queues, Sequence | Mapping):
            raise UsageError(f"queues: a sequence of names or a mapping to weights expected, got {quoted(queues)}")
        self.names = [name for name in queues if name != SCHEDULES]  # whose jobs are no calls
        if not self.names or not all(is_name(name) and len(name.encode()) <= 255 for name in self.names):
            raise UsageError(f"queues: names expected, of 1 to 255 bytes, got {quoted(queues)}")
        self._known = set(self.names)
        self._weights: dict[str, float] | None = None
        if isinstance(queues, Mapping):
            self._weights = {name: seconds_of(weight, f"queues[{quoted(name)}]") for name, weight in queues.items()}
            if not all(self._weights.values()):
                raise UsageError("queues: weights above 0 expected")
        self._clocks: dict[str, _Clock] = {}  # by pool
        self.idle: set[str] = set()
        """Queues that had no more to give when they were asked last."""

    def __str__(self) -> str:
        more = len(self.names) - SHOWN_QUEUES
        return ", ".join(self.names[:SHOWN_QUEUES]) + (f" and {more} more queues" if more > 0 else "")

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def add(self, name: str) -> None:
        """One more, with the weight 1."""
        if name not in self._known:
            if self._weights is not None:
                self._weights[name] = 1.0
            self._known.add(name)
            self.names.append(name)

    def turns(self, pool: str, names: list[str]) -> list[str]:
        """These queues, which wait for room in this pool, in the order in which they are to be asked."""
        weights = self._weights
        if weights is None or len(names) < 2:
            return names
        clock, idle = self._clocks.setdefault(pool, _Clock()), self.idle
        return sorted(names, key=lambda name: clock.start(name, weights[name], name in idle))

    def most(self, names: Sequence[str], room: int) -> int:
        """How many jobs may be leased in this turn, if there is room for so many."""
        weights = self._weights
        if weights is None or len(names) < 2:
            return room
        busy = [weights[name] for name in names if name not in self.idle]
        if len(busy) < 2:
            return room
        return min(room, max(1, int(TURN_JOBS * busy[0] / max(busy))))

    def gave(
        self,
        names: Sequence[str],
        given: Mapping[str, int],
        asked: float,
        pools: Callable[[str], Collection[str]],
    ) -> None:
        """What queues gave when they were asked in this order, for so many jobs together."""
        weights = self._weights
        if weights is not None:
            for name, count in given.items():
                weight = weights.get(name, 1.0)
                for pool in pools(name):
                    self._clocks.setdefault(pool, _Clock()).charge(name, weight, count, name in self.idle)
        for name in names:
            asked -= given.get(name, 0)
            if asked <= 0:
                self.idle.discard(name)
                return
            self.idle.add(name)

    def took_back(self, name: str, count: int, pools: Collection[str]) -> None:
        """This many jobs came back to their queue and did not begin."""
        self.idle.discard(name)
        if self._weights is not None and name in self._weights:
            for pool in pools:
                if pool in self._clocks:
                    self._clocks[pool].refund(name, count / self._weights[name])


class _Clock:
    """What queues got from one pool, in jobs by weight, on a common scale."""

    def __init__(self) -> None:
        self._now = 0.0  # where the queue that was served last stood then
        self._got: dict[str, float] = {}

    def start(self, name: str, weight: float, is_idle: bool) -> float:
        """Where a queue stands. One that had nothing to give begins anew: at the point where the others are."""
        got = self._got.get(name, self._now)
        return max(got, self._now) if is_idle else max(got, self._now - OWED_JOBS / weight)

    def charge(self, name: str, weight: float, count: int, is_idle: bool) -> None:
        start = self.start(name, weight, is_idle)
        self._got[name] = start + count / weight
        self._now = max(self._now, start)

    def refund(self, name: str, got: float) -> None:
        if name in self._got:
            self._got[name] -= got


class _Batch:
    """Jobs that were handed over together and of which some had to wait."""

    def __init__(self, since: float, deliveries: Sequence[Delivery], behind: int) -> None:
        self.since = since
        self.waiting = deque(deliveries)
        self.last = deliveries[-1]
        self.behind = behind  # jobs that waited then, these included


class Room:
    """A pool, how much it has to do, and how much may be leased for it in advance."""

    def __init__(self, pool: Pool, prefetch: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = pool
        self.jobs = 0  # handed over and not ended
        self.bytes = 0  # of their payloads
        self.careful: set[str] = set()
        """Queues with jobs of which none may be leased in advance."""
        self._prefetch = prefetch
        self._clock = clock
        self._seconds: float | None = None  # that a handler runs, lately
        self._fitting = float(min(FIRST_JOBS, prefetch))  # jobs that wait for no longer than they should, lately
        self._batches: deque[_Batch] = deque()  # those of which some have not begun
        self._begun = self._begun_before = 0  # of jobs that had to wait: now, and when it was asked for last
        self._quiet_s = PREFETCH_S
        self._quiet_until = -math.inf

    def free(self) -> int:
        """Jobs that may be leased now."""
        return self.pool.slots + self.ahead() - self.jobs

    def free_slots(self) -> int:
        """Handlers that can begin at once."""
        return self.pool.slots - self.jobs

    def free_bytes(self) -> int:
        """Bytes of payloads that may be leased, if more jobs are leased than slots are free."""
        return max(1, PREFETCH_BYTES - self.bytes)

    def is_wanting(self) -> bool:
        """It is worth a call to lease more."""
        return self.jobs <= max(self.pool.slots - 1, (self.pool.slots + self.ahead()) // 2)

    def ahead(self) -> int:
        """Jobs beyond the slots: as many as begin in a moment."""
        if self._seconds is None or self.careful or self.bytes >= PREFETCH_BYTES or self._clock() < self._quiet_until:
            return 0
        by_time = self.pool.slots * AIM_S / max(self._seconds, 1e-6)
        return int(min(self._prefetch, self._fitting, by_time))

    def took(self, batch: Sequence[Delivery]) -> None:
        """These are about to be handed over to the pool."""
        self.jobs += len(batch)
        self.bytes += sum(len(delivery.lease.payload) for delivery in batch)
        behind = self.jobs - self.pool.slots
        if batch and behind > 0:
            self._batches.append(_Batch(self._clock(), batch, behind))

    def ran(self, delivery: Delivery) -> None:
        """It ended."""
        self.jobs -= 1  # as `left`, for each job
        self.bytes -= len(delivery.lease.payload)
        known, seconds = self._seconds, delivery.seconds
        self._seconds = seconds if known is None else 0.9 * known + 0.1 * seconds

    def left(self, delivery: Delivery) -> None:
        """It is in the pool no more."""
        self.jobs -= 1
        self.bytes -= len(delivery.lease.payload)

    def waits_since(self) -> float | None:
        """Since when the first job waits that has not begun; None: all have."""
        while self._batches:
            first = self._batches[0]
            waiting = first.waiting
            while waiting and (waiting[0].started_at is not None or waiting[0].ending is not None):
                waiting.popleft()
                self._begun += 1
            if waiting:
                return first.since
            self._batches.popleft()
            if first.last.started_at is not None:
                self._learn(first.behind, first.last.started_at - first.since)
        return None

    def is_late(self, since: float, *, starved: bool) -> bool:
        """Jobs that wait since then are to be given back. `starved`: the process had no processor a moment ago."""
        begun, self._begun_before = self._begun - self._begun_before, self._begun
        waited = self._clock() - since
        return waited >= (LONGEST_WAIT_S if begun or starved else PREFETCH_S)

    def _learn(self, behind: int, waited: float) -> None:
        """The last of so many jobs that had to wait began after `waited` seconds."""
        fitting = behind * AIM_S / max(waited, 1e-6)
        if fitting < self._fitting:
            self._fitting = max(1.0, fitting, self._fitting / 2)
        elif behind >= self._fitting / 2:  # else it says nothing about as many as may wait
            self._fitting = min(self._prefetch, fitting, self._fitting * 2)

    def took_back(self) -> None:
        """Jobs waited for too long and are given back: handlers take longer than they did. No more for a while."""
        self._batches.clear()
        now = self._clock()
        calm = now > self._quiet_until + 10 * self._quiet_s
        self._quiet_s = PREFETCH_S if calm else min(LONGEST_QUIET_S, 2 * self._quiet_s)
        self._quiet_until = now + self._quiet_s
        self._seconds = max(self._seconds or 0.0, PREFETCH_S)

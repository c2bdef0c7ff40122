"""The renewer: what happens by the clock to jobs in hand.

It extends leases before they end, tells handlers that their lease was lost or their time is over, gives back what was
leased in advance and does not begin, and looks for calls in further queues.
"""

from __future__ import annotations

import logging
import math
import time

from rivetq import BrokerClosedError, BrokerFailedError, RivetQError

from ..engine import Extend
from ..tasks.running import Delivery
from ..units import duration_ms
from .held import LEASE_LOST, RENEWALS, Held, log_lost
from .limits import Limits
from .order import AIM_S, PREFETCH_S
from .queues import Queues

logger = logging.getLogger("rivetq.worker")


class Renewer:
    """Keeps the leases of a worker.

    Args:
        held: what the worker has in hand.
        queues: are looked for from time to time.
        limits: of handlers in threads.
    """

    def __init__(self, held: Held, queues: Queues, limits: Limits) -> None:
        self._held = held
        self._queues = queues
        self._limits = limits

    def run(self) -> None:
        held = self._held
        scan_at = give_back_at = math.inf
        while held.is_settling:
            held.renewer_poked.wait(self._pause_s(min(scan_at, give_back_at)))
            held.renewer_poked.clear()
            now = time.monotonic()
            self._limits.end(now)
            give_back_at = self._give_back_late(give_back_at) if held.is_watching else math.inf
            if now >= self._queues.look_at:
                self._queues.look_for_calls()
            if now >= scan_at:
                self._renew_due(now)
                scan_at = math.inf
            scan_at = min(scan_at, now + held.shortest / RENEWALS / 2)

    def _give_back_late(self, due: float) -> float:
        """Give back what was leased in advance and has waited for too long; when to look again, monotonic.

        What comes is leased afresh when a slot is free, the most urgent first. `due`: when this was to be called.
        """
        held = self._held
        next_at = math.inf
        with held.changed:
            now = time.monotonic()
            for room in () if held.is_stopping else held.rooms.values():
                since = room.waits_since()
                if since is None:
                    continue
                if now >= since + PREFETCH_S:
                    if room.is_late(since, starved=now > due + AIM_S) and held.take_back(room):
                        room.took_back()
                    next_at = min(next_at, now + AIM_S)
                else:
                    next_at = min(next_at, since + PREFETCH_S)
            held.is_watching = next_at < math.inf
        return next_at

    def _pause_s(self, until: float) -> float | None:
        """Until then, or until a time limit is over."""
        until = min(until, self._queues.look_at)
        first_at = self._limits.first_at()
        if first_at is not None:
            until = min(until, first_at)
        return None if until == math.inf else max(0.001, until - time.monotonic())

    def _renew_due(self, now: float) -> None:
        """Extend leases of which a third of their time is over, and with these those that will be due soon."""
        held = self._held
        due: dict[float, list[Delivery]] = {}
        soon: dict[float, list[Delivery]] = {}
        shortest = math.inf
        for delivery in list(held.deliveries.values()):
            seconds = delivery.visibility
            shortest = min(shortest, seconds)
            if delivery.is_told or delivery.job.finished:
                continue
            if delivery.renew_at <= now:
                due.setdefault(seconds, []).append(delivery)
            elif delivery.renew_at <= now + seconds / RENEWALS / 2:
                soon.setdefault(seconds, []).append(delivery)
        if shortest == math.inf:
            known, held.shortest = held.shortest, shortest
            if held.deliveries:  # the first came meanwhile
                held.shortest = known
        for seconds, deliveries in due.items():
            self._extend(deliveries + soon.get(seconds, []), seconds)

    def _extend(self, deliveries: list[Delivery], seconds: float) -> None:
        held, now = self._held, time.monotonic()
        extra_ms = duration_ms(seconds, "seconds")
        try:
            fates = held.broker.settle_many([Extend(each.lease.id, each.lease.token, extra_ms) for each in deliveries])
        except (BrokerClosedError, BrokerFailedError):
            raise
        except RivetQError as error:  # a full disk: the next turn tries it again
            logger.warning("%s leases could not be renewed: %s", len(deliveries), error)
            return
        for delivery, fate in zip(deliveries, fates, strict=True):
            if fate is None:
                delivery.renew_at = now + seconds / RENEWALS
            elif delivery.lease.token in held.deliveries and not delivery.is_told and not delivery.job.finished:
                self._note_lost(delivery)
                held.tell_handler(delivery, LEASE_LOST)

    def _note_lost(self, delivery: Delivery) -> None:
        self._held.let_go((delivery,))
        self._held.note_over((delivery,))
        log_lost(delivery)

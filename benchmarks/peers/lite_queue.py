"""litequeue: a table with the states ready, locked, done.

A locked job stays locked until its user looks for it (`list_locked`, `retry`): no timeout by itself. Batches of puts
go into one transaction; a pop opens its own, so there are none of those. One connection, and a lock around it, since
two threads cannot both begin a transaction on it. Done jobs stay until `prune`, which runs between the rounds.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import BUSY_POLL_S, Abilities, Contestant, Leases, Queue, installed, needed, polled

POLL_S = 0.01  # its manual names no interval


class LiteQueueQueue(Queue):
    def __init__(self, path: Path, *, durable: bool, poll_s: float) -> None:
        self._lock = threading.Lock()  # guards the connection
        self._queue = needed("litequeue", package="litequeue").LiteQueue(path)
        self._queue.conn.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._poll_s = poll_s

    def enqueue(self, payload: bytes) -> None:
        with self._lock:
            self._queue.put(payload)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        with self._lock, self._queue.transaction(mode="IMMEDIATE"):
            for payload in payloads:
                self._queue.put(payload)

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        if max_jobs != 1:
            raise NotImplementedError("litequeue takes one job at a time")
        return polled(self._look, wait_s, self._poll_s) if wait_s else self._look()

    def ack(self, deliveries: Sequence[Any]) -> None:
        with self._lock:
            for delivery in deliveries:
                self._queue.done(delivery.message_id)

    def payload(self, delivery: Any) -> bytes:
        payload: bytes = delivery.data
        return payload

    def tidy(self) -> None:
        with self._lock:
            self._queue.prune()

    def close(self) -> None:
        with self._lock:
            self._queue.close()

    def _look(self) -> list[Any]:
        with self._lock:
            delivery = self._queue.pop()
        return [] if delivery is None else [delivery]


class LiteQueue(Contestant):
    name = "litequeue"
    title = "litequeue"
    abilities = Abilities(Leases.ACK, lease_batches=False, poll_s=POLL_S)
    settings = (
        "WAL, synchronous=FULL / OFF, one connection under a lock, pruned between rounds; a waiting consumer polls "
        "every 10 ms (its manual names no interval)"
    )

    def open(self, *, waiting: bool = False) -> LiteQueueQueue:
        poll_s = POLL_S if waiting else BUSY_POLL_S
        return LiteQueueQueue(self.place() / "queue.sqlite", durable=self.durable, poll_s=poll_s)

    @classmethod
    def version(cls) -> str:
        needed("litequeue", package="litequeue")
        return f"litequeue {installed('litequeue')}"

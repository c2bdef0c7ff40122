"""persist-queue: its SQLite queue with acknowledgements, the payloads stored as they are.

The queue keeps acknowledged jobs until `clear_acked_data`, and looks for the next job from the first row on, over all
of those. So jobs are taken with `next_in_order`, which goes on from the last one, and the acknowledged are cleared
between the rounds. A job that was not acked comes back when the queue is opened again, or by `nack`: no timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import BUSY_POLL_S, Abilities, Contestant, Leases, Queue, installed, needed, polled


class AsTheyAre:
    """A serializer that does nothing: the payloads are bytes already."""

    @staticmethod
    def dumps(payload: bytes) -> bytes:
        return payload

    @staticmethod
    def loads(payload: bytes) -> bytes:
        return payload


class PersistQueueQueue(Queue):
    def __init__(self, path: Path, *, durable: bool) -> None:
        package = needed("persistqueue", package="persist-queue")
        self._empty = needed("persistqueue.exceptions", package="persist-queue").Empty
        self._queue = package.SQLiteAckQueue(str(path), multithreading=True, serializer=AsTheyAre)
        for connection in (self._queue._putter, self._queue._getter):  # it has no setting of its own for this
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._last: int | None = None

    def enqueue(self, payload: bytes) -> None:
        self._queue.put(payload)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            self._queue.put(payload)

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        if max_jobs != 1:
            raise NotImplementedError("persist-queue takes one job at a time")
        if (found := self._look()) or not wait_s:
            return found
        # Its own waiting can miss a put that comes between its look and its wait, for up to 10 s: wait for the same
        # event, and never longer than that race may cost.
        return polled(lambda: self._look() or self._wait_briefly(), wait_s, 0)

    def ack(self, deliveries: Sequence[Any]) -> None:
        for delivery in deliveries:
            self._queue.ack(id=delivery["pqid"])

    def payload(self, delivery: Any) -> bytes:
        payload: bytes = delivery["data"]
        return payload

    def tidy(self) -> None:
        self._queue.clear_acked_data(max_delete=1_000_000, keep_latest=0)

    def close(self) -> None:
        self._queue.close()

    def _look(self) -> list[Any]:
        last = self._last
        with contextlib.suppress(self._empty):
            delivery = self._queue.get(block=False, id=last, next_in_order=last is not None, raw=True)
            self._last = delivery["pqid"]
            return [delivery]
        return []

    def _wait_briefly(self) -> list[Any]:
        self._queue.put_event.clear()
        if not (found := self._look()):
            self._queue.put_event.wait(10 * BUSY_POLL_S)
        return found


class PersistQueue(Contestant):
    name = "persist"
    title = "persist-q"
    abilities = Abilities(Leases.ACK, enqueue_batches=False, lease_batches=False)
    settings = (
        "SQLiteAckQueue(multithreading=True), payloads unserialized, synchronous=FULL / OFF, get(next_in_order), "
        "consumers woken by its put_event"
    )

    def open(self, *, waiting: bool = False) -> PersistQueueQueue:
        return PersistQueueQueue(self.place(), durable=self.durable)

    @classmethod
    def version(cls) -> str:
        needed("persistqueue", package="persist-queue")
        return f"persist-queue {installed('persist-queue')}"

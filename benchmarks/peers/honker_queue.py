"""honker: queues with leases and batches in a SQLite file, written in Rust.

Its connections run with `synchronous=NORMAL` and it has no setting for that: WAL mode then syncs at a checkpoint and
not at a commit, so it takes part in the relaxed mode only. Payloads are JSON, so the bytes travel as Base64. Its own
watcher looks at the database every millisecond to wake its asynchronous consumers; the consumer here does the same.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import BUSY_POLL_S, QUEUE, Abilities, Contestant, Leases, Queue, installed, needed, polled

WORKER = "bench"


class HonkerQueue(Queue):
    def __init__(self, path: Path) -> None:
        self._database = needed("honker", package="honker").open(str(path))
        self._queue = self._database.queue(QUEUE, visibility_timeout_s=30)

    def enqueue(self, payload: bytes) -> None:
        self._queue.enqueue(as_text(payload))

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        with self._database.transaction() as transaction:
            for payload in payloads:
                self._queue.enqueue(as_text(payload), tx=transaction)

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        def look() -> list[Any]:
            return list(self._queue.claim_batch(WORKER, max_jobs))

        return polled(look, wait_s, BUSY_POLL_S) if wait_s else look()

    def ack(self, deliveries: Sequence[Any]) -> None:
        ids = [delivery.id for delivery in deliveries]
        acked = int(self._queue.ack(ids[0], WORKER)) if len(ids) == 1 else self._queue.ack_batch(ids, WORKER)
        if acked != len(ids):
            raise LookupError("a claim was lost")

    def payload(self, delivery: Any) -> bytes:
        return base64.b64decode(delivery.payload)

    def close(self) -> None:
        self._database.close()


def as_text(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


class Honker(Contestant):
    name = "honker"
    title = "honker"
    abilities = Abilities(Leases.TIMEOUT, durable=False, poll_s=BUSY_POLL_S)
    settings = (
        "synchronous=NORMAL, its only mode (so relaxed alone); a waiting consumer looks every 1 ms, as its watcher does"
    )

    def open(self, *, waiting: bool = False) -> HonkerQueue:
        return HonkerQueue(self.place() / "honker.db")

    @classmethod
    def version(cls) -> str:
        needed("honker", package="honker")
        return f"honker {installed('honker')}"

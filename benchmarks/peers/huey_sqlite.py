"""huey: the storage of its SqliteHuey by itself, without tasks, pickling or results around it.

A dequeue removes the job: what a consumer dies with is gone. No batches. Its consumer polls: every 0.1 s by default
(`-d`), rarer and rarer (up to 10 s) while nothing comes; here it stays at 0.1 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import BUSY_POLL_S, QUEUE, Abilities, Contestant, Leases, Queue, installed, needed, polled

DEFAULT_POLL_S = 0.1


class HueyQueue(Queue):
    def __init__(self, path: Path, *, durable: bool, poll_s: float) -> None:
        storage = needed("huey.storage", package="huey")
        self._storage = storage.SqliteStorage(QUEUE, filename=str(path), fsync=durable)
        self._poll_s = poll_s

    def enqueue(self, payload: bytes) -> None:
        self._storage.enqueue(payload)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            self._storage.enqueue(payload)

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[bytes]:
        if max_jobs != 1:
            raise NotImplementedError("huey takes one job at a time")
        return polled(self._look, wait_s, self._poll_s) if wait_s else self._look()

    def ack(self, deliveries: Sequence[Any]) -> None:
        """The job is gone already."""

    def payload(self, delivery: Any) -> bytes:
        return bytes(delivery)

    def close(self) -> None:
        self._storage.close()

    def _look(self) -> list[bytes]:
        payload = self._storage.dequeue()
        return [] if payload is None else [payload]


class Huey(Contestant):
    name = "huey"
    title = "huey"
    abilities = Abilities(Leases.NONE, enqueue_batches=False, lease_batches=False, poll_s=DEFAULT_POLL_S)
    settings = (
        "SqliteStorage of SqliteHuey: WAL, fsync=True / False; a waiting consumer polls every 0.1 s (its default)"
    )

    def open(self, *, waiting: bool = False) -> HueyQueue:
        poll_s = DEFAULT_POLL_S if waiting else BUSY_POLL_S
        return HueyQueue(self.place() / "huey.db", durable=self.durable, poll_s=poll_s)

    @classmethod
    def version(cls) -> str:
        needed("huey.storage", package="huey")
        return f"huey {installed('huey')}"

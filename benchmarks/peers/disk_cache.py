"""diskcache: its Cache as a queue, by `push` and `pull`, which is what its Deque is made of.

A pull removes the job: what a consumer dies with is gone. Batches go into one `transact` block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import BUSY_POLL_S, Abilities, Contestant, Leases, Queue, installed, needed, polled

POLL_S = 0.01  # its manual names no interval
FULL, OFF = 2, 0  # SQLite's numbers for `synchronous`


class DiskCacheQueue(Queue):
    def __init__(self, path: Path, *, durable: bool, poll_s: float) -> None:
        package = needed("diskcache", package="diskcache")
        self._cache = package.Cache(
            str(path),
            eviction_policy="none",
            cull_limit=0,  # a queue must not lose jobs to the cache's size limit
            sqlite_synchronous=FULL if durable else OFF,
        )
        self._poll_s = poll_s

    def enqueue(self, payload: bytes) -> None:
        self._cache.push(payload, retry=True)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        with self._cache.transact(retry=True):
            for payload in payloads:
                self._cache.push(payload, retry=True)

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        def look() -> list[Any]:
            return self._look() if max_jobs == 1 else self._look_for_many(max_jobs)

        return polled(look, wait_s, self._poll_s) if wait_s else look()

    def ack(self, deliveries: Sequence[Any]) -> None:
        """The jobs are gone already."""

    def payload(self, delivery: Any) -> bytes:
        payload: bytes = delivery
        return payload

    def close(self) -> None:
        self._cache.close()

    def _look(self) -> list[Any]:
        key, payload = self._cache.pull(retry=True)
        return [] if key is None else [payload]

    def _look_for_many(self, max_jobs: int) -> list[Any]:
        payloads: list[Any] = []
        with self._cache.transact(retry=True):
            while len(payloads) < max_jobs and (found := self._look()):
                payloads += found
        return payloads


class DiskCache(Contestant):
    name = "diskcache"
    title = "diskcache"
    abilities = Abilities(Leases.NONE, poll_s=POLL_S)
    settings = (
        "Cache.push / pull, no eviction, WAL, sqlite_synchronous=2 / 0; a waiting consumer polls every 10 ms (its "
        "manual names no interval)"
    )

    def open(self, *, waiting: bool = False) -> DiskCacheQueue:
        return DiskCacheQueue(self.place(), durable=self.durable, poll_s=POLL_S if waiting else BUSY_POLL_S)

    @classmethod
    def version(cls) -> str:
        needed("diskcache", package="diskcache")
        return f"diskcache {installed('diskcache')}"

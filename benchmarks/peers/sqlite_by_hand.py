"""A job queue on SQLite as a competent user would write it, for the same work as RivetQ's in the table.

WAL mode; `synchronous=FULL` where a commit must survive a power cut and `OFF` where it need not; one connection that
the threads share under a lock (with a connection each they would wait in SQLite's busy handler, which sleeps); partial
indexes, so that neither the order of the ready jobs nor the search for expired leases reads other jobs; leasing in a
single `UPDATE ... RETURNING`, fenced by a token; a condition that wakes the consumers of the process. It has no
idempotency keys, headers, retries, dead letters or limits: what it leaves out can only favour it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from contestants import QUEUE, Abilities, Contestant, Leases, Queue

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- an id is never reused
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL DEFAULT 5,
    leased INTEGER NOT NULL DEFAULT 0,
    due_ms INTEGER NOT NULL,               -- ready: not before; leased: the deadline
    token INTEGER NOT NULL DEFAULT 0,      -- counts deliveries, and fences the answers to them
    payload BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS ready ON jobs (queue, priority DESC, id) WHERE leased = 0;
CREATE INDEX IF NOT EXISTS deadlines ON jobs (due_ms) WHERE leased = 1;
"""
ENQUEUE = "INSERT INTO jobs (queue, due_ms, payload) VALUES (?, ?, ?)"
LEASE = """
UPDATE jobs SET leased = 1, due_ms = ?, token = token + 1 WHERE id IN (
    SELECT id FROM jobs WHERE leased = 0 AND queue = ? AND due_ms <= ? ORDER BY priority DESC, id LIMIT ?
) RETURNING id, token, payload
"""
ACK = "DELETE FROM jobs WHERE id = ? AND token = ?"
EXPIRE = "UPDATE jobs SET leased = 0 WHERE leased = 1 AND due_ms <= ?"
VISIBILITY_MS = 30_000


class Delivery(NamedTuple):
    id: int
    token: int
    payload: bytes


class SqliteQueue(Queue):
    """The queue; every call is one transaction. Thread-safe."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        self._changed = threading.Condition()  # guards the connection: sqlite3 lets one thread at a time use it
        self._waiting = 0  # consumers, so that an enqueue with nobody to wake costs no wake-up
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._connection.executescript(SCHEMA)

    def enqueue(self, payload: bytes) -> None:
        with self._changed:
            self._connection.execute(ENQUEUE, (QUEUE, now_ms(), payload))
            if self._waiting:
                self._changed.notify()

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        now = now_ms()
        with self._changed, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(ENQUEUE, ((QUEUE, now, payload) for payload in payloads))
            if self._waiting:
                self._changed.notify(len(payloads))

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Delivery]:
        with self._changed:
            deliveries, until = self._lease(max_jobs), time.monotonic() + wait_s
            while not deliveries and (left_s := until - time.monotonic()) > 0:
                self._waiting += 1
                try:
                    self._changed.wait(left_s)
                finally:
                    self._waiting -= 1
                deliveries = self._lease(max_jobs)
        return deliveries

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """All or nothing; LookupError if one of them was lost."""
        answers = [(delivery.id, delivery.token) for delivery in deliveries]
        with self._changed:
            if len(answers) == 1:
                if self._connection.execute(ACK, answers[0]).rowcount != 1:
                    raise LookupError("a lease was lost")
                return
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                if self._connection.executemany(ACK, answers).rowcount != len(answers):
                    raise LookupError("a lease was lost")

    def release_expired(self) -> int:
        """What a timer of the application would call. No workload does: that, too, favours this queue."""
        with self._changed:
            return self._connection.execute(EXPIRE, (now_ms(),)).rowcount

    def payload(self, delivery: Delivery) -> bytes:
        return delivery.payload

    def close(self) -> None:
        with self._changed:
            self._connection.close()

    def _lease(self, max_jobs: int) -> list[Delivery]:
        # Caller holds self._changed.
        now = now_ms()
        rows = self._connection.execute(LEASE, (now + VISIBILITY_MS, QUEUE, now, max_jobs)).fetchall()
        return [Delivery(*row) for row in rows]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class SqliteByHand(Contestant):
    name = "sqlite"
    title = "SQLite"
    abilities = Abilities(Leases.TIMEOUT)
    settings = "by hand: WAL, synchronous=FULL / OFF, one connection under a lock, consumers woken by a condition"

    def open(self, *, waiting: bool = False) -> SqliteQueue:
        return SqliteQueue(self.place() / "queue.sqlite", durable=self.durable)

    @classmethod
    def version(cls) -> str:
        return f"SQLite {sqlite3.sqlite_version}"

"""A job queue on SQLite as a competent user would write it, for the same work as RivetQ's in the table.

WAL mode; `synchronous=FULL` where a commit must survive a power cut and `OFF` where it need not; one connection that
the threads share under a lock (with a connection each they would wait in SQLite's busy handler, which sleeps); partial
indexes, so that neither the order of the ready jobs nor the search for expired leases reads other jobs; leasing in a
single `UPDATE ... RETURNING`, fenced by a token. It has no idempotency keys, headers, retries, dead letters or limits:
what it leaves out can only favour it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
VISIBILITY_MS = 30_000


class Delivery(NamedTuple):
    id: int
    token: int
    payload: bytes


class SqliteQueue:
    """The queue; every call is one transaction. Thread-safe."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        self._lock = threading.Lock()  # guards the connection: sqlite3 lets one thread at a time use it
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        self._connection.executescript(SCHEMA)

    def enqueue(self, queue: str, payload: bytes) -> int:
        with self._lock:
            job_id = self._connection.execute(ENQUEUE, (queue, now_ms(), payload)).lastrowid
        assert job_id is not None
        return job_id

    def enqueue_many(self, queue: str, payloads: Sequence[bytes]) -> None:
        now = now_ms()
        with self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(ENQUEUE, ((queue, now, payload) for payload in payloads))

    def lease_many(self, queue: str, max_jobs: int) -> list[Delivery]:
        now = now_ms()
        with self._lock:
            rows = self._connection.execute(LEASE, (now + VISIBILITY_MS, queue, now, max_jobs)).fetchall()
        return [Delivery(*row) for row in rows]

    def ack_many(self, deliveries: Sequence[Delivery]) -> None:
        """All or nothing; LookupError if one of them was lost."""
        answers = [(delivery.id, delivery.token) for delivery in deliveries]
        with self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            if self._connection.executemany(ACK, answers).rowcount != len(answers):
                raise LookupError("a lease was lost")

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def now_ms() -> int:
    return time.time_ns() // 1_000_000

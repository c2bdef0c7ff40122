"""The processes that test_kill.py kills: each opens the directory, says what it found, and works until it is dead.

    python kill_child.py DIRECTORY JOURNAL SEED

For each line on stdin (JSON: the number of a life, the keys to look up, the calls to make again) a child is forked, so
that an import is paid for once. It answers with two lines on stdout: its pid, and (JSON) all that is there. Then four
threads work. When it has died, its parent writes a line with how: minus the signal, or the exit status.

The journal is written with one os.write per line to a file opened O_APPEND, so that a line that was written outlives
the process. Before a call goes an "intent", after its return an "ok"; what has an intent and no ok is in doubt.

    ["intent", n, keys to be enqueued, ids to be ended, ids that were told for the keys]
    ["ok", n, ids of the keys]
    ["leased", id, token, attempt, key]
    ["told", ids]            of a transaction that will be rolled back
    ["wrong", text]          what this process saw itself
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import traceback
import zlib
from typing import Any

from inside import inside

from rivetq import Broker, RetryPolicy
from rivetq.engine import FsyncMode

QUEUE = "work"
SEGMENT_BYTES = 65_536
THREADS = 4
MODES: tuple[FsyncMode, ...] = ("always", "always", "interval", "never")
PLENTY = 150
"""Ready jobs above which the threads rather take than put."""
POLICY = RetryPolicy(max_attempts=4, base=0, jitter="none")


def payload_of(key: str) -> bytes:
    """The payload that belongs to a key: its name and something of a length that depends on it."""
    number = zlib.crc32(key.encode())
    return f"{key}|".encode() + number.to_bytes(4, "little") * (number % 200)


def key_of(payload: bytes) -> str:
    """The key whose payload this is, or what it says instead."""
    key = payload.partition(b"|")[0].decode("utf-8", "replace")
    return key if payload == payload_of(key) else f"damaged:{payload[:40]!r}"


class Journal:
    """What this process was told, in a file that survives it."""

    def __init__(self, path: str, life: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._numbers = itertools.count(life * 1_000_000)

    def number(self) -> int:
        return next(self._numbers)

    def write(self, *line: Any) -> None:
        data = json.dumps(line).encode() + b"\n"
        assert os.write(self._fd, data) == len(data), "the journal itself was cut short"

    def intend(self, keys: list[str], ended: list[int], told: list[int] | None = None) -> int:
        number = self.number()
        self.write("intent", number, keys, ended, told)
        return number


class Worker:
    """One thread's work."""

    def __init__(self, broker: Broker, journal: Journal, rng: random.Random) -> None:
        self._broker = broker
        self._journal = journal
        self._rng = rng

    def run(self) -> None:
        try:
            while True:
                self._step()
        except BaseException:
            self._journal.write("wrong", traceback.format_exc())
            raise

    def _step(self) -> None:
        dice = self._rng.random()
        if self._broker.stats(QUEUE).ready > PLENTY:
            dice = 0.5 + dice / 2
        if dice < 0.30:
            self.enqueue([self._key()])
        elif dice < 0.35:
            self.enqueue([self._key() for _ in range(3)])
        elif dice < 0.40:
            self._roll_back()
        else:
            self._take(dice)

    def _key(self) -> str:
        return f"k{self._journal.number()}"

    def enqueue(self, keys: list[str]) -> None:
        number = self._journal.intend(keys, [])
        payloads = [payload_of(key) for key in keys]
        if len(keys) == 1:
            ids = [self._broker.enqueue(QUEUE, payloads[0], idempotency_key=keys[0], retry=POLICY)]
        else:
            ids = list(self._broker.enqueue_many(QUEUE, payloads, idempotency_keys=keys, retry=POLICY))
        self._journal.write("ok", number, ids)

    def _take(self, dice: float) -> None:
        lease = self._broker.lease(QUEUE, visibility_timeout=3600)
        if lease is None:
            return self.enqueue([self._key()])
        self._journal.write("leased", lease.id, lease.token, lease.attempt, key_of(lease.payload))
        if dice < 0.80:
            number = self._journal.intend([], [lease.id])
            lease.ack()
            return self._journal.write("ok", number, [])
        if dice < 0.88:
            return lease.nack(error="again")
        keys = [self._key(), self._key()]
        with self._broker.transaction() as tx:
            tx.ack(lease)
            told = [tx.enqueue(QUEUE, payload_of(key), idempotency_key=key, retry=POLICY) for key in keys]
            number = self._journal.intend(keys, [lease.id], told)
        return self._journal.write("ok", number, told)

    def _roll_back(self) -> None:
        try:
            with self._broker.transaction() as tx:
                self._journal.write("told", [tx.enqueue(QUEUE, b"never")])
                raise _NeverMindError
        except _NeverMindError:
            pass


class _NeverMindError(Exception):
    """Rolls a transaction back."""


def found(broker: Broker, keys: list[str]) -> dict[str, Any]:
    """All that is there, and what the keys stand for."""
    inside(broker).audit()
    jobs = [(j.id, j.state, j.attempts, key_of(j.payload)) for j in broker.jobs(QUEUE, limit=10_000)]
    stats = broker.stats(QUEUE)
    return {
        "jobs": jobs,
        "counted": stats.ready + stats.scheduled + stats.leased + stats.dead,
        "found": {key: broker.find(QUEUE, key) for key in keys},
        "dropped": inside(broker)._machine.oldest_segment - 1,
        "metrics": broker.metrics(),
    }


def live(directory: str, journal_path: str, seed: str, order: dict[str, Any]) -> None:
    """One life: does not return unless a thread fails."""
    fsync = MODES[order["life"] % len(MODES)]  # a process that dies loses nothing in any of them
    broker = Broker(directory, segment_bytes=SEGMENT_BYTES, fsync=fsync, fsync_interval=0.02)
    report = found(broker, order["keys"])
    say(json.dumps(report))
    journal = Journal(journal_path, order["life"])
    workers = [Worker(broker, journal, random.Random(f"{seed} {order['life']} {i}")) for i in range(THREADS)]
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    for keys in order["again"]:  # what was in doubt: with their keys the calls may be made again
        workers[0].enqueue(keys)
    dead = [job_id for job_id, state, _, _ in report["jobs"] if state == "dead"]
    if len(dead) > 30:
        number = journal.intend([], dead)
        assert broker.purge(QUEUE, state="dead") == len(dead), "other dead letters than those that were listed"
        journal.write("ok", number, [])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    directory, journal_path, seed = sys.argv[1:4]
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            try:
                say(str(os.getpid()))
                live(directory, journal_path, seed, order)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        say(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


if __name__ == "__main__":
    main()

"""kill -9 on a process that works with four threads, again and again, in one directory.

`make crash` runs this alone: `pytest tests/test_kill.py --cycles 1000 -s`. The seed is printed; RIVETQ_SEED repeats it
(the order of the child's work, not the instant at which it dies).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import kill_child
import pytest
from kill_child import QUEUE, SEGMENT_BYTES, key_of

from rivetq import Broker

CYCLES = 60
"""In `make test`."""
SAMPLE = 40
"""Keys of earlier lives that are looked up after each opening; at the end all of them are."""


class Intent(NamedTuple):
    keys: list[str]
    ended: list[int]
    told: list[int] | None


class Expected:
    """What must be true of the directory by all that any process was told."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}  # of every key that was answered, or seen in a lease
        self.ended: set[int] = set()  # answered acks and purges
        self.doubtful: dict[int, Intent] = {}
        self.tokens: dict[int, int] = {}
        self.told: dict[int, str] = {}  # every id that anybody was told -> its key, "" if it was rolled back
        self.highest_before = 0  # the highest id told in earlier lives
        self.enqueues = self.acks = self.torn = 0
        self.lost: set[int] = set()
        self.resurrected: set[int] = set()
        self.wrong: list[str] = []

    def read(self, lines: list[str]) -> None:
        for line in lines:
            match json.loads(line):
                case ["intent", number, keys, ended, told]:
                    self.doubtful[number] = Intent(keys, ended, told)
                    for key, job_id in zip(keys, told or (), strict=False):
                        self._tell(job_id, key)  # also if it never comes into being
                case ["ok", number, ids]:
                    intent = self.doubtful.pop(number)
                    self._happened(intent, ids)
                    self.enqueues += len(ids)
                    self.acks += len(intent.ended)
                case ["leased", job_id, token, attempt, key]:
                    self.lease(job_id, token, attempt, key)
                case ["told", ids]:
                    for job_id in ids:
                        self._tell(job_id, "")
                case ["wrong", text]:
                    self.wrong.append(text)
                case other:
                    raise AssertionError(f"no line of a journal: {other}")

    def _happened(self, intent: Intent, ids: list[int]) -> None:
        for key, job_id in zip(intent.keys, ids, strict=True):
            self._learn(key, job_id)
        self.ended.update(intent.ended)

    def _learn(self, key: str, job_id: int) -> None:
        if self.ids.setdefault(key, job_id) != job_id:
            self.wrong.append(f"key {key} stands for {self.ids[key]} and for {job_id}")
        self._tell(job_id, key)

    def _tell(self, job_id: int, key: str) -> None:
        if job_id not in self.told and job_id <= self.highest_before:
            self.wrong.append(f"id {job_id} ({key}) is not above {self.highest_before}, told in an earlier life")
        if self.told.setdefault(job_id, key) != key:
            self.wrong.append(f"id {job_id} was told for {self.told[job_id]!r} and for {key!r}")

    def lease(self, job_id: int, token: int, attempt: int, key: str) -> None:
        if job_id in self.ended:
            self.resurrected.add(job_id)
        if token <= self.tokens.get(job_id, 0):
            self.wrong.append(f"job {job_id}: token {token} after {self.tokens[job_id]}")
        if not 1 <= attempt <= 4:
            self.wrong.append(f"job {job_id}: attempt {attempt} of 4")
        self.tokens[job_id] = token
        if key.startswith("damaged"):
            self.wrong.append(f"job {job_id}: {key}")
        else:
            self._learn(key, job_id)  # its enqueue may be in doubt: another thread saw that it happened

    def doubtful_keys(self) -> list[str]:
        return [key for intent in self.doubtful.values() for key in intent.keys]

    def compare(self, report: dict[str, Any]) -> None:
        """With what the next life found."""
        present = {job_id: (state, attempts, key) for job_id, state, attempts, key in report["jobs"]}
        if not len(present) == len(report["jobs"]) == report["counted"]:
            self.wrong.append(f"{len(report['jobs'])} jobs listed, {len(present)} ids, {report['counted']} counted")
        self._resolve(report["found"], present)
        for key, job_id in report["found"].items():
            if job_id != self.ids.get(key):
                self.wrong.append(f"key {key} stands for {job_id}, for {self.ids.get(key)} before")
        self.lost |= set(self.ids.values()) - self.ended - present.keys()
        self.resurrected |= self.ended & present.keys()
        for job_id, (state, attempts, key) in present.items():
            if self.ids.get(key) != job_id:
                self.wrong.append(f"job {job_id} with key {key} was enqueued by nobody")
            if (state == "dead") != (attempts == 4) or state in ("leased", "scheduled"):
                self.wrong.append(f"job {job_id} is {state} after {attempts} attempts of 4 and the owner's death")
        self.highest_before = max(self.told, default=0)

    def _resolve(self, ids: dict[str, int | None], present: dict[int, Any]) -> None:
        """A call that was under way is wholly in or wholly out."""
        doubtful, self.doubtful = self.doubtful, {}
        for number, intent in doubtful.items():
            new = [ids[key] for key in intent.keys]
            happened = {job_id is not None for job_id in new} | {job_id not in present for job_id in intent.ended}
            if len(happened) > 1:
                self.torn += 1
                self.wrong.append(f"call {number} is half in: {intent}, its keys stand for {new}")
            elif happened == {True}:
                self._happened(intent, [job_id for job_id in new if job_id is not None])
                if intent.told not in (None, new):
                    self.wrong.append(f"call {number} was told {intent.told} and has {new}")

    def verdict(self) -> None:
        assert not self.wrong, "\n".join(self.wrong[:10])
        assert not self.lost, f"lost: {sorted(self.lost)[:20]}"
        assert not self.resurrected, f"resurrected: {sorted(self.resurrected)[:20]}"
        assert not self.torn, f"{self.torn} calls are half in"


class Hunt:
    """The directory, the journal, and one process after the other."""

    def __init__(self, directory: Path, seed: str) -> None:
        self.path = directory / "queue"
        self.expected = Expected()
        self._journal = directory / "journal"
        self._journal.touch()
        self._read_to = 0
        self._errors = directory / "stderr"
        with self._errors.open("wb") as errors:
            self._parent = subprocess.Popen(
                [sys.executable, kill_child.__file__, str(self.path), str(self._journal), seed],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def live(self, life: int, rng: random.Random) -> dict[str, Any]:
        """One life, from the opening to the kill; what it found."""
        expected = self.expected
        # A transaction is not made again, its lease may be settled; its keys are just looked up.
        again = [intent.keys for intent in expected.doubtful.values() if intent.keys and not intent.ended]
        known = list(expected.ids)
        keys = expected.doubtful_keys() + rng.sample(known, min(SAMPLE, len(known)))
        self._order({"life": life, "keys": keys, "again": again})
        pid = int(self._hear())
        try:
            answer = self._hear()
            assert answer.startswith(b"{"), f"life {life} ended by itself\n{self._errors.read_text()[-3000:]}"
            time.sleep(rng.uniform(0.020, 0.120))  # the work that the kill cuts short
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        died = int(self._hear())
        assert died == -signal.SIGKILL, f"life {life} ended with {died}\n{self._errors.read_text()[-3000:]}"
        report: dict[str, Any] = json.loads(answer)
        expected.compare(report)
        expected.read(self._new_lines())
        expected.verdict()
        return report

    def end(self) -> None:
        self._parent.communicate()

    def _order(self, order: dict[str, Any]) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order).encode() + b"\n")
        self._parent.stdin.flush()

    def _hear(self) -> bytes:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        assert line, f"no answer\n{self._errors.read_text()[-3000:]}"
        return line

    def _new_lines(self) -> list[str]:
        with self._journal.open("rb") as journal:
            journal.seek(self._read_to)
            data = journal.read()
        self._read_to += len(data)
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            # The kill met the write of a long line between two of its pages, so it was not said: what it tells of stays
            # doubtful. The line of the next life begins anew.
            with self._journal.open("ab") as journal:
                self._read_to += journal.write(b"\n")
        return whole.decode().splitlines()


def test_kill_9_at_any_instant_loses_no_job_and_brings_no_acked_one_back(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    cycles: int = request.config.getoption("--cycles") or CYCLES
    seed = os.environ.get("RIVETQ_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"\nkill -9: seed {seed}")
    rng = random.Random(seed)
    hunt = Hunt(tmp_path, seed)
    expected = hunt.expected
    dropped = 0
    try:
        for life in range(1, cycles + 1):
            dropped = hunt.live(life, rng)["dropped"]
    finally:
        hunt.end()
    with Broker(hunt.path, segment_bytes=SEGMENT_BYTES) as broker:
        expected.compare(kill_child.found(broker, [*expected.ids, *expected.doubtful_keys()]))
        while leases := broker.lease_many(QUEUE, 500):
            for lease in leases:
                expected.lease(lease.id, lease.token, lease.attempt, key_of(lease.payload))
            broker.ack_many(leases)
    print(
        f"kill -9: {cycles} cycles, {expected.enqueues} ok enqueues, {expected.acks} ok acks, "
        f"lost {len(expected.lost)}, resurrected {len(expected.resurrected)}, half in {expected.torn}, "
        f"{dropped} segments compacted away"
    )
    expected.verdict()
    assert dropped or cycles < 50, "no segment was compacted away"
    assert expected.enqueues > 10 * cycles, "the processes hardly worked"
    assert expected.acks > 10 * cycles, "the processes hardly worked"

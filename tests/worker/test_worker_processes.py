"""Worker processes under load that are told to end, or killed, again and again, in one directory each.

`make workers CYCLES=50` runs this alone. What must hold is in `Account.check`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rivetq import Broker

CHILD = Path(__file__).parent.with_name("worker_child.py")
GRACE_S = 2.0
START_S = 30.0
SLICE = 2
"""Cycles in `make test`."""


class Account:
    """What the processes of one directory said, and what is in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines = Path(f"{directory}.lines")
        self.burnt = 0

    def said(self) -> tuple[set[int], Counter[int]]:
        enqueued: set[int] = set()
        ran: Counter[int] = Counter()
        for line in self.lines.read_text().splitlines():
            verb, *ids = line.split()
            if verb == "enqueued":
                enqueued.update(map(int, ids))
            elif verb == "ran":
                ran[int(ids[0])] += 1
        return enqueued, ran

    def check(self, *, killed: bool, hurried: bool = False) -> tuple[int, int]:
        """Nothing that was enqueued is lost; after an end in order no job ran twice, and no attempt was counted.

        Hurried: without a grace time a handler in a thread may just be ending when its job is given back.
        """
        enqueued, ran = self.said()
        with Broker(self.directory, release_on_open=killed) as broker:
            waiting: dict[int, int] = {}
            for queue in broker.queues():
                after = 0
                while jobs := broker.jobs(queue, after=after, limit=1000):
                    waiting.update((job.id, job.attempts) for job in jobs)
                    after = jobs[-1].id
            stats = broker.stats()
        lost = enqueued - waiting.keys() - ran.keys()
        assert not lost, f"lost: {sorted(lost)[:10]}"
        assert stats.leased == 0
        if not killed:
            assert stats.dead == 0
            if not hurried:
                assert not {job_id for job_id in waiting if job_id in ran}, "ran to its end and was not acked"
                assert max(ran.values(), default=1) == 1, "ran twice"
            assert {job_id for job_id, attempts in waiting.items() if attempts} == set(), "attempts were burnt"
        return len(enqueued), len(ran)


def begin(account: Account, runs: int = 20) -> subprocess.Popen[bytes]:
    """A worker process, leader of a group of its own, that has run some jobs, or has just begun."""
    before = account.lines.read_text().count("ran ") if account.lines.exists() else 0
    process = subprocess.Popen([sys.executable, str(CHILD), str(account.directory)], start_new_session=True)
    end = time.monotonic() + START_S
    while not account.lines.exists() or account.lines.read_text().count("ran ") < before + runs:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"it does not work; exit status {process.wait()}")
        time.sleep(0.01)
    return process


@pytest.fixture
def cycles(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--cycles")) or SLICE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_worker_that_is_told_to_end_loses_no_job_and_burns_no_attempt(
    tmp_path: Path, cycles: int, number: signal.Signals
) -> None:
    account = Account(tmp_path / "data")
    longest = 0.0
    for _ in range(cycles if number is signal.SIGTERM else 1):
        process = begin(account)
        time.sleep(random.random() * 0.3)
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(GRACE_S + 20) == 0
        longest = max(longest, time.monotonic() - started)
        enqueued, ran = account.check(killed=False)
    print(f"\n{number.name}: {enqueued} jobs enqueued, {ran} run, the slowest end took {longest:.2f} s of {GRACE_S} s")
    assert longest <= GRACE_S


def test_a_signal_to_the_whole_group_kills_no_child_that_comes_up(tmp_path: Path, cycles: int) -> None:
    """As Ctrl-C and supervisors send it, while the first children of the process pool start."""
    account = Account(tmp_path / "data")
    for turn in range(cycles):
        process = begin(account, runs=0)
        while account.lines.read_text().count("begun") <= turn:
            time.sleep(0.005)
        time.sleep(random.random() * 0.3)
        os.killpg(process.pid, random.choice([signal.SIGTERM, signal.SIGINT]))
        assert process.wait(GRACE_S + 20) == 0
        account.check(killed=False)


def test_two_signals_at_once_end_a_worker_like_one(tmp_path: Path, cycles: int) -> None:
    account = Account(tmp_path / "data")
    for turn in range(2 * cycles):
        process = begin(account)
        for number in (signal.SIGTERM, signal.SIGINT) if turn % 2 else (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        assert process.wait(GRACE_S + 20) == 0
        account.check(killed=False, hurried=True)


def test_a_worker_that_is_killed_loses_no_job(tmp_path: Path, cycles: int) -> None:
    account = Account(tmp_path / "data")
    for _ in range(cycles):
        process = begin(account)
        time.sleep(random.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        enqueued, ran = account.check(killed=True)
    print(f"\nSIGKILL: {enqueued} jobs enqueued, {ran} run")

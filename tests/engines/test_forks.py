"""A slice of the sweep of forks (see forks.py; `make forks` makes it whole), and that it sees bugs."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
from pathlib import Path

import forks
import pytest
from simulation import ViolationError

import rivetq.engines.lessees
import rivetq.storage.segment
from rivetq import Broker, ForkedBrokerError
from rivetq.aio import AsyncBroker


def test_a_fork_at_any_line_leaves_the_parent_alone_and_the_child_is_refused() -> None:
    held, lines, made = forks.run(120, 0, 2)
    assert made == 120
    assert len(lines) > 60
    assert {"engine", "keeper", "close", "soon", "group", "log, writing", "log, spares", "notifier"} <= held.keys()


PLANTS = {
    "a lock of the log": ("m.Log.forked = lambda self: self._disk.forked()", "storage.log", "sync", "hung.*under way"),
    "a write": ("m.SystemDisk.forked = lambda self: None", "storage.disk", "enqueue", r"the child changed \['log/"),
    "the index": ("m.Index.forget = lambda self: None", "storage.index", "checkpoint", r"the child changed \[.*'index"),
    "the group": ("m.GroupCommit.forked = lambda self, error: None", "storage.group_commit", "enqueue", "hung"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_the_sweep_of_forks_sees(name: str) -> None:
    plant, module, call, what = PLANTS[name]
    traced = f"forks.HANG_S = 5; forks.TRACED = {{m.__file__, {rivetq.storage.segment.__file__!r}}}"
    with pytest.raises(ViolationError, match=what):
        forks.run(400, 0, 1, only=[call], plant=f"import forks, rivetq.{module} as m; {plant}; {traced}")


def test_a_lease_that_is_about_to_wait_when_its_thread_forks_ends_in_the_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    park = rivetq.engines.lessees.SleepingLessee.park
    child = [0]

    def forks_first(lessee: rivetq.engines.lessees.SleepingLessee, timeout_s: float | None) -> None:
        child[0] = os.fork()
        if child[0]:
            broker.enqueue("q", b"")
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
        park(lessee, timeout_s)

    monkeypatch.setattr(rivetq.engines.lessees.SleepingLessee, "park", forks_first)
    with Broker(":memory:") as broker:
        try:
            assert broker.lease("q", wait=None) is not None
        except ForkedBrokerError:
            os._exit(0 if not child[0] else 1)
        finally:
            if not child[0]:
                os._exit(1)
        assert os.waitpid(child[0], 0)[1] == 0


def test_a_thread_that_forks_in_a_callback_ends_in_the_child() -> None:
    told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def done(leases: object, error: object) -> None:
        child = os.fork()
        if child:
            told.put(child)
        else:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)

    with Broker(":memory:") as broker:
        broker.lease_soon("q", 1, done)
        broker.enqueue("q", b"")
        assert os.waitpid(told.get(timeout=20), 0)[1] == 0


def test_an_async_broker_whose_threads_are_busy_refuses_in_a_child(tmp_path: Path) -> None:
    broker = AsyncBroker(Broker(tmp_path / "q"))

    async def look() -> None:
        await broker.stats()

    asyncio.run(look())  # its threads are there
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            with pytest.raises(ForkedBrokerError):
                asyncio.run(look())
            asyncio.run(broker.close())
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    broker.broker.close()
    asyncio.run(broker.close())

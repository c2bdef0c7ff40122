"""A program that closes all descriptors, RivetQ's among them, and opens files under their numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import rivetq.storage.index
from rivetq import Broker, BrokerFailedError, BrokerLockedError
from rivetq.engines.local import LocalEngine
from rivetq.storage.disk import OwnFile, SystemDisk
from rivetq.storage.lock import DirectoryLock


class Foreign:
    """Files of the program under numbers that were a broker's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fds: list[int] = []

    def take_over(self, broker: Broker, *names: str) -> None:
        """Close the descriptors of a broker's files, all or those of these names, and use their numbers."""
        own = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self.fds.append(own)
        for name in os.listdir("/proc/self/fd"):
            try:
                link = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:  # that of the listing
                continue
            if link.startswith(broker.path) and (not names or os.path.basename(link) in names):
                os.dup2(own, int(name))  # which closes it first
                self.fds.append(int(name))
        assert len(self.fds) > 1
        os.pwrite(own, b"precious" * 1024, 0)

    def is_untouched(self) -> bool:
        return self.path.read_bytes() == b"precious" * 1024 and all(
            os.path.samestat(os.fstat(fd), self.path.stat()) for fd in self.fds
        )


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Foreign]:
    # What a thread is about to open or close in the very moment is not covered.
    monkeypatch.setattr(LocalEngine, "_keep", lambda self, *, overdue: None)
    found = Foreign(tmp_path / "foreign")
    yield found
    for fd in found.fds:
        os.close(fd)


CALLS: dict[str, Callable[[Broker], Any]] = {
    "enqueue": lambda broker: broker.enqueue("q", b"after"),
    "enqueue much": lambda broker: broker.enqueue_many("q", [b"x" * 1000] * 1000),
    "lease": lambda broker: broker.lease("q"),
    "read": lambda broker: broker.jobs("q"),
    "sync": lambda broker: broker.sync(),
    "checkpoint": lambda broker: broker.checkpoint(),
    "compact": lambda broker: broker.compact(),
    "rotate": lambda broker: broker.rotate(),
    "close": lambda broker: broker.close(),
}


@pytest.mark.parametrize("fsync", ["always", "never"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_goes_into_a_file_of_the_program_and_what_was_answered_is_kept(
    tmp_path: Path, foreign: Foreign, call: str, fsync: Any
) -> None:
    broker = Broker(tmp_path / "data", fsync=fsync, cache_bytes=0)
    ids = [broker.enqueue("q", b"before") for _ in range(2)]
    broker.checkpoint()  # LMDB has its file open from here on
    ids.append(broker.enqueue("q", b"before"))
    foreign.take_over(broker)
    with suppress(BrokerFailedError):  # and nothing else: no file is damaged
        CALLS[call](broker)
    broker.close()
    broker.close()
    assert foreign.is_untouched()
    with Broker(tmp_path / "data") as broker:
        assert [job.id for job in broker.jobs("q")][:3] == ids
        assert all(job.payload == b"before" for job in broker.jobs("q"))


@pytest.mark.parametrize("call", ["enqueue", "sync", "rotate", "checkpoint"])
def test_a_call_that_needs_the_files_stops_the_broker(tmp_path: Path, foreign: Foreign, call: str) -> None:
    with Broker(tmp_path / "data", fsync="never") as broker:
        for _ in range(2):  # the first reserves ids, which is synced in every mode
            broker.enqueue("q", b"before")
        foreign.take_over(broker)
        with pytest.raises(BrokerFailedError) as caught:
            CALLS[call](broker)
        assert "closed by the program" in str(caught.value.__cause__)
        with pytest.raises(BrokerFailedError):
            broker.enqueue("q", b"again")


@pytest.mark.parametrize("name", ["LOCK", "mark"])
def test_one_file_that_is_gone_is_left_alone_at_the_end(tmp_path: Path, foreign: Foreign, name: str) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"x")
        broker.checkpoint()
        foreign.take_over(broker, name)
    assert foreign.is_untouched()
    with Broker(tmp_path / "data") as broker:
        assert broker.stats("q").ready == 1


@pytest.mark.parametrize(
    ("name", "call", "fsync"),
    [("0000000000000001.log", "sync", "never"), ("mark", "enqueue", "always"), ("spare", "rotate", "always")],
)  # fmt: skip
def test_each_file_is_looked_at_by_itself(tmp_path: Path, foreign: Foreign, name: str, call: str, fsync: Any) -> None:
    with Broker(tmp_path / "data", fsync=fsync) as broker:
        for _ in range(2):
            broker.enqueue("q", b"x")
        if name.startswith("spare"):
            broker._engine._log.space.refill()  # type: ignore[attr-defined]  # of a directory
            name = min(path.name for path in (tmp_path / "data" / "log").glob("spare-*"))
        foreign.take_over(broker, name)
        with pytest.raises(BrokerFailedError):
            CALLS[call](broker)
    assert foreign.is_untouched()
    with Broker(tmp_path / "data") as broker:
        assert broker.stats("q").ready >= 2


def test_the_index_is_closed_unless_files_are_gone(tmp_path: Path) -> None:
    forgotten = len(rivetq.storage.index._LEFT_ALONE)
    for _ in range(2):
        with Broker(tmp_path / "data") as broker:
            broker.enqueue("q", b"x")
    assert len(rivetq.storage.index._LEFT_ALONE) == forgotten
    assert not [link for link in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if link.endswith(".mdb")]


def test_a_lock_that_the_program_let_go_of_is_noticed_at_the_next_checkpoint(tmp_path: Path, foreign: Foreign) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"x")
        with pytest.raises(BrokerLockedError):
            Broker(tmp_path / "data")
        foreign.take_over(broker, "LOCK")
        with pytest.raises(BrokerFailedError):
            broker.checkpoint()


def test_a_refused_opening_writes_nothing_into_what_has_the_number_of_the_lock(
    tmp_path: Path, foreign: Foreign
) -> None:
    with Broker(tmp_path / "data") as broker:
        path = broker.path
    lock = DirectoryLock(path, 0)
    foreign.take_over(broker, "LOCK")
    with pytest.raises(OSError, match="closed by the program"):
        lock.refuse()
    lock.release()
    assert foreign.is_untouched()


def test_a_file_of_ours_under_another_files_number_is_another_file(tmp_path: Path) -> None:
    disk = SystemDisk()
    first = OwnFile(disk, "first", disk.create(str(tmp_path / "first")))
    number = first.fd
    os.close(number)
    second = OwnFile(disk, "second", disk.create(str(tmp_path / "second")))
    assert second.fd == number
    with pytest.raises(OSError, match="first"):
        first.check()
    first.close()
    second.check()
    second.close()
    with pytest.raises(OSError, match="second"):
        second.check()

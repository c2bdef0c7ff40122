"""The process dies before, or right behind, its nth disk operation, for every n: opening, rotation, compaction.

What a dead process leaves is what it handed to the operating system (a power cut, which takes more, is another hunt).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inside import inside

import rivetq.local
from rivetq import Broker, RetryPolicy, RivetQError
from rivetq.io import SystemDisk
from rivetq.testing import ManualClock

SEGMENT_BYTES = 65_536
LARGE = b"x" * 15_000


class ProcessDied(BaseException):
    """Nothing that this process does reaches the disk any more."""


class MortalDisk(SystemDisk):
    """Dies at its nth changing operation: instead of it, or behind it."""

    def __init__(self, dies_at: int, *, behind: bool) -> None:
        self.operations = 0
        self._dies_at = dies_at
        self._behind = behind

    def _operate(self, operation: Callable[..., Any], *args: Any) -> Any:
        self.operations += 1
        if self.operations > self._dies_at or (self.operations == self._dies_at and not self._behind):
            raise ProcessDied
        result = operation(*args)
        if self.operations == self._dies_at:
            raise ProcessDied
        return result

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # type: ignore[override]  # a method in place of a builtin
        written: int = self._operate(super().pwrite, fd, data, offset)
        return written

    def fdatasync(self, fd: int) -> None:  # type: ignore[override]  # a method in place of a builtin
        self._operate(super().fdatasync, fd)

    def create(self, path: str) -> int:
        fd: int = self._operate(super().create, path)
        return fd

    def allocate(self, fd: int, offset: int, size: int) -> None:
        self._operate(super().allocate, fd, offset, size)

    def truncate(self, fd: int, size: int) -> None:
        self._operate(super().truncate, fd, size)

    def rename(self, old: str, new: str) -> None:
        self._operate(super().rename, old, new)

    def unlink(self, path: str) -> None:
        self._operate(super().unlink, path)

    def sync_directory(self, path: str) -> None:
        self._operate(super().sync_directory, path)


class Life:
    """What one process was told before it died."""

    def __init__(self) -> None:
        self.there: dict[str, int] = {}  # key -> id, answered
        self.acked: set[int] = set()
        self.in_doubt: set[int] = set()  # an ack was under way

    def run(self, broker: Broker) -> None:
        number = itertools.count(len(self.there))

        def enqueue(payload: bytes) -> None:
            key = f"k{next(number)}"
            self.there[key] = broker.enqueue("q", payload, idempotency_key=key, retry=RetryPolicy(base=0))

        def settle_one() -> None:
            lease = broker.lease("q")
            assert lease is not None
            assert lease.id not in self.acked, f"job {lease.id} came back from the dead"
            self.in_doubt.add(lease.id)
            lease.ack()
            self.in_doubt.discard(lease.id)
            self.acked.add(lease.id)

        for payload in (LARGE, b"small"):
            enqueue(payload)
        settle_one()
        broker.checkpoint()
        for _ in range(5):
            enqueue(LARGE)
        settle_one()
        broker.compact()
        enqueue(b"last")
        settle_one()


def check(directory: Path, life: Life, clock: ManualClock) -> None:
    with Broker(directory, segment_bytes=SEGMENT_BYTES, fsync="never", clock=clock) as broker:
        inside(broker).audit()
        present = {job.id for job in broker.jobs("q")}
        for key, job_id in life.there.items():
            assert broker.find("q", key) == job_id, f"{key} is lost"
            if job_id not in life.acked and job_id not in life.in_doubt:
                assert job_id in present, f"job {job_id} ({key}) is lost"
        assert not present & life.acked, "acked jobs are back"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Life, ManualClock]:
    """A directory whose process died with records that were never synced."""
    directory, clock, life = tmp_path_factory.mktemp("killed"), ManualClock(), Life()
    with Broker(directory / "live", segment_bytes=SEGMENT_BYTES, fsync="never", clock=clock) as broker:
        life.run(broker)
        shutil.copytree(directory / "live", directory / "dead", ignore=shutil.ignore_patterns("spare-*"))
    return directory / "dead", life, clock


def live_and_die(
    directory: Path, life: Life, clock: ManualClock, disk: MortalDisk, fsync: Any, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether it died."""
    monkeypatch.setattr(rivetq.local, "SystemDisk", lambda: disk)
    broker = None
    try:
        broker = Broker(directory, segment_bytes=SEGMENT_BYTES, fsync=fsync, clock=clock)
        life.run(broker)
    except (ProcessDied, RivetQError):
        return True
    finally:
        if broker is not None:
            broker.close()
        monkeypatch.undo()
    return False


@pytest.mark.parametrize("behind", [False, True], ids=["instead", "behind"])
@pytest.mark.parametrize("fsync", ["always", "never"])
def test_a_process_that_dies_at_any_disk_operation_loses_nothing_and_brings_nothing_back(
    killed: tuple[Path, Life, ManualClock], tmp_path: Path, fsync: str, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, before, clock = killed
    for dies_at in itertools.count(1):
        directory = tmp_path / str(dies_at)
        shutil.copytree(origin, directory)
        life = Life()
        life.there, life.acked = dict(before.there), set(before.acked)
        disk = MortalDisk(dies_at, behind=behind)
        died = live_and_die(directory, life, clock, disk, fsync, monkeypatch)
        check(directory, life, clock)
        shutil.rmtree(directory)
        if not died and disk.operations < dies_at:
            break
    assert dies_at > 60, f"only {dies_at} operations were met"

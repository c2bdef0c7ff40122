"""The process dies before, or right behind, its nth disk operation, for every n: opening, rotation, compaction.

What a dead process leaves is what it handed to the operating system (a power cut, which takes more, is another hunt).
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
from inside import inside

import rivetq.engines.local
from rivetq import Broker, RetryPolicy, RivetQError
from rivetq.testing import ManualClock, PowerCut, SimulatedDisk

SEGMENT_BYTES = 65_536
LARGE = b"x" * 15_000


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
    directory: Path, life: Life, clock: ManualClock, disk: SimulatedDisk, fsync: Any, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether it died."""
    monkeypatch.setattr(rivetq.engines.local, "SystemDisk", lambda: disk)
    broker = None
    try:
        broker = Broker(directory, segment_bytes=SEGMENT_BYTES, fsync=fsync, clock=clock)
        life.run(broker)
    except (PowerCut, RivetQError):
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
        disk = SimulatedDisk(directory, opaque=("index", "LOCK"))
        disk.cut_power(dies_at, behind=behind)
        died = live_and_die(directory, life, clock, disk, fsync, monkeypatch)
        check(directory, life, clock)
        shutil.rmtree(directory)
        if not died and disk.operations < dies_at:
            break
    assert dies_at > 60, f"only {dies_at} operations were met"

"""A slice of each sweep (see sweeps.py; `make sweeps` makes them whole), and that each sees a bug."""

from __future__ import annotations

import pytest
import sweeps
from simulation import ViolationError
from sweeps import SWEEPS, Share, run

import rivetq.engines.live
import rivetq.storage.log
from rivetq.engines.local import LocalEngine
from rivetq.storage.log import Log


@pytest.mark.parametrize(
    ("name", "trials", "stride"),
    [
        ("crash", 80, 1),
        ("recovery", 2, 1),
        ("errors", 60, 37),
        ("exceptions", 50, 89),
        ("asyncio", 20, 61),
        ("closing", 30, 61),
        ("sequences", 40, 113),
    ],
    ids=list(SWEEPS),
)
def test_nothing_that_goes_wrong_breaks_a_promise(name: str, trials: int, stride: int) -> None:
    assert run(name, 0, Share(trials=trials, stride=stride)) >= trials


def test_the_shares_of_several_processes_are_all_trials() -> None:
    taken = []
    for first in range(3):
        share = Share(first, 3, trials=10, stride=2)
        while not share.is_over:
            number = share.seen
            if share.takes():
                taken.append(number)
    assert sorted(taken) == list(range(0, 20, 2))


def a_sync_that_is_repeated(self: Log) -> int:
    """In place of `sync`: what failed once is tried once more."""
    try:
        return honest_sync(self)
    except OSError:
        self._syncing = 0
        return honest_sync(self)


honest_sync = Log.sync


def test_the_sweep_of_errors_sees_a_sync_that_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, "sync", a_sync_that_is_repeated)
    with pytest.raises(ViolationError, match=r"(EIO|ENOSPC) x 1 "):
        run("errors", 0, Share(trials=400))


def test_the_sweep_of_exceptions_sees_a_failure_that_nobody_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "_fail", lambda self, error: None)
    monkeypatch.setattr(sweeps, "TRACED", {rivetq.storage.log.__file__})
    with pytest.raises(ViolationError, match=r"before log.py"):
        run("exceptions", 0, Share(trials=60, stride=16))


def test_the_sweep_of_sequences_sees_an_answer_before_its_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "_settle", lambda self, lsn, sync=True: self._log.write(lsn))
    with pytest.raises(ViolationError, match="records up to"):
        run("sequences", 0, Share(trials=50))


def test_the_sweep_of_power_cuts_sees_a_segment_that_goes_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "_wait_durable", lambda self, lsn: None)
    with pytest.raises(ViolationError):
        run("crash", 0, Share(trials=3000))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_sweep_of_awaited_calls_sees_a_notifier_that_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "HANG_S", 4.0)
    monkeypatch.setattr(rivetq.engines.live.LiveEngine, "_fail", lambda self, error: None)
    with pytest.raises(ViolationError):
        run("asyncio", 0, Share(trials=300, stride=7))

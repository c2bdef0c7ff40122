"""Group commit: one sync for all who wait, and one failure for all."""

from __future__ import annotations

import itertools
import linecache
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

import pytest

from rivetq.storage import group_commit
from rivetq.storage.group_commit import COMPANY, PATIENCE, PATIENCE_S, GroupCommit

PATIENCE_OF_THE_TEST_S = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    """For the state of another thread that has no event of its own."""
    end = time.monotonic() + PATIENCE_OF_THE_TEST_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.0005)


class FakeLog:
    """Syncs when the test lets it: each sync takes one permit, makes all of `written_lsn` durable or raises."""

    def __init__(self) -> None:
        self.written_lsn = 0
        self.durable_lsn = 0
        self.broken = False
        self.syncs = 0
        self.begun = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.faults: list[BaseException | None] = []

    def sync(self) -> int:
        self.syncs += 1
        lsn = self.written_lsn
        self.begun.release()
        assert self.permits.acquire(timeout=PATIENCE_OF_THE_TEST_S)
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        self.durable_lsn = lsn
        return lsn


class Desk:
    """A group commit, its log, and callers in threads of their own."""

    def __init__(self) -> None:
        self.log = FakeLog()
        self.group = GroupCommit(self.log)
        self.threads: list[threading.Thread] = []
        self.answers: dict[int, BaseException | None] = {}  # lsn -> what its caller got

    def call(self, lsn: int) -> None:
        """A thread appends record `lsn` and waits for it; returns when it leads or is parked."""
        self.log.written_lsn = max(self.log.written_lsn, lsn)
        parked = self.parked()
        leads = self.group._leader is None and parked + 1 >= min(self.group._company, COMPANY)

        def wait() -> None:
            try:
                self.group.wait(lsn)
                self.answers[lsn] = None
            except BaseException as error:
                self.answers[lsn] = error

        thread = threading.Thread(target=wait, daemon=True)
        self.threads.append(thread)
        thread.start()
        if leads:
            self.sync_begins()
        else:
            until(lambda: self.parked() > parked)

    def parked(self) -> int:
        return len(self.group._waiters)

    def sync_begins(self) -> None:
        assert self.log.begun.acquire(timeout=PATIENCE_OF_THE_TEST_S)

    def disk_answers(self, fault: BaseException | None = None) -> None:
        self.log.faults.append(fault)
        self.log.permits.release()

    def all_return(self) -> dict[int, BaseException | None]:
        for thread in self.threads:
            thread.join(PATIENCE_OF_THE_TEST_S)
            assert not thread.is_alive(), "a caller waits for ever"
        return self.answers

    def is_idle(self) -> bool:
        return self.group._leader is None and not self.group._waiters


def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until it is so."""
    end = time.monotonic() + PATIENCE_OF_THE_TEST_S
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    with mock.patch.object(group_commit, "PATIENCE_S", 1e6):  # the clock of the test machine decides nothing
        yield desk
    assert not any(thread.is_alive() for thread in desk.threads)


def test_a_lone_caller_syncs_in_its_own_thread(desk: Desk) -> None:
    threads = threading.active_count()
    desk.log.written_lsn = 3
    desk.disk_answers()
    desk.group.wait(3)
    assert (desk.log.syncs, desk.log.durable_lsn) == (1, 3)
    assert threading.active_count() == threads
    assert desk.is_idle()


def test_a_durable_record_needs_no_sync(desk: Desk) -> None:
    desk.log.durable_lsn = 5
    desk.group.wait(5)
    desk.group.wait(1)
    assert desk.log.syncs == 0


def test_a_record_that_became_durable_while_the_lock_was_waited_for_needs_no_sync(desk: Desk) -> None:
    lock = desk.group._lock

    class Meanwhile:
        def __enter__(self) -> None:
            lock.acquire()
            desk.log.durable_lsn = 5

        def __exit__(self, *_: object) -> None:
            lock.release()

    desk.group._lock = Meanwhile()  # type: ignore[assignment]  # a lock that does something in between
    desk.group.wait(5)
    assert desk.log.syncs == 0
    desk.group._lock = lock
    assert desk.is_idle()


def test_callers_that_come_while_the_disk_is_busy_share_the_next_sync(desk: Desk) -> None:
    for lsn in range(1, 6):
        desk.call(lsn)
    desk.disk_answers()
    desk.sync_begins()
    assert desk.log.durable_lsn == 1
    desk.disk_answers()
    assert desk.all_return() == dict.fromkeys(range(1, 6))
    assert desk.log.syncs == 2
    assert desk.is_idle()


def test_nobody_returns_before_its_record_is_durable(desk: Desk) -> None:
    desk.call(1)
    desk.call(2)
    assert desk.answers == {}
    desk.disk_answers()
    desk.sync_begins()
    until(lambda: desk.answers == {1: None})
    assert desk.threads[1].is_alive()
    desk.disk_answers()
    desk.all_return()


def test_a_caller_whose_record_was_covered_by_the_running_sync_needs_no_other(desk: Desk) -> None:
    desk.log.written_lsn = 3
    desk.call(1)
    desk.call(2)
    desk.call(3)
    desk.disk_answers()
    assert desk.all_return() == dict.fromkeys((1, 2, 3))
    assert desk.log.syncs == 1
    assert desk.is_idle()


def test_the_first_of_those_not_covered_leads_next(desk: Desk) -> None:
    desk.log.written_lsn = 2
    desk.call(1)
    desk.call(3)
    desk.call(2)
    desk.call(4)
    desk.disk_answers()
    desk.sync_begins()
    until(lambda: set(desk.answers) == {1, 2})
    desk.disk_answers()
    assert desk.all_return() == dict.fromkeys((1, 2, 3, 4))
    assert desk.log.syncs == 2


# -- failures


def test_a_failed_sync_fails_all_who_wait_and_all_who_come(desk: Desk) -> None:
    for lsn in (1, 2, 3):
        desk.call(lsn)
    error = OSError("the disk is gone")
    desk.log.broken = True
    desk.disk_answers(error)
    assert desk.all_return() == dict.fromkeys((1, 2, 3), error)
    with pytest.raises(OSError, match="the disk is gone"):
        desk.group.wait(4)
    assert desk.group.failure is error
    assert desk.log.syncs == 1, "a failed sync is not tried again"


def test_an_exception_fails_all_though_the_log_is_whole(desk: Desk) -> None:
    desk.call(1)
    desk.call(2)
    error = OSError("the mark cannot be written")
    desk.disk_answers(error)
    assert desk.all_return() == {1: error, 2: error}


def test_a_failure_hits_a_record_that_was_durable_before(desk: Desk) -> None:
    desk.log.durable_lsn = 9
    desk.group.fail(OSError("another thread's"))
    with pytest.raises(OSError, match="another thread's"):
        desk.group.wait(3)


def test_the_first_failure_stays_the_reason(desk: Desk) -> None:
    first = OSError("first")
    desk.group.fail(first)
    desk.group.fail(OSError("second"))
    assert desk.group.failure is first


def test_a_failure_from_elsewhere_wakes_who_is_parked(desk: Desk) -> None:
    desk.call(1)
    desk.call(2)
    error = RuntimeError("the keeper failed")
    desk.group.fail(error)
    until(lambda: desk.answers == {2: error})
    desk.disk_answers()
    assert desk.all_return() == {1: None, 2: error}, "the leader's record is on disk"


def test_a_parked_caller_whose_record_became_durable_before_the_failure_is_done(desk: Desk) -> None:
    desk.call(1)
    desk.call(2)
    desk.log.durable_lsn = 2
    desk.group.fail(OSError("a moment later"))
    until(lambda: desk.answers == {2: None})
    desk.disk_answers()
    desk.all_return()


def test_an_interrupt_that_leaves_the_log_whole_hits_its_caller_alone(desk: Desk) -> None:
    for lsn in (1, 2, 3):
        desk.call(lsn)
    interrupt = KeyboardInterrupt()
    desk.disk_answers(interrupt)
    desk.sync_begins()
    desk.disk_answers()
    assert desk.all_return() == {1: interrupt, 2: None, 3: None}
    assert desk.group.failure is None
    assert desk.is_idle()


def test_an_interrupt_that_breaks_the_log_hits_all(desk: Desk) -> None:
    desk.call(1)
    desk.call(2)
    interrupt = KeyboardInterrupt()
    desk.log.broken = True
    desk.disk_answers(interrupt)
    assert desk.all_return() == {1: interrupt, 2: interrupt}
    assert desk.group.failure is interrupt


def interrupt_the_parked(monkeypatch: pytest.MonkeyPatch, ready: Callable[[Any], bool]) -> None:
    """The next to park gets a KeyboardInterrupt as soon as it is `ready`."""

    class Interrupted(group_commit._Waiter):
        __slots__ = ()

        def __init__(self, lsn: int) -> None:
            super().__init__(lsn)
            monkeypatch.undo()
            waiter = self

            class Lock:
                def acquire(self, timeout: float | None = None) -> None:
                    until(lambda: ready(waiter))
                    raise KeyboardInterrupt

                def release(self) -> None:
                    pass

                def locked(self) -> bool:
                    return True

            self.lock = Lock()  # type: ignore[assignment]  # a lock that tells who takes it

    monkeypatch.setattr(group_commit, "_Waiter", Interrupted)


def test_an_interrupted_waiter_leaves_the_others_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.call(1)
    parked = threading.Event()
    interrupt_the_parked(monkeypatch, lambda waiter: parked.is_set())
    desk.call(2)
    desk.call(3)
    parked.set()
    until(lambda: 2 in desk.answers)
    assert isinstance(desk.answers[2], KeyboardInterrupt)
    assert desk.parked() == 1
    desk.disk_answers()
    desk.sync_begins()
    desk.disk_answers()
    desk.all_return()
    assert desk.answers[1] is desk.answers[3] is None
    assert desk.is_idle()


def test_an_interrupted_heir_passes_the_lead_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.call(1)
    interrupt_the_parked(monkeypatch, lambda waiter: desk.group._leader is waiter)
    desk.call(2)
    desk.call(3)
    desk.disk_answers()
    desk.sync_begins()
    desk.disk_answers()
    desk.all_return()
    assert isinstance(desk.answers[2], KeyboardInterrupt)
    assert desk.answers[1] is desk.answers[3] is None
    assert desk.is_idle()


def test_an_interrupted_heir_without_company_lays_the_lead_down(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.call(1)
    interrupt_the_parked(monkeypatch, lambda waiter: desk.group._leader is waiter)
    desk.call(2)
    desk.disk_answers()
    desk.all_return()
    assert isinstance(desk.answers[2], KeyboardInterrupt)
    assert desk.is_idle()
    desk.disk_answers()
    desk.group.wait(2)


def test_a_waiter_that_is_interrupted_when_it_was_already_done_changes_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.log.written_lsn = 2
    desk.call(1)
    interrupt_the_parked(monkeypatch, lambda waiter: desk.log.durable_lsn == 2 and not desk.parked())
    desk.call(2)
    desk.disk_answers()
    desk.all_return()
    assert isinstance(desk.answers[2], KeyboardInterrupt)
    assert desk.is_idle()


# -- patience


def hold_a_round(desk: Desk, callers: int) -> int:
    """Two syncs, `callers` in the second one; all know now that they have company, and nobody's patience ends."""
    for lsn in range(1, callers + 2):
        desk.call(lsn)
    desk.disk_answers()
    desk.sync_begins()
    desk.disk_answers()
    desk.all_return()
    desk.group._sync_s = 1e6
    return callers + 2


class ImpatientLock:
    """A waiter's lock: it notes the limit of a wait, and time is over at once, or after `meanwhile`.

    After that it tells, by `again`, of a wait without a limit.
    """

    def __init__(self, timeouts: list[float], meanwhile: Callable[[], None], again: Callable[[], None]) -> None:
        self._real = threading.Lock()
        self._timeouts = timeouts
        self._meanwhile = meanwhile
        self._again = again

    def acquire(self, timeout: float | None = None) -> bool:
        if timeout is None:
            if self._timeouts:
                self._again()
            return self._real.acquire()
        self._timeouts.append(timeout)
        self._meanwhile()
        return False

    def release(self) -> None:
        self._real.release()

    def locked(self) -> bool:
        return self._real.locked()


def lose_patience(
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[], None] = lambda: None,
    again: Callable[[], None] = lambda: None,
) -> list[float]:
    """The next waiter has an ImpatientLock; the timeouts that it notes."""
    timeouts: list[float] = []

    class Impatient(group_commit._Waiter):
        __slots__ = ()

        def __init__(self, lsn: int) -> None:
            super().__init__(lsn)
            monkeypatch.undo()
            self.lock = ImpatientLock(timeouts, meanwhile, again)  # type: ignore[assignment]  # a lock that tells who takes it
            self.lock.acquire()

    monkeypatch.setattr(group_commit, "_Waiter", Impatient)
    return timeouts


def test_the_last_of_the_company_to_come_back_leads_for_all(desk: Desk) -> None:
    lsn = hold_a_round(desk, 3)
    desk.call(lsn)
    desk.call(lsn + 1)
    assert (desk.log.syncs, desk.parked(), desk.group._leader) == (2, 2, None)
    desk.call(lsn + 2)
    assert desk.log.syncs == 3
    desk.disk_answers()
    assert desk.all_return()[lsn] is None
    assert desk.log.syncs == 3, "all of the round in one sync"
    assert desk.is_idle()


def test_more_company_than_enough_is_not_waited_for(desk: Desk) -> None:
    lsn = hold_a_round(desk, COMPANY + 2)
    for n in range(COMPANY - 1):
        desk.call(lsn + n)
    assert desk.log.syncs == 2
    desk.call(lsn + COMPANY - 1)
    assert desk.log.syncs == 3
    desk.disk_answers()
    desk.all_return()


def test_the_patience_is_some_syncs_time_and_the_first_to_come_then_leads(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    lsn = hold_a_round(desk, 3)
    desk.group._sync_s = 0.004
    timeouts = lose_patience(monkeypatch)
    desk.log.written_lsn = lsn
    desk.disk_answers()
    desk.group.wait(lsn)
    assert timeouts == [0.004 * PATIENCE]
    assert 0 < PATIENCE <= 4
    desk.disk_answers()
    desk.call(lsn + 1)
    assert desk.all_return()[lsn + 1] is None, "who was alone in the last round waits for nobody"
    assert desk.is_idle()


def test_a_disk_that_stalled_once_makes_nobody_patient_for_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    lsn = hold_a_round(desk, 2)
    timeouts = lose_patience(monkeypatch)
    desk.log.written_lsn = lsn
    desk.disk_answers()
    with mock.patch.object(group_commit, "PATIENCE_S", PATIENCE_S):
        desk.group.wait(lsn)
    assert timeouts == [PATIENCE_S]
    assert PATIENCE_S < 0.1


def test_only_the_first_to_come_has_a_time_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    lsn = hold_a_round(desk, 3)
    desk.call(lsn)
    timeouts = lose_patience(monkeypatch)
    desk.call(lsn + 1)
    desk.call(lsn + 2)
    desk.disk_answers()
    desk.all_return()
    assert timeouts == []


def test_whose_patience_ends_as_the_last_one_leads_waits_for_that_sync(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    lsn = hold_a_round(desk, 2)
    waits = threading.Event()
    timeouts = lose_patience(monkeypatch, lambda: desk.call(lsn + 1), waits.set)
    thread = threading.Thread(target=desk.group.wait, args=(lsn,), daemon=True)
    thread.start()
    until(lambda: waits.is_set() or desk.log.syncs > 3)
    desk.disk_answers()
    thread.join(PATIENCE_OF_THE_TEST_S)
    desk.all_return()
    assert (len(timeouts), desk.log.syncs) == (1, 3)
    assert desk.is_idle()


def test_an_interrupted_patient_one_lets_another_lead(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    lsn = hold_a_round(desk, 3)
    parked = threading.Event()
    interrupt_the_parked(monkeypatch, lambda waiter: parked.is_set())
    desk.call(lsn)
    desk.call(lsn + 1)
    parked.set()
    desk.sync_begins()
    desk.disk_answers()
    desk.all_return()
    assert isinstance(desk.answers[lsn], KeyboardInterrupt)
    assert desk.answers[lsn + 1] is None
    assert desk.is_idle()


def test_a_lone_caller_never_waits_for_company(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for lsn in range(1, 5):
        timeouts = lose_patience(monkeypatch)
        desk.call(lsn)
        desk.disk_answers()
        desk.all_return()
        assert timeouts == []
    assert desk.log.syncs == 4


class QuickLog:
    """A sync that takes as long as it is told."""

    broken = False

    def __init__(self, sync_s: float = 0.0) -> None:
        self.sync_s = sync_s
        self.lock = threading.Lock()
        self.written_lsn = self.durable_lsn = 0

    def append(self) -> int:
        with self.lock:
            self.written_lsn += 1
            return self.written_lsn

    def sync(self) -> int:
        with self.lock:
            lsn = self.written_lsn
        if self.sync_s:
            time.sleep(self.sync_s)
        self.durable_lsn = lsn
        return lsn


def test_an_interrupt_at_any_line_leaves_the_others_alone() -> None:
    """A KeyboardInterrupt before each line of the module in turn, while other threads commit."""
    for step in range(10_000):
        log = QuickLog(0.0002)
        group = GroupCommit(log)
        lines = 0

        def trace(frame: FrameType, event: str, arg: object, group: GroupCommit = group, step: int = step) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != group_commit.__file__:
                return None
            # Leaving a `with` is a line of its own to a trace, but nothing comes between its body and the release.
            if event == "line" and "with" not in linecache.getline(group_commit.__file__, frame.f_lineno):
                lines += 1
                if lines == step + 1:
                    raise KeyboardInterrupt
            return trace

        def work(log: QuickLog = log, group: GroupCommit = group) -> None:
            for _ in range(10):
                lsn = log.append()
                group.wait(lsn)
                assert log.durable_lsn >= lsn

        others = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for other in others:
            other.start()
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(5):
                group.wait(log.append())
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        for other in others:
            other.join(PATIENCE_OF_THE_TEST_S)
            assert not other.is_alive(), f"a caller waits for ever: interrupt at step {step}"
        assert (group._leader, group._waiters, group.failure) == (None, [], None)
        if lines <= step:
            break
    assert step > 20, "the trace saw the module"


class GatedLog(QuickLog):
    """Its first sync covers the first record and lasts until the gate opens; later ones cover all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def sync(self) -> int:
        if self.durable_lsn:
            return super().sync()
        assert self.gate.wait(PATIENCE_OF_THE_TEST_S)
        self.durable_lsn = 1
        return 1


def test_an_interrupt_at_any_line_of_a_leader_with_heirs_leaves_nobody_parked() -> None:
    """Three threads park while it syncs, so that each line of passing the lead on is met in every run."""
    steps = next(step for step in itertools.count() if not interrupted_among_heirs(step))
    assert steps > 20, "the trace saw the module"


def interrupted_among_heirs(step: int) -> bool:
    """One trial; whether there was such a line."""
    log = GatedLog()
    group = GroupCommit(log)
    lines = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != group_commit.__file__:
            return None
        if event == "line" and "with" not in linecache.getline(group_commit.__file__, frame.f_lineno):
            lines += 1
            if lines == step + 1:
                raise KeyboardInterrupt
        return trace

    lsns = [log.append() for _ in range(4)]
    parked = [threading.Thread(target=group.wait, args=(lsn,), daemon=True) for lsn in lsns[1:]]

    def keep_it_company() -> None:
        wait_until(lambda: group._leader is not None or lines > step)  # it leads, or was interrupted before
        for thread in parked:
            thread.start()
        wait_until(lambda: len(group._waiters) == len(parked) or lines > step)
        log.gate.set()

    company = threading.Thread(target=keep_it_company, daemon=True)
    company.start()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        group.wait(lsns[0])
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    company.join(PATIENCE_OF_THE_TEST_S)
    late = threading.Thread(target=group.wait, args=(log.append(),), daemon=True)
    late.start()
    for thread in (*parked, late):
        thread.join(PATIENCE_OF_THE_TEST_S)
        assert not thread.is_alive(), f"a caller waits for ever: interrupt at step {step}"
    assert (group._leader, group._waiters, group.failure) == (None, [], None)
    return lines > step


def test_a_last_sync_that_fails_is_told_to_all_who_wait() -> None:
    class Failing(GatedLog):
        def sync(self) -> int:
            if self.durable_lsn:
                raise OSError(5, "EIO")
            return super().sync()

    log = Failing()
    group = GroupCommit(log)
    told: list[object] = []

    def wait(lsn: int) -> None:
        try:
            group.wait(lsn)
        except OSError as error:
            told.append(error)
        else:
            told.append(lsn)

    def close() -> None:
        with pytest.raises(OSError, match="EIO"):
            group.close()
        told.append("closed")

    leader = threading.Thread(target=wait, args=(log.append(),), daemon=True)
    leader.start()
    wait_until(lambda: group._leader is not None)
    closer = threading.Thread(target=close, daemon=True)
    closer.start()
    wait_until(lambda: len(group._waiters) == 1)
    waiter = threading.Thread(target=wait, args=(log.append(),), daemon=True)
    waiter.start()
    wait_until(lambda: len(group._waiters) == 2)
    log.gate.set()
    for thread in (leader, closer, waiter):
        thread.join(PATIENCE_OF_THE_TEST_S)
        assert not thread.is_alive()
    assert 1 in told
    assert "closed" in told
    assert any(isinstance(each, OSError) for each in told), "record 2 is not on disk"


def test_many_threads_each_find_their_record_durable() -> None:
    """Without the desk: a sync that takes no time, and threads that come back at once."""
    checked: list[int] = []
    log = QuickLog()
    group = GroupCommit(log)

    def work() -> None:
        for _ in range(200):
            lsn = log.append()
            group.wait(lsn)
            assert log.durable_lsn >= lsn
            checked.append(lsn)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_OF_THE_TEST_S)
        assert not thread.is_alive()
    assert sorted(checked) == list(range(1, 1601))
    assert group.failure is None
    assert not group._waiters
    assert group._leader is None

"""The two clocks: the machine's own, and the one of tests that moves when it is told to."""

from __future__ import annotations

import random
import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from rivetq import Broker
from rivetq.clock import Clock, SystemClock
from rivetq.errors import UsageError
from rivetq.testing import ManualClock

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def as_clock(clock: Clock) -> Clock:
    """Both clocks are what an engine asks for; a type checker sees it here."""
    return clock


# The machine's clocks


def test_the_boot_clock_does_not_step_back() -> None:
    clock = as_clock(SystemClock())
    seen = [clock.boot_ms() for _ in range(1000)]
    assert seen == sorted(seen)
    assert seen[0] > 0


def test_the_boot_clock_counts_suspended_time_where_the_system_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def read(which: int) -> int:
        asked.append(which)
        return 1_999_999

    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 77, raising=False)
    monkeypatch.setattr(time, "clock_gettime_ns", read)
    assert SystemClock().boot_ms() == 1  # whole milliseconds, none too many
    assert asked == [77]


def test_without_a_boot_clock_the_monotonic_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def read(which: int) -> int:
        asked.append(which)
        return 5_000_000

    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(time, "clock_gettime_ns", read)
    assert SystemClock().boot_ms() == 5
    assert asked == [time.CLOCK_MONOTONIC]


def test_the_wall_clock_is_epoch_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_767_225_600_123_999_999)
    assert SystemClock().wall_ms() == 1_767_225_600_123


def test_two_clocks_of_one_boot_have_the_same_boot_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot_id").write_text(" 5d0e-a \n")
    monkeypatch.setattr("rivetq.clock.BOOT_ID", str(tmp_path / "boot_id"))
    assert SystemClock().boot_id == SystemClock().boot_id == "5d0e-a"


def test_without_a_boot_id_every_clock_is_another_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("rivetq.clock.BOOT_ID", str(tmp_path / "nowhere"))
    monkeypatch.setattr(time, "time_ns", lambda: next(ticks))
    first, second = SystemClock().boot_id, SystemClock().boot_id
    assert first.startswith("process-")
    assert first != second


def test_a_real_clock_makes_threads_sleep_as_long_as_asked_and_never_jumps() -> None:
    clock = SystemClock()
    assert [clock.timeout_s(ms) for ms in (0, 1, 250, 3_600_000)] == [0, 0.001, 0.25, 3600]
    unsubscribe = clock.subscribe(lambda: pytest.fail("a real clock jumped"))
    unsubscribe()
    unsubscribe()


# The clock of tests


def test_a_manual_clock_stands_still() -> None:
    clock = ManualClock(start=START)
    seen = {(clock.boot_ms(), clock.wall_ms(), clock.now()) for _ in range(100)}
    assert seen == {(0, round(START.timestamp() * 1000), START)}


def test_a_manual_clock_moves_both_clocks_by_as_much() -> None:
    clock = as_clock(ManualClock(start=0))
    assert isinstance(clock, ManualClock)
    clock.advance(1.5)
    clock.advance(timedelta(milliseconds=250))
    clock.advance(0)
    assert (clock.boot_ms(), clock.wall_ms()) == (1750, 1750)
    assert clock.now() == datetime(1970, 1, 1, 0, 0, 1, 750_000, tzinfo=UTC)


def test_the_default_start_is_a_fixed_moment() -> None:
    assert ManualClock().now() == ManualClock().now() == datetime(2026, 1, 1, tzinfo=UTC)


def test_a_start_in_another_zone_is_shown_in_utc() -> None:
    clock = ManualClock(start=datetime(2026, 3, 1, 14, tzinfo=timezone(timedelta(hours=2))))
    assert clock.now() == START
    assert clock.now().utcoffset() == timedelta(0)


@pytest.mark.parametrize("start", [datetime(2026, 1, 1), "2026", True, -1, float("nan"), None])
def test_a_start_that_is_no_moment_is_refused(start: object) -> None:
    with pytest.raises(UsageError, match=r"^start: "):
        ManualClock(start=start)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), True, "1", None])
def test_a_manual_clock_does_not_move_by_what_is_no_duration(seconds: object) -> None:
    clock, told = ManualClock(start=0), []
    clock.subscribe(lambda: told.append(1))
    with pytest.raises(UsageError, match=r"^seconds: "):
        clock.advance(seconds)  # type: ignore[arg-type]  # wrong on purpose
    assert (clock.boot_ms(), told) == (0, [])


def test_who_goes_while_others_are_told_hides_none_of_them() -> None:
    clock, seen = ManualClock(start=0), []

    def last_time() -> None:
        seen.append("first")
        leave()

    leave = clock.subscribe(last_time)
    clock.subscribe(lambda: seen.append("second"))
    clock.advance(1)
    clock.advance(1)
    assert seen == ["first", "second", "second"]


def test_who_subscribed_is_told_after_each_move_and_sees_the_new_time() -> None:
    clock, seen = ManualClock(start=0), []
    first = clock.subscribe(lambda: seen.append(("a", clock.boot_ms())))
    clock.subscribe(lambda: seen.append(("b", clock.boot_ms())))
    clock.advance(1)
    first()
    clock.advance(1)
    assert seen == [("a", 1000), ("b", 1000), ("b", 2000)]


def test_who_is_told_may_move_the_clock_and_unsubscribe() -> None:
    clock, seen = ManualClock(start=0), []

    def once() -> None:
        end()
        seen.append(clock.boot_ms())
        clock.advance(1)

    end = clock.subscribe(once)
    clock.advance(1)
    assert (seen, clock.boot_ms()) == ([1000], 2000)


def test_a_step_of_the_wall_clock_lets_no_time_pass() -> None:
    clock, told = ManualClock(start=START), []
    clock.subscribe(lambda: told.append(1))
    clock.step_wall(3600)
    clock.step_wall(-7200.5)
    assert clock.now() == START - timedelta(seconds=3600.5)
    assert (clock.boot_ms(), told) == (0, [])


def test_a_reboot_starts_the_boot_clock_again_and_the_wall_clock_goes_on() -> None:
    clock = ManualClock(start=START)
    clock.advance(60)
    before = clock.boot_id
    clock.reboot()
    assert clock.boot_id != before
    assert (clock.boot_ms(), clock.now()) == (0, START + timedelta(seconds=60))
    clock.advance(1)
    assert (clock.boot_ms(), clock.now()) == (1000, START + timedelta(seconds=61))


def test_two_manual_clocks_are_two_boots() -> None:
    assert ManualClock().boot_id != ManualClock().boot_id


def test_a_thread_on_a_manual_clock_sleeps_until_it_is_told() -> None:
    assert ManualClock().timeout_s(1) is None


def test_moves_from_many_threads_all_count() -> None:
    clock = ManualClock(start=0)

    def move() -> None:
        for _ in range(200):
            clock.advance(0.001)

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.boot_ms() == 800


def test_a_clock_that_rounds_down_makes_no_delay_too_short() -> None:
    class Floored(ManualClock):
        grain_ms = 1

    clock = Floored()
    with Broker(":memory:", clock=clock) as broker:

        def comes_after_ms(queue: str) -> float:
            for passed_ms in range(20):
                if broker.lease(queue) is not None:
                    return passed_ms
                clock.advance(0.001)
            raise AssertionError("it never came")

        job_id = broker.enqueue("one", b"", delay=0.005)
        job = broker.get(job_id)
        assert job is not None
        assert job.due_at == job.enqueued_at + timedelta(milliseconds=5)
        assert comes_after_ms("one") == 6
        broker.enqueue_many("many", [b""], delay=0.005, idempotency_keys=["k"])
        assert comes_after_ms("many") == 6
        for answer in ("nack", "release"):
            broker.enqueue(answer, b"")
            lease = broker.lease(answer)
            assert lease is not None
            getattr(lease, answer)(delay=0.005)
            assert comes_after_ms(answer) == 6
        broker.enqueue("now", b"", delay=0)
        assert comes_after_ms("now") == 0
    assert SystemClock.grain_ms == 1


def test_a_job_with_an_eta_is_due_at_it_to_the_millisecond() -> None:
    """By the clock of the machine, and also in a transaction that ends later."""
    with Broker(":memory:") as broker:
        for _ in range(50):
            eta = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1, milliseconds=random.randrange(1000))
            job = broker.get(broker.enqueue("q", b"", eta=eta))
            assert job is not None
            assert job.due_at == eta
        with broker.transaction() as tx:
            job_id = tx.enqueue("q", b"", eta=eta)
            time.sleep(0.01)
        job = broker.get(job_id)
        assert job is not None
        assert job.due_at == eta


class BusyClock(SystemClock):
    """A thread that reads the wall clock loses its processor before it has, now and then."""

    reads = 0

    def wall_ms(self) -> int:
        self.reads += 1
        if self.reads % 3:
            time.sleep(0.01)
        return super().wall_ms()


def test_a_job_with_an_eta_is_due_at_it_also_on_a_busy_machine() -> None:
    with Broker(":memory:", clock=BusyClock()) as broker:
        for _ in range(5):
            eta = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
            job = broker.get(broker.enqueue("q", b"", eta=eta))
            assert job is not None
            assert job.due_at == eta


def test_an_eta_is_a_moment_of_the_wall_clock_also_after_it_was_set() -> None:
    clock = ManualClock()
    with Broker(":memory:", clock=clock) as broker:
        for step in (3600, -7200):
            clock.step_wall(step)
            broker.enqueue("q", b"", eta=clock.now() + timedelta(seconds=10))
            clock.advance(9.999)
            assert broker.lease("q") is None
            clock.advance(0.001)
            assert broker.lease("q") is not None

"""Schedules: each tick once, over restarts, crashes and clock changes; what is missed goes by the policy."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY
from zoneinfo import ZoneInfo

import attrs
import pytest
from cronsim import CronSim

from rivetq import Broker, DiskFullError, RateLimit, UsageError
from rivetq.schedules import SCHEDULES, TICK_HEADER, Cron, Scheduler, every
from rivetq.schedules.when import TICKS, spec_of
from rivetq.tasks import App, current_job
from rivetq.testing import ManualClock
from rivetq.worker import Worker

START = datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def ticks_between(spec: Any, start: datetime, end: datetime) -> list[datetime]:
    found: list[datetime] = []
    for tick in spec.after(start):
        if tick > end:
            return found
        found.append(tick)
    return found


def make_app(broker: Broker, when: Any = "* * * * *", **options: Any) -> App:
    app = App(broker)

    @app.periodic(when, **options)
    @app.task(queue="q")
    def tick() -> None: ...

    return app


def live(app: App, seconds: float) -> None:
    """Let time pass as for a worker: each record is fired when it is due."""
    clock = app.broker.clock
    assert isinstance(clock, ManualClock)
    scheduler = Scheduler(app.broker, app.schedules)
    scheduler.reconcile()
    scheduler.step()
    end_ms = clock.wall_ms() + round(seconds * 1000)
    while clock.wall_ms() < end_ms:
        due = [job.due_at for job in app.broker.jobs(SCHEDULES) if job.due_at]
        left_ms = min(round(at.timestamp() * 1000) for at in due) - clock.wall_ms()
        if left_ms <= 0:  # the wall clock was set, and tells nothing about the queue's time
            left_ms = 1000
        clock.advance(min(left_ms, end_ms - clock.wall_ms()) / 1000)
        scheduler.step()


def fired(broker: Broker, queue: str = "q") -> list[datetime]:
    return [datetime.fromisoformat(job.headers[TICK_HEADER]) for job in broker.jobs(queue, limit=10_000)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(start=START)


@pytest.fixture
def broker(clock: ManualClock) -> Iterator[Broker]:
    with Broker(":memory:", clock=clock) as broker:
        yield broker


# -- Each tick once


def test_a_schedule_enqueues_its_task_at_each_tick(broker: Broker) -> None:
    live(make_app(broker, "*/5 * * * *"), 3600)
    assert fired(broker) == [utc("2026-01-01T00:00") + timedelta(minutes=5 * n) for n in range(1, 13)]
    job = broker.jobs("q")[0]
    assert (job.json(), job.headers["rivetq-task"]) == ({"args": [], "kwargs": {}}, "tick")
    assert job.enqueued_at >= fired(broker)[0]


def test_every_has_its_ticks_at_multiples_so_that_a_restart_does_not_move_them(broker: Broker) -> None:
    live(make_app(broker, every(25)), 100)
    assert [tick.timestamp() % 25 for tick in fired(broker)] == [0] * 4


def test_there_is_one_record_a_schedule_however_often_it_is_reconciled(broker: Broker) -> None:
    app = make_app(broker)
    for _ in range(3):
        Scheduler(broker, app.schedules).reconcile()
    assert len(broker.jobs(SCHEDULES)) == 1
    live(app, 600)
    assert len(broker.jobs(SCHEDULES)) == 1
    assert len(fired(broker)) == 10


@pytest.mark.parametrize(
    ("zone", "start"),
    [
        ("Europe/Paris", "2026-03-28T12:00"),
        ("Europe/Paris", "2026-10-24T12:00"),
        ("Australia/Lord_Howe", "2026-10-03T04:00"),
    ],
)
def test_24_hours_over_a_change_of_the_clocks_and_20_restarts_fire_each_tick_once(
    tmp_path: Path, zone: str, start: str
) -> None:
    """The third: two changes in one run, since Sydney changes half an hour after Lord Howe Island."""
    clock = ManualClock(start=utc(start))
    random_ = random.Random(start)
    specs = {
        "five": Cron("*/5 * * * *", zone), "hourly": Cron("7 * * * *", zone), "night": Cron("30 2 * * *", zone),
        "day": Cron("0 9 * * *", zone), "sydney": Cron("15 1,2,3 * * *", "Australia/Sydney"), "sevens": every(700),
    }  # fmt: skip
    cuts = sorted(random_.sample(range(1, 24 * 3600), 20))
    path = tmp_path / "data"
    for begin, end in zip([0, *cuts], [*cuts, 24 * 3600], strict=True):
        with Broker(path, clock=clock, fsync="never") as broker:
            app = App(broker)
            for name, spec in specs.items():
                when = spec.expression if isinstance(spec, Cron) else spec
                timezone = spec.zone if isinstance(spec, Cron) else "UTC"

                @app.periodic(when, timezone=timezone, misfire="all")
                @app.task(name=name, queue=name)
                def task() -> None: ...

            live(app, end - begin - 1)
            crashed = tmp_path / "crashed"
            if random_.random() < 0.5:  # the process dies: what is on disk goes on
                broker.backup(crashed)
        if crashed.exists():
            shutil.rmtree(path)
            crashed.rename(path)
        clock.advance(1)  # nobody is there for a second
    last = utc(start) + timedelta(hours=24)
    with Broker(path, clock=clock) as broker:
        app.broker  # closed by now, and not used again
        for name, spec in specs.items():
            expected = ticks_between(spec, utc(start), last)
            # What was due in the last second nobody fired yet.
            assert fired(broker, name) == [tick for tick in expected if tick < last - timedelta(seconds=1)], name
            assert len(expected) >= 1


def test_five_minutes_go_by_elapsed_time_over_a_change_of_the_clocks() -> None:
    """Against an oracle of its own: each full five minutes of UTC."""
    for start in ("2026-03-28T12:02", "2026-10-24T12:02"):
        found = ticks_between(Cron("*/5 * * * *", "Europe/Paris"), utc(start), utc(start) + timedelta(hours=24))
        assert found == [utc(start) + timedelta(minutes=3 + 5 * n) for n in range(288)]


@pytest.mark.parametrize(
    ("expression", "start", "expected"),
    [
        # Paris, 29 March 2026: 02:00 to 03:00 does not exist; 25 October: it comes twice.
        ("30 2 * * *", "2026-03-28T12:00", ["2026-03-29T01:00", "2026-03-30T00:30"]),
        ("30 2 * * *", "2026-10-24T12:00", ["2026-10-25T00:30", "2026-10-26T01:30"]),
        ("0 9 * * *", "2026-03-28T12:00", ["2026-03-29T07:00", "2026-03-30T07:00"]),
        ("0 9 * * *", "2026-10-24T12:00", ["2026-10-25T08:00", "2026-10-26T08:00"]),
        ("0 * * * *", "2026-10-24T23:30", ["2026-10-25T00:00", "2026-10-25T01:00", "2026-10-25T02:00"]),
        # From within the hour that comes twice: nothing that is over.
        ("30 2 * * *", "2026-10-25T01:10", ["2026-10-26T01:30"]),
        ("0,30 1-3 * * *", "2026-10-25T01:10", ["2026-10-25T02:00", "2026-10-25T02:30", "2026-10-26T00:00"]),
    ],
)
def test_a_change_of_the_clocks_neither_loses_nor_doubles_a_tick(
    expression: str, start: str, expected: list[str]
) -> None:
    ticks = Cron(expression, "Europe/Paris").after(utc(start))
    assert [next(ticks) for _ in expected] == [utc(text) for text in expected]


EXPRESSIONS = [
    "*/5 * * * *", "30 * * * *", "30 2 * * *", "0 */2 * * *", "*/30 2 * * *", "0 0 * * *", "15 1,2,3 * * *",
    "*/10 0 * * *", "0 23 * * *", "0 30 2 * * *", "30 1-3 * * *", "0 3 * * sun", "*/7 */3 * * *", "* 23 * * *",
]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize(
    ("zone", "start"),
    [("Europe/Paris", "2026-03-28T12:00"), ("Europe/Paris", "2026-10-24T12:00"),
     ("America/New_York", "2026-03-07T12:00"), ("America/New_York", "2026-10-31T12:00"),
     ("Antarctica/Troll", "2026-03-28T12:00"), ("America/Havana", "2026-10-31T12:00"),
     ("Australia/Lord_Howe", "2026-04-04T12:00"), ("Australia/Lord_Howe", "2026-10-03T04:00")],
)  # fmt: skip
def test_ticks_over_a_change_of_the_clocks_do_not_depend_on_where_one_begins(
    expression: str, zone: str, start: str
) -> None:
    """And are those of cronsim, but where it misses some: when clocks are changed by half an hour."""
    begin = utc(start)
    end = begin + timedelta(hours=36)
    found = ticks_between(Cron(expression, zone), begin, end)
    assert found == sorted(set(found))
    if zone != "Australia/Lord_Howe":
        known = (tick.astimezone(UTC) for tick in CronSim(expression, begin.astimezone(ZoneInfo(zone))))
        assert found == list(takewhile(lambda tick: tick <= end, (tick for tick in known if tick > begin)))
    for step in range(1, 36 * 4):
        moment = begin + timedelta(minutes=15 * step - 7)
        assert next(Cron(expression, zone).after(moment)) == next((t for t in found if t > moment), ANY)


def test_clocks_that_are_changed_by_half_an_hour_lose_no_tick() -> None:
    zone = ZoneInfo("Australia/Lord_Howe")
    found = ticks_between(Cron("30 * * * *", zone.key), utc("2026-04-04T13:00"), utc("2026-04-04T16:30"))
    assert [tick.astimezone(zone).isoformat()[11:22] for tick in found] == [
        "00:30:00+11", "01:30:00+11", "01:30:00+10", "02:30:00+10",
    ]  # fmt: skip
    ticks = ticks_between(Cron("* 23 * * *", zone.key), utc("2026-04-05T12:00"), utc("2026-04-05T14:00"))
    assert len(ticks) == 60


def test_a_crash_at_any_point_of_a_firing_neither_loses_nor_doubles_a_tick(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for turn in range(8):
        with Broker(tmp_path / "data", clock=clock) as broker:
            app = make_app(broker, misfire="all")
            scheduler = Scheduler(broker, app.schedules)
            scheduler.reconcile()
            clock.advance(60)
            if turn % 2:  # it dies with the record in its hand
                assert broker.lease(SCHEDULES) is not None
            else:
                scheduler.step()
    with Broker(tmp_path / "data", clock=clock) as broker:
        live(make_app(broker, misfire="all"), 60)
        assert fired(broker) == [utc("2026-01-01T00:00") + timedelta(minutes=n) for n in range(1, 10)]


# -- What was missed


@pytest.mark.parametrize(
    ("misfire", "late", "expected"),
    [("all", 600, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), ("once", 600, [10]), ("skip", 600, [10]), ("skip", 629, [10]),
     ("all", 30, [1]), ("once", 30, [1]), ("skip", 30, [1])],
)  # fmt: skip
def test_missed_ticks_go_by_the_policy(
    broker: Broker, clock: ManualClock, misfire: Any, late: int, expected: list[int]
) -> None:
    app = make_app(broker, misfire=misfire)
    scheduler = Scheduler(broker, app.schedules)
    scheduler.reconcile()
    clock.advance(late)
    scheduler.step()
    assert fired(broker) == [utc("2026-01-01T00:00") + timedelta(minutes=n) for n in expected]
    before = len(fired(broker))
    live(app, 60)
    assert len(fired(broker)) == before + 1


def test_skip_drops_the_last_tick_too_when_it_is_later_than_the_grace_time(broker: Broker, clock: ManualClock) -> None:
    app = make_app(broker, "0 * * * *", misfire="skip", grace=10)
    scheduler = Scheduler(broker, app.schedules)
    scheduler.reconcile()
    clock.advance(3570 + 11)
    scheduler.step()
    assert fired(broker) == []
    live(app, 3600)
    assert fired(broker) == [utc("2026-01-01T02:00")]


@pytest.mark.parametrize("misfire", ["once", "skip"])
@pytest.mark.parametrize("when", ["* * * * * *", every(0.1), "*/7 * * * *", "@daily", "30 2 29 2 *", "* * * 1 1 *"])
def test_what_was_missed_for_years_is_not_counted_tick_by_tick(
    broker: Broker, clock: ManualClock, when: Any, misfire: Any
) -> None:
    app = make_app(broker, when, misfire=misfire, grace=10**9, timezone="Europe/Paris")
    spec = app.schedules["tick"].spec
    asked: list[datetime] = []

    class Counted:
        text = spec.text

        def after(self, moment: datetime) -> Iterator[datetime]:
            for tick in spec.after(moment):
                asked.append(tick)
                yield tick

    app.schedules["tick"] = attrs.evolve(app.schedules["tick"], spec=Counted())
    scheduler = Scheduler(broker, app.schedules)
    scheduler.reconcile()
    clock.advance(8 * 365 * 86_400 + 12_345.678)
    scheduler.step()
    [tick] = fired(broker)
    assert len(asked) < 1000
    assert tick <= clock.now() < next(spec.after(tick))


@pytest.mark.parametrize(
    ("word", "expression"), [("@hourly", "0 * * * *"), ("@weekly", "0 0 * * 0"), ("@yearly", "0 0 1 1 *")]
)
def test_a_word_stands_for_an_expression(word: str, expression: str) -> None:
    assert spec_of(word, ZoneInfo("Europe/Paris")) == Cron(expression, "Europe/Paris")


def test_every_takes_parts_of_a_second_and_a_timedelta() -> None:
    ticks = every(timedelta(milliseconds=100)).after(utc("2026-01-01T00:00"))
    found = [next(ticks) for _ in range(50)]
    assert found == [utc("2026-01-01T00:00") + timedelta(milliseconds=100 * n) for n in range(1, 51)]
    for tick in found:  # each is the one behind what was before it, whatever a float says
        assert next(every(0.1).after(tick)) == tick + timedelta(milliseconds=100)
    assert every(1_234_567).text != every(1_234_568).text


def test_very_many_missed_ticks_come_in_several_transactions(broker: Broker, clock: ManualClock) -> None:
    app = make_app(broker, every(1), misfire="all")
    scheduler = Scheduler(broker, app.schedules)
    scheduler.reconcile()
    clock.advance(1000)
    scheduler.step()
    assert fired(broker) == [START + timedelta(seconds=n) for n in range(1, 1001)]


def test_one_transaction_has_a_hundred_ticks_at_most_and_waits_for_the_next(broker: Broker) -> None:
    schedule = make_app(broker, every(1), misfire="all").schedules["tick"]
    ticks, following = schedule.due(START, START + timedelta(days=1))
    assert ticks == [START + timedelta(seconds=n) for n in range(TICKS)]
    assert following == START + timedelta(seconds=TICKS)


def test_a_full_queue_holds_the_schedule_up_and_loses_no_tick(broker: Broker, clock: ManualClock) -> None:
    app = make_app(broker, misfire="all")
    broker.configure_queue("q", max_jobs=2)
    live(app, 300)
    assert len(fired(broker)) == 2
    broker.configure_queue("q", max_jobs=None)
    live(app, 60)
    assert fired(broker) == [utc("2026-01-01T00:00") + timedelta(minutes=n) for n in range(1, 7)]


def test_a_rate_limit_lets_missed_ticks_through_one_by_one(broker: Broker, clock: ManualClock) -> None:
    app = make_app(broker, misfire="all")
    broker.configure_queue("q", rate_limit=RateLimit(per_second=1, burst=1, on="enqueue"))
    scheduler = Scheduler(broker, app.schedules)
    scheduler.reconcile()
    clock.advance(300)
    live(app, 29)
    assert len(fired(broker)) == 5


# -- Changes of the program and of the clock


def test_a_changed_schedule_replaces_its_record_and_a_removed_one_ends(broker: Broker) -> None:
    live(make_app(broker, "* * * * *"), 60)
    hourly = make_app(broker, "0 * * * *")
    live(hourly, 3600)
    assert fired(broker) == [utc("2026-01-01T00:01"), utc("2026-01-01T01:00")]
    live(make_app(broker, "* * * * *"), 60)  # back again
    assert fired(broker)[-1] == utc("2026-01-01T01:02")
    other = App(broker)
    scheduler = Scheduler(broker, other.schedules)
    clock = broker.clock
    assert isinstance(clock, ManualClock)
    clock.advance(120)
    scheduler.step()
    assert len(broker.jobs(SCHEDULES)) == 1  # it may be another app's whose worker is about to start
    clock.advance(300)
    scheduler.step()
    assert broker.jobs(SCHEDULES) == []


def test_several_apps_share_a_broker_and_end_no_schedules_of_each_other(broker: Broker, clock: ManualClock) -> None:
    one, other, third = make_app(broker, misfire="all"), App(broker), make_app(broker)
    other.periodic(every(60), name="of another")(other.task(queue="r")(lambda: None))
    live(one, 60)
    clock.advance(60)
    scheduler = Scheduler(broker, other.schedules)  # its worker comes first, and finds a record of nobody's
    scheduler.reconcile()
    scheduler.step()
    with pytest.raises(UsageError, match="'of another'"):
        again = App(broker)
        again.periodic(every(60), name="of another")(again.task(lambda: None))
        Scheduler(broker, again.schedules)
    clock.advance(60)
    live(one, 600)
    scheduler.step()
    assert fired(broker) == [utc("2026-01-01T00:00") + timedelta(minutes=n) for n in range(1, 14)]
    assert len(fired(broker, "r")) == 11
    late = [job.enqueued_at - datetime.fromisoformat(job.headers[TICK_HEADER]) for job in broker.jobs("q", limit=100)]
    assert max(late[3:]) <= timedelta(seconds=1)  # two were missed, and nobody held up those behind for longer
    assert len(broker.jobs(SCHEDULES)) == 2
    both = Scheduler(broker, one.schedules)
    clock.advance(60)
    scheduler.step()  # on behalf of the other as well
    assert (len(fired(broker)), len(fired(broker, "r"))) == (14, 12)
    with pytest.raises(UsageError, match="'tick'"):
        Scheduler(broker, third.schedules)
    both.close()
    Scheduler(broker, third.schedules)


@pytest.mark.parametrize("step", [3600, -1800])
def test_a_wall_clock_that_is_set_moves_the_ticks_along_and_none_comes_twice(
    broker: Broker, clock: ManualClock, step: int
) -> None:
    app = make_app(broker, "0 * * * *")
    live(app, 1800)
    clock.step_wall(step)
    before = clock.now()
    live(app, 3 * 3600)
    ticks = fired(broker)
    assert len(set(ticks)) == len(ticks)
    assert ticks == ticks_between(Cron("0 * * * *", "UTC"), before - timedelta(hours=1), clock.now())[-len(ticks) :]
    assert len(ticks) in (3, 4)
    for job in broker.jobs("q"):
        assert job.enqueued_at is not None


def test_a_schedule_that_is_changed_and_changed_back_before_its_tick_has_its_record(broker: Broker) -> None:
    for when in ("* * * * *", "0 * * * *", "* * * * *"):
        app = make_app(broker, when)
        Scheduler(broker, app.schedules).reconcile()
    assert len(broker.jobs(SCHEDULES)) == 1
    live(app, 60)
    assert len(fired(broker)) == 1


def test_a_schedule_that_was_given_up_and_comes_back_before_its_tick_has_its_record(
    broker: Broker, clock: ManualClock
) -> None:
    Scheduler(broker, make_app(broker, "0 12 * * *").schedules).reconcile()
    scheduler = Scheduler(broker, App(broker).schedules)
    for _ in range(3):
        clock.advance(300)
        scheduler.step()
    assert broker.jobs(SCHEDULES) == []  # nobody had it for long enough
    live(make_app(broker, "0 12 * * *"), 86_400)
    assert fired(broker) == [utc("2026-01-01T12:00")]


def test_a_record_that_was_held_while_its_schedule_was_changed_fires_nothing(
    broker: Broker, clock: ManualClock
) -> None:
    Scheduler(broker, make_app(broker, "* * * * *").schedules).reconcile()
    clock.advance(60)
    held = broker.lease(SCHEDULES)  # another process fires it, and dies of it
    assert held is not None
    scheduler = Scheduler(broker, make_app(broker, "0 * * * *").schedules)
    scheduler.reconcile()
    assert len(broker.jobs(SCHEDULES)) == 2  # a leased job cannot be cancelled
    held.release()
    scheduler.step()
    assert fired(broker) == []
    assert len(broker.jobs(SCHEDULES)) == 1


def test_a_record_outlives_any_number_of_deaths_of_who_fires_it(broker: Broker, clock: ManualClock) -> None:
    app = make_app(broker)
    Scheduler(broker, app.schedules).reconcile()
    clock.advance(60)
    for _ in range(30):
        lease = broker.lease(SCHEDULES)
        assert lease is not None
        lease.nack(delay=0)
    live(app, 60)
    assert len(fired(broker)) == 2


def test_a_record_that_somebody_rejected_comes_back_with_the_next_start(broker: Broker, clock: ManualClock) -> None:
    app = make_app(broker)
    Scheduler(broker, app.schedules).reconcile()
    clock.advance(60)
    lease = broker.lease(SCHEDULES)  # by a consumer that follows all queues, say
    assert lease is not None
    lease.reject(error="no job of mine")
    live(app, 60)
    assert len(fired(broker)) == 2
    assert [job.state for job in broker.jobs(SCHEDULES)] == ["scheduled"]


def test_of_two_records_of_a_schedule_one_is_left(broker: Broker) -> None:
    app = make_app(broker)
    Scheduler(broker, app.schedules).reconcile()
    [record] = broker.jobs(SCHEDULES)
    broker.enqueue(SCHEDULES, {**record.json(), "tick_ms": record.json()["tick_ms"] + 60_000})
    Scheduler(broker, app.schedules).reconcile()
    assert len(broker.jobs(SCHEDULES)) == 1


def test_a_start_finds_the_records_of_more_schedules_than_one_page_has(broker: Broker, clock: ManualClock) -> None:
    app = App(broker)
    for n in range(1001):
        app.periodic(every(60), name=f"schedule {n}")(app.task(name=f"task {n}")(lambda: None))
    for _ in range(2):
        Scheduler(broker, app.schedules).reconcile()
        assert len(broker.jobs(SCHEDULES, limit=10_000)) == 1001
        clock.advance(3600)


def test_a_changed_schedule_with_the_same_next_tick_has_a_record_of_its_own(broker: Broker) -> None:
    for when in ("0 12 * * *", "0 12 1 * *"):
        app = make_app(broker, when)
        Scheduler(broker, app.schedules).reconcile()
    assert [job.json()["spec"] for job in broker.jobs(SCHEDULES)] == ["0 12 1 * * UTC"]
    live(app, 40 * 86_400)
    assert fired(broker) == [utc("2026-01-01T12:00"), utc("2026-02-01T12:00")]


def test_a_wall_clock_that_is_set_forward_makes_a_tick_five_minutes_late_at_most(
    broker: Broker, clock: ManualClock
) -> None:
    scheduler = Scheduler(broker, make_app(broker, "0 12 * * *").schedules)
    scheduler.reconcile()
    for _ in range(3):  # the record that a start makes, and those that a firing makes
        clock.step_wall(86_400)
        clock.advance(300)
        scheduler.step()
    assert fired(broker) == [utc(f"2026-01-0{day}T12:00") for day in (1, 2, 3)]


@pytest.mark.parametrize(("late_s", "jobs"), [(59.999, 1), (60, 1), (60.001, 0)])
def test_a_tick_is_in_time_up_to_the_very_end_of_its_grace(
    broker: Broker, clock: ManualClock, late_s: float, jobs: int
) -> None:
    scheduler = Scheduler(broker, make_app(broker, "0 * * * *", misfire="skip", grace=60).schedules)
    scheduler.reconcile()
    clock.advance(3570 + late_s)
    scheduler.step()
    assert len(fired(broker)) == jobs


def test_a_schedule_that_cannot_be_fired_waits_a_second_and_holds_up_no_other(
    broker: Broker, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(broker)
    app.periodic(every(60), name="broken")(app.task(name="broken")(lambda: None))

    def breaks(tx: Any, tick: datetime) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(app.schedules, "broken", attrs.evolve(app.schedules["broken"], put=breaks))
    scheduler = Scheduler(broker, app.schedules)
    scheduler.reconcile()
    clock.advance(30)
    for lease in broker.lease_many(SCHEDULES, 10):
        scheduler.fire(lease)
    assert len(fired(broker)) == 1
    assert broker.lease(SCHEDULES) is None  # else it would be tried without a pause
    clock.advance(1)
    lease = broker.lease(SCHEDULES)
    assert lease is not None
    assert lease.json()["schedule"] == "broken"


def test_what_is_no_record_ends_and_disturbs_nobody(broker: Broker) -> None:
    broker.enqueue(SCHEDULES, b"\xff")
    broker.enqueue(SCHEDULES, {"schedule": [], "spec": "x", "tick_ms": 0})
    broker.enqueue(SCHEDULES, b"[" * 100_000)
    broker.enqueue(SCHEDULES, {"schedule": "tick", "spec": "another", "tick_ms": 0})
    live(make_app(broker), 120)
    assert len(fired(broker)) == 2
    assert len(broker.jobs(SCHEDULES)) == 1


@pytest.mark.parametrize("lost", [False, True])
def test_a_record_that_is_leased_while_the_scheduler_stops_is_given_back(
    broker: Broker, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    app = make_app(broker)
    scheduler = Scheduler(broker, app.schedules)
    scheduler.reconcile()
    clock.advance(60)

    class Waiting:
        def __init__(self, done: Any) -> None:
            self._done = done
            scheduler.stop()

        def cancel(self) -> bool:
            leases = broker.lease_many(SCHEDULES, 10)
            if lost:
                clock.advance(31)
            self._done(leases, None)
            return False

    monkeypatch.setattr(broker, "lease_soon", lambda name, count, done: Waiting(done))
    scheduler.run()
    [record] = broker.jobs(SCHEDULES)
    assert (record.state in ("ready", "scheduled"), record.attempts) == (True, int(lost))
    assert fired(broker) == []


@pytest.mark.parametrize("way", ["raised", "told"])
def test_a_full_disk_ends_no_scheduler_and_keeps_it_from_no_stop(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("rivetq.schedules.scheduler.AGAIN_S", 0.01)
    scheduler = Scheduler(broker, make_app(broker).schedules)
    lease_soon, tries = broker.lease_soon, iter(range(10**6))
    again = threading.Event()

    def full(queue: str, most: int, done: Any) -> Any:
        if next(tries) < 2:
            if way == "raised":
                raise DiskFullError("full", path="d")
            done(None, DiskFullError("full", path="d"))
            return SimpleNamespace(cancel=lambda: False)  # it is over
        again.set()
        return lease_soon(queue, most, done)

    monkeypatch.setattr(broker, "lease_soon", full)
    running = threading.Thread(target=scheduler.run)
    running.start()
    assert again.wait(30)
    scheduler.stop()
    running.join(30)
    assert not running.is_alive()
    monkeypatch.setattr("rivetq.schedules.scheduler.AGAIN_S", 30.0)
    tries = iter(range(10**6))
    stopped = Scheduler(broker, {})
    stopped.stop()  # while it waits to try again
    before = time.monotonic()
    stopped.run()
    assert time.monotonic() - before < 15


@pytest.mark.parametrize("verb", ["configure_queue", "enqueue"])
def test_a_disk_that_is_full_at_the_start_is_waited_out_and_holds_up_no_stop(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    original, tries, is_full, tried = getattr(broker, verb), iter(range(10**6)), threading.Event(), threading.Event()

    def full(*args: Any, **options: Any) -> Any:
        if is_full.is_set() or next(tries) < 2:
            tried.set()
            raise DiskFullError("full", path="d")
        return original(*args, **options)

    monkeypatch.setattr(broker, verb, full)
    monkeypatch.setattr("rivetq.schedules.scheduler.AGAIN_S", 0.01)
    app = App(broker)
    fired_ = threading.Event()

    @app.periodic(every(0.1))
    @app.task
    def tick() -> None:
        fired_.set()

    clock = broker.clock
    assert isinstance(clock, ManualClock)
    with Worker(app) as worker:
        while not broker.jobs(SCHEDULES):
            assert worker.failure is None
            time.sleep(0.001)
        clock.advance(1)
        assert fired_.wait(30)
    is_full.set()
    tried.clear()
    monkeypatch.setattr("rivetq.schedules.scheduler.AGAIN_S", 60.0)
    other = App(broker)
    other.periodic(every(5))(other.task(name="other")(lambda: None))
    waits = Worker(other)
    waits.start()
    assert tried.wait(30)
    before = time.monotonic()
    waits.stop()
    assert time.monotonic() - before < 30
    assert waits.failure is None


# -- In a program


def test_a_worker_fires_schedules_and_runs_their_tasks() -> None:
    ran: list[str] = []
    done = threading.Event()
    with App(":memory:") as app:

        @app.periodic(every(1))
        def tick() -> None:
            ran.append(current_job().headers[TICK_HEADER])
            if len(ran) == 2:
                done.set()

        with Worker(app):
            assert done.wait(20)
            time.sleep(0.05)
        assert [count for count in Counter(ran).values() if count > 1] == []
        assert len(app.broker.jobs(SCHEDULES, state="scheduled")) == 1


def test_periodic_makes_a_task_or_takes_one_and_passes_arguments(broker: Broker) -> None:
    app = App(broker)

    @app.periodic("* * * * *", args=(1,), kwargs={"b": 2})
    @app.periodic("0 * * * *", name="hourly", args=(3,))
    def both(a: int, b: int = 0) -> int:
        return a + b

    assert both(1) == 1
    assert sorted(app.schedules) == ["both", "hourly"]
    live(app, 3600)
    payloads = Counter(str(job.json()) for job in broker.jobs("default", limit=100))
    assert payloads == {"{'args': [1], 'kwargs': {'b': 2}}": 60, "{'args': [3], 'kwargs': {}}": 1}


@pytest.mark.parametrize(
    ("when", "options", "why"),
    [
        ("* * *", {}, "no cron expression"), ("61 * * * *", {}, "no cron expression"), (5, {}, "every"),
        ("* * * * *", {"timezone": "Mars/Olympus"}, "timezone"), ("0 0 31 2 *", {}, "periodic"),
        ("* * * * *", {"misfire": "never"}, "misfire"), ("* * * * *", {"grace": -1}, "grace"),
        ("* * * * *", {"args": (1,)}, "do not fit"), ("* * * * *", {"args": "ab"}, "a sequence"),
        ("* * * * *", {"timezone": None}, "timezone"), (every(5), {"timezone": "Mars/Olympus"}, "timezone"),
    ],
)  # fmt: skip
def test_a_bad_schedule_is_refused(broker: Broker, when: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        make_app(broker, when, **options)


@pytest.mark.parametrize("seconds", [0, 0.05, True, "1", float("nan"), timedelta(0)])
def test_every_takes_a_tenth_of_a_second_at_least(seconds: Any) -> None:
    with pytest.raises(UsageError, match="every"):
        every(seconds)


def test_schedules_with_long_names_that_begin_alike_are_two(broker: Broker) -> None:
    app = App(broker)
    for n in range(2):

        @app.periodic("* * * * *", name="x" * 300 + str(n))
        @app.task(name=f"t{n}", queue=f"q{n}")
        def task() -> None: ...

    live(app, 60)
    assert [len(fired(broker, f"q{n}")) for n in range(2)] == [1, 1]


def test_two_schedules_of_one_name_are_refused(broker: Broker) -> None:
    app = make_app(broker)
    with pytest.raises(UsageError, match="'tick'"):
        app.periodic("0 * * * *")(app.tasks["tick"])


def test_a_time_zone_is_that_of_the_expression() -> None:
    spec = spec_of("0 12 * * *", "America/New_York")
    tick = next(spec.after(START))
    assert (tick, tick.astimezone(ZoneInfo("America/New_York")).hour) == (utc("2026-01-01T17:00"), 12)

"""`App.testing`: jobs in memory, run when the test says so, time by hand."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rivetq import RateLimit, RetryPolicy, UsageError
from rivetq.tasks import App, Reject, Retry, Snooze, current_job, every

app = App("never opened")
seen: list[Any] = []


@app.task(queue="mail", retry=RetryPolicy(base=60, jitter="none", max_attempts=2))
def send(to: str, body: str = "hello") -> None:
    seen.append((to, current_job().attempt))
    if to == "nobody":
        raise ValueError("no such address")
    if to == "all":
        send.enqueue("ada")
        greet.enqueue("bob")


@app.task
async def greet(name: str) -> None:
    await asyncio.sleep(0)
    seen.append(name)


@app.task
def end(how: str) -> None:
    raise {"retry": Retry(5), "snooze": Snooze(5), "reject": Reject("no")}[how]


@app.periodic(every(300))
@app.task(pool="thread")
def report() -> None:
    seen.append("report")


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


def test_jobs_wait_until_they_are_drained_with_what_they_enqueue() -> None:
    with app.testing() as testing:
        send.enqueue("all")
        assert seen == []
        done = testing.drain()
        assert seen == [("all", 1), ("ada", 1), "bob"]
        assert (done.jobs, done.acked, done.failed, done.errors) == (3, 3, 0, [])
        assert testing.drain().jobs == 0
    assert not Path("never opened").exists()


def test_drain_raises_what_a_handler_raised_and_the_job_is_retried() -> None:
    with app.testing() as testing:
        job_id = send.enqueue("nobody")
        with pytest.raises(ValueError, match="no such address"):
            testing.drain()
        assert testing.drain().jobs == 0  # it waits for its retry
        testing.advance(60)
        done = testing.drain(raise_errors=False)
        assert [str(error) for error in done.errors] == ["no such address"]
        job = testing.broker.get(job_id)
        assert job is not None
        assert (job.state, job.attempts) == ("dead", 2)


def test_outcomes_are_no_errors() -> None:
    with app.testing() as testing:
        end.enqueue_many([("retry",), ("snooze",), ("reject",)])
        done = testing.drain()
        assert (done.failed, done.released, done.errors) == (2, 1, [])
        waits = {job.attempts: job for job in testing.broker.jobs("default", state="scheduled")}
        assert {n: (job.due_at or testing.clock.now()) - testing.clock.now() for n, job in waits.items()} == {
            1: timedelta(seconds=5), 0: timedelta(seconds=5),
        }  # fmt: skip


def test_inline_runs_a_job_at_its_enqueue_and_raises_its_error() -> None:
    with app.testing(inline=True) as testing:
        send.enqueue("all")
        assert seen == [("all", 1), ("ada", 1), "bob"]
        send.options(delay=5).enqueue("later")
        assert len(seen) == 3
        testing.advance(5)
        testing.drain()
        assert seen[3:] == [("later", 1)]
        with pytest.raises(ValueError, match="no such address"):
            send.enqueue("nobody")
        with testing.broker.transaction() as tx:
            send.options(transaction=tx).enqueue("tx")
        assert ("tx", 1) not in seen
        testing.drain()
        assert ("tx", 1) in seen


def test_inline_runs_its_own_job_and_no_other_of_the_queue() -> None:
    with app.testing(inline=True) as testing:
        first = testing.broker.enqueue("mail", {"args": ["first"]}, headers={"rivetq-task": "send"})
        send.enqueue("second")
        assert seen == [("second", 1)]
        job = testing.broker.get(first)
        assert job is not None
        assert (job.state, job.attempts) == ("ready", 0)


def test_an_app_awaits_its_own_broker_again_after_the_block() -> None:
    async def main() -> None:
        with App(":memory:") as other:
            other.task(name="task")(lambda: None)
            await other.tasks["task"].aenqueue()
            with other.testing():
                await other.tasks["task"].aenqueue()
            await other.tasks["task"].aenqueue()
            assert other.broker.stats().enqueued == 2

    asyncio.run(main())


def test_async_tasks_run_in_a_test_that_has_a_loop_itself() -> None:
    async def main() -> None:
        with app.testing() as testing:
            await greet.aenqueue("ada")
            testing.drain()
        with app.testing(inline=True):
            await greet.aenqueue("bob")

    asyncio.run(main())
    assert seen == ["ada", "bob"]


def test_a_queue_that_is_held_back_holds_no_other_back() -> None:
    with app.testing() as testing:
        for hold in (lambda: testing.broker.pause("mail"), lambda: testing.broker.resume("mail")):
            hold()
            send.enqueue("ada")
            greet.enqueue("bob")
            testing.drain()
            assert testing.broker.stats("default").ready == 0
        assert testing.broker.stats("mail").ready == 0
        testing.broker.configure_queue("mail", rate_limit=RateLimit(1, 1))
        send.enqueue_many([("ada",), ("eve",), ("zoe",)])
        greet.enqueue("bob")
        assert testing.drain().jobs == 2
        assert (testing.broker.stats("mail").ready, testing.broker.stats("default").ready) == (2, 0)


def test_the_kit_is_for_a_block() -> None:
    testing = app.testing()
    for outside in (testing.drain, testing.enqueued, lambda: testing.broker):
        with pytest.raises(UsageError, match="block"):
            outside()
    assert not Path("never opened").exists()


def test_assert_enqueued_compares_what_arrives() -> None:
    with app.testing() as testing:
        send.enqueue(("ada", "bob"))  # type: ignore[arg-type]  # whatever it is annotated with
        testing.assert_enqueued(send, args=[("ada", "bob")], kwargs={})
        with pytest.raises(AssertionError, match="no call"):
            testing.assert_enqueued(send, args=[["ada", "bob"]])
        send.enqueue(to="eve", body="hi")
        testing.assert_enqueued(send, args=["eve"], kwargs={"body": "hi"}, count=1)  # the same arguments
        testing.assert_enqueued(send, kwargs={"to": "eve", "body": "hi"}, count=1)
        testing.assert_enqueued(send, args=["eve"], count=1)
        testing.assert_enqueued(send, kwargs={"body": "hi"}, count=1)
        for wrong in (
            {"args": ["eve"], "kwargs": {}},
            {"args": ["eve", "ho"]},
            {"args": [1, 2, 3]},
            {"kwargs": {"x": 1}},
        ):
            with pytest.raises(AssertionError, match="no call"):
                testing.assert_enqueued(send, **wrong)  # type: ignore[arg-type]  # as mappings
        with pytest.raises(UsageError, match="task: a task"):
            testing.assert_enqueued("send")  # type: ignore[arg-type]  # a name is none
        testing.assert_enqueued(send, args=[mock.ANY])
        with pytest.raises(AssertionError):
            testing.assert_enqueued(send, args=[("ada",)])


def test_assert_enqueued_counts_more_than_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.tasks.under_test.MANY_JOBS", 10)
    with app.testing() as testing:
        send.enqueue_many([("ada",)] * 25)
        testing.assert_enqueued(send, count=25)


def test_assert_enqueued_says_what_waits_instead() -> None:
    with app.testing() as testing:
        send.options(queue="other").enqueue("ada", body="hi")
        send.options(delay=60).enqueue("bob")
        (call,) = testing.assert_enqueued(send, args=["ada"], kwargs={"body": "hi"}, queue="other")
        assert call.job.queue == "other"
        testing.assert_enqueued(send, count=2)
        testing.assert_enqueued(send, args=("bob",), queue="mail")
        assert [call.args for call in testing.enqueued(queue="mail")] == [["bob"]]
        for wrong in ({"args": ["eve"]}, {"queue": "mail", "args": ["ada"]}, {"count": 1}, {"kwargs": {"body": "x"}}):
            with pytest.raises(AssertionError, match=r"other: send\('ada', body='hi'\)"):
                testing.assert_enqueued(send, **wrong)  # type: ignore[arg-type]  # each of them is right by itself
        with pytest.raises(AssertionError, match="'greet'"):
            testing.assert_enqueued(greet)


def test_advance_lets_schedules_enqueue_each_tick() -> None:
    with app.testing(start=datetime(2026, 1, 1, tzinfo=UTC)) as testing:
        testing.advance(3600)
        testing.assert_enqueued(report, count=12)
        assert testing.clock.now() == datetime(2026, 1, 1, 1, tzinfo=UTC)
        testing.drain()
    assert seen == ["report"] * 12


def test_a_job_that_is_no_call_is_a_dead_letter() -> None:
    with app.testing() as testing:
        job_id = testing.broker.enqueue("mail", b"")
        assert testing.drain().failed == 1
        job = testing.broker.get(job_id)
        assert job is not None
        assert job.state == "dead"


def test_a_task_that_enqueues_itself_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.tasks.under_test.MANY_JOBS", 20)
    with App(":memory:") as other:

        @other.task
        def again() -> None:
            again.enqueue()

        with other.testing() as testing:
            again.enqueue()
            with pytest.raises(UsageError, match="enqueue itself"):
                testing.drain()


def test_the_app_is_as_before_after_the_block() -> None:
    with App(":memory:") as other:

        @other.task
        def task() -> None: ...

        task.enqueue()
        before = other.broker
        with other.testing() as testing:
            assert testing.broker is not before
            with pytest.raises(UsageError, match="already"), other.testing():
                pass
            task.enqueue_many([(), ()])
        assert other.broker is before
        assert before.stats().enqueued == 1
        with pytest.raises(UsageError, match="once"):
            testing.__enter__()


def test_the_time_goes_on_in_large_steps_after_the_wall_clock_was_set() -> None:
    with app.testing() as testing:
        testing.clock.step_wall(3600)
        advances: list[float] = []
        advance = testing.clock.advance
        testing.clock.advance = lambda seconds: (advances.append(seconds), advance(seconds))[1]  # type: ignore[method-assign, assignment, func-returns-value]  # counts the steps
        testing.advance(700)
        assert len(advances) < 800
        assert testing.enqueued(report)


def test_a_year_of_a_yearly_schedule_is_a_few_steps() -> None:
    with App(":memory:") as other:
        other.periodic("0 0 1 1 *")(other.task(name="yearly")(lambda: None))
        with other.testing() as testing:
            advances: list[float] = []
            advance = testing.clock.advance
            testing.clock.advance = lambda seconds: (advances.append(seconds), advance(seconds))[1]  # type: ignore[method-assign, assignment, func-returns-value]  # counts the steps
            testing.advance(3 * 366 * 86_400)
            assert len(testing.enqueued(other.tasks["yearly"])) == 3
            assert len(advances) < 10


def test_a_schedule_that_is_gone_ends_while_the_time_goes_on() -> None:
    with App(":memory:") as other:
        other.periodic("0 0 1 1 *")(other.task(name="yearly")(lambda: None))
        with other.testing() as testing:
            other.schedules.clear()
            testing.advance(1000)
            assert not testing.broker.jobs("rivetq.schedules")


def test_a_handler_that_lets_the_time_pass_loses_its_lease_and_no_more() -> None:
    with App(":memory:") as other:

        @other.task(visibility_timeout=10)
        def sleepy() -> None:
            if current_job().attempt == 1:
                testing.clock.advance(20)

        with other.testing() as testing:
            sleepy.enqueue()
            assert testing.drain().acked == 1  # in its second attempt
            assert testing.broker.stats().acked == 1


def test_what_somebody_enqueued_by_hand_is_no_call() -> None:
    with app.testing() as testing:
        testing.broker.enqueue("mail", [1], headers={"rivetq-task": "send"})
        assert testing.enqueued() == []

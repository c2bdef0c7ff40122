"""How to test tasks: jobs in memory, time that moves by hand, no worker, no sleeping.

`app.testing()` gives a test an empty broker for as long as its block lasts, and what it enqueues runs when the test
says so. The app under test is the first part of this file; in a project the test imports it.

    pytest examples/testing_tasks.py
    python examples/testing_tasks.py     # the same functions, without pytest
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from rivetq import RetryPolicy
from rivetq.tasks import App, Reject, current_job, every

# -- the app ----------------------------------------------------------------------------------------------------------

DAY = 86_400
app = App("data")
sent: list[str] = []
mail_server_is_down = False


@app.task(queue="mail", retry=RetryPolicy(max_attempts=3, base=60, jitter="none"))
def send_invoice(order: int, *, copy_to: str | None = None) -> None:
    """Send it now, and have a reminder sent in two weeks."""
    if order < 0:
        raise Reject(f"there is no order {order}")  # another attempt would not help
    if mail_server_is_down:
        raise ConnectionError("the mail server is down")
    sent.append(f"invoice {order}, attempt {current_job().attempt}")
    remind.options(delay=14 * DAY).enqueue(order)


@app.task(queue="mail")
async def remind(order: int) -> None:
    sent.append(f"reminder {order}")


@app.periodic(every(DAY))
@app.task
def report() -> None:
    sent.append("report")


# -- its tests --------------------------------------------------------------------------------------------------------


def test_enqueue_runs_nothing_until_the_test_drains() -> None:
    sent.clear()
    with app.testing() as testing:
        send_invoice.enqueue(17, copy_to="ada@example.org")
        (call,) = testing.assert_enqueued(send_invoice, args=[17], kwargs={"copy_to": "ada@example.org"}, queue="mail")
        assert call.job.state == "ready"
        assert sent == []
        assert testing.drain().acked == 1
        assert sent == ["invoice 17, attempt 1"]
        testing.assert_enqueued(remind, args=[17], count=1)  # it waits for its day


def test_a_reminder_comes_after_two_weeks_and_not_before() -> None:
    sent.clear()
    with app.testing() as testing:
        remind.options(delay=14 * DAY).enqueue(17)
        testing.advance(14 * DAY - 1)
        testing.drain()
        assert "reminder 17" not in sent
        testing.advance(1)
        testing.drain()
        assert "reminder 17" in sent


def test_an_invoice_that_fails_is_sent_a_minute_later() -> None:
    global mail_server_is_down
    sent.clear()
    with app.testing() as testing:
        send_invoice.enqueue(17)
        mail_server_is_down = True
        failed = testing.drain(raise_errors=False)  # else it raises the ConnectionError: no test hides one by accident
        mail_server_is_down = False
        assert [str(error) for error in failed.errors] == ["the mail server is down"]
        assert testing.drain().jobs == 0
        testing.advance(60)
        testing.drain()
        assert sent == ["invoice 17, attempt 2"]


def test_an_order_that_does_not_exist_is_a_dead_letter_at_once() -> None:
    with app.testing() as testing:
        send_invoice.enqueue(-1)
        testing.drain()
        (dead,) = testing.broker.dead_letters("mail")
        assert (dead.attempts, dead.last_error) == (1, "there is no order -1")


def test_a_report_each_day() -> None:
    with app.testing(start=datetime(2026, 1, 1, 12, tzinfo=UTC)) as testing:
        testing.advance(7 * DAY)
        ticks = [call.job.headers["rivetq-tick"][:10] for call in testing.assert_enqueued(report, count=7)]
        assert (ticks[0], ticks[-1]) == ("2026-01-02", "2026-01-08")


def test_inline_a_job_runs_at_its_enqueue() -> None:
    sent.clear()
    with app.testing(inline=True) as testing:
        send_invoice.enqueue(17)
        assert sent == ["invoice 17, attempt 1"]
        testing.assert_enqueued(remind, count=1)  # what is for later waits in this mode too


if __name__ == "__main__":
    logging.getLogger("rivetq").setLevel(logging.ERROR)  # one test fails a job on purpose
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print("ok", name.removeprefix("test_").replace("_", " "))

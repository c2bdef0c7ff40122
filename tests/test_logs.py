"""Log records: JSON that holds all fields whatever they are, and the job in what its handler logs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from rivetq import UsageError
from rivetq.logs import JobFields, JsonFormatter, configure
from rivetq.tasks import App
from rivetq.worker import Worker


def record(msg: object = "hello", *args: object, **facts: Any) -> logging.LogRecord:
    made = logging.LogRecord("shop", logging.INFO, __file__, 1, msg, args, None)
    vars(made).update(facts)
    return made


def formatted(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert line.isascii()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


class Mute:
    """Has no text, as an object with a broken `__str__` has not."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __str__ = __repr__


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the loggers write; as they were afterwards."""
    loggers = [logging.getLogger(name) for name in ("rivetq", "rivetq.worker", "shop", None)]
    before = [(each, each.level, each.propagate, list(each.handlers)) for each in loggers]
    yield io.StringIO()
    for each, level, propagate, handlers in before:
        each.setLevel(level)
        each.propagate, each.handlers = propagate, handlers


# -- JSON


def test_a_record_is_one_json_object_with_time_level_logger_and_message() -> None:
    found = formatted(record("mail to %s", "ada", created=datetime(2026, 1, 2, 3, 4, 5, 678000, UTC).timestamp()))
    assert found == {
        "time": "2026-01-02T03:04:05.678Z", "level": "INFO", "logger": "shop", "message": "mail to ada",
    }  # fmt: skip


def test_extra_fields_are_fields_of_the_object_and_never_hide_the_main_ones() -> None:
    found = formatted(record(job_id=7, queue="mail", shop={"cart": [1, None, True]}, time="noon", level=9))
    assert (found["job_id"], found["queue"], found["shop"]) == (7, "mail", {"cart": [1, None, True]})
    assert (found["level"], found["level_"], found["time_"]) == ("INFO", 9, "noon")
    assert found["time"].endswith("Z")


def test_an_exception_and_a_stack_are_fields() -> None:
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        made = record(exc_info=sys.exc_info(), stack_info="Stack:\n  here")
    found = formatted(made)
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("ZeroDivisionError: by zero")
    assert found["stack"] == "Stack:\n  here"
    assert "exception" not in formatted(record(exc_info=(None, None, None)))


def test_many_lines_and_all_letters_fit_into_one_line_of_ascii() -> None:
    assert formatted(record("a\nb\u2028ü\ud800"))["message"] == "a\nb\u2028ü\ud800"


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (b"\xff", "b'\\xff'"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02 00:00:00+00:00"),
        (ValueError("no"), "no"),
        ({1, }, "{1}"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (CYCLE, "[[...]]"),
        (Mute(), "<Mute: its text cannot be made: RuntimeError>"),
        (10**5000, "<int: its text cannot be made: ValueError>"),
        (DEEP, "<list: its text cannot be made: RecursionError>"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_json_cannot_say_is_there_as_its_text_beside_the_others(value: object, text: str) -> None:
    found = formatted(record(odd=value, fine=1))
    assert (found["odd"], found["fine"], found["message"]) == (text, 1, "hello")


@pytest.mark.parametrize(
    ("msg", "args", "text"),
    [
        ("two of %s", (), "two of %s"),
        ("%s and %s", ("one",), "%s and %s ('one',)"),
        ("%d", ("one",), "%d ('one',)"),
        ("%s", (Mute(),), "%s <tuple: its text cannot be made: RuntimeError>"),
        (Mute(), (), "<Mute: its text cannot be made: RuntimeError>"),
        (b"bytes", (), "b'bytes'"),
    ],
)
def test_a_message_that_cannot_be_made_does_not_raise(msg: object, args: tuple[object, ...], text: str) -> None:
    assert formatted(record(msg, *args))["message"] == text


def test_an_exception_without_a_text_does_not_raise() -> None:
    class MuteError(Mute, Exception):
        pass

    assert "MuteError" in formatted(record(exc_info=(MuteError, MuteError(), None)))["exception"]
    assert formatted(record(exc_info=(ValueError, "no exception", "no traceback")))["exception"].startswith(
        "ValueError"
    )


@pytest.mark.parametrize("created", [math.nan, 1e300, None, Mute()], ids=["nan", "far", "none", "mute"])
def test_a_time_that_is_none_does_not_raise(created: object) -> None:
    assert formatted(record(created=created))["message"] == "hello"


# -- The job


def test_a_record_logged_in_a_handler_tells_its_job(lines: io.StringIO) -> None:
    configure(json=True, logger="shop", stream=lines)
    shop, app = logging.getLogger("shop.mail"), App(":memory:")

    @app.task(queue="mail")
    def send(to: str) -> None:
        shop.info("mail to %s", to)

    @app.task(queue="fast")
    async def asynchronous() -> None:
        await asyncio.sleep(0)
        shop.info("from a loop", extra={"queue": "my own"})

    with app.testing() as testing:
        first, second = send.enqueue("ada"), asynchronous.enqueue()
        testing.drain()
    shop.info("outside")
    one, two, outside = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert {name: one[name] for name in ("message", "job_id", "queue", "task", "attempt")} == {
        "message": "mail to ada", "job_id": first, "queue": "mail", "task": "send", "attempt": 1,
    }  # fmt: skip
    assert (two["job_id"], two["task"], two["queue"]) == (second, "asynchronous", "my own")
    assert outside.keys() == {"time", "level", "logger", "message"}


def test_a_filter_without_a_job_changes_nothing_and_drops_nothing() -> None:
    made = record()
    before = dict(vars(made))
    assert JobFields().filter(made)
    assert vars(made) == before


def test_the_record_of_a_failed_job_tells_its_job_and_the_exception(lines: io.StringIO) -> None:
    configure(json=True, stream=lines)
    app = App(":memory:")

    @app.task(queue="mail")
    def fail() -> None:
        raise ZeroDivisionError("by zero")

    with app.testing() as testing:
        job_id = fail.enqueue()
        testing.drain(raise_errors=False)
    [found] = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert (found["logger"], found["level"], found["job_id"], found["task"]) == (
        "rivetq.worker", "WARNING", job_id, "fail",
    )  # fmt: skip
    assert found["exception"].endswith("ZeroDivisionError: by zero")


# -- configure


def test_plain_lines_tell_the_job_and_the_exception(lines: io.StringIO) -> None:
    configure("debug", stream=lines)
    made = record("no %s", "luck", job_id=7, queue="mail", created=0.0, exc_text="Traceback: here")
    logging.getLogger("rivetq").handle(made)
    assert lines.getvalue() == "1970-01-01T00:00:00.000Z INFO shop: no luck job_id=7 queue=mail\n  Traceback: here\n"


FORGED = "2026-01-01T00:00:00.000Z CRITICAL shop: disk on fire"
FIELD = "x job_id=8"


def test_nothing_in_a_text_begins_a_line_of_its_own_or_reaches_a_terminal(lines: io.StringIO) -> None:
    configure(stream=lines)
    hostile = f"a\r\n{FORGED}\x1b[2J\x9b31m\u2028{FORGED}\x85\x0b"
    for facts in ({"queue": hostile}, {"task": hostile}, {"exc_text": hostile}, {"stack_info": hostile}):
        logging.getLogger("rivetq").handle(record("hello", **facts))
    logging.getLogger("rivetq").handle(record("job %s", hostile))
    logging.getLogger("rivetq").handle(record(hostile))
    found = lines.getvalue().split("\n")
    assert [line for line in found if line.startswith("2026-01-01")] == []
    assert all(line.isprintable() for line in found), found
    assert len([line for line in found if line[:1] not in ("", " ")]) == 6


def test_a_name_cannot_look_like_another_field(lines: io.StringIO) -> None:
    configure(stream=lines)
    for name in (FIELD, "a=b", "", 'a"b', "plain", "ü-1:x"):
        logging.getLogger("rivetq").handle(record("hello", queue=name, attempt=3))
    found = [line.partition("hello ")[2] for line in lines.getvalue().splitlines()]
    assert found == [
        f"queue={FIELD!r} attempt=3", "queue='a=b' attempt=3", "queue='' attempt=3", "queue='a\"b' attempt=3",
        "queue=plain attempt=3", "queue=ü-1:x attempt=3",
    ]  # fmt: skip


@pytest.mark.parametrize("json", [False, True])
def test_a_line_does_not_hold_a_whole_payload(lines: io.StringIO, json: bool) -> None:
    configure(json=json, stream=lines)
    much = "x" * 2**20
    try:
        raise ValueError(much)
    except ValueError:
        info = sys.exc_info()
    for made in (
        record(much), record("%s", much), record("%s %s", much), record("no", exc_text=much),
        record("no", exc_info=info), record("no", stack_info=much), record("no", queue=much),
    ):  # fmt: skip
        if json and made.msg == "no" and "queue" in vars(made):
            continue  # what is passed as `extra` goes into the object as it is
        lines.seek(0)
        lines.truncate()
        logging.getLogger("rivetq").handle(made)
        assert 100 < len(lines.getvalue()) < 100_000
        assert "characters left out" in lines.getvalue()


@pytest.mark.parametrize("json", [False, True])
def test_a_job_with_a_class_name_of_a_mebibyte_is_a_short_line(lines: io.StringIO, json: bool) -> None:
    configure(json=json, stream=lines)
    with App(":memory:") as app:

        @app.task(queue="q")
        def work(x: object) -> None: ...

        payload = {"args": [{"$class": ["\x07" * 2**20, {}]}]}
        app.broker.enqueue("q", payload, headers={"rivetq-task": "work"})
        with Worker(app, concurrency=1):
            while not app.broker.stats("q").dead:
                time.sleep(0.01)
        [dead] = app.broker.dead_letters("q")
    assert "is not known here" in str(dead.last_error)
    assert "is not known here" in lines.getvalue()
    assert len(lines.getvalue()) < 5000


@pytest.mark.parametrize("json", [False, True])
def test_a_handler_that_raises_a_mebibyte_is_a_bounded_line(lines: io.StringIO, json: bool) -> None:
    configure(json=json, stream=lines)
    with App(":memory:") as app:

        @app.task(queue="q", max_attempts=1)
        def work() -> None:
            raise ValueError("\x07" * 2**20)

        work.enqueue()
        assert Worker(app, max_jobs=1, concurrency=1).run() == 0
    assert "ValueError" in lines.getvalue()
    assert len(lines.getvalue()) < 6 * 2**17


def test_the_level_holds_and_the_last_call_counts(lines: io.StringIO) -> None:
    configure("WARNING", stream=io.StringIO())
    configure(logging.ERROR, stream=lines)
    logger = logging.getLogger("rivetq.worker")
    logger.warning("no")
    logger.error("yes")
    assert [line.partition(": ")[2] for line in lines.getvalue().splitlines()] == ["yes"]


def test_a_handler_of_the_programs_own_stays(lines: io.StringIO) -> None:
    own = logging.NullHandler()
    logging.getLogger("rivetq").addHandler(own)
    configure(stream=lines)
    made = configure(stream=lines)
    assert logging.getLogger("rivetq").handlers == [own, made]


def test_all_loggers_can_be_set_up_at_once(lines: io.StringIO) -> None:
    configure(json=True, logger="", stream=lines)
    logging.getLogger("rivetq.worker").error("one")
    logging.getLogger("shop").error("two")
    assert [json.loads(line)["logger"] for line in lines.getvalue().splitlines()] == ["rivetq.worker", "shop"]


def test_without_a_stream_lines_go_to_what_is_standard_error_then(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure()
    monkeypatch.setattr(sys, "stderr", lines)
    logging.getLogger("rivetq").error("there")
    assert lines.getvalue().endswith("rivetq: there\n")


@pytest.mark.parametrize("level", ["LOUD", None, 1.5])
def test_a_level_that_there_is_not_is_refused(lines: io.StringIO, level: Any) -> None:
    with pytest.raises(UsageError, match="level"):
        configure(level)


# -- structlog


@pytest.fixture
def structlog() -> Iterator[Any]:
    found = pytest.importorskip("structlog", reason="structlog is not installed")
    yield found
    found.reset_defaults()


def test_structlog_writes_its_fields_through_the_json_formatter(structlog: Any, lines: io.StringIO) -> None:
    configure(json=True, logger="shop", stream=lines)
    structlog.configure(
        processors=[structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    app = App(":memory:")

    @app.task
    def send() -> None:
        structlog.get_logger("shop").info("sent", to="ada")

    with app.testing() as testing:
        job_id = send.enqueue()
        testing.drain()
    found = json.loads(lines.getvalue())
    assert (found["message"], found["to"], found["job_id"], found["logger"]) == ("sent", "ada", job_id, "shop")


def test_structlog_renders_records_of_rivetq_with_their_fields(structlog: Any, lines: io.StringIO) -> None:
    handler = configure(stream=lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder()],
        )
    )
    logging.getLogger("rivetq").warning("lost", extra={"job_id": 7})
    assert json.loads(lines.getvalue()) == {"event": "lost", "level": "warning", "job_id": 7}

"""Log records: as lines of JSON, and with the job that a handler runs.

RivetQ logs to "rivetq" (the broker: recovery, housekeeping) and "rivetq.worker" (jobs that failed, leases that were
lost), by the standard `logging`, with the job's facts as `extra` fields. Nothing is set up by itself: see `configure`.

>>> facts = {"name": "rivetq", "levelname": "INFO", "msg": "hello", "created": 0.0, "queue": "mail"}
>>> JsonFormatter().format(logging.makeLogRecord(facts))
'{"time": "1970-01-01T00:00:00.000Z", "level": "INFO", "logger": "rivetq", "message": "hello", "queue": "mail"}'
"""

from __future__ import annotations

import json as json_module
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from rivetq import UsageError

from .tasks.current import current_job
from .texts import NAME_CHARS, cut, escaped, quoted

MOST_CHARS = 2**16
"""Of a message, a traceback or a stack in a line: what an error says may hold a whole payload."""
JOB_FIELDS = ("job_id", "queue", "task", "attempt")
_STANDARD = frozenset([*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"])
"""Attributes that every record has, in some version of Python; all others came as `extra`."""
_OWN = frozenset(["time", "level", "logger", "message", "exception", "stack"])


class JobFields(logging.Filter):
    """Adds job_id, queue, task and attempt of `current_job` to what is logged inside a handler; drops nothing.

    For a `logging.Handler`: a filter of a logger sees only the records of that very logger, not those of its children.
    A record that has such a field keeps it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True."""
        try:
            job = current_job()
        except UsageError:
            return True
        for name, value in zip(JOB_FIELDS, (job.id, job.queue, job.task, job.attempt), strict=True):
            vars(record).setdefault(name, value)
        return True


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON in ASCII: time, level, logger, message, all `extra` fields, exception, stack.

    The time is ISO 8601 in UTC with milliseconds. A value that JSON cannot express appears as its text. If a field or
    an argument raises when it is asked for its text, formatting still does not raise. An `extra` field with one of the
    names above gets an underscore behind it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end. Raises nothing."""
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD:
                fields[f"{name}_" if name in _OWN else name] = value
        exception = _exception(self, record)
        if exception is not None:
            fields["exception"] = exception
        if record.stack_info:
            fields["stack"] = cut(record.stack_info, MOST_CHARS)
        try:
            return _json(fields)
        except Exception:  # one of the fields: the others go out as they are
            return "{" + ", ".join(f"{_json(_text(name))}: {_safe_json(value)}" for name, value in fields.items()) + "}"


class _PlainFormatter(logging.Formatter):
    """Text for people, in lines that tell the job.

    A record begins at the start of a line; its further lines, such as those of a traceback, are indented. So what
    a caller wrote into a job's name or error is never a record of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {record.name}: {_block(_message(record))}"
        line += "".join(f" {name}={_word(vars(record)[name])}" for name in JOB_FIELDS if name in vars(record))
        parts = [_exception(self, record), record.stack_info]
        return "".join([line, *(f"\n  {_block(cut(str(part), MOST_CHARS))}" for part in parts if part)])


class _Handler(logging.StreamHandler[TextIO]):
    """That of `configure`, to be known again; without a stream it writes to what standard error is by then."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._is_given = stream is not None

    def emit(self, record: logging.LogRecord) -> None:
        if not self._is_given:
            self.stream = sys.stderr
        super().emit(record)


def configure(
    level: str | int = "INFO", json: bool = False, *, logger: str = "rivetq", stream: TextIO | None = None
) -> logging.Handler:
    """Set up logging for a program, to standard error. May be repeated: the last call counts.

    Args:
        level: of the logger, by name or number.
        json: lines of JSON (`JsonFormatter`); False: text, in UTC too.
        logger: whose records are written, with those of its children; "" for all loggers of the program. Others than ""
            hand nothing on to the loggers above them, so that no line comes twice.
        stream: where to; None: `sys.stderr`.

    Returns:
        The handler, which has the filter `JobFields`.

    Raises:
        UsageError: there is no such level.
    """
    target = logging.getLogger(logger or None)
    try:
        target.setLevel(level.upper() if isinstance(level, str) else level)
    except (TypeError, ValueError) as error:
        raise UsageError(f"level: the name or number of a level of logging expected, got {quoted(level)}") from error
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter() if json else _PlainFormatter())
    handler.addFilter(JobFields())
    for former in [each for each in target.handlers if isinstance(each, _Handler)]:
        target.removeHandler(former)
    target.addHandler(handler)
    if logger:
        target.propagate = False
    return handler


# From a child process


class Forward(logging.Handler):
    """Hands records to another process, which treats them as its own (`take`): those of the children of a worker.

    Args:
        send: gets the attributes of a record, all of them picklable.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._send = send
        self.addFilter(JobFields())

    def emit(self, record: logging.LogRecord) -> None:
        """Raises nothing: a record that cannot be sent is lost."""
        if len(logging.getLogger().handlers) > 1:  # the program set up logging after this one was there
            return
        found = {**vars(record), "msg": _message(record), "args": None}
        found["exc_text"], found["exc_info"] = _exception(logging.Formatter(), record), None
        for name in found.keys() - _STANDARD:
            if not isinstance(found[name], str | int | float | bool | None):
                found[name] = _text(found[name])
        try:
            self._send(found)
        except Exception:
            self.handleError(record)


def levels() -> dict[str, int]:
    """The levels that this program has set, by logger."""
    known = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    return {each.name: each.level for each in known if isinstance(each, logging.Logger) and each.level}


def forward(send: Callable[[dict[str, Any]], None], levels: Mapping[str, int]) -> None:
    """In a child that has set up no logging: send all records of these levels to the parent."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(Forward(send))
        for name, level in levels.items():
            logging.getLogger(name if name != root.name else None).setLevel(level)


def take(attributes: dict[str, Any]) -> None:
    """Log a record that `Forward` has sent as if it were made here."""
    record = logging.makeLogRecord(attributes)
    logger = logging.getLogger(record.name if record.name != logging.root.name else None)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


# How


def _time(record: logging.LogRecord) -> str:
    try:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except Exception:  # a record that was made by hand
        return _text(record.created)


def _message(record: logging.LogRecord) -> str:
    try:
        return cut(record.getMessage(), MOST_CHARS)
    except Exception:  # arguments that do not fit, or have no text
        found = f"{_text(record.msg)} {_text(record.args)}" if record.args else _text(record.msg)
        return cut(found, MOST_CHARS)


def _block(text: str) -> str:
    """Lines of which only the first begins at the margin, and no control characters."""
    return text if text.isprintable() else "\n  ".join(escaped(line, keep="\t") for line in text.split("\n"))


def _word(value: object) -> str:
    """One word: what is none is in quotes, so that it cannot look like another field."""
    text = cut(_text(value), NAME_CHARS + 100)
    return text if text.isprintable() and text and not set(text) & set(" '\"=\\") else repr(text)


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    info = record.exc_info
    if not info or info[0] is None:
        return cut(record.exc_text, MOST_CHARS) if record.exc_text else None
    try:
        return cut(formatter.formatException(info), MOST_CHARS)
    except Exception as trouble:
        return f"{info[0].__name__} (its traceback cannot be made: {type(trouble).__name__})"


def _json(value: Any) -> str:
    # In ASCII: a lone surrogate, or a stream that cannot say a letter, would raise in the handler.
    return json_module.dumps(value, default=_text, allow_nan=False)


def _safe_json(value: Any) -> str:
    try:
        return _json(value)
    except Exception:  # not a number, a cycle, keys of odd types, a number of very many digits
        return _json(_text(value))


def _text(value: object) -> str:
    try:
        return repr(value) if isinstance(value, bytes | bytearray) else str(value)  # -bb refuses the text of bytes
    except Exception as trouble:
        return f"<{type(value).__name__}: its text cannot be made: {type(trouble).__name__}>"

"""Arguments of the facade: checked and brought into the form that engines take.

Every function raises UsageError if what it is given is wrong; nothing has changed then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import UsageError
from ..model import JobState, read_only
from ..units import duration_ms, quoted

MAX_ERROR_BYTES = 4096
MAX_HEADERS_BYTES = 64 * 1024
"""All names and values of a job together: they stay in memory while the job is looked at, and go into every copy."""
MAX_QUEUE_BYTES, MAX_KEY_BYTES = 255, 256


def checked_text(value: object, name: str, max_bytes: int) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}: a str expected, got {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{name}: {value!r} has a lone surrogate and cannot be UTF-8") from None
    if not 1 <= size <= max_bytes:
        raise UsageError(f"{name}: 1 to {max_bytes} bytes of UTF-8 expected, got {size}")
    return value


def checked_queues(queue: object) -> list[str]:
    if isinstance(queue, str):
        return [checked_text(queue, "queue", MAX_QUEUE_BYTES)]
    if not isinstance(queue, Sequence) or isinstance(queue, (bytes, bytearray, memoryview)):
        raise UsageError(f"queue: a str or a sequence of them expected, got {type(queue).__name__}")
    if not queue:
        raise UsageError("queue: at least one name expected, got none")
    return list(dict.fromkeys(checked_text(name, "queue", MAX_QUEUE_BYTES) for name in queue))


def checked_payloads(payloads: object, idempotency_keys: object) -> list[Any]:
    """The payloads of a batch; each is looked at when it is encoded."""
    if isinstance(payloads, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(payloads, Iterable):
        raise UsageError(f"payloads: a sequence of payloads expected, got {type(payloads).__name__}")
    if idempotency_keys is not None and (
        isinstance(idempotency_keys, (str, bytes)) or not isinstance(idempotency_keys, Sequence)
    ):
        raise UsageError(f"idempotency_keys: a sequence expected, got {type(idempotency_keys).__name__}")
    return list(payloads)


def checked_lease(lease: object) -> tuple[int, int]:
    try:
        job_id, token = lease.id, lease.token  # type: ignore[attr-defined]  # what has none is caught here
    except AttributeError:
        job_id = token = None
    if type(job_id) is not int or type(token) is not int:
        raise UsageError(f"lease: a Lease, or anything with int id and token, expected, got {type(lease).__name__}")
    return job_id, token


def checked_leases(leases: object) -> list[Any]:
    if isinstance(leases, (str, bytes, Mapping)) or not isinstance(leases, Iterable):
        raise UsageError(f"leases: a sequence of leases expected, got {type(leases).__name__}")
    return list(leases)


def checked_error(error: object) -> str | None:
    if error is None:
        return None
    if not isinstance(error, str):
        raise UsageError(f"error: a str expected, got {type(error).__name__}")
    # Exception texts may hold anything, file names with surrogates too: an answer must not fail for that.
    data = error.encode("utf-8", "backslashreplace")
    return data[:MAX_ERROR_BYTES].decode("utf-8", "ignore")


def checked_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name}: True or False expected, got {quoted(value)}")
    return value


def checked_state(state: object) -> JobState | None:
    if state is None:
        return None
    with suppress(ValueError):
        if isinstance(state, str):
            return JobState(state)
    raise UsageError(f"state: one of {', '.join(repr(s.value) for s in JobState)} expected, got {quoted(state)}")


def checked_headers(headers: object) -> Mapping[str, str]:
    if not isinstance(headers, Mapping):
        raise UsageError(f"headers: a mapping of str to str expected, got {type(headers).__name__}")
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise UsageError(f"headers: str to str expected, got {quoted(name)}: {quoted(value)}")
        size += len(name) + len(value) if name.isascii() and value.isascii() else _utf8_bytes(name) + _utf8_bytes(value)
    if size > MAX_HEADERS_BYTES:
        raise UsageError(
            f"headers: {size} bytes, {MAX_HEADERS_BYTES} in all is the most; put large things into the payload"
        )
    return read_only(headers)


def _utf8_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"headers: {quoted(text)} has a lone surrogate and cannot be UTF-8") from None


def checked_visibility(value: object) -> int:
    """Milliseconds, at least one: a lease that is lost when it is given is of no use."""
    visibility_ms = duration_ms(value, "visibility_timeout")
    if not visibility_ms:
        raise UsageError(f"visibility_timeout: more than 0 seconds expected, got {quoted(value)}")
    return visibility_ms


def checked_path(path: object) -> str:
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # what it is not made for is a TypeError, caught here
    except TypeError:
        raise UsageError(f"path: a str or os.PathLike expected, got {type(path).__name__}") from None
    if not text or "\0" in text:
        raise UsageError(f"path: a directory expected, got {quoted(text)}")
    return text


def encoded(payload: object) -> bytes:
    """Bytes of a payload: bytes-like as it is, anything else as JSON.

    No other buffers: the bytes of a numpy scalar, say, do not tell what they were.
    """
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        return _json(payload)
    try:
        return bytes(payload)
    except ValueError as error:  # a view that was released
        raise UsageError(f"payload: its bytes cannot be read ({error})") from error


def _json(payload: object) -> bytes:
    try:
        _check_keys(payload)
        return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"payload: JSON cannot say it ({error}); encode it yourself and enqueue bytes") from error


def _check_keys(value: object) -> None:
    """json.dumps would make "1" of 1, which comes back as another key."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"keys must be str, got {quoted(key)}")
            _check_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_keys(item)

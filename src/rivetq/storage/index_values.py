"""Jobs, runs and keys <-> the values of the index. The layouts are those of docs/file-format.md.

LMDB itself checks nothing, so a CRC over key and value comes first ("sealed"); a value that is not whole is a
`ValueError`.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from crc32c import crc32c

from ..machine.columns import Columns, Shelf
from ..machine.entry import Entry, Spec
from ..machine.events import QueueCopied
from ..machine.queue import DEAD, READY, SCHEDULED, Queue
from ..machine.run import Run
from ..model import NO_HEADERS, read_only
from .answers import config_from_json, config_to_json
from .fields import COUNT, NONSENSE, Reader, policy, spec_numbers, text_bytes

_ENTRY = struct.Struct("<IBBIQiqidddBQQQQIQIIIQiii")
_KEY_VALUE = struct.Struct("<QQI")
_QUEUE = struct.Struct("<IQQQQ")
CACHED_HEADERS = 4096
"""Characters: options with longer headers get an object of their own each, so that 1,024 of them cannot fill memory."""


def encode_entry(entry: Entry) -> bytes:
    """The index value of a job."""
    spec = entry.spec
    error = None if entry.last_error is None else entry.last_error.encode()
    headers = json.dumps(dict(spec.headers)).encode() if spec.headers else None
    key = None if entry.key is None else entry.key.encode()
    head = _ENTRY.pack(
        entry.queue.number,
        entry.state,
        spec.priority,
        entry.attempts,
        entry.token,
        *spec_numbers(spec.max_attempts, spec.visibility_ms, spec.retry),
        entry.enqueued_at_ms,
        entry.due_ms,
        entry.deadline_ms,
        entry.died_at_ms,
        entry.segment,
        entry.offset,
        entry.length,
        entry.crc,
        entry.size,
        entry.lsn,
        *(-1 if text is None else len(text) for text in (error, headers, key)),
    )
    return seal(entry.id.to_bytes(8, "big"), b"".join((head, error or b"", headers or b"", key or b"")))


def decode_entry(key: bytes, value: bytes, queues: Mapping[int, Any]) -> tuple[Entry, int]:
    """The job and its state. Raises ValueError if the value is not whole."""
    body = unseal(key, value)
    if len(body) < _ENTRY.size:
        raise ValueError(f"{len(body)} bytes are no job's value")
    number, state, priority, attempts, token, *rest = _ENTRY.unpack_from(body)
    enqueued_at_ms, due_ms, deadline_ms, died_at_ms, segment, offset, length, crc, size, lsn = rest[7:17]
    last_error = headers = text = None
    if rest[17:] != [-1, -1, -1]:
        reader = Reader(body)
        reader.at = _ENTRY.size
        last_error, headers, text = (None if n < 0 else reader.data(n).decode() for n in rest[17:])
    spec = _spec_of(priority, *rest[:7], headers)
    job_id = int.from_bytes(key, "big")
    entry = Entry(job_id, queues[number], spec, enqueued_at_ms, due_ms, text, segment, offset, length, crc, size, lsn)
    entry.attempts, entry.token, entry.deadline_ms, entry.died_at_ms = attempts, token, deadline_ms, died_at_ms
    entry.last_error = last_error
    return entry, state


def _spec_of(priority: int, *rest: Any) -> Spec:
    headers = rest[-1]
    if headers is not None and len(headers) > CACHED_HEADERS:
        return _spec.__wrapped__(priority, *rest)
    return _spec(priority, *rest)


@lru_cache(maxsize=1024)
def _spec(
    priority: int,
    max_attempts: int,
    visibility_ms: int,
    retry_attempts: int,
    base: float,
    factor: float,
    max_delay: float,
    jitter: int,
    headers: str | None,
) -> Spec:
    """Jobs with the same options share one object, as they did when they were enqueued."""
    return Spec(
        priority,
        max_attempts or None,
        policy(retry_attempts, base, factor, max_delay, jitter),
        None if visibility_ms < 0 else visibility_ms,
        read_only(json.loads(headers)) if headers else NO_HEADERS,
    )


# Runs: a head that an opening reads, then the columns, which are read when their turn comes. A column whose cells are
# all the same, and ids without a gap, take one cell.

_RUN = struct.Struct("<IBBIQQQQQQI")
_LIVE = struct.Struct("<IQ")
_SPEC = struct.Struct("<BiqidddBi")
_COLUMNS = ("ids", "times", "dues", "segments", "offsets", "lengths", "crcs", "sizes")
_FULL, _SAME, _RISING = range(3)
_KINDS = (READY, SCHEDULED, DEAD)


def encode_run(number: int, queue: Queue, priority: int, state: int, columns: Columns) -> bytes:
    """The index value of a run with these columns."""
    ids, dues = columns.ids, columns.dues
    live = columns.live()
    head = _RUN.pack(
        queue.number, priority, state, len(ids), dues[0], ids[0], dues[-1], ids[-1], min(ids), max(ids), len(live)
    ) + b"".join(_LIVE.pack(*item) for item in live.items())
    key = number.to_bytes(8, "big")
    head = seal(key, head)
    return b"".join((COUNT.pack(len(head)), head, seal(key, _encode_columns(columns))))


def _encode_columns(columns: Columns) -> bytes:
    n = len(columns)
    parts: list[bytes] = []
    for name in _COLUMNS:
        column = getattr(columns, name)
        if (
            name == "ids"
            and column[-1] - column[0] == n - 1
            and columns.ids == array("Q", range(column[0], column[0] + n))
        ):
            parts += [bytes((_RISING,)), _little(column[:1])]
        elif column[0] == column[-1] and column.count(column[0]) == n:
            parts += [bytes((_SAME,)), _little(column[:1])]
        else:
            parts += [bytes((_FULL,)), _little(column)]
    table: dict[int, int] = {}
    distinct: list[Spec] = []
    numbers = array("I")
    specs = columns.specs
    for spec in specs[:1] if specs.count(specs[0]) == n else specs:  # usually one for all
        if id(spec) not in table:
            table[id(spec)] = len(distinct)
            distinct.append(spec)
        numbers.append(table[id(spec)])
    parts.append(COUNT.pack(len(distinct)))
    for spec in distinct:
        headers = json.dumps(dict(spec.headers)).encode() if spec.headers else None
        values = spec_numbers(spec.max_attempts, spec.visibility_ms, spec.retry)
        parts.append(_SPEC.pack(spec.priority, *values, -1 if headers is None else len(headers)))
        parts.append(headers or b"")
    if len(distinct) > 1:
        parts.append(_little(numbers))
    parts.append(bytes((columns.keys is not None, columns.extras is not None)))
    if columns.keys is not None:
        parts += [text_bytes(key) for key in columns.keys]
    if columns.extras is not None:
        parts.append(COUNT.pack(len(columns.extras)))
        for job_id, (attempts, token, died_at_ms, error) in columns.extras.items():
            parts += [_EXTRA.pack(job_id, attempts, token, died_at_ms), text_bytes(error)]
    return b"".join(parts)


_EXTRA = struct.Struct("<QIQQ")


def _little(column: array[int]) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()


def decode_run(
    key: bytes, value: bytes | memoryview, queues: Mapping[int, Queue], shelf: Shelf
) -> tuple[Run, list[tuple[int, int]]]:
    """The run, its columns left where they are, and its bytes per segment. ValueError if it is not whole."""
    try:
        (size,) = COUNT.unpack_from(value)
        head = unseal(key, bytes(value[4 : 4 + size]))
        queue, priority, state, left, *rest = _RUN.unpack_from(head)
        head_due, head_id, last_due, last_id, low, high, live = rest
        by_due = state == SCHEDULED
        run = Run.shelved(
            queues[queue], priority, state, int.from_bytes(key, "big"), left,
            (head_due, head_id) if by_due else head_id, (last_due, last_id) if by_due else last_id, low, high, shelf,
        )  # fmt: skip
        found = [_LIVE.unpack_from(head, _RUN.size + i * _LIVE.size) for i in range(live)]
    except NONSENSE as error:
        raise ValueError(f"no run: {error!r}") from error
    if state not in _KINDS or not left:
        raise ValueError(f"no run: state {state}, {left} jobs")
    return run, [(segment, size) for segment, size in found]


def decode_columns(key: bytes, value: bytes) -> Columns:
    """The columns of a run's value. ValueError if they are not whole."""
    try:
        (size,) = COUNT.unpack_from(value)
        n = _RUN.unpack_from(unseal(key, value[4 : 4 + size]))[3]
        reader = Reader(unseal(key, value[4 + size :]))
        columns = Columns()
        for name in _COLUMNS:
            column = getattr(columns, name)
            form = reader.body[reader.skip(1)]
            column.frombytes(reader.data(column.itemsize * (n if form == _FULL else 1)))
            if sys.byteorder == "big":
                column.byteswap()
            if form == _SAME:
                column *= n
            elif form == _RISING:
                column.extend(range(column[0] + 1, column[0] + n))
            setattr(columns, name, column)
        columns.lsns = array("Q", (0,)) * n  # the index is never ahead of the disk
        distinct = []
        for _ in range(reader.take(COUNT)[0]):
            priority, *values, size = reader.take(_SPEC)
            headers = None if size < 0 else reader.data(size).decode()
            distinct.append(_spec_of(priority, *values, headers))
        if len(distinct) > 1:
            columns.specs = [distinct[i] for i in reader.column(f"<{n}I")]
        else:
            columns.specs = distinct * n
        has_keys, has_extras = reader.data(2)
        if has_keys:
            columns.keys = [reader.text() for _ in range(n)]
        if has_extras:
            columns.extras = {}
            for _ in range(reader.take(COUNT)[0]):
                job_id, attempts, token, died_at_ms = reader.take(_EXTRA)
                columns.extras[job_id] = (attempts, token, died_at_ms, reader.text())
    except NONSENSE as error:
        raise ValueError(f"no columns: {error!r}") from error
    return columns


def encode_key_value(key: bytes, job_id: int, expires_ms: int, segment: int) -> bytes:
    """The index value of an idempotency key that outlived its job."""
    return seal(key, _KEY_VALUE.pack(job_id, expires_ms, segment))


def decode_key_value(key: bytes, value: bytes) -> tuple[int, int, int]:
    """Job id, end of the window, segment. Raises ValueError if the value is not whole."""
    body = unseal(key, value)
    if len(body) != _KEY_VALUE.size:
        raise ValueError(f"{len(body)} bytes are no key's value")
    job_id, expires_ms, segment = _KEY_VALUE.unpack(body)
    return job_id, expires_ms, segment


def seal(key: bytes, value: bytes) -> bytes:
    """The value with a CRC32C over key and value in front."""
    return crc32c(value, crc32c(key)).to_bytes(4, "little") + value


def unseal(key: bytes, sealed: bytes) -> bytes:
    """The value of `seal`. Raises ValueError if a bit differs."""
    value = sealed[4:]
    if len(sealed) < 4 or int.from_bytes(sealed[:4], "little") != crc32c(value, crc32c(key)):
        raise ValueError(f"checksum of the index value of key {key.hex()} does not match")
    return value


def encode_queue(queue: QueueCopied, segment: int) -> tuple[bytes, bytes]:
    """Key and value of a queue that was written last in this segment."""
    key = queue.number.to_bytes(4, "big")
    totals = _QUEUE.pack(segment, queue.enqueued, queue.acked, queue.cancelled, queue.purged)
    return key, seal(key, totals + text_bytes(queue.name) + text_bytes(json.dumps(config_to_json(queue.config))))


def decode_queue(key: bytes, sealed: bytes) -> tuple[QueueCopied, int]:
    """The queue and the segment. Raises ValueError if it is not whole."""
    reader = Reader(unseal(key, sealed))
    try:
        segment, *totals = reader.take(_QUEUE)
        name, config = reader.text() or "", config_from_json(json.loads(reader.text() or ""))
        return QueueCopied(int.from_bytes(key, "big"), name, config, *totals), segment
    except NONSENSE as error:
        raise ValueError(f"queue {key.hex()} cannot be read: {error!r}") from error

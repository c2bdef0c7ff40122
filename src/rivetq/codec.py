"""Events <-> bytes, jobs <-> index values, snapshots <-> bytes. The layouts are those of docs/file-format.md.

All numbers are little-endian. What is read has passed a checksum first, so a decoding that fails here means a damaged
checksum or a newer writer; it raises `ValueError` and the caller turns that into `CorruptLogError`.

A batch enqueue is in columns (lengths, checksums, payloads joined): its cost per job is that of three array cells.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, assert_never

import attrs
from crc32c import crc32c

from .entry import DEAD, READY, SCHEDULED, Entry, Spec
from .events import (
    Acked,
    Buried,
    Cancelled,
    Copied,
    Enqueued,
    Event,
    Extended,
    IdsReserved,
    KeyCopied,
    Leased,
    Purged,
    QueueConfigured,
    QueueCreated,
    Redriven,
    Released,
    Retried,
    SegmentsDropped,
)
from .model import NO_HEADERS, QueueConfig, RateLimit, RetryPolicy, read_only
from .run import Columns, Run, Shelf
from .state import Queue, QueueSnapshot, Snapshot

_TIME = struct.Struct("<Q")
_ENQUEUED = struct.Struct("<BIQIBQiqidddBIB")
_JITTERS = ("full", "equal", "none")
_JITTER_NUMBERS = {name: number for number, name in enumerate(_JITTERS)}
_TAGS: dict[type, int] = {
    QueueCreated: 1,
    QueueConfigured: 2,
    Enqueued: 3,
    Leased: 4,
    Acked: 5,
    Retried: 6,
    Released: 7,
    Buried: 8,
    Extended: 9,
    Cancelled: 10,
    Purged: 11,
    Redriven: 12,
    IdsReserved: 13,
    Copied: 14,
    KeyCopied: 15,
    SegmentsDropped: 16,
}
_ID = struct.Struct("<BQ")
_ID_MOMENT = struct.Struct("<BQQ")
_RELEASED = struct.Struct("<BQQI")
_QUEUE = struct.Struct("<BI")
_QUEUE_ID = struct.Struct("<BIQ")
_COUNT = struct.Struct("<I")
_PLACE = struct.Struct("<IBI")
_LENGTH_CRC = struct.Struct("<II")
_COPIED = struct.Struct("<BQIBBIQiqidddBQQQQII")
_KEY_COPIED = struct.Struct("<BIQQ")
_ENTRY = struct.Struct("<IBBIQiqidddBQQQQIQIIIQiii")
_KEY_VALUE = struct.Struct("<QQI")


_NONSENSE = (struct.error, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What bytes that passed their checksum and mean nothing can raise on the way; callers see a ValueError."""


# Records


def encode_record(events: Sequence[Event], now_ms: int) -> bytes:
    """The body of one record. Sets `payload_at` and `crcs` of the events that carry payloads."""
    parts = [_TIME.pack(now_ms)]
    size = _TIME.size
    for event in events:
        new = _encode(event)
        parts += new
        size += sum(map(len, new))
        if type(event) is Enqueued or type(event) is Copied:
            event.payload_at = size - len(new[-1])  # the payloads are the last part of their event
    return b"".join(parts)


def _encode(event: Event) -> list[bytes]:
    tag = _TAGS[type(event)]
    match event:
        case Enqueued():
            return _encode_enqueued(event)
        case Leased():
            n = len(event.ids)
            columns = (*event.ids, *event.tokens, *event.deadlines_ms, *event.attempts)
            places = [number for place in event.places for number in place]
            return [
                bytes((tag,)),
                _COUNT.pack(n),
                struct.pack(f"<{3 * n}Q{n}I", *columns),
                bytes((len(event.places),)) if len(event.places) < 256 else b"\0",
                struct.pack("<" + "IBI" * len(event.places), *places) if len(event.places) < 256 else b"",
            ]
        case Acked(queue, ids) | Purged(queue, ids):
            return [_QUEUE.pack(tag, queue), _ids(ids)]
        case Retried():
            return [_ID_MOMENT.pack(tag, event.id, event.due_ms), _text(event.error)]
        case Released():
            return [_RELEASED.pack(tag, event.id, event.due_ms, event.attempts)]
        case Buried():
            return [_ID_MOMENT.pack(tag, event.id, event.died_at_ms), _text(event.error)]
        case Extended():
            return [_ID_MOMENT.pack(tag, event.id, event.deadline_ms)]
        case Cancelled():
            return [_QUEUE_ID.pack(tag, event.queue, event.id)]
        case Redriven():
            return [bytes((tag,)), _ids(event.ids)]
        case QueueCreated():
            return [_QUEUE.pack(tag, event.number), _text(event.name)]
        case QueueConfigured():
            return [_QUEUE.pack(tag, event.queue), _text(json.dumps(_config_to_json(event.config)))]
        case IdsReserved(number) | SegmentsDropped(number):
            return [_ID.pack(tag, number)]
        case Copied():
            return _encode_copied(event)
        case KeyCopied():
            return [_KEY_COPIED.pack(tag, event.queue, event.job_id, event.expires_ms), _text(event.key)]
        case _:
            assert_never(event)


def _encode_enqueued(event: Enqueued) -> list[bytes]:
    payloads = event.payloads
    n = len(payloads)
    headers = json.dumps(dict(event.headers)).encode() if event.headers else b""
    event.crcs = [crc32c(p) for p in payloads]
    parts = [
        _ENQUEUED.pack(
            3,
            event.queue,
            event.first_id,
            n,
            event.priority,
            event.due_ms,
            *_spec_numbers(event.max_attempts, event.visibility_ms, event.retry),
            len(headers),
            event.keys is not None,
        ),
        headers,
    ]
    if event.keys is not None:
        texts = [b"" if key is None else key.encode() for key in event.keys]
        parts += [struct.pack(f"<{n}H", *map(len, texts)), *texts]
    if n == 1:
        parts += [_LENGTH_CRC.pack(event.lengths[0], event.crcs[0]), payloads[0]]
    else:
        parts += [struct.pack(f"<{2 * n}I", *event.lengths, *event.crcs), b"".join(payloads)]
    return parts


def _spec_numbers(max_attempts: int | None, visibility_ms: int | None, retry: RetryPolicy) -> tuple[Any, ...]:
    """0 stands for "no end", -1 for "not set"."""
    return (
        max_attempts or 0,
        -1 if visibility_ms is None else visibility_ms,
        retry.max_attempts or 0,
        retry.base,
        retry.factor,
        retry.max_delay,
        _JITTER_NUMBERS[retry.jitter],
    )


@lru_cache(maxsize=1024)
def _retry(max_attempts: int, base: float, factor: float, max_delay: float, jitter: int) -> RetryPolicy:
    return RetryPolicy(
        max_attempts=max_attempts or None, base=base, factor=factor, max_delay=max_delay, jitter=_jitter(jitter)
    )


def _jitter(number: int) -> Any:
    return _JITTERS[number]


def _encode_copied(event: Copied) -> list[bytes]:
    head = _COPIED.pack(
        14,
        event.id,
        event.queue,
        event.state,
        event.priority,
        event.attempts,
        event.token,
        *_spec_numbers(event.max_attempts, event.visibility_ms, event.retry),
        event.enqueued_at_ms,
        event.due_ms,
        event.deadline_ms,
        event.died_at_ms,
        event.length,
        event.crc,
    )
    headers = json.dumps(dict(event.headers)) if event.headers else None
    return [head, _text(event.last_error), _text(headers), _text(event.key), event.payload]


def _text(text: str | None) -> bytes:
    if text is None:
        return b"\xff\xff\xff\xff"
    data = text.encode()
    return _COUNT.pack(len(data)) + data


def _ids(ids: Sequence[int]) -> bytes:
    return _COUNT.pack(len(ids)) + struct.pack(f"<{len(ids)}Q", *ids)


def decode_record(body: bytes) -> tuple[int, list[Event]]:
    """The moment and the events of one record. Payloads are not copied out: `payload_at` and `lengths` find them."""
    reader = _Reader(body)
    events: list[Event] = []
    try:
        (now_ms,) = reader.take(_TIME)
        while reader.at < len(body):
            events.append(_decode(reader))
    except _NONSENSE as error:
        raise ValueError(f"no event can be read at offset {reader.at} of the body: {error!r}") from error
    return now_ms, events


class _Reader:
    """A position in a body."""

    __slots__ = ("at", "body")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        values = layout.unpack_from(self.body, self.at)
        self.at += layout.size
        return values

    def column(self, layout: str) -> tuple[Any, ...]:
        return self.take(struct.Struct(layout))

    def ids(self) -> list[int]:
        (n,) = self.take(_COUNT)
        return list(self.column(f"<{n}Q"))

    def data(self, size: int) -> bytes:
        if self.at + size > len(self.body):
            raise IndexError(f"{size} bytes at {self.at} of {len(self.body)}")
        self.at += size
        return self.body[self.at - size : self.at]

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; returns where they begin."""
        if self.at + size > len(self.body):
            raise IndexError(f"{size} bytes at {self.at} of {len(self.body)}")
        self.at += size
        return self.at - size

    def text(self) -> str | None:
        (size,) = self.take(_COUNT)
        return None if size == 0xFFFFFFFF else self.data(size).decode()


def _decode(reader: _Reader) -> Event:
    tag = reader.body[reader.at]
    match tag:
        case 1:
            _, number = reader.take(_QUEUE)
            return QueueCreated(number, reader.text() or "")
        case 2:
            _, queue = reader.take(_QUEUE)
            return QueueConfigured(queue, _config_from_json(json.loads(reader.text() or "")))
        case 3:
            return _decode_enqueued(reader)
        case 4:
            reader.at += 1
            (n,) = reader.take(_COUNT)
            column = reader.column(f"<{3 * n}Q{n}I")
            known = reader.body[reader.skip(1)]
            places = [reader.take(_PLACE) for _ in range(known)]
            return Leased(column[:n], column[n : 2 * n], column[3 * n :], column[2 * n : 3 * n], places)
        case 5:
            return Acked(reader.take(_QUEUE)[1], reader.ids())
        case 6:
            _, job_id, due_ms = reader.take(_ID_MOMENT)
            return Retried(job_id, due_ms, reader.text())
        case 7:
            return Released(*reader.take(_RELEASED)[1:])
        case 8:
            _, job_id, died_at_ms = reader.take(_ID_MOMENT)
            return Buried(job_id, died_at_ms, reader.text())
        case 9:
            return Extended(*reader.take(_ID_MOMENT)[1:])
        case 10:
            return Cancelled(*reader.take(_QUEUE_ID)[1:])
        case 11:
            return Purged(reader.take(_QUEUE)[1], reader.ids())
        case 12:
            reader.at += 1
            return Redriven(reader.ids())
        case 13:
            return IdsReserved(reader.take(_ID)[1])
        case 14:
            return _decode_copied(reader)
        case 15:
            _, queue, job_id, expires_ms = reader.take(_KEY_COPIED)
            return KeyCopied(queue, reader.text() or "", job_id, expires_ms)
        case 16:
            return SegmentsDropped(reader.take(_ID)[1])
        case _:
            raise ValueError(f"unknown event {tag}")


def _decode_enqueued(reader: _Reader) -> Enqueued:
    values = reader.take(_ENQUEUED)
    _, queue, first_id, n, priority, due_ms, max_attempts, visibility_ms, *retry, header_size, has_keys = values
    headers = read_only(json.loads(reader.data(header_size))) if header_size else NO_HEADERS
    keys: list[str | None] | None = None
    if has_keys:
        keys = [reader.data(size).decode() if size else None for size in reader.column(f"<{n}H")]
    numbers = reader.column(f"<{2 * n}I")
    lengths, crcs = numbers[:n], numbers[n:]
    payload_at = reader.skip(sum(lengths))
    return Enqueued(
        queue,
        first_id,
        priority,
        due_ms,
        max_attempts or None,
        _retry(*retry),
        None if visibility_ms < 0 else visibility_ms,
        lengths,
        (),
        headers,
        keys,
        crcs,
        payload_at,
    )


def _decode_copied(reader: _Reader) -> Copied:
    _, job_id, queue, state, priority, attempts, token, max_attempts, visibility_ms, *rest = reader.take(_COPIED)
    enqueued_at_ms, due_ms, deadline_ms, died_at_ms, length, crc = rest[5:]
    last_error, headers, key = reader.text(), reader.text(), reader.text()
    return Copied(
        job_id,
        queue,
        state,
        priority,
        attempts,
        token,
        max_attempts or None,
        _retry(*rest[:5]),
        None if visibility_ms < 0 else visibility_ms,
        enqueued_at_ms,
        due_ms,
        deadline_ms,
        died_at_ms,
        last_error,
        read_only(json.loads(headers)) if headers else NO_HEADERS,
        key,
        length,
        crc,
        payload_at=reader.skip(length),
    )


# Snapshots: rare and small, so JSON, which a person can read in a hex dump


def encode_snapshot(snapshot: Snapshot) -> bytes:
    value = attrs.asdict(snapshot, recurse=False)
    value["queues"] = [
        {**attrs.asdict(queue, recurse=False), "config": _config_to_json(queue.config)} for queue in snapshot.queues
    ]
    return json.dumps(value, separators=(",", ":")).encode()


def decode_snapshot(data: bytes) -> Snapshot:
    """Raises ValueError if it is none."""
    try:
        value = json.loads(data)
        queues = [QueueSnapshot(**{**q, "config": _config_from_json(q["config"])}) for q in value.pop("queues")]
        return Snapshot(queues=queues, **value)
    except _NONSENSE as error:
        raise ValueError(f"no snapshot: {error!r}") from error


def _config_to_json(config: QueueConfig) -> dict[str, Any]:
    return attrs.asdict(config)


def _config_from_json(value: dict[str, Any]) -> QueueConfig:
    limit = value.pop("rate_limit")
    retry = RetryPolicy(**value.pop("retry"))
    return QueueConfig(retry=retry, rate_limit=None if limit is None else RateLimit(**limit), **value)


# Index values: the CRC over key and value comes first, since LMDB itself checks nothing


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
        *_spec_numbers(spec.max_attempts, spec.visibility_ms, spec.retry),
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
        reader = _Reader(body)
        reader.at = _ENTRY.size
        last_error, headers, text = (None if n < 0 else reader.data(n).decode() for n in rest[17:])
    spec = _spec(priority, *rest[:7], headers)
    entry = Entry(int.from_bytes(key, "big"), queues[number], spec, enqueued_at_ms, due_ms, text)
    entry.attempts, entry.token, entry.deadline_ms, entry.died_at_ms = attempts, token, deadline_ms, died_at_ms
    entry.last_error = last_error
    entry.lies(segment, offset, length, crc, size, lsn)
    return entry, state


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
        _retry(retry_attempts, base, factor, max_delay, jitter),
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
    return b"".join((_COUNT.pack(len(head)), head, seal(key, _encode_columns(columns))))


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
    parts.append(_COUNT.pack(len(distinct)))
    for spec in distinct:
        headers = json.dumps(dict(spec.headers)).encode() if spec.headers else None
        values = _spec_numbers(spec.max_attempts, spec.visibility_ms, spec.retry)
        parts.append(_SPEC.pack(spec.priority, *values, -1 if headers is None else len(headers)))
        parts.append(headers or b"")
    if len(distinct) > 1:
        parts.append(_little(numbers))
    parts.append(bytes((columns.keys is not None, columns.extras is not None)))
    if columns.keys is not None:
        parts += [_text(key) for key in columns.keys]
    if columns.extras is not None:
        parts.append(_COUNT.pack(len(columns.extras)))
        for job_id, (attempts, token, died_at_ms, error) in columns.extras.items():
            parts += [_EXTRA.pack(job_id, attempts, token, died_at_ms), _text(error)]
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
        (size,) = _COUNT.unpack_from(value)
        head = unseal(key, bytes(value[4 : 4 + size]))
        queue, priority, state, left, *rest = _RUN.unpack_from(head)
        head_due, head_id, last_due, last_id, low, high, live = rest
        by_due = state == SCHEDULED
        run = Run.shelved(
            queues[queue], priority, state, int.from_bytes(key, "big"), left,
            (head_due, head_id) if by_due else head_id, (last_due, last_id) if by_due else last_id, low, high, shelf,
        )  # fmt: skip
        found = [_LIVE.unpack_from(head, _RUN.size + i * _LIVE.size) for i in range(live)]
    except _NONSENSE as error:
        raise ValueError(f"no run: {error!r}") from error
    if state not in _KINDS or not left:
        raise ValueError(f"no run: state {state}, {left} jobs")
    return run, [(segment, size) for segment, size in found]


def decode_columns(key: bytes, value: bytes) -> Columns:
    """The columns of a run's value. ValueError if they are not whole."""
    try:
        (size,) = _COUNT.unpack_from(value)
        n = _RUN.unpack_from(unseal(key, value[4 : 4 + size]))[3]
        reader = _Reader(unseal(key, value[4 + size :]))
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
        for _ in range(reader.take(_COUNT)[0]):
            priority, *values, size = reader.take(_SPEC)
            headers = None if size < 0 else reader.data(size).decode()
            distinct.append(_spec(priority, *values, headers))
        if len(distinct) > 1:
            columns.specs = [distinct[i] for i in reader.column(f"<{n}I")]
        else:
            columns.specs = distinct * n
        has_keys, has_extras = reader.data(2)
        if has_keys:
            columns.keys = [reader.text() for _ in range(n)]
        if has_extras:
            columns.extras = {}
            for _ in range(reader.take(_COUNT)[0]):
                job_id, attempts, token, died_at_ms = reader.take(_EXTRA)
                columns.extras[job_id] = (attempts, token, died_at_ms, reader.text())
    except _NONSENSE as error:
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

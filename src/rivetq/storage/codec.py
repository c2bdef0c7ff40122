"""Events <-> bytes, snapshots <-> bytes. The layouts are those of docs/file-format.md; index values are in `values`.

All numbers are little-endian. What is read has passed a checksum first. An event or a flag that is not known was
written by a newer RivetQ: `FormatError`. Any other decoding that fails means damage with a right checksum: it raises
`ValueError`, and the caller turns that into `CorruptLogError`.

A batch enqueue is in columns (lengths, checksums, payloads joined): its cost per job is that of three array cells.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import assert_never

import attrs
from crc32c import crc32c

from ..errors import FormatError
from ..machine.events import (
    Acked,
    Buried,
    Called,
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
    QueueCopied,
    QueueCreated,
    QueueRemoved,
    Redriven,
    Released,
    Retried,
    SegmentsDropped,
    SessionEnded,
)
from ..machine.snapshot import Session, Snapshot
from ..model import NO_HEADERS, read_only
from .answers import answer_from_json, answer_to_json, config_from_json, config_to_json
from .fields import COUNT, NONSENSE, Reader, policy, spec_bytes, spec_numbers, text_bytes
from .header import VERSION

_TIME = struct.Struct("<Q")
_ENQUEUED = struct.Struct("<BIQIBQiqidddBIH")
_ENQUEUED_START, _ENQUEUED_END, _ENQUEUED_ONE = struct.Struct("<BIQIBQ"), struct.Struct("<IH"), struct.Struct("<IHII")
"""The same in writing: in between are the bytes of its spec."""
KEYS = 1
"""The flag of an Enqueued with keys. docs/file-format.md names those that are kept for what is to come."""
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
    QueueRemoved: 17,
    QueueCopied: 18,
    Called: 19,
    SessionEnded: 20,
}
_ID = struct.Struct("<BQ")
_ID_MOMENT = struct.Struct("<BQQ")
_RELEASED = struct.Struct("<BQQI")
_QUEUE = struct.Struct("<BI")
_QUEUE_ID = struct.Struct("<BIQ")
_PLACE = struct.Struct("<IBI")
_COPIED = struct.Struct("<BQIHBBIQiqidddBQQQQII")
_KEY_COPIED = struct.Struct("<BIQQ")
_ACKED = struct.Struct("<BIQ")
_QUEUE_COPIED = struct.Struct("<BIQQQQ")
_CALLED = struct.Struct("<BQQQ")


# Records


def encode_record(events: Sequence[Event], now_ms: int) -> bytes:
    """The body of one record. Sets `payload_at` and `crcs` of the events that carry payloads."""
    parts = [_TIME.pack(now_ms)]
    size = counted = 0  # bytes of the first parts, and how many these are
    for event in events:
        parts += _encode(event)
        if type(event) is Enqueued or type(event) is Copied:
            size += sum(map(len, parts[counted:]))
            counted = len(parts)
            event.payload_at = size - len(parts[-1])  # the payloads are the last part of their event
    return b"".join(parts)


def _encode(event: Event) -> list[bytes]:
    tag = _TAGS[type(event)]
    match event:
        case Enqueued():
            return _encode_enqueued(event)
        case Leased(ids, tokens, attempts, deadlines_ms, places):
            n = len(ids)
            columns = struct.pack(f"<BI{3 * n}Q{n}I", tag, n, *ids, *tokens, *deadlines_ms, *attempts)
            if len(places) > 255:  # who reads it finds the jobs without
                return [columns, b"\0"]
            return [columns, bytes((len(places),)), *[_PLACE.pack(*place) for place in places]]
        case Acked(queue, ids, keys_until_ms):
            return [struct.pack(f"<BIQI{len(ids)}Q", tag, queue, keys_until_ms, len(ids), *ids)]
        case Purged(queue, ids) | Redriven(queue, ids):
            return [struct.pack(f"<BII{len(ids)}Q", tag, queue, len(ids), *ids)]
        case Retried():
            return [_ID_MOMENT.pack(tag, event.id, event.due_ms), text_bytes(event.error)]
        case Released():
            return [_RELEASED.pack(tag, event.id, event.due_ms, event.attempts)]
        case Buried():
            return [_ID_MOMENT.pack(tag, event.id, event.died_at_ms), text_bytes(event.error)]
        case Extended():
            return [_ID_MOMENT.pack(tag, event.id, event.deadline_ms)]
        case Cancelled():
            return [_QUEUE_ID.pack(tag, event.queue, event.id)]
        case QueueCreated():
            return [_QUEUE.pack(tag, event.number), text_bytes(event.name)]
        case QueueConfigured():
            return [_QUEUE.pack(tag, event.queue), text_bytes(json.dumps(config_to_json(event.config)))]
        case IdsReserved(number) | SegmentsDropped(number):
            return [_ID.pack(tag, number)]
        case QueueRemoved(number):
            return [_QUEUE.pack(tag, number)]
        case Copied():
            return _encode_copied(event)
        case KeyCopied():
            return [_KEY_COPIED.pack(tag, event.queue, event.job_id, event.expires_ms), text_bytes(event.key)]
        case QueueCopied():
            totals = event.enqueued, event.acked, event.cancelled, event.purged
            texts = text_bytes(event.name), text_bytes(json.dumps(config_to_json(event.config)))
            return [_QUEUE_COPIED.pack(tag, event.number, *totals), *texts]
        case Called(session, number, done_below, answer):
            text = json.dumps(answer_to_json(answer), separators=(",", ":"))
            return [_CALLED.pack(tag, session, number, done_below), text_bytes(text)]
        case SessionEnded(session):
            return [_ID.pack(tag, session)]
        case _:
            assert_never(event)


def _encode_enqueued(event: Enqueued) -> list[bytes]:
    payloads = event.payloads
    n = len(payloads)
    headers = json.dumps(dict(event.headers)).encode() if event.headers else b""
    event.crcs = crcs = [crc32c(p) for p in payloads]
    flags = 0 if event.keys is None else KEYS
    spec = spec_bytes(event.max_attempts, event.visibility_ms, event.retry)
    start = _ENQUEUED_START.pack(3, event.queue, event.first_id, n, event.priority, event.due_ms)
    if n == 1 and not headers and not flags:
        return [start, spec, _ENQUEUED_ONE.pack(0, 0, len(payloads[0]), crcs[0]), payloads[0]]
    parts = [start, spec, _ENQUEUED_END.pack(len(headers), flags), headers]
    if event.keys is not None:
        texts = [b"" if key is None else key.encode() for key in event.keys]
        parts += [struct.pack(f"<{n}H", *map(len, texts)), *texts]
    return [*parts, struct.pack(f"<{2 * n}I", *event.lengths, *crcs), b"".join(payloads)]


def _encode_copied(event: Copied) -> list[bytes]:
    head = _COPIED.pack(
        14,
        event.id,
        event.queue,
        0,
        event.state,
        event.priority,
        event.attempts,
        event.token,
        *spec_numbers(event.max_attempts, event.visibility_ms, event.retry),
        event.enqueued_at_ms,
        event.due_ms,
        event.deadline_ms,
        event.died_at_ms,
        event.length,
        event.crc,
    )
    headers = json.dumps(dict(event.headers)) if event.headers else None
    return [head, text_bytes(event.last_error), text_bytes(headers), text_bytes(event.key), event.payload]


def decode_record(body: bytes) -> tuple[int, list[Event]]:
    """The moment and the events of one record. Payloads are not copied out: `payload_at` and `lengths` find them.

    Raises ValueError for what makes no sense, FormatError for what a newer RivetQ wrote.
    """
    reader = Reader(body)
    events: list[Event] = []
    try:
        (now_ms,) = reader.take(_TIME)
        while reader.at < len(body):
            events.append(_decode(reader))
    except NONSENSE as error:
        raise ValueError(f"no event can be read at offset {reader.at} of the body: {error!r}") from error
    return now_ms, events


def _decode(reader: Reader) -> Event:
    tag = reader.body[reader.at]
    match tag:
        case 1:
            _, number = reader.take(_QUEUE)
            return QueueCreated(number, reader.text() or "")
        case 2:
            _, queue = reader.take(_QUEUE)
            return QueueConfigured(queue, config_from_json(json.loads(reader.text() or "")))
        case 3:
            return _decode_enqueued(reader)
        case 4:
            reader.at += 1
            (n,) = reader.take(COUNT)
            column = reader.column(f"<{3 * n}Q{n}I")
            known = reader.body[reader.skip(1)]
            places = [reader.take(_PLACE) for _ in range(known)]
            return Leased(column[:n], column[n : 2 * n], column[3 * n :], column[2 * n : 3 * n], places)
        case 5:
            _, queue, keys_until_ms = reader.take(_ACKED)
            return Acked(queue, reader.ids(), keys_until_ms)
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
            return Redriven(reader.take(_QUEUE)[1], reader.ids())
        case 13:
            return IdsReserved(reader.take(_ID)[1])
        case 14:
            return _decode_copied(reader)
        case 15:
            _, queue, job_id, expires_ms = reader.take(_KEY_COPIED)
            return KeyCopied(queue, reader.text() or "", job_id, expires_ms)
        case 16:
            return SegmentsDropped(reader.take(_ID)[1])
        case 17:
            return QueueRemoved(reader.take(_QUEUE)[1])
        case 18:
            _, number, *totals = reader.take(_QUEUE_COPIED)
            return QueueCopied(number, reader.text() or "", config_from_json(json.loads(reader.text() or "")), *totals)
        case 19:
            _, session, number, done_below = reader.take(_CALLED)
            return Called(session, number, done_below, answer_from_json(json.loads(reader.text() or "")))
        case 20:
            return SessionEnded(reader.take(_ID)[1])
        case _:
            raise _unknown(f"event {tag}")


def _unknown(what: str) -> FormatError:
    return FormatError(
        f"{what} is unknown in format version {VERSION}: a newer RivetQ wrote it; open the directory with that one"
    )


def _decode_enqueued(reader: Reader) -> Enqueued:
    values = reader.take(_ENQUEUED)
    _, queue, first_id, n, priority, due_ms, max_attempts, visibility_ms, *retry, header_size, flags = values
    if flags & ~KEYS:
        raise _unknown(f"flag {flags & ~KEYS:#x} of an enqueue")
    headers = read_only(json.loads(reader.data(header_size))) if header_size else NO_HEADERS
    keys: list[str | None] | None = None
    if flags & KEYS:
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
        policy(*retry),
        None if visibility_ms < 0 else visibility_ms,
        lengths,
        (),
        headers,
        keys,
        crcs,
        payload_at,
    )


def _decode_copied(reader: Reader) -> Copied:
    _, job_id, queue, flags, state, priority, attempts, token, max_attempts, visibility_ms, *rest = reader.take(_COPIED)
    if flags:
        raise _unknown(f"flag {flags:#x} of a copied job")
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
        policy(*rest[:5]),
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
    value["sessions"] = [
        [session.id, session.done_below, [[n, answer_to_json(answer)] for n, answer in session.answers.items()]]
        for session in snapshot.sessions
    ]
    return json.dumps(value, separators=(",", ":")).encode()


def decode_snapshot(data: bytes) -> Snapshot:
    """Raises ValueError if it is none."""
    try:
        value = json.loads(data)
        value["sessions"] = [
            Session(number, done_below, {n: answer_from_json(answer) for n, answer in answers})
            for number, done_below, answers in value["sessions"]
        ]
        return Snapshot(**value)
    except NONSENSE as error:
        raise ValueError(f"no snapshot: {error!r}") from error

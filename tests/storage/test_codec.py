"""Events and index values to bytes and back; what is damaged is a ValueError and nothing else."""

from __future__ import annotations

import json
import random
import struct
import sys
from array import array
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from crc32c import crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rivetq.engine import Deadline, Lost
from rivetq.errors import FormatError
from rivetq.machine.columns import Columns
from rivetq.machine.entry import Entry, Spec
from rivetq.machine.events import (
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
    Took,
)
from rivetq.machine.queue import DEAD, LEASED, READY, SCHEDULED, Queue
from rivetq.machine.run import Run
from rivetq.machine.snapshot import Session, Snapshot
from rivetq.model import NO_HEADERS, JobId, QueueConfig, RateLimit, RetryPolicy, read_only
from rivetq.storage.codec import decode_record, decode_snapshot, encode_record, encode_snapshot
from rivetq.storage.index_values import (
    decode_columns,
    decode_entry,
    decode_key_value,
    decode_run,
    encode_entry,
    encode_key_value,
    encode_run,
    seal,
    unseal,
)

NOW = 1_772_366_400_000

# What an event can hold

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
count = st.integers(1, 4)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
errors = st.none() | texts
seconds = st.floats(0, 3e9)
policies = st.builds(
    RetryPolicy,
    max_attempts=st.none() | st.integers(1, 2**31 - 1),
    base=seconds,
    factor=st.floats(1, 1e15),
    max_delay=seconds,
    jitter=st.sampled_from(["full", "equal", "none"]),
)
limits = st.builds(RateLimit, st.floats(1e-9, 1e15), st.integers(1, 2**53), on=st.sampled_from(["lease", "enqueue"]))
configs = st.builds(
    QueueConfig,
    retry=policies,
    rate_limit=st.none() | limits,
    visibility_timeout=seconds,
    max_jobs=st.none() | u32,
    idempotency_ttl=seconds,
    paused=st.booleans(),
)
headers = st.dictionaries(texts, texts, max_size=3).map(read_only)
maxima = st.none() | st.integers(1, 2**31 - 1)
visibilities = st.none() | st.integers(0, 2**62)
key_texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)


@st.composite
def enqueueds(draw: st.DrawFn) -> Enqueued:
    payloads = draw(st.lists(st.binary(max_size=30), min_size=1, max_size=4))
    n = len(payloads)
    return Enqueued(
        draw(u32), draw(u64), draw(st.integers(0, 9)), draw(u64), draw(maxima), draw(policies), draw(visibilities),
        [len(p) for p in payloads], payloads, draw(headers),
        draw(st.none() | st.lists(st.none() | key_texts, min_size=n, max_size=n)),
    )  # fmt: skip


@st.composite
def leaseds(draw: st.DrawFn) -> Leased:
    n = draw(count)
    ids, tokens, attempts, deadlines = (draw(st.lists(kind, min_size=n, max_size=n)) for kind in (u64, u64, u32, u64))
    return Leased(ids, tokens, attempts, deadlines, draw(st.lists(st.tuples(u32, st.integers(0, 9), u32), max_size=3)))


@st.composite
def copieds(draw: st.DrawFn) -> Copied:
    payload = draw(st.binary(max_size=30))
    return Copied(
        draw(u64), draw(u32), draw(st.integers(0, 3)), draw(st.integers(0, 9)), draw(u32), draw(u64), draw(maxima),
        draw(policies), draw(visibilities), draw(u64), draw(u64), draw(u64), draw(u64), draw(errors), draw(headers),
        draw(st.none() | key_texts), len(payload), crc32c(payload), payload,
    )  # fmt: skip


ids = st.lists(u64, max_size=5)
ranges = st.builds(lambda first, n: list(range(first, first + n)), u64, count)
job_ids = st.lists(st.builds(JobId, u64, created=st.booleans()), min_size=1, max_size=3)
parts = st.one_of(st.none(), ids, ranges, job_ids, st.builds(Deadline, u64, st.just(0)), st.builds(Lost, u64, texts))
answers = st.one_of(
    st.none(),
    st.booleans(),
    u64,
    configs,
    st.builds(Took, ids, ids),
    st.lists(parts.filter(lambda part: part != [])),
)
EVENTS: dict[type, st.SearchStrategy[Event]] = {
    QueueCreated: st.builds(QueueCreated, u32, texts),
    QueueConfigured: st.builds(QueueConfigured, u32, configs),
    Enqueued: enqueueds(),
    Leased: leaseds(),
    Acked: st.builds(Acked, u32, ids, u64),
    Retried: st.builds(Retried, u64, u64, errors),
    Released: st.builds(Released, u64, u64, u32),
    Buried: st.builds(Buried, u64, u64, errors),
    Extended: st.builds(Extended, u64, u64),
    Cancelled: st.builds(Cancelled, u32, u64),
    Purged: st.builds(Purged, u32, ids),
    Redriven: st.builds(Redriven, u32, ids),
    IdsReserved: st.builds(IdsReserved, u64),
    Copied: copieds(),
    KeyCopied: st.builds(KeyCopied, u32, key_texts, u64, u64),
    SegmentsDropped: st.builds(SegmentsDropped, u64),
    QueueRemoved: st.builds(QueueRemoved, u32),
    QueueCopied: st.builds(QueueCopied, u32, texts, configs, u64, u64, u64, u64),
    Called: st.builds(Called, u64, u64, u64, answers),
    SessionEnded: st.builds(SessionEnded, u64),
}
events = st.one_of(*EVENTS.values())


def same(found: Event, wrote: Event, body: bytes) -> None:
    """All facts are the same; of payloads there is the place instead of the bytes."""
    assert type(found) is type(wrote)
    plain = []
    for event in (found, wrote):
        facts = {f.name: getattr(event, f.name) for f in attrs.fields(type(event))}
        facts.pop("payload", None), facts.pop("payloads", None)
        plain.append({name: list(v) if isinstance(v, tuple) else v for name, v in facts.items()})
    assert plain[0] == plain[1]
    if isinstance(wrote, QueueConfigured) and isinstance(found, QueueConfigured):
        assert found.config.paused is wrote.config.paused
    if isinstance(wrote, Copied) and isinstance(found, Copied):
        assert body[found.payload_at : found.payload_at + found.length] == wrote.payload
        assert found.payload == b""
    if isinstance(wrote, Enqueued) and isinstance(found, Enqueued):
        at = found.payload_at
        for payload, length, crc in zip(wrote.payloads, found.lengths, found.crcs, strict=True):
            assert body[at : at + length] == payload
            assert crc == crc32c(payload)
            at += length
        assert found.payloads == ()


# Records


def test_every_kind_of_event_is_covered_here() -> None:
    assert set(EVENTS) == set(Event.__args__)


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_an_event_comes_back_as_it_was(kind: type) -> None:
    @settings(max_examples=30, deadline=None)
    @given(EVENTS[kind], u64)
    def check(event: Event, now_ms: int) -> None:
        body = encode_record([event], now_ms)
        found_ms, (found,) = decode_record(body)
        assert found_ms == now_ms
        same(found, event, body)

    check()


@settings(max_examples=100, deadline=None)
@given(st.lists(events, max_size=6))
def test_a_record_keeps_any_events_in_their_order(wrote: list[Event]) -> None:
    body = encode_record(wrote, NOW)
    now_ms, found = decode_record(body)
    assert now_ms == NOW
    assert len(found) == len(wrote)
    for one, other in zip(found, wrote, strict=True):
        same(one, other, body)


def test_what_is_not_set_is_told_from_zero() -> None:
    for visibility_ms in (None, 0):
        for key in (None, "k"):
            event = Enqueued(
                1, 1, 0, 0, None, RetryPolicy(max_attempts=None), visibility_ms, [0], [b""], NO_HEADERS, [key]
            )
            (found,) = decode_record(encode_record([event], NOW))[1]
            assert isinstance(found, Enqueued)
            assert (found.visibility_ms, found.max_attempts, found.retry.max_attempts) == (visibility_ms, None, None)
            assert found.keys == [key]
    for error in (None, ""):
        assert decode_record(encode_record([Buried(1, 2, error)], 0))[1] == [Buried(1, 2, error)]


def test_a_batch_of_no_keys_is_told_from_one_with_keys() -> None:
    for keys in (None, [None, None]):
        event = Enqueued(1, 1, 5, 0, 5, RetryPolicy(), None, [1, 1], [b"a", b"b"], NO_HEADERS, keys)
        (found,) = decode_record(encode_record([event], NOW))[1]
        assert isinstance(found, Enqueued)
        assert found.keys == keys


@pytest.mark.parametrize(("n", "kept"), [(0, 0), (1, 1), (255, 255), (256, 0), (300, 0)])
def test_places_of_leased_jobs_are_left_out_where_a_byte_cannot_count_them(n: int, kept: int) -> None:
    places = [(i, i % 10, 1) for i in range(n)]
    many = range(1, n + 2)
    body = encode_record([Leased(many, many, many, many, places), Acked(1, [2])], NOW)
    leased, acked = decode_record(body)[1]
    assert isinstance(leased, Leased)
    assert [list(leased.ids), list(leased.tokens), list(leased.attempts), list(leased.deadlines_ms)] == [[*many]] * 4
    assert list(leased.places) == places[:kept]
    assert acked == Acked(1, [2])


def test_payloads_are_written_once_and_found_by_their_offset() -> None:
    payloads = [b"first-payload", b"", b"third-payload"]
    event = Enqueued(1, 1, 5, 0, 5, RetryPolicy(), None, [len(p) for p in payloads], payloads)
    body = encode_record([Acked(1, [1, 2]), event, Redriven(1, [9])], NOW)
    assert body.count(b"first-payload") == body.count(b"third-payload") == 1
    assert body[event.payload_at :].startswith(b"first-paylo" + b"adthird-payload")
    assert list(event.crcs) == [crc32c(p) for p in payloads]


def test_a_batch_costs_eight_bytes_a_job_besides_its_payloads() -> None:
    def size(n: int) -> int:
        return len(encode_record([Enqueued(1, 1, 5, 0, 5, RetryPolicy(), None, [3] * n, [b"abc"] * n)], NOW))

    assert size(1001) - size(2) == 999 * (8 + 3)


def test_headers_that_are_read_back_are_read_only_and_absent_ones_are_shared() -> None:
    for given_headers in ({"h": "ü"}, {}):
        event = Enqueued(1, 1, 5, 0, 5, RetryPolicy(), None, [1], [b"a"], given_headers)
        (found,) = decode_record(encode_record([event], NOW))[1]
        assert isinstance(found, Enqueued)
        assert found.headers == given_headers
        with pytest.raises(TypeError):
            found.headers["x"] = "y"  # type: ignore[index]  # wrong on purpose
        assert given_headers or found.headers is NO_HEADERS


def test_policies_that_are_read_back_are_shared() -> None:
    event = Enqueued(1, 1, 5, 0, 5, RetryPolicy(base=3), None, [1], [b"a"])
    first, second = (decode_record(encode_record([event], NOW))[1][0] for _ in range(2))
    assert isinstance(first, Enqueued)
    assert isinstance(second, Enqueued)
    assert first.retry is second.retry


# Damage


SAMPLES: list[Event] = [
    QueueCreated(1, "büro"),
    QueueConfigured(1, QueueConfig(rate_limit=RateLimit(1.5, 3), max_jobs=5)),
    Enqueued(1, 1, 5, 7, 5, RetryPolicy(), None, [3, 2], [b"abc", b"de"], {"h": "1"}, ["k", None]),
    Enqueued(1, 3, 5, 0, None, RetryPolicy(jitter="none"), 30, [1], [b"z"]),
    Leased([1, 2], [3, 4], [5, 6], [7, 8]),
    Leased([1, 2, 3], [3, 4, 5], [5, 6, 7], [7, 8, 9], [(1, 5, 1), (2, 9, 2)]),
    Acked(1, [1, 2]),
    Retried(1, 2, "boom"),
    Released(1, 2, 3),
    Buried(1, 2, None),
    Extended(1, 2),
    Cancelled(1, 2),
    Purged(1, [3]),
    Redriven(1, [1]),
    IdsReserved(9),
    Copied(1, 1, 2, 5, 1, 9, None, RetryPolicy(), None, 1, 2, 3, 4, "e", {"h": "1"}, "k", 3, crc32c(b"abc"), b"abc"),
    KeyCopied(1, "k", 1, 2),
    SegmentsDropped(3),
    QueueRemoved(3),
    QueueCopied(1, "büro", QueueConfig(rate_limit=RateLimit(1.5, 3), max_jobs=5), 4, 3, 2, 1),
    Called(1, 2, 1, [[JobId(1, created=True)], Deadline(5, 0), Lost(6, "gone"), None]),
    SessionEnded(1),
]
each_sample = pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)


def read_or_value_error(body: bytes) -> bool:
    """Whether a body could be read; anything but a ValueError, or the word of a newer RivetQ, goes through."""
    try:
        decode_record(body)
    except (ValueError, FormatError):
        return False
    return True


@each_sample
def test_a_record_that_ends_too_early_is_a_value_error(event: Event) -> None:
    body = encode_record([event], NOW)
    for size in range(9, len(body)):
        with pytest.raises(ValueError):
            decode_record(body[:size])


@pytest.mark.parametrize("size", range(8))
def test_a_record_without_its_moment_is_a_value_error(size: int) -> None:
    with pytest.raises(ValueError):
        decode_record(bytes(size))


@each_sample
def test_a_flipped_bit_in_a_record_is_at_worst_a_value_error(event: Event) -> None:
    body = encode_record([event], NOW)
    for at in range(len(body) * 8):
        flipped = bytearray(body)
        flipped[at // 8] ^= 1 << at % 8
        read_or_value_error(bytes(flipped))


@each_sample
def test_a_byte_of_any_value_in_a_record_is_at_worst_a_value_error(event: Event) -> None:
    body = encode_record([event], NOW)
    rng = random.Random(1)
    for at in range(len(body)):
        for value in (0, 255, rng.randrange(256)):
            read_or_value_error(body[:at] + bytes([value]) + body[at + 1 :])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 20), st.binary(max_size=120))
def test_any_bytes_at_all_are_at_worst_a_value_error(tag: int, body: bytes) -> None:
    read_or_value_error(bytes(8) + bytes([tag]) + body)


@pytest.mark.parametrize("tag", [0, 21, 255])
def test_an_event_of_a_newer_format_is_named(tag: int) -> None:
    with pytest.raises(FormatError, match=f"event {tag} is unknown in format version 2"):
        decode_record(bytes(8) + bytes([tag]))


@pytest.mark.parametrize("bit", range(16))
def test_a_flag_of_a_newer_format_is_named(bit: int) -> None:
    """Of an enqueue the lowest is known: it has keys."""
    flags = (1 << bit).to_bytes(2, "little")
    job = Enqueued(1, 1, 5, 7, 5, RetryPolicy(), None, [3], [b"abc"])
    body = bytearray(encode_record([job], NOW))
    at = len(body) - 3 - 8 - 2  # before the payload, its length and checksum
    assert body[at : at + 2] == bytes(2)
    body[at : at + 2] = flags
    if bit:
        with pytest.raises(FormatError, match=f"flag {1 << bit:#x} of an enqueue is unknown"):
            decode_record(bytes(body))
    (sample,) = (event for event in SAMPLES if isinstance(event, Copied))
    body = bytearray(encode_record([sample], NOW))
    assert body[8 + 1 + 12 : 8 + 1 + 14] == bytes(2)
    body[8 + 1 + 12 : 8 + 1 + 14] = flags
    with pytest.raises(FormatError, match=f"flag {1 << bit:#x} of a copied job is unknown"):
        decode_record(bytes(body))


def test_a_count_that_no_body_could_hold_is_a_value_error() -> None:
    for tag in (4, 5, 11, 12):
        head = bytes([tag]) + (b"\1\0\0\0" if tag in (5, 11) else b"")
        with pytest.raises(ValueError, match="no event can be read at offset"):
            decode_record(bytes(8) + head + b"\xff" * 40)


CONFIG_VALUES = [
    b"3", b"[]", b"null", b'"x"', b"{}", b"{", b"", b"\xff", b'{"rate_limit": null}', b'{"rate_limit": 3, "retry": {}}',
    b'{"rate_limit": null, "retry": 3}', b'{"rate_limit": null, "retry": {}, "newer": 1}', b"[" * 100_000,
    b'{"rate_limit": {"per_second": 0, "burst": 1}, "retry": {}}', b'{"rate_limit": null, "retry": {"base": -1}}',
]  # fmt: skip


@pytest.mark.parametrize("text", CONFIG_VALUES, ids=lambda text: repr(text[:60]))
def test_a_configuration_that_is_none_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        decode_record(bytes(8) + struct.pack("<BII", 2, 1, len(text)) + text)


@pytest.mark.parametrize(
    "text", [b"3", b"[1]", b"true", b'"x"', b"{", b"\xff", b"[" * 100_000], ids=lambda t: repr(t[:9])
)
def test_headers_that_are_none_are_a_value_error(text: bytes) -> None:
    event = Enqueued(1, 1, 5, 0, 5, RetryPolicy(), None, [1], [b"a"], {"h": "x" * (len(text) - 9)})
    if len(text) < 10:
        event.headers = {"h": "x" * 10}
    body = encode_record([event], NOW)
    old = json.dumps(dict(event.headers)).encode()
    assert body.count(old) == 1
    with pytest.raises(ValueError):
        decode_record(body.replace(old, text.ljust(len(old)) if len(text) < len(old) else text[: len(old)]))


# Snapshots


sessions = st.builds(Session, u64, u64, st.dictionaries(u64, answers, max_size=2))
snapshots = st.builds(Snapshot, u64, u64, u64, u64, st.lists(sessions, max_size=3))


@settings(max_examples=60, deadline=None)
@given(snapshots)
@example(Snapshot(1, 1, 1, 0, []))
def test_a_snapshot_comes_back_as_it_was(snapshot: Snapshot) -> None:
    found = decode_snapshot(encode_snapshot(snapshot))
    assert found == snapshot


def test_a_snapshot_can_be_read_by_a_person() -> None:
    data = encode_snapshot(Snapshot(7, 8, 1, NOW, [Session(5, 3, {4: True, 3: [[1, 2, 3]]})]))
    value = json.loads(data)
    assert (value["next_id"], value["reserved_id"], value["oldest_segment"], value["now_ms"]) == (7, 8, 1, NOW)
    assert value["sessions"] == [[5, 3, [[4, True], [3, [{"from": 1, "n": 3}]]]]]


GOOD = encode_snapshot(Snapshot(1, 1, 1, 0, [Session(5, 3, {3: [QueueConfig()]})]))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff\xff", b"3", b"null", b"[]", b'"x"', b"{}", b'{"sessions": 3}', b'{"sessions": []}',
        b'{"sessions": [3]}', b'{"sessions": [[]]}', b'{"sessions": [[1, 2]]}', b'{"sessions": [[1, 2, [3]]]}',
        GOOD[:-1], GOOD.replace(b'"next_id"', b'"newer"'), GOOD.replace(b'"jitter"', b'"newer"'),
        GOOD.replace(b'"full"', b'"sometimes"'), b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:40]),
)  # fmt: skip
def test_a_snapshot_that_is_none_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_snapshot(data)


def test_a_snapshot_that_ends_too_early_is_a_value_error() -> None:
    for size in range(len(GOOD)):
        with pytest.raises(ValueError):
            decode_snapshot(GOOD[:size])


# Index values


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    spec = Spec(draw(st.integers(0, 9)), draw(maxima), draw(policies), draw(visibilities), draw(headers))
    entry = Entry(draw(u64), Queue(draw(u32), "mail"), spec, draw(u64), draw(u64), draw(st.none() | key_texts))
    entry.state = draw(st.integers(0, 3))
    entry.attempts, entry.token, entry.deadline_ms = draw(u32), draw(u64), draw(u64)
    entry.died_at_ms, entry.last_error = draw(u64), draw(errors)
    entry.segment, entry.offset, entry.length = draw(u32), draw(u64), draw(u32)
    entry.crc, entry.size, entry.lsn = draw(u32), draw(u32), draw(u64)
    return entry


def facts_of(entry: Entry, state: int) -> dict[str, Any]:
    spec = {name: getattr(entry.spec, name) for name in Spec.__slots__}
    own = {name: getattr(entry, name) for name in Entry.__slots__ if name not in ("spec", "state", "queue", "indexed")}
    return {**own, **spec, "state": state, "queue": entry.queue}


def key_of(entry: Entry) -> bytes:
    return entry.id.to_bytes(8, "big")


@settings(max_examples=100, deadline=None)
@given(entries())
def test_a_job_comes_back_from_the_index_as_it_was(entry: Entry) -> None:
    found, state = decode_entry(key_of(entry), encode_entry(entry), {entry.queue.number: entry.queue})
    assert facts_of(found, state) == facts_of(entry, entry.state)


def full_entry() -> Entry:
    spec = Spec(7, 5, RetryPolicy(), 40, read_only({"h": "1"}))
    entry = Entry(7, Queue(3, "mail"), spec, NOW, NOW + 5, "key")
    entry.last_error = "boom"
    entry.segment, entry.offset, entry.length, entry.crc, entry.size, entry.lsn = 1, 100, 20, 99, 140, 12
    return entry


def test_what_a_job_does_not_have_is_told_from_what_is_empty() -> None:
    for error in (None, ""):
        for key in (None, "k"):
            entry = full_entry()
            entry.last_error, entry.key = error, key
            entry.spec = Spec(7, None, RetryPolicy(max_attempts=None), None, NO_HEADERS)
            found, _ = decode_entry(key_of(entry), encode_entry(entry), {3: entry.queue})
            assert (found.last_error, found.key, found.spec.visibility_ms, found.spec.max_attempts) == (
                error, key, None, None,
            )  # fmt: skip
            assert found.spec.headers is NO_HEADERS


def test_a_flipped_bit_in_the_index_value_of_a_job_is_a_value_error() -> None:
    entry = full_entry()
    refuse_every_flip(key_of(entry), encode_entry(entry), lambda k, v: decode_entry(k, v, {3: entry.queue}))


def test_a_flipped_bit_in_the_index_value_of_a_key_is_a_value_error() -> None:
    key = (3).to_bytes(4, "big") + b"key"
    refuse_every_flip(key, encode_key_value(key, 7, NOW, 1), decode_key_value)


def refuse_every_flip(key: bytes, value: bytes, decode: Callable[[bytes, bytes], object]) -> None:
    """Each bit of the value and of its key, and each size that is too small."""
    decode(key, value)
    for at in range(len(value) * 8):
        flipped = bytearray(value)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match=f"checksum of the index value of key {key.hex()} does not match"):
            decode(key, bytes(flipped))
    for at in range(len(key) * 8):
        other = bytearray(key)
        other[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match="checksum"):
            decode(bytes(other), value)
    for size in range(len(value)):
        with pytest.raises(ValueError, match="checksum"):
            decode(key, value[:size])
    with pytest.raises(ValueError, match="checksum"):
        decode(key, value + b"\0")


# Runs

ARRAYS = ("ids", "times", "dues", "segments", "offsets", "lengths", "crcs", "sizes")


def cells(draw: st.DrawFn, cell: st.SearchStrategy[int], n: int) -> list[int]:
    """A column: all different, all the same, or rising by one."""
    match draw(st.sampled_from(["any", "same", "rising"])):
        case "any":
            return draw(st.lists(cell, min_size=n, max_size=n))
        case "same":
            return [draw(cell)] * n
        case _:
            first = min(draw(cell), 2**32 - n)
            return list(range(first, first + n))


specs = st.builds(Spec, st.integers(0, 9), maxima, policies, visibilities, headers)
extras_of_one = st.tuples(u32, u64, u64, errors)


@st.composite
def column_sets(draw: st.DrawFn) -> Columns:
    """Any columns, in any order: what the codec writes does not depend on it."""
    n = draw(st.integers(1, 6))
    columns = Columns()
    for name in ARRAYS:
        column = getattr(columns, name)
        column.extend(cells(draw, u64 if column.itemsize == 8 else u32, n))
    columns.lsns.extend(draw(st.lists(u64, min_size=n, max_size=n)))
    pool = draw(st.lists(specs, min_size=1, max_size=3))
    columns.specs = draw(st.lists(st.sampled_from(pool), min_size=n, max_size=n))
    columns.keys = draw(st.none() | st.lists(st.none() | key_texts, min_size=n, max_size=n))
    columns.extras = draw(st.none() | st.dictionaries(st.sampled_from(columns.ids), extras_of_one))
    columns.payloads = [b"in memory only"] * n if draw(st.booleans()) else None
    return columns


class NoShelf:
    """A run that is only decoded asks for nothing."""

    def columns(self, number: int) -> Columns:
        raise AssertionError(f"the columns of run {number} are read")

    def key(self, queue: int, text: str) -> tuple[int, int, int] | None:
        raise AssertionError(f"key {text!r} of queue {queue} is read")

    def key_names(self) -> list[tuple[int, str]]:
        raise AssertionError("all keys are read")


SHELF = NoShelf()
MAIL = Queue(3, "mail")


def number_key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def facts_of_columns(columns: Columns) -> dict[str, Any]:
    """All that an index value keeps."""
    facts: dict[str, Any] = {name: list(getattr(columns, name)) for name in ARRAYS}
    facts["specs"] = [[getattr(spec, name) for name in Spec.__slots__] for spec in columns.specs]
    return {**facts, "keys": columns.keys, "extras": columns.extras}


def run_of(value: bytes, number: int = 7) -> tuple[Run, list[tuple[int, int]]]:
    return decode_run(number_key(number), value, {MAIL.number: MAIL}, SHELF)


@settings(max_examples=150, deadline=None)
@given(column_sets(), st.sampled_from([READY, SCHEDULED, DEAD]), st.integers(0, 9), u64)
def test_a_run_comes_back_from_the_index_as_it_was(columns: Columns, state: int, priority: int, number: int) -> None:
    before = facts_of_columns(columns)
    value = encode_run(number, MAIL, priority, state, columns)
    assert facts_of_columns(columns) == before
    found = decode_columns(number_key(number), value)
    assert facts_of_columns(found) == before
    assert (list(found.lsns), found.payloads) == ([0] * len(columns), None), "it is on disk, and not in memory"
    for name in Columns.__slots__:
        column = getattr(found, name)
        assert type(column) is type(getattr(Columns(), name)) or name in ("keys", "extras")
        assert getattr(column, "typecode", "") == getattr(getattr(columns, name), "typecode", "")

    run, live = run_of(value, number)
    ids, dues = columns.ids, columns.dues
    assert (run.queue, run.priority, run.state, run.number, run.left) == (MAIL, priority, state, number, len(ids))
    ends = ((dues[0], ids[0]), (dues[-1], ids[-1])) if state == SCHEDULED else (ids[0], ids[-1])
    assert (run.head, run.last, run.low, run.high) == (*ends, min(ids), max(ids))
    assert (run.columns, run.shelf, run.at, run.by_due) == (None, SHELF, 0, state == SCHEDULED)
    assert dict(live) == columns.live()
    assert len(live) == len(set(columns.segments))


def test_the_head_of_a_run_is_read_from_a_view_of_the_value_as_well() -> None:
    run, live = decode_run(number_key(7), memoryview(full_run()), {3: MAIL}, SHELF)
    assert (run.left, live) == (3, [(1, 60), (2, 30)])


def test_options_that_jobs_of_a_run_share_are_one_object_again() -> None:
    columns = full_columns()
    columns.specs = [columns.specs[0], columns.specs[2], columns.specs[0]]
    found = decode_columns(number_key(7), encode_run(7, MAIL, 5, READY, columns)).specs
    assert found[0] is found[2] is not found[1]
    assert found[1].headers is NO_HEADERS


def plain_columns(n: int) -> Columns:
    """As one call enqueues them: only payloads differ."""
    columns = Columns()
    spec = Spec(5, 5, RetryPolicy(), None, NO_HEADERS)
    columns.add_batch(1, [3] * n, [9] * n, spec, NOW, 0, (1, 400, 5), 8, None, None)
    return columns


def full_columns() -> Columns:
    columns = Columns()
    policy = RetryPolicy(jitter="none")
    for i, text in enumerate(("k", None, "ü")):
        spec = Spec(5, None, policy, i, read_only({"h": str(i)}) if i < 2 else NO_HEADERS)
        entry = Entry(9 + 2 * i, MAIL, spec, NOW + i * i, NOW + 7 * i, text)
        entry.segment, entry.offset, entry.length, entry.crc, entry.size = 1 + i // 2, 100 * i * i, 20 + i, i * i, 30
        if i != 1:
            entry.attempts, entry.token, entry.died_at_ms, entry.last_error = i, 2, 3, "boom" if i else ""
        columns.add(entry)
    return columns


def full_run(number: int = 7) -> bytes:
    return encode_run(number, MAIL, 5, SCHEDULED, full_columns())


def test_what_all_jobs_of_a_run_have_in_common_is_written_once() -> None:
    """Of a batch of equal payloads nothing but their places depends on how many there are."""

    def size(n: int) -> int:
        return len(encode_run(7, MAIL, 5, READY, plain_columns(n)))

    assert size(1000) - size(2) == 998 * 8


def test_a_column_is_written_once_only_if_every_cell_has_the_value() -> None:
    """Ends that fit a short form prove nothing about what is between them."""
    for ids, times in (([1, 5, 3], [4, 9, 4]), ([3, 1, 5], [4, 4, 9]), ([1, 1, 3], [9, 4, 4])):
        columns = plain_columns(3)
        columns.ids, columns.times = array("Q", ids), array("Q", times)
        found = decode_columns(number_key(7), encode_run(7, MAIL, 5, READY, columns))
        assert (list(found.ids), list(found.times)) == (ids, times)


@pytest.mark.parametrize("columns", [plain_columns(3), full_columns()], ids=["plain", "full"])
def test_where_numbers_in_memory_begin_at_the_other_end_they_are_turned_around(
    columns: Columns, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns.specs = columns.specs[:1] * 3
    before, usual = facts_of_columns(columns), encode_run(7, MAIL, 5, SCHEDULED, columns)
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    value = encode_run(7, MAIL, 5, SCHEDULED, columns)
    assert facts_of_columns(columns) == before
    for name in ARRAYS:
        column = getattr(columns, name)[:1]
        assert column.tobytes() in usual
        column.byteswap()
        assert column.tobytes() in value
    assert facts_of_columns(decode_columns(number_key(7), value)) == before


@pytest.mark.parametrize("columns", [plain_columns(1), plain_columns(4), full_columns()], ids=["one", "plain", "full"])
def test_a_flipped_bit_in_the_index_value_of_a_run_is_a_value_error(columns: Columns) -> None:
    """In its head for the opening that reads heads, in its columns for whoever reads these."""
    key, value = number_key(7), encode_run(7, MAIL, 5, SCHEDULED, columns)
    head = 4 + int.from_bytes(value[:4], "little")
    run_of(value)
    for at in range(len(value) * 8):
        flipped = bytearray(value)
        flipped[at // 8] ^= 1 << at % 8
        if at // 8 < head:
            with pytest.raises(ValueError):
                run_of(bytes(flipped))
        else:
            assert run_of(bytes(flipped))[0].left == len(columns), "columns are not looked at"
            with pytest.raises(ValueError, match="checksum of the index value of key 0000000000000007 does not match"):
                decode_columns(key, bytes(flipped))


def test_a_run_under_another_number_is_a_value_error() -> None:
    for number in (0, 6, 8, 7 << 8, 2**64 - 1):
        with pytest.raises(ValueError, match="checksum"):
            run_of(full_run(), number)
        with pytest.raises(ValueError, match="checksum"):
            decode_columns(number_key(number), full_run())


def test_a_run_that_ends_too_early_or_too_late_is_a_value_error() -> None:
    value = full_run()
    head = 4 + int.from_bytes(value[:4], "little")
    for size in range(len(value)):
        with pytest.raises(ValueError):
            decode_columns(number_key(7), value[:size])
        if size < head:
            with pytest.raises(ValueError):
                run_of(value[:size])
    with pytest.raises(ValueError, match="checksum"):
        decode_columns(number_key(7), value + b"\0")


def sealed_run(head: bytes, columns: bytes) -> bytes:
    """A run's value whose checksums are right, whatever it says."""
    key = number_key(7)
    return struct.pack("<I", len(head) + 4) + seal(key, head) + seal(key, columns)


def run_head(queue: int = 3, state: int = READY, n: int = 2, live: int = 0) -> bytes:
    return struct.pack("<IBBIQQQQQQI", queue, 5, state, n, 0, 1, 0, 2, 1, 2, live)


@pytest.mark.parametrize(
    "head", [
        b"", run_head()[:-1], run_head(queue=4), run_head(state=LEASED), run_head(state=4), run_head(n=0),
        run_head(live=1), run_head(live=2) + bytes(12),
    ],
    ids=lambda head: head.hex()[-24:],
)  # fmt: skip
def test_a_head_that_is_whole_and_no_run_s_is_a_value_error(head: bytes) -> None:
    with pytest.raises(ValueError, match="no run"):
        run_of(sealed_run(head, b""))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
@example(b"\2" + bytes(8))
def test_any_columns_at_all_are_at_worst_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        decode_columns(number_key(7), sealed_run(run_head(n=40), body))


@settings(max_examples=100, deadline=None)
@given(column_sets(), st.data())
def test_columns_that_are_whole_and_end_too_early_are_a_value_error(columns: Columns, data: st.DataObject) -> None:
    value = encode_run(7, MAIL, 5, READY, columns)
    body = unseal(number_key(7), value[4 + int.from_bytes(value[:4], "little") :])
    size = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(ValueError):
        decode_columns(number_key(7), sealed_run(run_head(n=len(columns)), body[:size]))


@pytest.mark.parametrize("value", [b"", b"\0", b"\0\0\0\0", b"xyz" * 5])
def test_a_sealed_value_that_is_whole_but_of_another_kind_is_a_value_error(value: bytes) -> None:
    with pytest.raises(ValueError):
        decode_key_value(b"k", seal(b"k", value))
    with pytest.raises(ValueError):
        decode_entry(bytes(8), seal(bytes(8), value), {})
    with pytest.raises(ValueError):
        decode_run(bytes(8), seal(bytes(8), value), {}, SHELF)
    with pytest.raises(ValueError):
        decode_columns(bytes(8), seal(bytes(8), value))


@settings(max_examples=60, deadline=None)
@given(key_texts, u64, u64, u32)
def test_a_key_comes_back_from_the_index_as_it_was(text: str, job_id: int, expires_ms: int, segment: int) -> None:
    key = (1).to_bytes(4, "big") + text.encode()
    value = encode_key_value(key, job_id, expires_ms, segment)
    assert decode_key_value(key, value) == (job_id, expires_ms, segment)


@given(st.binary(max_size=20), st.binary(max_size=40))
def test_what_is_sealed_is_unsealed_with_its_own_key_only(key: bytes, value: bytes) -> None:
    sealed = seal(key, value)
    assert unseal(key, sealed) == value
    assert len(sealed) == len(value) + 4
    with pytest.raises(ValueError):
        unseal(key + b"x", sealed)


@pytest.mark.parametrize("sealed", [b"", b"\0", b"\0\0\0"])
def test_less_than_a_checksum_is_no_sealed_value(sealed: bytes) -> None:
    with pytest.raises(ValueError):
        unseal(b"", sealed)

"""docs/file-format.md is enough to write a reader: this one knows nothing of RivetQ but that page."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb
from crc32c import crc32c

import rivetq
from rivetq.engine import EndSession, Enqueue, Once
from rivetq.testing import ManualClock

NUMBERS = "iqidddB"
STATES = ("ready", "scheduled", "leased", "dead")


def mask(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class Bytes:
    """Takes fields off the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def raw(self, size: int) -> bytes:
        self.at += size
        assert self.at <= len(self.data)
        return self.data[self.at - size : self.at]

    def text(self) -> str | None:
        (size,) = self.take("I")
        return None if size == 0xFFFFFFFF else self.raw(size).decode()

    def ids(self) -> list[int]:
        (n,) = self.take("I")
        return list(self.take(f"{n}Q"))


def read_header(data: bytes) -> dict[str, Any]:
    magic, version, size, crc, epoch, salt, previous_crc, number, first_lsn, boot_ms, now_ms = struct.unpack_from(
        "<8sIIIIIIQQQQ", data
    )
    assert (magic, version, size % 8) == (b"RivetQ\0\n", 2, 0)
    assert crc == mask(crc32c(data[:16] + bytes(4) + data[20:size]))
    return {
        "crc": crc, "size": size, "epoch": epoch, "salt": salt, "previous_crc": previous_crc, "id": number,
        "first_lsn": first_lsn, "boot_ms": boot_ms, "now_ms": now_ms, "log_id": data[64:80],
        "boot_id": data[80:120].rstrip(b"\0").decode(), "snapshot": json.loads(data[120:size].rstrip(b"\0")),
    }  # fmt: skip


def read_frames(data: bytes, header: dict[str, Any]) -> list[tuple[int, int, int, bytes]]:
    """(crc, lsn, durable, body) of each good frame in a row."""
    frames = []
    at, lsn, previous = header["size"], header["first_lsn"], header["crc"]
    while at + 32 <= len(data):
        crc, length, found_lsn, salt, found_previous, durable = struct.unpack_from("<IIQIIQ", data, at)
        if not 0 < length <= 2**30 or (salt, found_lsn, found_previous) != (header["salt"], lsn, previous):
            break
        if crc != mask(crc32c(data[at + 4 : at + 32 + length])):
            break
        frames.append((crc, lsn, durable, data[at + 32 : at + 32 + length]))
        at, lsn, previous = at + -(-(32 + length) // 8) * 8, lsn + 1, crc
    return frames


def read_event(body: Bytes) -> tuple[Any, ...]:
    match body.take("B")[0]:
        case 1:
            return "QueueCreated", *body.take("I"), body.text()
        case 2:
            return "QueueConfigured", *body.take("I"), json.loads(body.text() or "")
        case 3:
            return read_enqueued(body)
        case 4:
            (n,) = body.take("I")
            columns = *(body.take(f"{n}Q") for _ in range(3)), body.take(f"{n}I")
            (places,) = body.take("B")
            counts = [body.take("IBI")[2] for _ in range(places)]
            assert not counts or sum(counts) == n, "every job has its place, or there were too many places to tell"
            return "Leased", *columns
        case 5:
            return "Acked", *body.take("IQ"), body.ids()
        case 6:
            return "Retried", *body.take("QQ"), body.text()
        case 7:
            return "Released", *body.take("QQI")
        case 8:
            return "Buried", *body.take("QQ"), body.text()
        case 9:
            return "Extended", *body.take("QQ")
        case 10:
            return "Cancelled", *body.take("IQ")
        case 11:
            return "Purged", *body.take("I"), body.ids()
        case 12:
            return "Redriven", *body.take("I"), body.ids()
        case 13:
            return "IdsReserved", *body.take("Q")
        case 14:
            return read_copied(body)
        case 15:
            return "KeyCopied", *body.take("IQQ"), body.text()
        case 16:
            return "SegmentsDropped", *body.take("Q")
        case 17:
            return "QueueRemoved", *body.take("I")
        case 18:
            return "QueueCopied", *body.take("IQQQQ"), body.text(), json.loads(body.text() or "")
        case 19:
            return "Called", *body.take("QQQ"), json.loads(body.text() or "")
        case 20:
            return "SessionEnded", *body.take("Q")
        case tag:
            raise AssertionError(f"tag {tag} is not on the page")


def read_enqueued(body: Bytes) -> tuple[Any, ...]:
    queue, first_id, n, priority, due_ms = body.take("IQIBQ")
    body.take(NUMBERS)
    headers_size, flags = body.take("IH")
    assert flags in (0, 1)
    headers = json.loads(body.raw(headers_size)) if headers_size else {}
    keys = [body.raw(size).decode() or None for size in body.take(f"{n}H")] if flags else None
    lengths, crcs = body.take(f"{n}I"), body.take(f"{n}I")
    payloads = [body.raw(length) for length in lengths]
    assert [crc32c(payload) for payload in payloads] == list(crcs)
    return "Enqueued", queue, first_id, priority, due_ms, headers, keys, payloads


def read_copied(body: Bytes) -> tuple[Any, ...]:
    job_id, queue, flags, state, priority, attempts, token = body.take("QIHBBIQ")
    assert not flags
    body.take(NUMBERS)
    body.take("4Q")
    length, crc = body.take("II")
    texts = body.text(), body.text(), body.text()
    payload = body.raw(length)
    assert crc32c(payload) == crc
    return "Copied", job_id, queue, state, priority, attempts, token, texts, payload


def read_log(directory: Path) -> list[tuple[Any, ...]]:
    """All events that count."""
    files = sorted((directory / "log").glob("*.log"))
    segments = [(int(path.stem), path.read_bytes()) for path in files]
    headers = [read_header(data) for _, data in segments]
    assert [header["id"] for header in headers] == [number for number, _ in segments]
    events: list[tuple[Any, ...]] = []
    before: tuple[int, int] | None = None  # last lsn and crc
    for i, (header, (_, data)) in enumerate(zip(headers, segments, strict=True)):
        assert header["log_id"] == headers[0]["log_id"]
        frames = read_frames(data, header)
        if i + 1 < len(headers):
            frames = [frame for frame in frames if frame[1] < headers[i + 1]["first_lsn"]]
        if before is not None:
            assert (header["first_lsn"] - 1, header["previous_crc"]) == before
        before = (frames[-1][1], frames[-1][0]) if frames else (header["first_lsn"] - 1, header["crc"])
        for _, lsn, durable, data in frames:
            assert durable < lsn
            body = Bytes(data)
            body.take("Q")
            while body.at < len(data):
                events.append(read_event(body))
    mark = (directory / "log" / "mark").read_bytes()
    log_id, lsn, crc = struct.unpack("<16sQI", mark)
    assert (log_id, crc) == (headers[0]["log_id"], crc32c(mark[:24]))
    assert before is not None
    assert lsn <= before[0]
    return events


def unseal(key: bytes, sealed: bytes | None) -> bytes:
    assert sealed is not None
    assert int.from_bytes(sealed[:4], "little") == crc32c(key + sealed[4:])
    return sealed[4:]


def read_index(
    directory: Path, seen: set[str] | None = None, queues: list[Any] | None = None
) -> tuple[dict[int, dict[str, Any]], dict[tuple[int, str], int]]:
    """The jobs by id, and the ids that keys stand for. `seen` gets what there was in runs, `queues` all queues."""
    manifest = json.loads(unseal(b"manifest", (directory / "index/manifest").read_bytes()))
    data = (directory / "index/data.mdb").read_bytes()
    assert (manifest["format"], manifest["size"], manifest["crc"]) == (3, len(data), crc32c(data))
    jobs: dict[int, dict[str, Any]] = {}
    keys: dict[tuple[int, str], int] = {}
    ends: set[bytes] = set()
    with lmdb.open(str(directory / "index"), readonly=True, lock=False, max_dbs=5) as env, env.begin() as txn:
        json.loads(unseal(b"snapshot", txn.get(b"snapshot")))
        for key, sealed in txn.cursor(env.open_db(b"queues", txn, create=False)):
            queue = Bytes(unseal(key, sealed))
            totals = queue.take("IQQQQ")
            read = int.from_bytes(key, "big"), queue.text(), json.loads(queue.text() or ""), totals
            assert queue.at == len(queue.data)
            if queues is not None:
                queues.append(read)
        counts = dict(json.loads(unseal(b"keys per segment", txn.get(b"keys per segment"))))
        for key, value in txn.cursor(env.open_db(b"runs", txn, create=False)):
            jobs.update(read_run(directory, key, value, set() if seen is None else seen))
        for key, sealed in txn.cursor(env.open_db(b"jobs", txn, create=False)):
            job = Bytes(unseal(key, sealed))
            _, state, priority, attempts, _ = job.take("IBBIQ")
            job.take(NUMBERS)
            job.take("4Q")
            segment, offset, length, crc, _, _ = job.take("IQIIIQ")
            last_error, headers, text = (None if n < 0 else job.raw(n).decode() for n in job.take("iii"))
            assert job.at == len(job.data)
            payload = read_payload(directory, segment, offset, length, crc)
            jobs[int.from_bytes(key, "big")] = {
                "state": STATES[state], "priority": priority, "attempts": attempts, "last_error": last_error,
                "headers": json.loads(headers or "{}"), "key": text, "payload": payload,
            }  # fmt: skip
        for key, sealed in txn.cursor(env.open_db(b"keys", txn, create=False)):
            job_id, expires_ms, segment = struct.unpack("<QQI", unseal(key, sealed))
            keys[int.from_bytes(key[:4], "big"), key[4:].decode()] = job_id
            if expires_ms:
                counts[segment] -= 1
                ends.add(expires_ms.to_bytes(8, "big") + key)
        assert ends == set(txn.cursor(env.open_db(b"ends", txn, create=False)).iternext(values=False))
        assert not any(counts.values())
    return dict(sorted(jobs.items())), keys


def read_payload(directory: Path, segment: int, offset: int, length: int, crc: int) -> bytes:
    with (directory / f"log/{segment:016d}.log").open("rb") as file:
        file.seek(offset)
        payload = file.read(length)
    assert crc32c(payload) == crc
    return payload


def read_run(directory: Path, key: bytes, value: bytes, seen: set[str]) -> dict[int, dict[str, Any]]:
    """The jobs of one run by id."""
    (size,) = struct.unpack_from("<I", value)
    head = Bytes(unseal(key, value[4 : 4 + size]))
    _, priority, state, n, first_due_ms, first, last_due_ms, last, low, high, segments = head.take("IBBIQQQQQQI")
    weights = dict[int, int](head.take("IQ") for _ in range(segments))
    assert head.at == len(head.data)
    body = Bytes(unseal(key, value[4 + size :]))
    columns: list[Sequence[int]] = []
    for cell in "QQQIQIII":
        (form,) = body.take("B")
        assert form in (0, 1, 2)
        seen.add(f"form {form} of {cell}")
        cells = body.take(f"{n}{cell}" if form == 0 else cell)
        columns.append(cells if form == 0 else [cells[0] + i * (form == 2) for i in range(n)])
    ids, _, dues_ms, places, offsets, lengths, crcs, sizes = columns
    assert (ids[0], ids[-1], min(ids), max(ids)) == (first, last, low, high)
    assert (dues_ms[0], dues_ms[-1]) == (first_due_ms, last_due_ms)
    order = list(zip(dues_ms, ids, strict=True)) if STATES[state] == "scheduled" else list(ids)
    assert order == sorted(order)
    options = []
    for _ in range(body.take("I")[0]):
        assert body.take("B") == (priority,)
        body.take(NUMBERS)
        (length,) = body.take("i")
        options.append(json.loads(body.raw(length)) if length >= 0 else {})
    which = body.take(f"{n}I") if len(options) > 1 else [0] * n
    has_keys, has_extras = body.take("BB")
    keys = [body.text() for _ in range(n)] if has_keys else [None] * n
    extras = {}
    for _ in range(body.take("I")[0] if has_extras else 0):
        job_id, attempts, _, _ = body.take("QIQQ")
        extras[job_id] = attempts, body.text()
    assert body.at == len(body.data)
    seen |= {STATES[state], f"options {len(options) > 1}", f"keys {has_keys}", f"extras {has_extras}"}
    assert set(weights) == set(places)
    for segment, weight in weights.items():
        assert weight == sum(size for size, place in zip(sizes, places, strict=True) if place == segment)
    return {
        job_id: {
            "state": STATES[state], "priority": priority, "attempts": extras.get(job_id, (0, None))[0],
            "last_error": extras.get(job_id, (0, None))[1], "headers": options[which[i]], "key": keys[i],
            "payload": read_payload(directory, places[i], offsets[i], lengths[i], crcs[i]),
        }
        for i, job_id in enumerate(ids)
    }  # fmt: skip


def reject_one(broker: rivetq.Broker, error: str) -> None:
    job = broker.lease("q")
    assert job is not None
    job.reject(error=error)


def a_full_life(directory: Path) -> None:
    """A directory in which every event happened, closed."""
    clock = ManualClock()
    with rivetq.Broker(directory, clock=clock) as broker:
        broker.configure_queue("q", rate_limit=rivetq.RateLimit(1000, 1000), max_jobs=100)
        broker.enqueue_many("q", [b"one", b"two", b""], idempotency_keys=["k1", None, "k3"], headers={"a": "ä"})
        first, second, third = broker.lease_many("q", 3)
        first.ack()
        second.extend(60)
        second.nack(error="no", delay=5)
        third.release()
        reject_one(broker, error="never")
        broker.redrive("q")
        broker.enqueue("q", "later", delay=60, priority=9)
        broker.cancel(broker.enqueue("q", "not at all"))
        broker.enqueue("other", "away")
        broker.purge("other")
        with broker.transaction() as tx:
            tx.enqueue("other", {"in": "tx"})
        for _ in range(20):
            broker.enqueue("other", b"x" * 1000)  # garbage, so that a compaction has something to do
        broker.purge("other")
        broker.cancel(broker.enqueue("gone", ""))
        broker.remove_queue("gone")
        reject_one(broker, error="dead")
        broker.pause("other")
        session = 2**64 - 1
        broker.commit([Enqueue("other", [b"a", b"b"]), Enqueue("other", [b"c"], keys=["k"])], once=Once(session, 1))
        broker.commit([Enqueue("other", [b"d"])], once=Once(7, 1))
        broker._engine.call(EndSession(7))


def test_a_reader_written_from_the_page_reads_log_and_index(tmp_path: Path) -> None:
    data = tmp_path / "data"
    a_full_life(data)
    seen = {event[0] for event in read_log(data)}
    with rivetq.Broker(data, clock=ManualClock()) as broker:
        broker.compact()
        jobs = broker.jobs("q") + broker.jobs("other")
        done, kept = broker.find("q", "k1"), broker.find("q", "k3")
        stats = broker.stats("q")
        totals = stats.enqueued, stats.acked, stats.cancelled, stats.purged
    log = read_log(data)
    (copy,) = (event for event in log if event[0] == "QueueCopied" and event[6] == "q")
    assert copy[1:6] == (1, *totals)
    assert (copy[7]["max_jobs"], copy[7]["rate_limit"]["on"]) == (100, "lease")
    seen |= {event[0] for event in log}
    assert seen == {
        "QueueCreated", "QueueConfigured", "Enqueued", "Leased", "Acked", "Retried", "Released", "Buried", "Extended",
        "Cancelled", "Purged", "Redriven", "IdsReserved", "Copied", "KeyCopied", "SegmentsDropped",
        "QueueRemoved", "QueueCopied", "Called", "SessionEnded",
    }  # fmt: skip
    queues: list[Any] = []
    found, keys = read_index(data, queues=queues)
    assert {name: (number, counted[1:]) for number, name, _, counted in queues} == {
        "q": (1, totals), "other": (2, (26, 0, 0, 22))
    }  # fmt: skip
    assert keys == {(1, "k1"): done, (1, "k3"): kept, (2, "k"): jobs[-2].id}
    assert [facts.pop("key") for facts in found.values()] == [None, "k3", None, None, None, "k", None]
    assert found == known(jobs)
    headers = [read_header(path.read_bytes()) for path in sorted((data / "log").glob("*.log"))]
    first = jobs[-4].id
    answers = [{"from": first, "n": 2}, {"ids": [[first + 2, True]]}]
    assert headers[-1]["snapshot"]["sessions"] == [[2**64 - 1, 0, [[1, answers]]]]


def known(jobs: list[rivetq.Job]) -> dict[int, dict[str, Any]]:
    return {
        job.id: {
            "state": job.state, "priority": job.priority, "attempts": job.attempts, "last_error": job.last_error,
            "headers": job.headers, "payload": job.payload,
        }
        for job in jobs
    }  # fmt: skip


def test_a_reader_written_from_the_page_reads_runs_of_every_kind(tmp_path: Path) -> None:
    data, clock = tmp_path / "data", ManualClock()
    with rivetq.Broker(data, clock=clock, window_jobs=1024) as broker:
        broker.enqueue_many("plain", [b"x"] * 1500)
        broker.enqueue_many("keys", [b"y" * n for n in range(300)], idempotency_keys=[f"ü{n}" for n in range(300)])
        for n in range(6):
            broker.enqueue_many("options", [b"z"] * 3, headers={"n": "ä" * n} if n else {}, max_attempts=n // 2 + 1)
            broker.enqueue_many("later", [b"soon"] * 3, delay=60 - n)
        broker.enqueue_many("again", [b"%d" % n for n in range(400)], max_attempts=2)
        for n, job in enumerate(broker.lease_many("again", 400)):
            job.nack(error=f"é {n}" if n % 2 else None, delay=0)
        broker.enqueue_many("dead", [b"bad"] * 300, max_attempts=1)
        for job in broker.lease_many("dead", 300):
            job.nack(error="no")
        clock.advance(0.001)
        broker.checkpoint()
        jobs = [job for queue in broker.queues() for job in broker.jobs(queue, limit=2000)]
    seen: set[str] = set()
    found, keys = read_index(data, seen)
    texts = [facts.pop("key") for facts in found.values()]
    assert found == known(sorted(jobs, key=lambda job: job.id))
    assert len(found) == 1500 + 300 + 18 + 18 + 400 + 300
    assert [text for text in texts if text] == [f"ü{n}" for n in range(300)]
    assert len(keys) == 300
    assert seen >= {
        "ready", "scheduled", "dead", "options True", "options False", "keys 0", "keys 1", "extras 0", "extras 1",
        "form 0 of Q", "form 1 of Q", "form 2 of Q", "form 0 of I", "form 1 of I",
    }  # fmt: skip

"""The index: a cache that gives back what was written into it, or says that it cannot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import waiting_of

from rivetq import QueueConfig, RateLimit, RetryPolicy, StorageError
from rivetq.machine import look, saving
from rivetq.machine.advance import advance
from rivetq.machine.apply import apply
from rivetq.machine.check import check, dump
from rivetq.machine.events import Acked, Enqueued, Event, Leased, QueueConfigured, QueueCreated
from rivetq.machine.keys import Key
from rivetq.machine.machine import Machine
from rivetq.machine.queue import READY
from rivetq.machine.snapshot import Place, Snapshot
from rivetq.storage.codec import encode_snapshot
from rivetq.storage.disk import SystemDisk
from rivetq.storage.index import MAP_BYTES, Index
from rivetq.storage.index_values import encode_entry, encode_queue, encode_run, seal

LOG_ID = bytes(range(16))
KEY = (1).to_bytes(4, "big") + b"spent"


def machine_of(count: int = 5) -> Machine:
    """Jobs with all that a job may have, in runs and loose; a configured queue, a key that outlived its job."""
    machine = Machine()
    retry = RetryPolicy(max_attempts=3, base=2, jitter="equal")
    config = QueueConfig(retry=retry, rate_limit=RateLimit(per_second=5, burst=5), max_jobs=100, paused=True)
    events: list[Event] = [QueueCreated(1, "q"), QueueConfigured(1, config)]
    for n in range(count):
        keys = ["spent" if n == 0 else None if n == 1 else f"kéy {n}"]
        event = Enqueued(1, n + 1, n % 10, 5_000 * (n % 2), n or None, retry, 70 if n else None, [3], [b"abc"])
        event.headers, event.keys, event.crcs = {"n": str(n)} if n > 1 else {}, keys, [7]
        events.append(event)
    events += [Leased([1, 3], [8, 9], [1, 1], [90, 95]), Acked(1, [1], 10 + 86_400_000)]
    for lsn, each in enumerate(events, 1):
        apply(machine, each, 10, Place(1, 64 * lsn, lsn))
    machine.now_ms = 10
    return machine


def jobs_in(machine: Machine) -> list[tuple[bytes, bytes | None]]:
    return [(entry.id.to_bytes(8, "big"), encode_entry(entry)) for entry in machine.jobs.values()]


def runs_in(machine: Machine) -> list[tuple[bytes, bytes | None]]:
    """The values of all runs, which get their numbers."""
    values: list[tuple[bytes, bytes | None]] = []
    for waiting in machine.waiting.values():
        for state, window in waiting.each():
            for run in window.runs:
                if not run.number:
                    run.number, machine.next_run = machine.next_run, machine.next_run + 1
                columns = run.load().picked(slice(run.at, None))
                value = encode_run(run.number, run.queue, run.priority, state, columns)
                values.append((run.number.to_bytes(8, "big"), value))
    return values


def queues_in(machine: Machine) -> list[tuple[bytes, bytes | None]]:
    return [encode_queue(saving.queue_copied(queue), queue.segment) for queue in machine.numbers.values()]


class Desk:
    """An index directory, and the index that was opened last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = self.open()

    def open(self) -> Index:
        self.index = Index(SystemDisk(), str(self.path))
        return self.index

    def save(self, machine: Machine, applied_lsn: int = 9) -> None:
        self.index.write(
            LOG_ID, applied_lsn, saving.snapshot(machine), jobs=jobs_in(machine), runs=runs_in(machine),
            queues=queues_in(machine), keys=machine.keys.changed.items(), key_counts=machine.keys.counts,
        )  # fmt: skip

    def loaded(self) -> Machine:
        machine = Machine()
        self.index.close()  # a process opens it once
        self.open().load(machine)
        return machine

    def manifest(self) -> dict[str, Any]:
        content = (self.path / "manifest").read_bytes()
        return dict(json.loads(content[4:]))

    def rewrite_manifest(self, **changes: Any) -> None:
        text = json.dumps(self.manifest() | changes).encode()
        (self.path / "manifest").write_bytes(seal(b"manifest", text))

    def put(self, key: bytes, value: bytes | None, db: bytes | None = None) -> None:
        """Write into the data file behind the index's back."""
        env = lmdb.open(str(self.path), max_dbs=5, map_size=1 << 24, lock=False, lib_version=0)
        with env.begin(write=True) as txn:
            handle = env.open_db(db, txn=txn)
            if value is None:
                txn.delete(key, db=handle)
            else:
                txn.put(key, value, db=handle)
        env.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "index")
    yield desk
    desk.index.close()


@pytest.fixture
def saved(desk: Desk) -> Desk:
    desk.save(machine_of())
    desk.index.close()
    return desk


# -- what is written comes back


def test_a_machine_comes_back_as_it_was_saved(desk: Desk) -> None:
    machine = machine_of()
    desk.save(machine)
    loaded = desk.loaded()
    assert dump(loaded) == dump(machine)
    check(loaded)
    assert saving.snapshot(loaded) == saving.snapshot(machine)
    assert look.live_bytes(loaded) == look.live_bytes(machine)
    assert loaded.next_token == 10
    assert loaded.keys.counts == machine.keys.counts == {1: 1}
    places = {e.id: (e.segment, e.offset, e.size) for e in look.everything(loaded)}
    assert places == {e.id: (e.segment, e.offset, e.size) for e in look.everything(machine)}
    assert len(loaded.jobs) == len(machine.jobs) == 1


def test_what_was_loaded_needs_no_saving(desk: Desk) -> None:
    desk.save(machine_of())
    loaded = desk.loaded()
    assert loaded.changes is not None
    changes = loaded.changes
    assert (changes.jobs, changes.runs, changes.gone, changes.queues) == (set(), set(), set(), set())
    assert (loaded.keys.changed, loaded.keys.frozen) == ({}, {})
    assert all(entry.indexed for entry in loaded.jobs.values())


def test_a_later_write_changes_what_it_names_and_nothing_else(desk: Desk) -> None:
    machine = machine_of()
    desk.save(machine)
    apply(machine, Acked(1, [3], 12 + 86_400_000), 12, Place(1, 0, 20))
    gone: list[tuple[bytes, bytes | None]] = [((n).to_bytes(8, "big"), None) for n in (3, 99)]
    key = machine.keys.get(1, "kéy 2")
    assert key is not None
    keys = {(1, "spent"): Key(0, 0), (1, "kéy 2"): key}
    desk.index.write(
        LOG_ID, 20, saving.snapshot(machine), jobs=gone, queues=queues_in(machine),
        keys=keys.items(), key_counts={1: 1},
    )  # fmt: skip
    loaded = desk.loaded()
    assert sorted(e.id for e in look.everything(loaded)) == [2, 4, 5]
    assert loaded.keys.get(1, "spent") is None
    check(loaded)
    assert loaded.numbers[1].acked == 2
    assert desk.manifest()["applied_lsn"] == 20


def test_an_index_without_jobs_and_keys_has_its_snapshot(desk: Desk) -> None:
    desk.index.write(LOG_ID, 1, saving.snapshot(Machine()))
    assert dump(desk.loaded()) == dump(Machine())


def test_an_index_in_which_nothing_was_ever_put_has_no_jobs(desk: Desk) -> None:
    desk.path.mkdir()
    snapshot = encode_snapshot(Snapshot(5, 1, 1, 0, []))
    desk.put(b"snapshot", seal(b"snapshot", snapshot))
    desk.put(b"keys per segment", seal(b"keys per segment", b"[]"))
    loaded = desk.loaded()
    assert (loaded.jobs, loaded.next_id) == ({}, 5)
    assert (desk.index.key(1, "spent"), desk.index.key_names(), desk.index.ended_keys(9, 9)) == (None, [], [])


def test_many_jobs_come_back_in_the_order_of_their_ids(desk: Desk) -> None:
    machine = machine_of(700)
    desk.save(machine)
    loaded = desk.loaded()
    assert [e.id for e in look.listing(loaded, "q", None, 0, 1000)] == list(range(2, 701))
    check(loaded)


# -- runs and keys are read when they are asked for


def test_an_opening_reads_no_columns(saved: Desk) -> None:
    loaded = saved.loaded()
    assert saved.index.reads == 0
    assert loaded.queues["q"].counts == machine_of().queues["q"].counts
    assert saved.index.reads == 0
    assert look.job(loaded, 2) is not None
    assert saved.index.reads == 1


def test_a_run_that_went_is_not_loaded(desk: Desk) -> None:
    machine = machine_of()
    desk.save(machine)
    numbers = [key for key, _ in runs_in(machine)]
    desk.index.write(LOG_ID, 20, saving.snapshot(machine), runs=[(key, None) for key in numbers], key_counts={1: 1})
    loaded = desk.loaded()
    assert [e.id for e in look.everything(loaded)] == [3]
    assert loaded.next_run == 1


def test_damage_in_the_head_of_a_run_is_found_at_the_opening_that_in_its_columns_when_they_are_read(desk: Desk) -> None:
    machine = machine_of()
    desk.save(machine)
    key, value = runs_in(machine)[0]
    assert value is not None
    head = 4 + int.from_bytes(value[:4], "little")
    desk.index.close()
    for at in range(len(value)):
        desk.put(key, value[:at] + bytes((value[at] ^ 16,)) + value[at + 1 :], b"runs")
        if at < head:
            with pytest.raises(ValueError, match=r"checksum|no run"):
                desk.loaded()
        else:
            loaded = desk.loaded()
            with pytest.raises(StorageError, match="open the directory again"):
                dump(loaded)
            desk.index.close()


def test_a_run_that_is_missing_when_it_is_asked_for_is_a_storage_error(saved: Desk) -> None:
    saved.loaded()
    with pytest.raises(StorageError, match="run 99 cannot be read"):
        saved.index.columns(99)


def test_a_damaged_key_is_found_when_it_is_asked_for(saved: Desk) -> None:
    saved.put(KEY, bytes(24), b"keys")
    loaded = saved.loaded()
    with pytest.raises(StorageError, match="key 'spent' cannot be read"):
        look.find(loaded, "q", "spent", 10)


def test_keys_are_told_in_the_order_in_which_they_end(desk: Desk) -> None:
    keys = {
        (1, "late"): Key(1, 1, 300),
        (1, "soon"): Key(2, 1, 100),
        (2, "soon"): Key(3, 1, 100),
        (1, "lives"): Key(4, 1),
    }
    desk.index.write(LOG_ID, 1, saving.snapshot(Machine()), keys=keys.items())
    assert desk.index.ended_keys(99, 10) == []
    assert desk.index.ended_keys(100, 10) == [(1, "soon"), (2, "soon")]
    assert desk.index.ended_keys(300, 10) == [(1, "soon"), (2, "soon"), (1, "late")]
    assert desk.index.ended_keys(300, 1) == [(1, "soon")]
    assert sorted(desk.index.key_names()) == sorted(keys)
    again = {(1, "soon"): Key(9, 1, 400), (2, "soon"): Key(0, 0), (1, "late"): Key(5, 1)}
    desk.index.write(LOG_ID, 2, saving.snapshot(Machine()), keys=again.items())
    assert desk.index.ended_keys(1000, 10) == [(1, "soon")]
    assert [desk.index.key(*name) for name in keys] == [(5, 0, 1), (9, 400, 1), None, (4, 0, 1)]


key_steps = st.lists(
    st.dictionaries(
        st.tuples(st.integers(1, 2), st.sampled_from(["", "a", "ä", "b", "bb"])),
        st.just((0, 0, 0)) | st.tuples(st.integers(1, 9), st.integers(1, 3), st.sampled_from([0, 1, 255, 256, 2**40])),
        max_size=5,
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(key_steps, st.integers(0, 12), st.sampled_from([0, 1, 255, 2**41]))
def test_keys_that_change_in_any_way_are_known_as_they_were_last_and_end_once(
    steps: list[dict[tuple[int, str], tuple[int, int, int]]], limit: int, now_ms: int
) -> None:
    known: dict[tuple[int, str], tuple[int, int, int]] = {}
    with tempfile.TemporaryDirectory() as path:
        index = Desk(Path(path) / "index").index
        for lsn, changed in enumerate(steps, 1):
            keys = {name: Key(*facts) for name, facts in changed.items()}
            index.write(LOG_ID, lsn, saving.snapshot(Machine()), keys=keys.items())
            known |= changed
            for name, (job_id, segment, expires_ms) in known.items():
                assert index.key(*name) == ((job_id, expires_ms, segment) if job_id else None)
        living = {name: facts for name, facts in known.items() if facts[0]}
        assert sorted(index.key_names()) == sorted(living)
        ends = sorted((ms, number, text.encode()) for (number, text), (_, _, ms) in living.items() if 0 < ms <= now_ms)
        assert index.ended_keys(now_ms, limit) == [(number, text.decode()) for _, number, text in ends[:limit]]
        index.close()


def test_a_closed_index_knows_no_keys_and_no_runs(saved: Desk) -> None:
    saved.loaded()
    saved.index.close()
    assert (saved.index.key(1, "spent"), saved.index.key_names(), saved.index.ended_keys(2**60, 9)) == (None, [], [])
    with pytest.raises(StorageError, match="run 1 cannot be read"):
        saved.index.columns(1)


def test_an_error_of_lmdb_while_a_run_or_a_key_is_read_is_a_storage_error(
    saved: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: bytes, key: bytes) -> bytes | None:
        raise lmdb.CorruptedError("wrong page")

    saved.loaded()
    monkeypatch.setattr(saved.index, "_get", fail)
    with pytest.raises(StorageError, match=r"run 1 cannot be read.*wrong page"):
        saved.index.columns(1)
    with pytest.raises(StorageError, match=r"key 'spent' cannot be read.*wrong page"):
        saved.index.key(1, "spent")


def test_the_longest_key_fits(desk: Desk) -> None:
    name = (2**32 - 1, "k" * 256)
    desk.index.write(LOG_ID, 1, saving.snapshot(Machine()), keys=[(name, Key(1, 1, 2**62))])
    assert desk.index.ended_keys(2**63, 9) == [name]
    assert desk.index.key(*name) == (1, 2**62, 1)


def test_a_run_that_is_written_again_replaces_the_one_with_its_number(desk: Desk) -> None:
    machine = machine_of(40)
    desk.save(machine)
    apply(machine, Leased([11, 21], [10, 11], [1, 1], [90, 95], [(1, 0, 2)]), 12, Place(1, 0, 50))
    assert machine.changes is not None
    assert not machine.changes.gone
    desk.save(machine, applied_lsn=50)
    loaded = desk.loaded()
    assert dump(loaded) == dump(machine)
    assert look.live_bytes(loaded) == look.live_bytes(machine)
    assert loaded.next_run == machine.next_run
    check(loaded)


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_a_loaded_machine_goes_on_like_the_one_that_was_saved(desk: Desk, limit: int) -> None:
    machine = machine_of(60)
    desk.save(machine)
    loaded = desk.loaded()
    for each in (machine, loaded):
        advance(each, 6_000)
        for state, window in waiting_of(each, "q").each():
            ids = look.head(each, window, min(limit, window.count))[0] if state == READY else []
            numbers = list(range(each.next_token, each.next_token + len(ids)))
            if ids:
                apply(each, Leased(ids, numbers, [1] * len(ids), [9_000] * len(ids)), 6_000, Place(2, 0, 80))
                apply(each, Acked(1, ids[::2]), 6_000, Place(2, 0, 81))
        check(each)
    assert dump(loaded) == dump(machine)
    assert look.live_bytes(loaded) == look.live_bytes(machine)
    assert loaded.keys.counts == machine.keys.counts


def test_an_index_that_was_never_opened_has_nothing_to_reopen(desk: Desk) -> None:
    desk.index.reopen()
    assert not desk.path.exists()


def test_a_reopened_index_is_read_as_before_and_may_be_written(saved: Desk) -> None:
    loaded = saved.loaded()
    before = (saved.path / "data.mdb").read_bytes()
    saved.index.reopen()
    assert (saved.path / "data.mdb").read_bytes() == before
    assert dump(loaded) == dump(machine_of())
    assert look.find(loaded, "q", "spent", 10) == 1
    saved.save(machine_of(3), applied_lsn=12)
    assert saved.manifest()["applied_lsn"] == 12


# -- the manifest


def test_a_manifest_tells_how_far_the_index_is(saved: Desk) -> None:
    found = saved.open().manifest(LOG_ID)
    assert found is not None
    assert found.applied_lsn == 9
    assert found.size == (saved.path / "data.mdb").stat().st_size
    assert found.log_id == LOG_ID.hex()


def test_without_files_there_is_no_manifest(desk: Desk) -> None:
    assert desk.index.manifest(LOG_ID) is None


@pytest.mark.parametrize("name", ["manifest", "data.mdb"])
def test_a_missing_file_makes_the_index_useless(saved: Desk, name: str) -> None:
    (saved.path / name).unlink()
    assert saved.open().manifest(LOG_ID) is None


def test_a_manifest_of_another_log_is_none(saved: Desk) -> None:
    assert saved.open().manifest(bytes(16)) is None


@pytest.mark.parametrize(
    "changes", [{"format": 1}, {"size": 1}, {"crc": 0}, {"more": 1}, {"log_id": 5}, {"size": None}], ids=repr
)
def test_a_manifest_that_says_something_else_is_none(saved: Desk, changes: dict[str, Any]) -> None:
    saved.rewrite_manifest()
    assert saved.open().manifest(LOG_ID) is not None
    saved.rewrite_manifest(**changes)
    assert saved.open().manifest(LOG_ID) is None


@pytest.mark.parametrize("content", [b"", b"abc", b"{}", seal(b"manifest", b"[]"), seal(b"manifest", b"no json")])
def test_something_else_is_no_manifest(saved: Desk, content: bytes) -> None:
    (saved.path / "manifest").write_bytes(content)
    assert saved.open().manifest(LOG_ID) is None


def test_a_directory_in_place_of_the_manifest_is_none(saved: Desk) -> None:
    (saved.path / "manifest").unlink()
    (saved.path / "manifest").mkdir()
    assert saved.open().manifest(LOG_ID) is None


def test_one_flipped_bit_in_manifest_or_data_is_noticed(saved: Desk) -> None:
    for name, step in (("manifest", 1), ("data.mdb", 31)):
        path = saved.path / name
        content = path.read_bytes()
        for at in range(0, len(content), step):
            path.write_bytes(content[:at] + bytes((content[at] ^ 1 << at % 8,)) + content[at + 1 :])
            assert saved.open().manifest(LOG_ID) is None, f"{name} at {at}"
        path.write_bytes(content)
    assert saved.open().manifest(LOG_ID) is not None


def test_a_commit_without_its_manifest_is_noticed(saved: Desk) -> None:
    """The process died between the two."""
    manifest = (saved.path / "manifest").read_bytes()
    saved.open().write(LOG_ID, 12, saving.snapshot(machine_of(3)))
    saved.index.close()
    (saved.path / "manifest").write_bytes(manifest)
    assert saved.open().manifest(LOG_ID) is None


# -- the checksums of the values


def test_a_value_that_is_not_whole_is_refused(saved: Desk) -> None:
    job, value = jobs_in(machine_of())[0]
    assert value is not None
    for at in range(len(value)):
        saved.put(job, value[:at] + bytes((value[at] ^ 4,)) + value[at + 1 :], b"jobs")
        with pytest.raises(ValueError, match="checksum"):
            saved.loaded()


def test_a_value_under_another_key_is_refused(saved: Desk) -> None:
    _, value = jobs_in(machine_of())[0]
    saved.put((77).to_bytes(8, "big"), value, b"jobs")
    with pytest.raises(ValueError, match="checksum"):
        saved.loaded()


@pytest.mark.parametrize("value", [None, b"", bytes(24)])
def test_without_whole_counts_of_keys_nothing_is_loaded(saved: Desk, value: bytes | None) -> None:
    saved.put(b"keys per segment", value)
    with pytest.raises(ValueError, match="checksum"):
        saved.loaded()


@pytest.mark.parametrize("value", [None, b"", bytes(50), seal(b"snapshot", b"{}")])
def test_without_a_whole_snapshot_nothing_is_loaded(saved: Desk, value: bytes | None) -> None:
    saved.put(b"snapshot", value)
    with pytest.raises(ValueError, match=r"snapshot|checksum"):
        saved.loaded()


def test_no_data_file_is_an_error_of_lmdb(desk: Desk) -> None:
    with pytest.raises(lmdb.Error):
        desk.loaded()
    assert not desk.path.exists()


# -- what loading leaves


def test_loading_changes_nothing_in_the_directory(saved: Desk) -> None:
    def look() -> dict[str, tuple[bytes, int]]:
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved.path.iterdir()}

    (saved.path / "lock.mdb").unlink(missing_ok=True)
    before = look()
    assert set(before) == {"data.mdb", "manifest"}
    saved.loaded()
    assert saved.open().manifest(LOG_ID) is not None
    assert look() == before


def test_the_files_are_their_owners_alone(saved: Desk) -> None:
    assert saved.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in saved.path.iterdir()} == {0o600}
    assert {"data.mdb", "manifest"} <= {path.name for path in saved.path.iterdir()}


# -- clearing, closing, forgetting


def test_a_cleared_index_begins_anew(desk: Desk) -> None:
    desk.save(machine_of())
    desk.index.clear()
    assert not desk.path.exists()
    desk.index.clear()
    machine = machine_of(2)
    desk.save(machine)
    assert dump(desk.loaded()) == dump(machine)


def test_a_closed_index_may_be_written_again(desk: Desk) -> None:
    desk.index.close()
    desk.save(machine_of())
    desk.index.close()
    desk.index.close()
    desk.save(machine_of(), applied_lsn=10)
    assert desk.manifest()["applied_lsn"] == 10


def test_a_write_into_a_directory_that_is_there_uses_it(desk: Desk) -> None:
    desk.path.mkdir(mode=0o750)
    desk.save(machine_of())
    assert dump(desk.loaded()) == dump(machine_of())


def test_a_forked_child_lets_go_without_touching_the_environment(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []
    monkeypatch.setattr("rivetq.storage.index._LEFT_ALONE", left)
    desk.save(machine_of())
    env = desk.index._env
    desk.index.forget()
    assert left == [env]
    assert env is not None
    assert env.stat()["entries"] == 7, "still open"
    desk.index.close()
    assert env.stat()["entries"] == 7
    env.close()


# -- address space


def refuse_maps(limit: int, error: type[BaseException]) -> Callable[..., lmdb.Environment]:
    real = lmdb.open

    def open_small(path: str, *, map_size: int, **options: Any) -> lmdb.Environment:
        if map_size > limit:
            raise error("no address space")
        return real(path, map_size=map_size, **options)

    return open_small


@pytest.mark.parametrize("error", [lmdb.MemoryError, MemoryError])
def test_where_address_space_is_short_a_smaller_map_serves(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(lmdb, "open", refuse_maps(2**26, error))
    desk.save(machine_of())
    assert desk.index._env is not None
    assert desk.index._env.info()["map_size"] == 2**26 < MAP_BYTES
    desk.index.close()
    assert dump(desk.loaded()) == dump(machine_of())


def test_without_any_address_space_it_is_an_error(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb, "open", refuse_maps(0, lmdb.MemoryError))
    with pytest.raises(lmdb.MemoryError):
        desk.save(machine_of())


def test_no_descriptor_stays_open(saved: Desk) -> None:
    saved.loaded()
    saved.index.close()
    saved.open().manifest(LOG_ID)
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    assert not [target for target in targets if target.startswith(str(saved.path))]

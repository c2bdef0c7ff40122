"""Calls about very many jobs: they are done in parts, and other calls get their turn in between."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import inside, waiting_of

import rivetq.engines.leasing
import rivetq.engines.live
import rivetq.engines.looking
from rivetq import Broker, BrokerClosedError, JobNotFoundError, JobState, Lease, RateLimit, RetryPolicy, StorageError
from rivetq.engine import Once, Take
from rivetq.engines.local import LocalEngine
from rivetq.machine import saving
from rivetq.machine.decide import PART_JOBS
from rivetq.machine.events import Leased, Purged, Redriven
from rivetq.testing import ManualClock

MANY = 3 * PART_JOBS + 7


@pytest.fixture(params=["files", "memory"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    path = ":memory:" if request.param == "memory" else tmp_path / "data"
    with Broker(path, clock=ManualClock(), fsync="never") as broker:
        yield broker
        if inside(broker)._ended is None:
            inside(broker).audit()


@pytest.fixture
def records(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs each record of a purge or a redrive has."""
    found: list[int] = []
    engine = inside(broker)
    record = engine._record

    def noting(events: Any, now_ms: int, keep_reserve: bool = False) -> int:
        found.extend(len(event.ids) for event in events if isinstance(event, Purged | Redriven))
        return record(events, now_ms, keep_reserve)

    monkeypatch.setattr(engine, "_record", noting)
    return found


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Do something once between two parts of a call: it would hang if the lock were held."""

    def arrange(act: Callable[[], object]) -> None:
        acts = [act]
        monkeypatch.setattr(rivetq.engines.live, "give_turn", lambda: acts.pop()() if acts else None)

    return arrange


def bury(broker: Broker, count: int, **options: Any) -> list[int]:
    """So many dead letters."""
    ids = list(broker.enqueue_many("q", [b"job"] * count, max_attempts=1, **options))
    for start in range(0, count, 1000):
        leases = broker.lease_many("q", min(1000, count - start))
        with broker.transaction() as transaction:
            for lease in leases:
                transaction.reject(lease)
    return ids


def dead(broker: Broker) -> list[int]:
    found: list[int] = []
    while part := broker.dead_letters("q", after=found[-1] if found else 0, limit=10_000):
        found += [job.id for job in part]
    return found


# Purge


@pytest.mark.parametrize("delay", [0, 60])
def test_a_purge_of_many_jobs_goes_in_records_of_a_bounded_size(
    broker: Broker, records: list[int], delay: float
) -> None:
    broker.enqueue_many("q", [b"job"] * MANY, delay=delay)
    kept = broker.enqueue("other", b"job")
    assert broker.purge("q") == MANY
    assert max(records) <= PART_JOBS
    assert sum(records) == MANY
    assert (broker.stats("q").purged, broker.stats("q").ready, broker.stats("q").scheduled) == (MANY, 0, 0)
    assert broker.get(kept) is not None


def test_what_comes_while_a_purge_goes_on_stays(
    broker: Broker, between: Callable[[Callable[[], object]], None]
) -> None:
    broker.enqueue_many("q", [b"job"] * MANY)
    came: list[int] = []
    between(lambda: came.extend(broker.enqueue_many("q", [b"new"] * 10)))
    assert broker.purge("q") == MANY
    assert [job.id for job in broker.jobs("q", limit=100)] == came != []


def test_jobs_of_all_states_and_places_are_purged(broker: Broker, records: list[int]) -> None:
    bury(broker, 1500)
    broker.enqueue_many("q", [b"job"] * 1500, delay=60)
    broker.enqueue_many("q", [b"job"] * 1500, priority=9)
    leases = broker.lease_many("q", 700)
    for lease in leases[:300]:
        lease.release()  # single ones
    assert broker.purge("q", state="dead") == 1500
    assert broker.purge("q") == 1500 + 1500 - 400
    assert (broker.stats("q").leased, broker.stats("q").ready, broker.stats("q").dead) == (400, 0, 0)
    assert max(records) <= PART_JOBS


# Redrive


def test_a_redrive_of_many_goes_in_records_of_a_bounded_size(broker: Broker, records: list[int]) -> None:
    ids = bury(broker, MANY)
    assert broker.redrive("q") == MANY
    assert max(records) <= PART_JOBS
    assert (broker.stats("q").ready, broker.stats("q").dead) == (MANY, 0)
    assert [lease.id for lease in broker.lease_many("q", MANY)] == ids


def test_a_job_that_dies_again_meanwhile_is_not_brought_back_for_ever(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury(broker, MANY)

    def die() -> None:
        with broker.transaction() as transaction:
            for lease in broker.lease_many("q", 1000):
                transaction.reject(lease)

    monkeypatch.setattr(rivetq.engines.live, "give_turn", die)
    assert broker.redrive("q") <= MANY


def test_a_redrive_of_some_of_many_takes_the_lowest_ids(broker: Broker) -> None:
    ids = bury(broker, MANY)
    assert broker.redrive("q", limit=PART_JOBS + 5) == PART_JOBS + 5
    assert dead(broker) == ids[PART_JOBS + 5 :]
    assert broker.redrive("q", limit=3) == 3
    assert dead(broker) == ids[PART_JOBS + 8 :]
    assert broker.redrive("q", limit=0) == 0


def test_a_redrive_of_many_ids_changes_nothing_if_one_is_no_dead_letter(broker: Broker, records: list[int]) -> None:
    ids = bury(broker, MANY)
    ready = broker.enqueue("q", b"job")
    with pytest.raises(JobNotFoundError) as caught:
        broker.redrive("q", job_ids=[*ids, ready])
    assert caught.value.job_id == ready
    assert not records
    assert caught.value.outcome == "not_done"
    assert broker.redrive("q", job_ids=reversed(ids)) == MANY
    assert max(records) <= PART_JOBS


def test_what_another_call_took_meanwhile_is_left_out_of_a_redrive(
    broker: Broker, between: Callable[[Callable[[], object]], None]
) -> None:
    ids = bury(broker, MANY)
    between(lambda: [broker.cancel(ids[-1]), broker.redrive("q", job_ids=[ids[-2]])])
    assert broker.redrive("q", job_ids=ids) == MANY - 2
    assert (broker.stats("q").ready, broker.stats("q").cancelled) == (MANY - 1, 1)


# What breaks in


def test_a_crash_between_two_parts_leaves_the_rest(
    tmp_path: Path, between: Callable[[Callable[[], object]], None]
) -> None:
    with Broker(tmp_path / "data", clock=ManualClock(), fsync="never") as broker:
        broker.enqueue_many("q", [b"job"] * MANY)
        between(
            lambda: shutil.copytree(tmp_path / "data", tmp_path / "killed", ignore=shutil.ignore_patterns("spare-*"))
        )
        assert broker.purge("q") == MANY
    with Broker(tmp_path / "killed", clock=ManualClock(), fsync="never") as broker:
        stats = broker.stats("q")
        assert (stats.purged, stats.ready) == (PART_JOBS, MANY - PART_JOBS)
        inside(broker).audit()
        assert broker.purge("q") == MANY - PART_JOBS


def test_an_error_between_two_parts_has_an_unknown_outcome(
    broker: Broker, between: Callable[[Callable[[], object]], None]
) -> None:
    broker.enqueue_many("q", [b"job"] * MANY)
    between(broker.close)
    with pytest.raises(BrokerClosedError) as caught:
        broker.purge("q")
    assert caught.value.outcome == "unknown"
    with pytest.raises(BrokerClosedError) as caught:
        broker.purge("q")
    assert caught.value.outcome == "not_done"


@pytest.mark.parametrize("killed", [False, True])
def test_an_opening_ends_many_leases_in_records_of_a_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """A process that dies between two of them leaves the rest to the next opening."""
    clock = ManualClock()
    with Broker(tmp_path / "data", clock=clock, fsync="never") as broker:
        broker.enqueue_many("q", [b"job"] * MANY)
        assert len(broker.lease_many("q", MANY, visibility_timeout=3600)) == MANY
    parts: list[int] = []
    change = LocalEngine._change

    def noting(engine: LocalEngine, plan: Any, **options: Any) -> Any:
        answer = change(engine, plan, **options)
        if isinstance(answer, list):
            parts.append(len(answer))
            if killed and len(parts) == 2:
                raise OSError("killed")
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(LocalEngine, "_change", noting)
        if killed:
            with pytest.raises(StorageError):
                Broker(tmp_path / "data", clock=clock, fsync="never")
        with Broker(tmp_path / "data", clock=clock, fsync="never") as broker:
            assert (broker.stats("q").ready, broker.stats("q").leased) == (MANY, 0)
            assert {job.last_error for job in broker.jobs("q", limit=10_000)} == {"owner gone"}
            inside(broker).audit()
    assert max(parts) <= PART_JOBS
    assert sum(parts) == MANY


# Listings


@pytest.mark.parametrize("state", [None, JobState.SCHEDULED])
@pytest.mark.parametrize("limit", [1, 50, 1500, 10_000])
def test_a_long_listing_is_that_of_one_look(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, state: JobState | None, limit: int
) -> None:
    bury(broker, 50)
    for n in range(120):  # in another order of due moments than of ids
        broker.enqueue_many("q", [b"job"] * 20, delay=1000 - n * 7 % 120)
        broker.enqueue("q", b"job", priority=9)
        broker.enqueue("q", b"job", delay=60 + n * 31 % 120, priority=7)
    for lease in broker.lease_many("q", 30):
        broker.nack(lease, delay=100)
    for after in (0, 1000):
        expected = broker.jobs("q", state=state, after=after, limit=limit)
        with monkeypatch.context() as patched:
            patched.setattr(rivetq.engines.looking, "FEW_SCHEDULED", 10)
            patched.setattr(rivetq.machine.decide, "PART_JOBS", 7)
            patched.setattr(rivetq.engines.looking, "RUNS_AT_ONCE", 2)
            assert broker.jobs("q", state=state, after=after, limit=limit) == expected
    assert [job.id for job in expected] == sorted({job.id for job in expected})


@pytest.mark.parametrize("change", ["falls due", "comes back", "is packed"])
def test_a_job_that_changes_while_a_listing_goes_on_is_there_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """It was there before and after."""
    broker.configure_queue("q", retry=RetryPolicy(base=500, jitter="none"))
    first = broker.enqueue("q", b"first", priority=9)
    lease = broker.lease("q")
    assert lease is not None
    broker.enqueue_many("q", [b"job"] * 200, delay=0 if change == "is packed" else 60)
    if change == "is packed":
        for each in broker.lease_many("q", 200):
            each.release(delay=60)  # single ones
    engine = inside(broker)
    monkeypatch.setattr(rivetq.engines.looking, "FEW_SCHEDULED", 10)
    monkeypatch.setattr(rivetq.machine.decide, "PART_JOBS", 50)
    looks = 0
    look = engine._look

    def changing(read: Any) -> Any:
        nonlocal looks
        looks += 1
        value = look(read)
        if looks == 3:
            if change == "falls due":
                engine.clock.advance(61)  # type: ignore[attr-defined]  # a manual one
            elif change == "comes back":
                monkeypatch.setattr(engine, "_look", look)
                broker.nack(lease)
                monkeypatch.setattr(engine, "_look", changing)
            else:
                window = waiting_of(engine._machine, "q").windows(1)[0]
                with engine._lock:
                    saving.pack(engine._machine, 1, window, 100)
        return value

    monkeypatch.setattr(engine, "_look", changing)
    found = [job.id for job in broker.jobs("q", limit=1000)]
    assert looks > 3
    assert found == list(range(first, first + 201))


# Leases

LARGE = 25


@pytest.fixture
def leased(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs each record of a lease has; ten at most."""
    monkeypatch.setattr(rivetq.engines.leasing, "PART_LEASES", 10)
    found: list[int] = []
    engine = inside(broker)
    record = engine._record

    def noting(events: Any, now_ms: int, keep_reserve: bool = False) -> int:
        found.extend(len(event.ids) for event in events if isinstance(event, Leased))
        return record(events, now_ms, keep_reserve)

    monkeypatch.setattr(engine, "_record", noting)
    return found


def leases_soon(broker: Broker, **options: Any) -> list[Lease]:
    over = threading.Event()
    told: list[Any] = []
    broker.lease_soon("q", LARGE, lambda *each: (told.append(each), over.set())[0], **options)
    assert over.wait(20)
    ((leases, error),) = told
    assert error is None
    return list(leases)


def leases_at_once(broker: Broker, **options: Any) -> list[Lease]:
    return broker.lease_many("q", LARGE, **options)


def leases_that_wait(broker: Broker, **options: Any) -> list[Lease]:
    return broker.lease_many("q", LARGE, wait=20, **options)


HOW = [leases_at_once, leases_that_wait, leases_soon]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("waiting", [9, 10, 11, 20, 25, 40])
def test_a_large_lease_is_taken_in_records_of_a_bounded_size(
    broker: Broker, leased: list[int], how: Callable[..., list[Lease]], waiting: int
) -> None:
    ids = broker.enqueue_many("q", [b"job"] * waiting)
    leases = how(broker, visibility_timeout=30)
    assert [lease.id for lease in leases] == list(ids)[:LARGE]
    assert {lease.granted for lease in leases} == {30}
    assert len({lease.token for lease in leases}) == len(leases)
    assert max(leased) <= 10
    assert sum(leased) == len(leases) == broker.stats("q").leased
    broker.ack_many(leases)


@pytest.mark.parametrize("how", HOW)
def test_the_parts_of_a_large_lease_share_its_bytes(
    broker: Broker, leased: list[int], how: Callable[..., list[Lease]]
) -> None:
    broker.enqueue_many("q", [b"x" * 10] * 40)
    assert len(how(broker, max_bytes=145)) == 14
    assert leased == [10, 4]
    assert len(how(broker, max_bytes=105)) == 10


@pytest.mark.parametrize("how", HOW)
def test_a_large_lease_keeps_to_the_rate_of_its_queue(
    broker: Broker, leased: list[int], how: Callable[..., list[Lease]]
) -> None:
    broker.configure_queue("q", rate_limit=RateLimit(1, 13))
    broker.enqueue_many("q", [b"x"] * 40)
    assert len(how(broker)) == 13
    assert sum(leased) == 13


@pytest.mark.parametrize("how", HOW)
def test_what_a_large_lease_took_is_handed_out_though_its_rest_fails(
    broker: Broker, leased: list[int], how: Callable[..., list[Lease]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.enqueue_many("q", [b"x"] * 40)

    def full() -> None:
        raise StorageError("no space")

    monkeypatch.setattr(rivetq.engines.leasing, "give_turn", full)
    assert len(how(broker)) == 10
    monkeypatch.undo()


def test_other_calls_get_their_turn_between_two_parts_of_a_lease(
    broker: Broker, leased: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.enqueue_many("q", [b"x"] * 40)
    told: list[int] = []

    def urgent() -> None:
        told.append(broker.enqueue("q", b"now", priority=9))

    monkeypatch.setattr(rivetq.engines.leasing, "give_turn", lambda: urgent() if not told else None)
    ids = [lease.id for lease in broker.lease_many("q", LARGE)]
    assert ids[10] == told[0], "each part takes the most urgent ones that there are by then"


def test_a_large_lease_with_a_number_is_one_part(broker: Broker, leased: list[int]) -> None:
    broker.enqueue_many("q", [b"x"] * 40)
    request = Take(["q"], LARGE, once=Once(1, 1))
    grants = broker._engine.call(request)
    assert len(grants) == 10
    assert [grant.token for grant in broker._engine.call(request)] == [grant.token for grant in grants]

"""The machine by itself: events go in by hand, and after each of them `check` looks at everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rivetq.events import (
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
from rivetq.machine import NEVER_MS, Machine
from rivetq.model import NO_HEADERS, QueueConfig, QueueStats, RateLimit, RetryPolicy, read_only
from rivetq.ratelimit import TokenBucket
from rivetq.state import (
    COPY_BYTES,
    DEAD,
    JOB_BYTES,
    KEY_BYTES,
    LEASED,
    READY,
    RECORD_BYTES,
    SCHEDULED,
    Changes,
    Entry,
    Place,
    Queue,
    Snapshot,
    Spec,
)

NOW = 1_000_000
POLICY = RetryPolicy()
MAIL, AUDIT = 1, 2
TTL_MS = 86_400_000


class Bench:
    """A machine with two queues, a clock that is a number, and a place in the log."""

    def __init__(self, *, keep_payloads: bool = False, config: QueueConfig | None = None) -> None:
        self.machine = Machine(keep_payloads=keep_payloads)
        self.now = NOW
        self.place = Place() if keep_payloads else Place(1, 1000, 1)
        self.apply(QueueCreated(MAIL, "mail"), QueueCreated(AUDIT, "audit"))
        if config is not None:
            self.apply(QueueConfigured(MAIL, config))
        self.machine.woken.clear()

    def apply(self, *events: Event, at: int | None = None) -> None:
        """As one call does it: the clock acts, then the events, then everything is looked at."""
        if at is not None:
            self.now = at
        self.machine.advance(self.now)
        for event in events:
            self.machine.apply(event, self.now, self.place)
            self.machine.check()

    def enqueue(self, count: int = 1, **options: Any) -> list[int]:
        event = enqueued(self.machine.next_id, count, **options)
        self.apply(event)
        return list(range(event.first_id, event.first_id + count))

    def lease(self, *ids: int, deadline: int = 30_000) -> list[int]:
        """Tokens of new deliveries, which end `deadline` ms from now."""
        first = self.machine.next_token
        tokens = list(range(first, first + len(ids)))
        attempts = [self.machine.jobs[i].attempts + 1 for i in ids]
        self.apply(Leased(ids, tokens, attempts, [self.now + deadline] * len(ids)))
        return tokens

    def bury(self, *ids: int) -> None:
        for job_id in ids:
            self.apply(Buried(job_id, self.now, "no good"))

    def states(self, name: str = "mail") -> dict[str, list[int]]:
        queue = self.machine.queues[name]
        found = {"ready": READY, "scheduled": SCHEDULED, "leased": LEASED, "dead": DEAD}
        return {text: ids for text, state in found.items() if (ids := queue.ids(state))}

    @property
    def mail(self) -> Queue:
        return self.machine.queues["mail"]


def enqueued(
    first_id: int,
    count: int = 1,
    *,
    queue: int = MAIL,
    priority: int = 5,
    due: int = 0,
    keys: Sequence[str | None] | None = None,
    length: int = 10,
    max_attempts: int | None = 5,
) -> Enqueued:
    payloads = [bytes([65 + i % 26]) * length for i in range(count)]
    return Enqueued(
        queue, first_id, priority, due, max_attempts, POLICY, None, [length] * count, payloads, NO_HEADERS, keys,
        crcs=[1000 + i for i in range(count)], payload_at=40,
    )  # fmt: skip


def copied(entry: Entry, **changes: Any) -> Copied:
    """What a compaction writes of a job as it is."""
    spec = entry.spec
    event = Copied(
        entry.id, entry.queue.number, entry.state, spec.priority, entry.attempts, entry.token, spec.max_attempts,
        spec.retry, spec.visibility_ms, entry.enqueued_at_ms, entry.due_ms, entry.deadline_ms, entry.died_at_ms,
        entry.last_error, spec.headers, entry.key, entry.length, entry.crc, b"x" * entry.length, payload_at=7,
    )  # fmt: skip
    return attrs.evolve(event, **changes)


# Enqueue


def test_a_new_job_is_ready_and_carries_what_the_event_says() -> None:
    bench = Bench()
    event = attrs.evolve(enqueued(1, keys=["k"]), headers=read_only({"h": "1"}), visibility_ms=7, priority=3)
    bench.apply(event)
    entry = bench.machine.jobs[1]
    assert (entry.id, entry.queue, entry.state, entry.attempts, entry.token) == (1, bench.mail, READY, 0, 0)
    assert (entry.enqueued_at_ms, entry.due_ms, entry.last_error, entry.key) == (NOW, 0, None, "k")
    spec = entry.spec
    assert (spec.priority, spec.max_attempts, spec.retry, spec.visibility_ms, spec.headers) == (
        3, 5, POLICY, 7, {"h": "1"},
    )  # fmt: skip
    assert bench.states() == {"ready": [1]}
    assert bench.machine.next_id == 2
    assert bench.machine.woken == {"mail"}


def test_jobs_of_one_batch_share_what_they_have_in_common() -> None:
    bench = Bench()
    bench.enqueue(3)
    assert len({id(bench.machine.jobs[i].spec) for i in (1, 2, 3)}) == 1


def test_each_job_of_a_batch_knows_where_its_payload_is() -> None:
    bench = Bench()
    bench.enqueue(3, length=10)
    jobs = bench.machine.jobs
    assert [jobs[i].offset for i in (1, 2, 3)] == [1040, 1050, 1060]
    assert [jobs[i].crc for i in (1, 2, 3)] == [1000, 1001, 1002]
    assert {(e.segment, e.lsn, e.length, e.payload) for e in jobs.values()} == {(1, 1, 10, None)}
    assert {e.size for e in jobs.values()} == {10 + RECORD_BYTES // 3 + JOB_BYTES}
    assert bench.machine.live == {1: sum(e.size for e in jobs.values())}


def test_without_files_the_payload_stays_with_the_job() -> None:
    bench = Bench(keep_payloads=True)
    bench.enqueue(2, length=3)
    assert [bench.machine.jobs[i].payload for i in (1, 2)] == [b"AAA", b"BBB"]
    assert bench.machine.live == {}
    assert bench.machine.changes is None


def test_ready_jobs_are_found_by_priority_and_then_by_id() -> None:
    bench = Bench()
    for priority in (5, 9, 0, 9):
        bench.enqueue(priority=priority)
    assert [list(w.after(0)) for w in reversed(bench.mail.ready) if len(w)] == [[2, 4], [1], [3]]
    assert list(bench.mail.ids_after(READY, 1)) == [2, 3, 4]


def test_a_job_with_a_delay_is_scheduled_and_becomes_ready_at_its_moment_not_before() -> None:
    bench = Bench()
    bench.enqueue(2, due=NOW + 500)
    assert bench.states() == {"scheduled": [1, 2]}
    assert bench.machine.woken == set()
    assert bench.machine.next_wakeup_ms() == NOW + 500
    bench.apply(at=NOW + 499)
    assert bench.states() == {"scheduled": [1, 2]}
    bench.apply(at=NOW + 500)
    bench.machine.check()
    assert bench.states() == {"ready": [1, 2]}
    assert bench.machine.woken == {"mail"}
    assert bench.machine.next_wakeup_ms() is None


def test_a_moment_that_has_passed_means_now() -> None:
    bench = Bench()
    bench.enqueue(due=NOW)
    bench.enqueue(due=NOW - 1)
    assert bench.states() == {"ready": [1, 2]}


def test_delays_fall_due_one_after_the_other() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 300)
    bench.enqueue(due=NOW + 100, queue=AUDIT)
    bench.enqueue(due=NOW + 200)
    seen = []
    while (at := bench.machine.next_wakeup_ms()) is not None:
        bench.apply(at=at)
        bench.machine.check()
        seen.append((at - NOW, bench.states().get("ready", []), bench.states("audit").get("ready", [])))
    assert seen == [(100, [], [2]), (200, [3], [2]), (300, [1, 3], [2])]


def test_a_queue_that_is_paused_wakes_nobody_until_it_is_resumed() -> None:
    bench = Bench(config=QueueConfig(paused=True))
    bench.enqueue()
    assert bench.machine.woken == set()
    bench.apply(QueueConfigured(MAIL, QueueConfig()))
    assert bench.machine.woken == {"mail"}


def test_a_resumed_queue_without_ready_jobs_wakes_nobody() -> None:
    bench = Bench(config=QueueConfig(paused=True))
    bench.apply(QueueConfigured(MAIL, QueueConfig()))
    assert bench.machine.woken == set()


def test_each_new_job_costs_a_token_where_the_limit_is_on_enqueue() -> None:
    bench = Bench(config=QueueConfig(rate_limit=RateLimit(1, 5, "enqueue")))
    bench.enqueue(3)
    bench.lease(1)
    assert bench.mail.bucket is not None
    assert bench.mail.bucket.available(bench.now) == 2


def test_each_delivery_costs_a_token_where_the_limit_is_on_lease() -> None:
    bench = Bench(config=QueueConfig(rate_limit=RateLimit(1, 5, "lease")))
    bench.enqueue(3)
    bench.lease(1, 2)
    assert bench.mail.bucket is not None
    assert bench.mail.bucket.available(bench.now) == 3


# The ways of a delivery


def test_a_leased_job_is_nobody_else_s_and_knows_its_delivery() -> None:
    bench = Bench()
    bench.enqueue(3)
    assert bench.lease(1, 3, deadline=500) == [1, 2]
    entry = bench.machine.jobs[3]
    assert (entry.token, entry.attempts, entry.deadline_ms) == (2, 1, NOW + 500)
    assert bench.states() == {"ready": [2], "leased": [1, 3]}
    assert bench.machine.next_token == 3
    assert bench.machine.next_wakeup_ms() == NOW + 500


def test_an_acked_job_is_gone_and_counted() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1, 2)
    bench.apply(Acked(MAIL, [1, 2]))
    assert bench.states() == {}
    assert (bench.machine.jobs, bench.mail.acked) == ({}, 2)
    assert bench.machine.live == {1: 0}


def test_a_retried_job_waits_in_its_place_with_its_error() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1, 2)
    bench.apply(Retried(1, NOW + 500, "boom"), Retried(2, NOW, None))
    assert bench.states() == {"ready": [2], "scheduled": [1]}
    first, second = bench.machine.jobs[1], bench.machine.jobs[2]
    assert (first.last_error, first.due_ms, first.attempts) == ("boom", NOW + 500, 1)
    assert (second.last_error, second.attempts) == (None, 1)


def test_a_released_job_gets_its_attempt_back_and_keeps_its_last_error() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1)
    bench.apply(Retried(1, NOW, "boom"))
    bench.lease(1)
    bench.apply(Released(1, NOW + 100, 1))
    entry = bench.machine.jobs[1]
    assert (entry.attempts, entry.last_error, bench.states()) == (1, "boom", {"scheduled": [1]})
    bench.apply(at=NOW + 100)
    assert bench.states() == {"ready": [1]}


def test_a_buried_job_is_a_dead_letter_until_it_is_redriven() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1)
    bench.apply(Buried(1, NOW - 5, "no good"))
    entry = bench.machine.jobs[1]
    assert (bench.states(), entry.died_at_ms, entry.last_error) == ({"dead": [1]}, NOW - 5, "no good")
    bench.machine.woken.clear()
    bench.apply(Redriven([1]))
    assert (bench.states(), entry.died_at_ms, entry.attempts) == ({"ready": [1]}, 0, 0)
    assert entry.last_error == "no good"
    assert bench.machine.woken == {"mail"}


def test_an_extended_lease_ends_at_its_new_deadline() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1, deadline=100)
    bench.apply(Extended(1, NOW + 900))
    assert bench.machine.jobs[1].deadline_ms == NOW + 900
    assert bench.machine.ended_leases(NOW + 899, 10) == []
    assert bench.machine.ended_leases(NOW + 900, 10) == [(NOW + 900, 1)]
    assert bench.machine.next_wakeup_ms() == NOW + 900


def test_cancelled_and_purged_jobs_are_gone_and_counted() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.enqueue(due=NOW + 10)
    bench.enqueue()
    bench.bury(4)
    bench.apply(Cancelled(MAIL, 3), Cancelled(MAIL, 1), Purged(MAIL, [2, 4]))
    assert (bench.states(), bench.mail.cancelled, bench.mail.purged) == ({}, 2, 2)
    assert bench.machine.next_wakeup_ms() is None


# Tolerance


UNKNOWN: list[Event] = [
    Leased([99], [50], [1], [NOW + 10]),
    Retried(99, NOW + 5, "e"),
    Released(99, NOW + 5, 0),
    Buried(99, NOW, "e"),
    Extended(99, NOW + 10),
    Redriven([99, 98]),
]


@pytest.mark.parametrize("event", UNKNOWN, ids=lambda event: type(event).__name__)
def test_an_event_about_an_unknown_job_is_skipped(event: Event) -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1)
    before = bench.machine.dump()
    bench.apply(event)
    assert bench.machine.dump() == before
    assert bench.machine.changes is not None
    assert 99 not in bench.machine.changes.jobs


@pytest.mark.parametrize(
    ("event", "total"),
    [(Acked(MAIL, [98, 99]), "acked"), (Cancelled(MAIL, 99), "cancelled"), (Purged(MAIL, [97, 98, 99]), "purged")],
)
def test_the_totals_of_an_event_about_unknown_jobs_are_counted(event: Event, total: str) -> None:
    machine = Bench().machine
    machine.apply(event, NOW, Place(1, 0, 2))
    expected = 1 if isinstance(event, Cancelled) else len(event.ids)  # type: ignore[union-attr]
    assert getattr(machine.queues["mail"], total) == expected


def test_tokens_go_on_above_those_of_unknown_jobs() -> None:
    bench = Bench()
    bench.apply(Leased([98, 99], [50, 51], [1, 1], [NOW, NOW]))
    assert bench.machine.next_token == 52
    bench.enqueue()
    bench.apply(Leased([1], [7], [1], [NOW + 1]))
    assert bench.machine.next_token == 52


def test_a_lease_of_a_job_that_is_leased_already_moves_it_to_the_new_delivery() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1, deadline=900)
    bench.apply(Leased([1], [9], [4], [NOW + 50]))
    entry = bench.machine.jobs[1]
    assert (entry.token, entry.attempts, entry.deadline_ms, bench.states()) == (9, 4, NOW + 50, {"leased": [1]})
    bench.apply(Acked(MAIL, [1]))


@pytest.mark.parametrize("state", ["ready", "scheduled", "leased", "dead"])
@pytest.mark.parametrize(
    "event",
    [
        Leased([1], [9], [2], [NOW + 10]), Retried(1, NOW + 5, "e"), Retried(1, 0, "e"), Released(1, 0, 0),
        Buried(1, NOW, "e"), Redriven([1]), Acked(MAIL, [1]), Cancelled(MAIL, 1), Purged(MAIL, [1]),
        Extended(1, NOW + 99), enqueued(1), enqueued(1, due=NOW + 7),
    ],
    ids=lambda event: type(event).__name__ if not isinstance(event, str) else event,
)  # fmt: skip
def test_an_event_applied_twice_leaves_what_it_says(event: Event, state: str) -> None:
    """Whatever the state that it meets, which may be a later one; a replay does just that."""
    bench = Bench()
    bench.enqueue(due=NOW + 50 if state == "scheduled" else 0)
    if state == "leased":
        bench.lease(1)
    elif state == "dead":
        bench.bury(1)
    apply_uncounted(bench, event)
    once = bench.machine.dump()["jobs"]
    apply_uncounted(bench, event)
    assert bench.machine.dump()["jobs"] == once


def apply_uncounted(bench: Bench, event: Event) -> None:
    """Apply an event and take back what it counts twice, so that the sums of `check` still hold."""
    machine, queue = bench.machine, bench.mail
    machine.apply(event, bench.now, bench.place)
    if isinstance(event, Acked | Cancelled | Purged):
        queue.acked = queue.cancelled = queue.purged = 0
    queue.enqueued = len(machine.jobs)
    machine.check()


def test_an_extension_of_a_lease_that_ended_changes_nothing() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1)
    bench.apply(Retried(1, NOW, None))
    before, deadline_ms = bench.machine.dump(), bench.machine.jobs[1].deadline_ms
    bench.apply(Extended(1, NOW + 10**6))
    assert bench.machine.dump() == before
    assert bench.machine.jobs[1].deadline_ms == deadline_ms


def test_an_enqueue_of_a_known_job_replaces_it() -> None:
    bench = Bench()
    bench.enqueue(keys=["k"])
    bench.lease(1)
    apply_uncounted(bench, enqueued(1, keys=["k"]))
    entry = bench.machine.jobs[1]
    assert (entry.state, entry.attempts, entry.token) == (READY, 0, 0)
    assert bench.machine.find("mail", "k", NOW) == 1
    assert bench.machine.live == {1: entry.size}


def test_a_known_job_that_is_enqueued_again_is_still_in_the_index() -> None:
    bench = Bench()
    bench.enqueue()
    bench.machine.jobs[1].indexed = True
    apply_uncounted(bench, enqueued(1))
    bench.lease(1)
    bench.apply(Acked(MAIL, [1]))
    assert bench.machine.changes is not None
    assert bench.machine.changes.jobs == {1}, "its end has to be written"


def test_an_enqueue_of_an_old_job_does_not_lower_the_next_id() -> None:
    bench = Bench()
    bench.enqueue(9)
    apply_uncounted(bench, enqueued(1))
    assert bench.machine.next_id == 10


def test_a_queue_that_is_created_twice_is_one_queue() -> None:
    bench = Bench()
    bench.enqueue()
    queue = bench.mail
    bench.apply(QueueCreated(MAIL, "mail"))
    assert bench.mail is queue
    assert bench.states() == {"ready": [1]}


# Ids


def test_ids_are_taken_below_the_reservation_only() -> None:
    machine = Bench().machine
    machine.apply(IdsReserved(11), NOW, Place(1, 0, 2))
    assert machine.take_ids(4) == 1
    assert machine.take_ids(6) == 5
    assert (machine.next_id, machine.reserved_id) == (11, 11)
    with pytest.raises(AssertionError, match="ids up to 12 told, reserved are 11"):
        machine.take_ids(1)


def test_ids_that_may_have_been_told_are_not_given_again_after_a_start() -> None:
    bench = Bench()
    bench.apply(IdsReserved(100))
    bench.enqueue()
    assert bench.machine.next_id == 2
    bench.machine.start(bench.now, 1)
    assert bench.machine.next_id == 100


def test_tokens_go_on_above_all_former_ones_after_a_start() -> None:
    bench = Bench()
    bench.machine.start(NOW, 500)
    assert bench.machine.next_token == 500
    bench.machine.start(NOW, 7)
    assert bench.machine.next_token == 500


def test_buckets_are_full_after_a_start() -> None:
    bench = Bench(config=QueueConfig(rate_limit=RateLimit(0.001, 3, "enqueue")))
    bench.enqueue(3)
    bench.machine.start(NOW, 1)
    assert bench.mail.bucket is not None
    assert bench.mail.bucket.available(NOW) == 3
    assert bench.machine.queues["audit"].bucket is None


def test_a_start_lets_the_clock_act() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 100)
    bench.machine.start(NOW + 100, 1)
    bench.machine.check()
    assert bench.states() == {"ready": [1]}


# Configurations


def test_a_configuration_holds_from_the_event_on() -> None:
    config = QueueConfig(visibility_timeout=1.5, idempotency_ttl=0.25, max_jobs=3, rate_limit=RateLimit(1, 2))
    bench = Bench(config=config)
    assert bench.mail.config is config
    assert (bench.mail.visibility_ms, bench.mail.ttl_ms) == (1500, 250)
    assert bench.machine.queues["audit"].config == QueueConfig()


def test_a_bucket_is_kept_while_its_limit_is_the_same_and_new_with_another() -> None:
    limit = RateLimit(1, 5, "enqueue")
    bench = Bench(config=QueueConfig(rate_limit=limit))
    bench.enqueue(5)
    bucket = bench.mail.bucket
    bench.apply(QueueConfigured(MAIL, QueueConfig(rate_limit=RateLimit(1, 5, "enqueue"), max_jobs=9)))
    assert bench.mail.bucket is bucket
    bench.apply(QueueConfigured(MAIL, QueueConfig(rate_limit=RateLimit(1, 6, "enqueue"))))
    assert isinstance(bench.mail.bucket, TokenBucket)
    assert bench.mail.bucket.available(NOW) == 6
    bench.apply(QueueConfigured(MAIL, QueueConfig()))
    assert bench.mail.bucket is None


# Time


def test_the_time_line_never_steps_back() -> None:
    machine = Bench().machine
    machine.advance(NOW)
    with pytest.raises(AssertionError, match=f"time line stepped back: {NOW} -> {NOW - 1}"):
        machine.advance(NOW - 1)
    assert machine.now_ms == NOW


def test_the_next_wake_up_is_the_first_of_delays_and_deadlines() -> None:
    bench = Bench()
    assert bench.machine.next_wakeup_ms() is None
    assert bench.machine.wake_ms == NEVER_MS
    bench.enqueue(2)
    bench.lease(1, deadline=700)
    bench.enqueue(due=NOW + 900)
    assert bench.machine.next_wakeup_ms() == bench.machine.wake_ms == NOW + 700
    bench.enqueue(due=NOW + 300)
    assert bench.machine.wake_ms == NOW + 300, "known before anybody asks"
    assert bench.machine.next_wakeup_ms() == NOW + 300


def test_nobody_is_woken_for_the_end_of_a_key_but_the_machine_looks_at_it() -> None:
    bench = Bench(config=QueueConfig(idempotency_ttl=1))
    bench.enqueue(keys=["k"])
    bench.apply(Cancelled(MAIL, 1))
    assert bench.machine.next_wakeup_ms() is None
    assert bench.machine.wake_ms == NOW + 1000
    bench.apply(at=NOW + 1000)
    assert bench.machine.wake_ms == NEVER_MS


def test_leases_that_ended_come_earliest_first_and_stay_until_an_event_says_so() -> None:
    bench = Bench()
    bench.enqueue(4)
    for job_id, deadline in ((1, 300), (2, 100), (3, 200), (4, 400)):
        bench.lease(job_id, deadline=deadline)
    for _ in range(2):
        assert bench.machine.ended_leases(NOW + 300, 10) == [(NOW + 100, 2), (NOW + 200, 3), (NOW + 300, 1)]
        assert bench.machine.ended_leases(NOW + 300, 2) == [(NOW + 100, 2), (NOW + 200, 3)]
    assert bench.machine.ended_leases(NOW + 99, 10) == []
    bench.apply(Retried(2, NOW, "lease expired"))
    assert bench.machine.ended_leases(NOW + 300, 1) == [(NOW + 200, 3)]


def test_a_lease_that_ended_is_told_once_though_it_was_extended_to_where_it_was() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1, 2, deadline=100)
    bench.apply(Extended(1, NOW + 900), Extended(1, NOW + 100), Extended(1, NOW + 100))
    assert bench.machine.ended_leases(NOW + 100, 10) == [(NOW + 100, 1), (NOW + 100, 2)]


def test_the_heap_of_deadlines_stays_small_however_many_leases_are_acked() -> None:
    machine = Bench(keep_payloads=True).machine
    now, place = NOW, Place()
    for i in range(1, 3001):
        machine.apply(enqueued(i), now, place)
        machine.apply(Leased([i], [i], [1], [now + 10**9]), now, place)
        machine.apply(Acked(MAIL, [i]), now, place)
        assert len(machine._deadlines) <= 64 + 2
    machine.check()
    assert machine.next_wakeup_ms() is None


def test_the_heap_of_deadlines_stays_small_however_often_a_lease_is_extended() -> None:
    bench = Bench(keep_payloads=True)
    bench.enqueue(10)
    bench.lease(*range(1, 11))
    for i in range(2000):
        bench.machine.apply(Extended(1 + i % 10, NOW + 30_001 + i), NOW, bench.place)
        assert len(bench.machine._deadlines) <= 64 + 2 * 10
    bench.machine.check()
    ended = bench.machine.ended_leases(NOW + 10**6, 100)
    assert ended == [(NOW + 30_001 + i, 1 + i % 10) for i in range(1990, 2000)], "none was lost"


# Keys


def keyed(**options: Any) -> Bench:
    """A queue whose job 1 has the key "k", which outlives it by a second."""
    bench = Bench(config=QueueConfig(idempotency_ttl=1, **options))
    bench.enqueue(keys=["k"])
    return bench


def test_a_key_stands_for_its_living_job_for_ever() -> None:
    bench = keyed()
    bench.bury(1)
    assert bench.machine.find("mail", "k", NOW + 10**12) == 1
    assert bench.machine.find("mail", "other", NOW) is None
    assert bench.machine.find("audit", "k", NOW) is None
    assert bench.machine.find("unknown", "k", NOW) is None


@pytest.mark.parametrize(
    "end", [Acked(MAIL, [1]), Cancelled(MAIL, 1), Purged(MAIL, [1])], ids=["ack", "cancel", "purge"]
)
def test_a_key_outlives_its_job_by_the_window_of_the_queue(end: Event) -> None:
    bench = keyed()
    bench.apply(end)
    assert bench.machine.find("mail", "k", NOW + 999) == 1
    assert bench.machine.find("mail", "k", NOW + 1000) is None
    assert bench.machine.live == {1: KEY_BYTES}
    bench.apply(at=NOW + 999)
    assert bench.mail.keys.keys() == {"k"}
    bench.apply(at=NOW + 1000)
    bench.machine.check()
    assert (bench.mail.keys, bench.machine.live) == ({}, {1: 0})


def test_without_a_window_a_key_ends_with_its_job() -> None:
    bench = Bench(config=QueueConfig(idempotency_ttl=0))
    bench.enqueue(keys=["k"])
    bench.apply(Cancelled(MAIL, 1))
    assert bench.mail.keys == {}
    assert bench.machine.changes is not None
    assert bench.machine.changes.keys == set()


def test_a_key_that_ended_can_be_used_again_though_the_clock_has_not_swept_it() -> None:
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    machine = bench.machine
    machine.apply(enqueued(2, keys=["k"]), NOW + 1000, bench.place)
    machine.check()
    assert machine.find("mail", "k", NOW + 1000) == 2
    bench.apply(at=NOW + 2000)
    machine.check()
    assert machine.find("mail", "k", NOW + 2000) == 2, "the old end is forgotten"


def test_keys_of_different_queues_have_nothing_to_do_with_each_other() -> None:
    bench = keyed()
    bench.enqueue(queue=AUDIT, keys=["k"])
    bench.apply(Cancelled(MAIL, 1))
    bench.apply(at=NOW + 1000)
    assert bench.machine.find("audit", "k", bench.now) == 2


def test_the_end_of_a_job_leaves_a_key_alone_that_stands_for_another_by_now() -> None:
    """So a replay finds it that starts from a checkpoint which took the key's next job already."""
    bench = keyed()
    bench.mail.keys["k"].job_id = 50
    bench.machine.apply(Acked(MAIL, [1]), NOW, bench.place)
    assert (bench.mail.keys["k"].job_id, bench.mail.keys["k"].expires_ms) == (50, 0)
    del bench.mail.keys["k"]
    bench.machine.apply(enqueued(2, keys=["j"]), NOW, bench.place)
    del bench.mail.keys["j"]
    bench.machine.apply(Acked(MAIL, [2]), NOW, bench.place)
    assert bench.mail.keys == {}


def test_a_batch_holds_the_keys_of_those_that_have_one() -> None:
    bench = Bench()
    bench.enqueue(3, keys=["a", None, "c"])
    assert {text: key.job_id for text, key in bench.mail.keys.items()} == {"a": 1, "c": 3}
    assert [bench.machine.jobs[i].key for i in (1, 2, 3)] == ["a", None, "c"]


def test_without_files_a_key_weighs_nothing() -> None:
    bench = Bench(keep_payloads=True)
    bench.enqueue(keys=["k"])
    bench.apply(Cancelled(MAIL, 1))
    bench.apply(at=NOW + TTL_MS)
    bench.machine.check()
    assert (bench.machine.live, bench.mail.keys) == ({}, {})


# Copies and segments


@pytest.mark.parametrize("state", [READY, SCHEDULED, LEASED, DEAD])
def test_a_copied_job_is_the_same_job_in_another_place(state: int) -> None:
    bench = keyed()
    bench.machine.jobs[1].indexed = True
    bench.lease(1)
    if state == DEAD:
        bench.apply(Buried(1, NOW, "e"))
    elif state != LEASED:
        bench.apply(Retried(1, NOW + (500 if state == SCHEDULED else 0), "e"))
    before, states, wakeup = bench.machine.dump(), bench.states(), bench.machine.next_wakeup_ms()
    bench.place = Place(2, 5000, 77)
    bench.apply(copied(bench.machine.jobs[1]))
    entry = bench.machine.jobs[1]
    assert bench.machine.dump() == before
    assert (bench.states(), bench.machine.next_wakeup_ms()) == (states, wakeup)
    assert (entry.segment, entry.offset, entry.lsn, entry.size) == (2, 5007, 77, 10 + COPY_BYTES)
    assert bench.machine.live == {1: 0, 2: entry.size}
    assert entry.indexed
    assert bench.machine.changes is not None
    assert 1 in bench.machine.changes.jobs


@pytest.mark.parametrize("state", [READY, SCHEDULED, LEASED, DEAD])
def test_a_copied_job_that_is_unknown_comes_to_be(state: int) -> None:
    source = keyed()
    source.lease(1)
    entry = source.machine.jobs[1]
    entry.state, entry.due_ms = state, NOW + 500 if state == SCHEDULED else 0
    event = copied(entry, id=41, token=12)
    bench = Bench()
    bench.mail.enqueued = 1  # what the snapshot says
    bench.apply(event)
    assert list(bench.states().values()) == [[41]]
    assert bench.machine.jobs[41].state == state
    assert not bench.machine.jobs[41].indexed
    assert (bench.machine.next_id, bench.machine.next_token) == (42, 13)
    assert bench.machine.find("mail", "k", NOW) == 41
    if state == READY:
        assert bench.machine.woken == {"mail"}


def test_a_scheduled_job_whose_moment_has_come_is_copied_as_ready() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 500)
    event = copied(bench.machine.jobs[1])
    bench.apply(event, at=NOW + 500)
    assert bench.states() == {"ready": [1]}


def test_a_copied_job_does_not_lower_the_next_id_or_token() -> None:
    bench = Bench()
    bench.enqueue(9)
    bench.lease(1)
    bench.lease(2)
    bench.apply(copied(bench.machine.jobs[1]))
    assert (bench.machine.next_id, bench.machine.next_token) == (10, 3)


def test_a_copied_key_moves_to_its_new_segment_and_keeps_its_end() -> None:
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    bench.place = Place(2, 0, 9)
    bench.apply(KeyCopied(MAIL, "k", 1, NOW + 1000))
    assert bench.machine.live == {1: 0, 2: KEY_BYTES}
    assert bench.machine.find("mail", "k", NOW + 999) == 1
    bench.apply(at=NOW + 1000)
    assert bench.mail.keys == {}


def test_a_copied_key_that_is_unknown_comes_to_be() -> None:
    bench = Bench()
    bench.apply(KeyCopied(MAIL, "k", 7, NOW + 1000))
    assert bench.machine.find("mail", "k", NOW) == 7
    assert bench.machine.changes is not None
    assert bench.machine.changes.keys == {(MAIL, "k")}


def test_dropped_segments_are_forgotten() -> None:
    bench = Bench()
    for segment in (1, 2, 3, 4):
        bench.place = Place(segment, 0, segment)
        bench.enqueue()
    bench.apply(Cancelled(MAIL, 1), Cancelled(MAIL, 2), Cancelled(MAIL, 3))
    bench.apply(SegmentsDropped(2))
    assert bench.machine.live.keys() == {3, 4}
    assert bench.machine.oldest_segment == 3
    bench.apply(SegmentsDropped(1))
    assert bench.machine.oldest_segment == 3


def test_what_ends_after_its_segment_was_dropped_is_not_subtracted_from_anything() -> None:
    """A replay does not let the clock act: it meets the drop before the ends that had come before it."""
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    bench.machine.apply(enqueued(2), NOW, bench.place)
    bench.machine.apply(SegmentsDropped(1), NOW + 1000, Place(2, 0, 9))
    bench.machine.apply(Cancelled(MAIL, 2), NOW + 1000, Place(2, 0, 10))
    bench.machine.advance(NOW + 1000)
    bench.machine.check()
    assert bench.machine.live == {}


# What a checkpoint has to write


def changes_of(machine: Machine) -> tuple[set[int], set[tuple[int, str]]]:
    """What changed since the last look."""
    taken, machine.changes = machine.changes, Changes()
    assert taken is not None
    return taken.jobs, taken.keys


def test_every_job_that_an_event_touches_is_to_be_written() -> None:
    bench = Bench()
    bench.enqueue(3)
    assert changes_of(bench.machine) == ({1, 2, 3}, set())
    bench.lease(1, 2)
    assert changes_of(bench.machine) == ({1, 2}, set())
    for event in (Extended(1, NOW + 10**6), Retried(1, NOW, "e"), Buried(1, NOW, "e"), Redriven([1])):
        bench.apply(event)
        assert changes_of(bench.machine) == ({1}, set())
    bench.apply(Released(2, NOW, 0))
    assert changes_of(bench.machine) == ({2}, set())


def test_a_job_that_never_was_in_the_index_leaves_nothing_to_write() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1)
    bench.apply(Acked(MAIL, [1]), Cancelled(MAIL, 2))
    assert changes_of(bench.machine) == (set(), set())


def test_the_end_of_a_job_in_the_index_is_to_be_written() -> None:
    bench = Bench()
    bench.enqueue(2)
    changes_of(bench.machine)
    bench.machine.jobs[1].indexed = True
    bench.apply(Purged(MAIL, [1, 2]))
    assert changes_of(bench.machine) == ({1}, set())


def test_a_key_is_to_be_written_when_it_outlives_its_job_and_when_it_ends_in_the_index() -> None:
    bench = keyed()
    assert changes_of(bench.machine) == ({1}, set()), "a living job's key is found with the job"
    bench.apply(Cancelled(MAIL, 1))
    assert changes_of(bench.machine) == (set(), {(MAIL, "k")})
    bench.mail.keys["k"].indexed = True
    bench.apply(at=NOW + 1000)
    assert changes_of(bench.machine) == (set(), {(MAIL, "k")})


def test_a_key_that_never_was_in_the_index_leaves_nothing_to_write() -> None:
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    bench.apply(at=NOW + 1000)
    assert changes_of(bench.machine)[1] == set()


def test_a_key_in_the_index_that_is_used_again_is_to_be_written() -> None:
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    bench.mail.keys["k"].indexed = True
    changes_of(bench.machine)
    bench.machine.apply(enqueued(2, keys=["k"]), NOW + 1000, bench.place)
    assert bench.mail.keys["k"].indexed
    assert changes_of(bench.machine)[1] == {(MAIL, "k")}


# Saving and loading


def reload(machine: Machine, entries: Sequence[tuple[Entry, int]] = ()) -> Machine:
    again = Machine()
    again.load(machine.snapshot())
    again.load_entries(entries)
    return again


def clone(entry: Entry, queues: dict[int, Queue]) -> tuple[Entry, int]:
    """The job as an index gives it back, and its state."""
    again = Entry(entry.id, queues[entry.queue.number], entry.spec, entry.enqueued_at_ms, entry.due_ms, entry.key)
    for name in ("attempts", "token", "deadline_ms", "died_at_ms", "last_error", "segment", "offset", "length", "crc",
                 "size", "lsn"):  # fmt: skip
        setattr(again, name, getattr(entry, name))
    return again, entry.state


def test_a_snapshot_brings_back_counters_configurations_and_the_time_line() -> None:
    bench = Bench(config=QueueConfig(paused=True, max_jobs=7, idempotency_ttl=1))
    bench.place = Place(5, 0, 2)
    bench.enqueue(4)
    bench.apply(IdsReserved(50), Cancelled(MAIL, 1), Purged(MAIL, [2]), SegmentsDropped(3), at=NOW + 9)
    bench.lease(3)
    bench.apply(Acked(MAIL, [3]), Cancelled(MAIL, 4))
    again = reload(bench.machine)
    again.check()
    assert attrs.asdict(again.snapshot()) == attrs.asdict(bench.machine.snapshot())
    queue = again.queues["mail"]
    assert (queue.enqueued, queue.acked, queue.cancelled, queue.purged) == (4, 1, 2, 1)
    assert (again.next_id, again.reserved_id, again.oldest_segment, again.now_ms) == (5, 50, 4, NOW + 9)
    assert queue.config.paused
    assert (queue.ttl_ms, again.numbers[MAIL]) == (1000, queue)


def test_a_snapshot_is_loaded_into_an_empty_machine_only() -> None:
    machine = Bench().machine
    with pytest.raises(AssertionError, match="a snapshot is loaded into an empty machine"):
        machine.load(Snapshot(1, 1, 1, 0, []))


def test_loaded_jobs_are_where_they_were_and_nothing_about_them_is_to_be_written() -> None:
    bench = keyed()
    bench.enqueue(4, priority=9)
    bench.enqueue(2, due=NOW + 500)
    bench.lease(2, 3, deadline=700)
    bench.bury(4)
    queues = (again := reload(bench.machine)).numbers
    again.load_entries([clone(entry, queues) for _, entry in sorted(bench.machine.jobs.items())])
    again.check()
    assert again.dump() == bench.machine.dump()
    assert again.live == bench.machine.live
    assert (again.next_token, again.next_wakeup_ms()) == (3, NOW + 500)
    assert all(entry.indexed for entry in again.jobs.values())
    assert again.woken == {"mail"}
    assert again.changes is not None
    assert (again.changes.jobs, again.changes.keys) == (set(), set())


def test_a_loaded_job_of_a_paused_queue_wakes_nobody() -> None:
    bench = Bench(config=QueueConfig(paused=True))
    bench.enqueue()
    again = reload(bench.machine)
    again.load_entries([clone(bench.machine.jobs[1], again.numbers)])
    again.check()
    assert again.woken == set()


def test_a_loaded_key_keeps_its_end_and_need_not_be_written() -> None:
    again = reload(keyed().machine)
    again.queues["mail"].enqueued = 0
    again.load_key(MAIL, "k", 1, NOW + 1000, 1)
    again.check()
    assert again.find("mail", "k", NOW + 999) == 1
    assert again.find("mail", "k", NOW + 1000) is None
    assert again.queues["mail"].keys["k"].indexed
    assert again.live == {1: KEY_BYTES}
    assert again.changes is not None
    assert again.changes.keys == set()


def test_without_files_nothing_is_noted_for_an_index() -> None:
    machine = Machine(keep_payloads=True)
    machine.apply(QueueCreated(MAIL, "mail"), NOW, Place())
    machine.load_key(MAIL, "k", 1, NOW + 1000, 0)
    assert (machine.changes, machine.live) == (None, {})
    event = copied(loose_entry(machine.numbers[MAIL], 3))
    machine.apply(event, NOW, Place())
    machine.apply(Released(3, NOW, 0), NOW, Place())
    assert machine.changes is None
    assert machine.jobs[3].indexed is False


def loose_entry(queue: Queue, job_id: int) -> Entry:
    return Entry(job_id, queue, Spec(5, None, POLICY, None, NO_HEADERS), NOW, 0, None)


def test_a_key_that_was_saved_after_its_job_gets_its_end_from_the_log() -> None:
    bench = keyed()
    again = reload(bench.machine)
    again.load_entries([clone(bench.machine.jobs[1], again.numbers)])
    again.load_key(MAIL, "k", 1, NOW + 1000, 1)
    again.check()
    key = again.queues["mail"].keys["k"]
    assert (key.expires_ms, key.indexed) == (0, True)
    again.apply(Cancelled(MAIL, 1), NOW + 5, Place(1, 0, 9))
    again.check()
    assert again.find("mail", "k", NOW + 1004) == 1
    again.advance(NOW + 1005)
    assert again.changes is not None
    assert again.changes.keys == {(MAIL, "k")}


# Looking


def test_stats_count_one_queue_or_all() -> None:
    bench = Bench()
    bench.enqueue(4)
    bench.enqueue(2, queue=AUDIT, due=NOW + 10)
    bench.lease(1, 2)
    bench.apply(Acked(MAIL, [1]))
    bench.bury(3)
    mail = QueueStats(ready=1, leased=1, dead=1, enqueued=4, acked=1, oldest_age=0.25)
    audit = QueueStats(scheduled=2, enqueued=2)
    machine = bench.machine
    assert machine.stats("mail", NOW + 250) == mail
    assert machine.stats("audit", NOW) == audit
    assert machine.stats(None, NOW + 250) == attrs.evolve(mail, scheduled=2, enqueued=6)
    assert machine.stats("unknown", NOW) == QueueStats()
    bench.apply(Cancelled(MAIL, 4), Purged(MAIL, [3]))
    assert (machine.stats("mail", NOW).cancelled, machine.stats("mail", NOW).purged) == (1, 1)


def test_the_oldest_age_is_that_of_the_oldest_ready_job_of_any_priority() -> None:
    bench = Bench()
    bench.enqueue(priority=0)
    bench.apply(at=NOW + 100)
    bench.enqueue(priority=9)
    bench.apply(at=NOW + 200)
    bench.enqueue(queue=AUDIT)
    machine = bench.machine
    assert machine.stats("mail", NOW + 1000).oldest_age == 1.0
    assert machine.stats(None, NOW + 1000).oldest_age == 1.0
    assert machine.stats("audit", NOW + 1000).oldest_age == 0.8
    bench.lease(1)
    assert machine.stats("mail", NOW + 1000).oldest_age == 0.9


def test_a_listing_is_by_id_over_all_states_or_of_one() -> None:
    bench = Bench()
    for priority in (1, 9, 5, 3, 7, 0):
        bench.enqueue(priority=priority)
    bench.enqueue(due=NOW + 10)
    bench.lease(6, 2)
    bench.bury(4)

    def ids(state: int | None, after: int = 0, limit: int = 100) -> list[int]:
        return [entry.id for entry in bench.machine.listing("mail", state, after, limit)]

    assert ids(None) == [1, 2, 3, 4, 5, 6, 7]
    assert [ids(state) for state in (READY, SCHEDULED, LEASED, DEAD)] == [[1, 3, 5], [7], [2, 6], [4]]
    assert ids(None, after=2, limit=3) == [3, 4, 5]
    assert ids(LEASED, after=2) == [6]
    assert ids(DEAD, after=4) == ids(None, after=7) == ids(None, limit=0) == []
    assert bench.machine.listing("unknown", None, 0, 10) == []


def test_leased_jobs_too_are_listed_by_id() -> None:
    bench = Bench()
    bench.enqueue(16)
    bench.lease(16, 9)  # a set of these two does not come in this order by itself
    assert bench.mail.ids(LEASED) == list(bench.mail.ids_after(LEASED, 0)) == [9, 16]
    assert [entry.id for entry in bench.machine.listing("mail", LEASED, 0, 10)] == [9, 16]


def test_a_queue_counts_what_takes_a_place_in_it() -> None:
    bench = Bench()
    bench.enqueue(3)
    bench.enqueue(due=NOW + 5)
    bench.lease(1)
    bench.bury(2)
    assert bench.mail.occupied() == 3


def test_a_delivery_carries_what_the_lessee_needs() -> None:
    bench = Bench()
    bench.apply(attrs.evolve(enqueued(1, priority=8), headers=read_only({"h": "1"})))
    bench.lease(1, deadline=50)
    bench.apply(Retried(1, NOW, "boom"))
    bench.lease(1, deadline=60)
    delivery = bench.machine.delivery(bench.machine.jobs[1], b"payload")
    assert attrs.asdict(delivery) == {
        "id": 1, "queue": "mail", "payload": b"payload", "headers": {"h": "1"}, "priority": 8, "attempt": 2, "token": 2,
        "deadline_ms": NOW + 60, "enqueued_at_ms": NOW, "max_attempts": 5, "last_error": "boom",
    }  # fmt: skip


def test_a_dump_is_the_same_for_the_same_state_whatever_the_way_to_it() -> None:
    one, two = Bench(), Bench()
    one.enqueue(2, keys=["a", "b"])
    two.enqueue(keys=["a"])
    two.enqueue(keys=["b"])
    for bench in (one, two):
        bench.lease(1)
    two.apply(Released(1, NOW, 0))
    assert one.machine.dump() != two.machine.dump()
    two.apply(Leased([1], [1], [1], [NOW + 30_000]))
    for job_id in (1, 2):
        two.machine.jobs[job_id].crc = one.machine.jobs[job_id].crc
    assert one.machine.dump() == two.machine.dump()


# What check finds


def damage_number(bench: Bench) -> None:
    bench.machine.numbers[MAIL] = bench.machine.numbers[AUDIT]


def damage_ready_count(bench: Bench) -> None:
    bench.mail.ready_count += 1


def damage_two_sets(bench: Bench) -> None:
    bench.mail.dead.add(1)


def damage_other_queue(bench: Bench) -> None:
    bench.machine.jobs[1].queue = bench.machine.queues["audit"]


def damage_totals(bench: Bench) -> None:
    bench.mail.acked += 1


def damage_key_of_a_living_job(bench: Bench) -> None:
    bench.mail.keys["k"].expires_ms = NOW


def damage_key_of_nobody(bench: Bench) -> None:
    bench.mail.keys["k"].job_id = 99


def damage_key_of_another(bench: Bench) -> None:
    bench.mail.keys["k"].job_id = 2


def damage_state(bench: Bench) -> None:
    bench.machine.jobs[2].state = DEAD


def damage_due(bench: Bench) -> None:
    bench.machine.due.add((NOW + 1, 2))


def damage_next_id(bench: Bench) -> None:
    bench.machine.next_id = 2


def damage_live(bench: Bench) -> None:
    bench.machine.live[1] += 1


def damage_window(bench: Bench) -> None:
    bench.mail.ready[5]._keys.add(2)
    bench.mail.ready_count += 1


@pytest.mark.parametrize(
    "damage", [value for name, value in globals().items() if name.startswith("damage_")], ids=lambda f: f.__name__[7:]
)
def test_check_finds(damage: Any) -> None:
    bench = Bench()
    bench.enqueue(3, keys=["k", None, None])
    bench.machine.check()
    damage(bench)
    with pytest.raises(AssertionError):
        bench.machine.check()


# Replay


class Writer:
    """Turns small numbers into a history that could have been: each event fits the state that it meets.

    It keeps the log (events with their moments and places) beside the machine, as an engine does.
    """

    def __init__(self) -> None:
        self.machine = Machine()
        self.now = NOW
        self.lsn = 0
        self.segment = 1
        self.log: list[tuple[int, Event, int, Place]] = []  # (lsn, event, now_ms, place)
        for number, name in ((MAIL, "mail"), (AUDIT, "audit")):
            self.write(QueueCreated(number, name))
        self.write(QueueConfigured(MAIL, QueueConfig(idempotency_ttl=0.2)))

    def write(self, *events: Event) -> None:
        """One record."""
        self.lsn += 1
        place = Place(self.segment, 100 * self.lsn, self.lsn)
        self.machine.advance(self.now)
        for event in events:
            self.log.append((self.lsn, event, self.now, place))
            self.machine.apply(event, self.now, place)

    def step(self, kind: int, a: int, b: int) -> None:
        """`kind` says what is done, `a` to which job or queue, `b` how."""
        machine = self.machine
        machine.advance(self.now)
        by_state: dict[int, list[int]] = {READY: [], SCHEDULED: [], LEASED: [], DEAD: []}
        for job_id, entry in sorted(machine.jobs.items()):
            by_state[entry.state].append(job_id)
        leased, dead = by_state[LEASED], by_state[DEAD]
        resting = sorted(by_state[READY] + by_state[SCHEDULED] + dead)
        later = self.now + 50 * b
        match kind:
            case 0:
                queue = machine.numbers[1 + a % 2]
                text = ("k", "j", None, None)[b % 4]
                free = text is not None and machine.find(queue.name, text, self.now) is None
                self.write(
                    enqueued(machine.next_id, queue=queue.number, priority=a, due=later, keys=[text] if free else None)
                )
            case 1:
                self.write(enqueued(machine.next_id, 2 + b % 2, queue=1 + a % 2))
            case 2 if by_state[READY]:
                ids = by_state[READY][a % len(by_state[READY]) :][: 1 + b % 2]
                tokens = [machine.next_token + i for i in range(len(ids))]
                self.write(Leased(ids, tokens, [machine.jobs[i].attempts + 1 for i in ids], [later] * len(ids)))
            case 3 if leased:
                entry = machine.jobs[leased[a % len(leased)]]
                same = [i for i in leased if machine.jobs[i].queue is entry.queue]
                self.write(Acked(entry.queue.number, same if b % 2 else [entry.id]))
            case 4 if leased:
                job_id = leased[a % len(leased)]
                entry = machine.jobs[job_id]
                self.write(
                    (
                        Retried(job_id, later, f"e{b}"), Released(job_id, later, entry.attempts - 1),
                        Buried(job_id, self.now, f"d{b}"), Extended(job_id, entry.deadline_ms + b),
                    )[b % 4]
                )  # fmt: skip
            case 5 if resting:
                entry = machine.jobs[resting[a % len(resting)]]
                self.write(Cancelled(entry.queue.number, entry.id))
            case 6:
                ids = [i for i in resting if machine.jobs[i].queue.number == 1 + a % 2]
                if ids:
                    self.write(Purged(1 + a % 2, ids[: 1 + b]))
            case 7 if dead:
                self.write(Redriven(dead[: 1 + b]))
            case 8:
                self.now += 1 + 40 * a + b
            case 9:
                self.write(QueueConfigured(1 + a % 2, QueueConfig(idempotency_ttl=(0, 0.1, 0.5)[b % 3], paused=b > 4)))
            case 10:
                self.segment += 1
            case 11:
                self.compact()
            case 12:
                self.write(IdsReserved(machine.next_id + 8))
                machine.take_ids(b)

    def compact(self) -> None:
        """Copy what lives in the oldest segments to the last one, and drop them."""
        machine = self.machine
        upto = self.segment
        self.segment += 1
        events: list[Event] = [copied(e) for e in machine.jobs.values() if e.segment <= upto]
        for queue in machine.queues.values():
            events += [
                KeyCopied(queue.number, text, key.job_id, key.expires_ms)
                for text, key in queue.keys.items()
                if key.expires_ms and key.segment <= upto
            ]
        if events:
            self.write(*events)
        self.write(SegmentsDropped(upto))


class Capture:
    """A checkpoint of everything at one moment."""

    def __init__(self, machine: Machine) -> None:
        self.snapshot = machine.snapshot()
        self.jobs = {i: clone(entry, machine.numbers) for i, entry in machine.jobs.items()}
        self.keys = {
            (queue.number, text): (key.job_id, key.expires_ms, key.segment)
            for queue in machine.queues.values()
            for text, key in queue.keys.items()
            if key.expires_ms
        }


def recovered(
    snapshot: Snapshot,
    jobs: dict[int, tuple[Entry, int]],
    keys: dict[tuple[int, str], tuple[int, int, int]],
    log: Sequence[tuple[int, Event, int, Place]],
    now_ms: int,
) -> Machine:
    """What an opening makes of a checkpoint and the log behind it."""
    machine = Machine()
    machine.load(snapshot)
    loaded = []
    for _, (entry, state) in sorted(jobs.items()):
        entry.state = state
        loaded.append(clone(entry, machine.numbers))
    machine.load_entries(loaded)
    for (number, text), value in sorted(keys.items()):
        machine.load_key(number, text, *value)
    for _, event, at_ms, place in log:
        machine.now_ms = max(machine.now_ms, at_ms)
        machine.apply(event, at_ms, place)
    machine.start(now_ms, 1)
    machine.check()
    return machine


def same_state(found: Machine, expected: Machine) -> None:
    assert found.dump() == expected.dump()
    assert {s: n for s, n in found.live.items() if n} == {s: n for s, n in expected.live.items() if n}
    assert found.oldest_segment == expected.oldest_segment
    assert found.next_id == max(expected.next_id, expected.reserved_id)
    assert found.next_wakeup_ms() == expected.next_wakeup_ms()


STORY = [
    (0, 1, 0), (0, 0, 1), (1, 0, 0), (2, 0, 1), (4, 0, 0), (0, 2, 6), (8, 0, 7), (2, 1, 3), (4, 0, 2), (10, 0, 0),
    (2, 0, 3), (4, 0, 1), (5, 0, 0), (7, 0, 0), (2, 0, 2), (3, 0, 1), (12, 0, 3), (1, 1, 0), (2, 2, 3), (11, 0, 0),
    (4, 0, 3), (8, 7, 0), (0, 0, 4), (0, 1, 4), (6, 1, 1), (9, 0, 2), (2, 0, 3), (4, 1, 2), (3, 0, 0), (8, 3, 3),
    (0, 0, 0), (11, 0, 0), (7, 0, 4), (2, 0, 3), (3, 1, 1), (8, 2, 1),
]  # fmt: skip


def test_a_replay_from_any_point_on_any_later_state_gives_the_same_state() -> None:
    """The counters are those of the point, the jobs and keys are those of a later moment: all pairs of the two."""
    writer = Writer()
    captures: list[tuple[int, Capture]] = []
    kinds = set()
    for kind, a, b in STORY:
        before = writer.lsn
        writer.step(kind, a, b)
        kinds |= {type(event) for lsn, event, _, _ in writer.log if lsn > before}
        writer.machine.check()
        captures.append((writer.lsn, Capture(writer.machine)))
    writer.machine.advance(writer.now)
    assert kinds == set(Event.__args__) - {QueueCreated}, "the story has to tell of everything"
    for k, (lsn, start) in enumerate(captures):
        log = [record for record in writer.log if record[0] > lsn]
        for _, later in captures[k:]:
            same_state(recovered(start.snapshot, later.jobs, later.keys, log, writer.now), writer.machine)


def test_a_replay_of_the_whole_log_gives_the_same_state() -> None:
    writer = Writer()
    for step in STORY:
        writer.step(*step)
    writer.machine.advance(writer.now)
    same_state(recovered(Machine().snapshot(), {}, {}, writer.log, writer.now), writer.machine)


steps = st.tuples(st.integers(0, 12), st.integers(0, 7), st.integers(0, 7))


@settings(max_examples=120, deadline=None)
@given(st.lists(steps, max_size=25), st.lists(steps, max_size=25), st.data())
def test_a_checkpoint_taken_in_slices_is_made_whole_by_the_replay(
    first: list[tuple[int, int, int]], second: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Each job is taken at a moment of its own, and the keys at the last one."""
    writer = Writer()
    for step in first:
        writer.step(*step)
    captures = [Capture(writer.machine)]
    lsn = writer.lsn
    for step in second:
        writer.step(*step)
        writer.machine.check()
        captures.append(Capture(writer.machine))
    writer.machine.advance(writer.now)
    jobs, last = {}, 0
    for job_id in captures[0].jobs:
        at = data.draw(st.integers(0, len(captures) - 1))
        last = max(last, at)
        if job_id in captures[at].jobs:
            jobs[job_id] = captures[at].jobs[job_id]
    keys = captures[data.draw(st.integers(last, len(captures) - 1))].keys
    log = [record for record in writer.log if record[0] > lsn]
    same_state(recovered(captures[0].snapshot, jobs, keys, log, writer.now), writer.machine)


class Keeper:
    """Checkpoints as the durable engine makes them: what changed is written into an index that lives on."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.jobs: dict[int, tuple[Entry, int]] = {}
        self.keys: dict[tuple[int, str], tuple[int, int, int]] = {}
        self.snapshot = Machine().snapshot()
        self.lsn = 0

    def checkpoint(self, meanwhile: Iterable[tuple[int, int, int]]) -> None:
        """Jobs are taken in two slices, with a call of somebody else's after each."""
        writer, machine = self.writer, self.writer.machine
        taken, machine.changes = machine.changes, Changes()
        assert taken is not None
        snapshot, lsn = machine.snapshot(), writer.lsn
        calls = iter(meanwhile)
        jobs: dict[int, tuple[Entry, int] | None] = {}
        for part in (0, 1):
            for job_id in sorted(taken.jobs)[part::2]:
                entry = machine.jobs.get(job_id)
                jobs[job_id] = None if entry is None else clone(entry, machine.numbers)
                if entry is not None:
                    entry.indexed = True
            self.call(calls)
        keys: dict[tuple[int, str], tuple[int, int, int] | None] = {}
        for number, text in taken.keys | machine.changes.keys:
            key = machine.numbers[number].keys.get(text)
            keys[number, text] = None
            if key is not None:
                key.indexed = key.expires_ms > 0
                if key.indexed:
                    keys[number, text] = (key.job_id, key.expires_ms, key.segment)
        self.call(calls)
        for mapping, items in ((self.jobs, jobs), (self.keys, keys)):
            for name, value in items.items():  # type: ignore[attr-defined]
                if value is None:
                    mapping.pop(name, None)  # type: ignore[attr-defined]
                else:
                    mapping[name] = value  # type: ignore[index]
        self.snapshot, self.lsn = snapshot, lsn

    def call(self, calls: Iterable[tuple[int, int, int]]) -> None:
        for step in calls:
            self.writer.step(*step)
            break

    def crash(self) -> None:
        """Open again and go on from there; nobody may see the difference."""
        writer = self.writer
        writer.machine.advance(writer.now)
        log = [record for record in writer.log if record[0] > self.lsn]
        again = recovered(self.snapshot, self.jobs, self.keys, log, writer.now)
        same_state(again, writer.machine)
        again.next_token = writer.machine.next_token
        writer.machine = again
        writer.machine.reserved_id = max(again.reserved_id, again.next_id)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(steps, steps, steps, st.just("crash"), st.lists(steps, max_size=3)), max_size=60))
def test_an_index_that_is_fed_with_the_changes_alone_is_enough_at_every_opening(
    actions: list[tuple[int, int, int] | list[tuple[int, int, int]] | str],
) -> None:
    writer = Writer()
    keeper = Keeper(writer)
    for action in actions:
        if isinstance(action, str):
            keeper.crash()
        elif isinstance(action, list):
            keeper.checkpoint(action)
        else:
            writer.step(*action)
        writer.machine.check()
    keeper.crash()

"""The machine by itself: events go in by hand, and after each of them `check` looks at everything."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from inside import shrink_runs, waiting_of

from rivetq.machine import decide, look, saving
from rivetq.machine.advance import RIPE_JOBS, _ripen, advance, ended_leases, expect_token, next_wakeup_ms, resume
from rivetq.machine.apply import apply
from rivetq.machine.check import check, dump
from rivetq.machine.columns import PAYLOAD_BYTES, Columns
from rivetq.machine.commit import keys_until_ms
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
)
from rivetq.machine.keys import Key
from rivetq.machine.machine import Machine
from rivetq.machine.queue import DEAD, LEASED, NEVER_MS, READY, SCHEDULED, Queue
from rivetq.machine.ratelimit import TokenBucket
from rivetq.machine.run import Run
from rivetq.machine.snapshot import COPY_BYTES, JOB_BYTES, KEY_BYTES, RECORD_BYTES, Changes, Place, Snapshot
from rivetq.machine.waiting import Waiting
from rivetq.machine.window import Window
from rivetq.model import NO_HEADERS, JobId, QueueConfig, QueueStats, RateLimit, RetryPolicy, read_only
from rivetq.storage.codec import decode_snapshot, encode_snapshot

NOW = 1_000_000
POLICY = RetryPolicy()
MAIL, AUDIT = 1, 2
TTL_MS = 86_400_000


class Bench:
    """A machine with two queues, a clock that is a number, and a place in the log."""

    def __init__(self, *, keep_payloads: bool = False, config: QueueConfig | None = None) -> None:
        self.machine = Machine(keep_payloads=keep_payloads)
        self.now = NOW
        self.place = Place()
        self.apply(QueueCreated(MAIL, "mail"), QueueCreated(AUDIT, "audit"))
        if not keep_payloads:
            self.place = Place(1, 1000, 1)
        if config is not None:
            self.apply(QueueConfigured(MAIL, config))
        self.machine.woken.clear()

    def apply(self, *events: Event, at: int | None = None) -> None:
        """As one call does it: the clock acts, then the events, then everything is looked at."""
        if at is not None:
            self.now = at
        advance(self.machine, self.now)
        for event in events:
            apply(self.machine, event, self.now, self.place)
            check(self.machine)

    def enqueue(self, count: int = 1, **options: Any) -> list[int]:
        event = enqueued(self.machine.next_id, count, **options)
        self.apply(event)
        return list(range(event.first_id, event.first_id + count))

    def lease(self, *ids: int, deadline: int = 30_000) -> list[int]:
        """Tokens of new deliveries, which end `deadline` ms from now."""
        first = self.machine.next_token
        tokens = list(range(first, first + len(ids)))
        attempts = [self.job(i).attempts + 1 for i in ids]
        self.apply(Leased(ids, tokens, attempts, [self.now + deadline] * len(ids)))
        return tokens

    def ack(self, *ids: int) -> None:
        """Deliver and ack them."""
        self.lease(*ids)
        self.apply(Acked(MAIL, ids, keys_until_ms(self.mail, self.now)))

    def bury(self, *ids: int) -> None:
        """Deliver each of them, and make it a dead letter."""
        for job_id in ids:
            if self.job(job_id).state != LEASED:
                self.lease(job_id)
            self.apply(Buried(job_id, self.now, "no good"))

    def loosen(self, job_id: int) -> Entry:
        """The job itself, not a copy: it is in no run any more."""
        entry = self.machine.loosen(job_id, self.machine.queues.values())
        assert entry is not None, f"no job {job_id}"
        return entry

    def listed(self, state: int | None, after: int = 0, limit: int = 100) -> list[int]:
        return [entry.id for entry in look.listing(self.machine, "mail", state, after, limit)]

    def job(self, job_id: int) -> Entry:
        """The job, wherever it is; a copy if it is in a run."""
        entry = look.job(self.machine, job_id)
        assert entry is not None, f"no job {job_id}"
        return entry

    def states(self, name: str = "mail") -> dict[str, list[int]]:
        leased, waiting = sorted(self.machine.queues[name].leased), waiting_of(self.machine, name)
        found = {"ready": READY, "scheduled": SCHEDULED, "leased": LEASED, "dead": DEAD}
        each = {text: leased if state == LEASED else waiting.ids(state) for text, state in found.items()}
        return {text: ids for text, ids in each.items() if ids}

    @property
    def mail(self) -> Queue:
        return self.machine.queues["mail"]

    @property
    def lines(self) -> Waiting:
        """Who waits in `mail`."""
        return waiting_of(self.machine, "mail")


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
    entry = bench.job(1)
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
    assert len({id(bench.job(i).spec) for i in (1, 2, 3)}) == 1


def test_each_job_of_a_batch_knows_where_its_payload_is() -> None:
    bench = Bench()
    bench.enqueue(3, length=10)
    jobs = [bench.job(i) for i in (1, 2, 3)]
    assert [e.offset for e in jobs] == [1040, 1050, 1060]
    assert [e.crc for e in jobs] == [1000, 1001, 1002]
    assert {(e.segment, e.lsn, e.length, e.payload) for e in jobs} == {(1, 1, 10, None)}
    assert {e.size for e in jobs} == {10 + RECORD_BYTES // 3 + JOB_BYTES}
    assert look.live_bytes(bench.machine) == {1: sum(e.size for e in jobs)}


def test_without_files_the_payload_stays_with_the_job() -> None:
    bench = Bench(keep_payloads=True)
    bench.enqueue(2, length=3)
    assert [bench.job(i).payload for i in (1, 2)] == [b"AAA", b"BBB"]
    assert look.live_bytes(bench.machine) == {}
    assert bench.machine.changes is None


def test_ready_jobs_are_found_by_priority_and_then_by_id() -> None:
    bench = Bench()
    for priority in (5, 9, 0, 9):
        bench.enqueue(priority=priority)
    windows = [window for window in reversed(bench.lines.ready) if window]
    assert [look.head(bench.machine, window, 9)[0] for window in windows] == [[2, 4], [1], [3]]
    assert bench.listed(READY, after=1) == [2, 3, 4]


def test_a_job_with_a_delay_is_scheduled_and_becomes_ready_at_its_moment_not_before() -> None:
    bench = Bench()
    bench.enqueue(2, due=NOW + 500)
    assert bench.states() == {"scheduled": [1, 2]}
    assert bench.machine.woken == set()
    assert next_wakeup_ms(bench.machine) == NOW + 500
    bench.apply(at=NOW + 499)
    assert bench.states() == {"scheduled": [1, 2]}
    bench.apply(at=NOW + 500)
    check(bench.machine)
    assert bench.states() == {"ready": [1, 2]}
    assert bench.machine.woken == {"mail"}
    assert next_wakeup_ms(bench.machine) is None


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
    while (at := next_wakeup_ms(bench.machine)) is not None:
        bench.apply(at=at)
        check(bench.machine)
        seen.append((at - NOW, bench.states().get("ready", []), bench.states("audit").get("ready", [])))
    assert seen == [(100, [], [2]), (200, [3], [2]), (300, [1, 3], [2])]


def test_the_next_delay_is_known_when_the_first_job_is_gone() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 100)
    bench.enqueue(due=NOW + 200)
    bench.apply(Cancelled(MAIL, 1))
    assert next_wakeup_ms(bench.machine) == NOW + 200
    bench.apply(Cancelled(MAIL, 2))
    assert next_wakeup_ms(bench.machine) is None


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
    entry = bench.job(3)
    assert (entry.token, entry.attempts, entry.deadline_ms) == (2, 1, NOW + 500)
    assert bench.states() == {"ready": [2], "leased": [1, 3]}
    assert bench.machine.next_token == 3
    assert next_wakeup_ms(bench.machine) == NOW + 500


def test_an_acked_job_is_gone_and_counted() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1, 2)
    bench.apply(Acked(MAIL, [1, 2]))
    assert bench.states() == {}
    assert (bench.machine.jobs, bench.mail.acked) == ({}, 2)
    assert look.live_bytes(bench.machine) == {1: 0}


def test_a_retried_job_waits_in_its_place_with_its_error() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1, 2)
    bench.apply(Retried(1, NOW + 500, "boom"), Retried(2, NOW, None))
    assert bench.states() == {"ready": [2], "scheduled": [1]}
    first, second = bench.job(1), bench.job(2)
    assert (first.last_error, first.due_ms, first.attempts) == ("boom", NOW + 500, 1)
    assert (second.last_error, second.attempts) == (None, 1)


def test_a_released_job_gets_its_attempt_back_and_keeps_its_last_error() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1)
    bench.apply(Retried(1, NOW, "boom"))
    bench.lease(1)
    bench.apply(Released(1, NOW + 100, 1))
    entry = bench.job(1)
    assert (entry.attempts, entry.last_error, bench.states()) == (1, "boom", {"scheduled": [1]})
    bench.apply(at=NOW + 100)
    assert bench.states() == {"ready": [1]}


def test_a_buried_job_is_a_dead_letter_until_it_is_redriven() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1)
    bench.apply(Buried(1, NOW - 5, "no good"))
    entry = bench.job(1)
    assert entry is bench.machine.jobs[1]
    assert (bench.states(), entry.died_at_ms, entry.last_error) == ({"dead": [1]}, NOW - 5, "no good")
    bench.machine.woken.clear()
    bench.apply(Redriven(MAIL, [1]))
    assert (bench.states(), entry.died_at_ms, entry.attempts) == ({"ready": [1]}, 0, 0)
    assert entry.last_error == "no good"
    assert bench.machine.woken == {"mail"}


def test_an_extended_lease_ends_at_its_new_deadline() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1, deadline=100)
    bench.apply(Extended(1, NOW + 900))
    assert bench.job(1).deadline_ms == NOW + 900
    assert ended_leases(bench.machine, NOW + 899, 10) == []
    assert ended_leases(bench.machine, NOW + 900, 10) == [(NOW + 900, 1)]
    assert next_wakeup_ms(bench.machine) == NOW + 900


def test_cancelled_and_purged_jobs_are_gone_and_counted() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.enqueue(due=NOW + 10)
    bench.enqueue()
    bench.bury(4)
    bench.apply(Cancelled(MAIL, 3), Cancelled(MAIL, 1), Purged(MAIL, [2, 4]))
    assert (bench.states(), bench.mail.cancelled, bench.mail.purged) == ({}, 2, 2)
    assert next_wakeup_ms(bench.machine) is None


# Tolerance


UNKNOWN: list[Event] = [
    Leased([99], [50], [1], [NOW + 10]),
    Retried(99, NOW + 5, "e"),
    Released(99, NOW + 5, 0),
    Buried(99, NOW, "e"),
    Extended(99, NOW + 10),
    Redriven(MAIL, [99, 98]),
]


@pytest.mark.parametrize("event", UNKNOWN, ids=lambda event: type(event).__name__)
def test_an_event_about_an_unknown_job_is_skipped(event: Event) -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1)
    before = dump(bench.machine)
    bench.apply(event)
    assert dump(bench.machine) == before
    assert bench.machine.changes is not None
    assert 99 not in bench.machine.changes.jobs


@pytest.mark.parametrize(
    ("event", "total"),
    [(Acked(MAIL, [98, 99]), "acked"), (Cancelled(MAIL, 99), "cancelled"), (Purged(MAIL, [97, 98, 99]), "purged")],
)
def test_the_totals_of_an_event_about_unknown_jobs_are_counted(event: Event, total: str) -> None:
    machine = Bench().machine
    apply(machine, event, NOW, Place(1, 0, 2))
    expected = 1 if isinstance(event, Cancelled) else len(event.ids)  # type: ignore[union-attr]  # every other event here has ids
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
    entry = bench.job(1)
    assert (entry.token, entry.attempts, entry.deadline_ms, bench.states()) == (9, 4, NOW + 50, {"leased": [1]})
    bench.apply(Acked(MAIL, [1]))


@pytest.mark.parametrize("state", ["ready", "scheduled", "leased", "dead"])
@pytest.mark.parametrize(
    "event",
    [
        Leased([1], [9], [2], [NOW + 10]), Retried(1, NOW + 5, "e"), Retried(1, 0, "e"), Released(1, 0, 0),
        Buried(1, NOW, "e"), Redriven(MAIL, [1]), Acked(MAIL, [1]), Cancelled(MAIL, 1), Purged(MAIL, [1]),
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
    once = dump(bench.machine)["jobs"]
    apply_uncounted(bench, event)
    assert dump(bench.machine)["jobs"] == once


def apply_uncounted(bench: Bench, event: Event) -> None:
    """Apply an event to job 1 and take back what it counts twice, so that the sums of `check` still hold.

    The job is not in a run: what is taken of a run is as it was where the replay begins.
    """
    machine, queue = bench.machine, bench.mail
    machine.loosen(1, (queue,))
    apply(machine, event, bench.now, bench.place)
    if isinstance(event, Acked | Cancelled | Purged):
        queue.acked = queue.cancelled = queue.purged = 0
    queue.enqueued = len(list(look.everything(machine)))
    check(machine)


def test_an_extension_of_a_lease_that_ended_changes_nothing() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1)
    bench.apply(Retried(1, NOW, None))
    before, deadline_ms = dump(bench.machine), bench.job(1).deadline_ms
    bench.apply(Extended(1, NOW + 10**6))
    assert dump(bench.machine) == before
    assert bench.job(1).deadline_ms == deadline_ms


def test_an_enqueue_of_a_known_job_replaces_it() -> None:
    bench = Bench()
    bench.enqueue(keys=["k"])
    bench.lease(1)
    apply_uncounted(bench, enqueued(1, keys=["k"]))
    entry = bench.job(1)
    assert (entry.state, entry.attempts, entry.token) == (READY, 0, 0)
    assert look.find(bench.machine, "mail", "k", NOW) == 1
    assert look.live_bytes(bench.machine) == {1: entry.size}


def test_a_known_job_that_is_enqueued_again_is_still_in_the_index() -> None:
    bench = Bench()
    bench.enqueue()
    bench.loosen(1).indexed = True
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
    apply(machine, IdsReserved(11), NOW, Place(1, 0, 2))
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
    resume(bench.machine, bench.now, 1)
    assert bench.machine.next_id == 100


def test_tokens_go_on_above_all_former_ones_after_a_start() -> None:
    bench = Bench()
    resume(bench.machine, NOW, 500)
    assert bench.machine.next_token == 500
    resume(bench.machine, NOW, 7)
    assert bench.machine.next_token == 500


def test_buckets_are_full_after_a_start() -> None:
    bench = Bench(config=QueueConfig(rate_limit=RateLimit(0.001, 3, "enqueue")))
    bench.enqueue(3)
    resume(bench.machine, NOW, 1)
    assert bench.mail.bucket is not None
    assert bench.mail.bucket.available(NOW) == 3
    assert bench.machine.queues["audit"].bucket is None


def test_a_start_lets_the_clock_act() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 100)
    resume(bench.machine, NOW + 100, 1)
    check(bench.machine)
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
    advance(machine, NOW)
    with pytest.raises(AssertionError, match=f"time line stepped back: {NOW} -> {NOW - 1}"):
        advance(machine, NOW - 1)
    assert machine.now_ms == NOW


def test_the_next_wake_up_is_the_first_of_delays_and_deadlines() -> None:
    bench = Bench()
    assert next_wakeup_ms(bench.machine) is None
    assert bench.machine.wake_ms == NEVER_MS
    bench.enqueue(2)
    bench.lease(1, deadline=700)
    bench.enqueue(due=NOW + 900)
    assert next_wakeup_ms(bench.machine) == bench.machine.wake_ms == NOW + 700
    bench.enqueue(due=NOW + 300)
    assert bench.machine.wake_ms == NOW + 300, "known before anybody asks"
    assert next_wakeup_ms(bench.machine) == NOW + 300


def test_nobody_is_woken_for_the_end_of_a_key_but_the_machine_looks_at_it() -> None:
    bench = Bench(config=QueueConfig(idempotency_ttl=1))
    bench.enqueue(keys=["k"])
    bench.ack(1)
    assert next_wakeup_ms(bench.machine) is None
    assert bench.machine.wake_ms == NOW + 1000
    bench.apply(at=NOW + 1000)
    assert bench.machine.wake_ms == NEVER_MS


def test_leases_that_ended_come_earliest_first_and_stay_until_an_event_says_so() -> None:
    bench = Bench()
    bench.enqueue(4)
    for job_id, deadline in ((1, 300), (2, 100), (3, 200), (4, 400)):
        bench.lease(job_id, deadline=deadline)
    for _ in range(2):
        assert ended_leases(bench.machine, NOW + 300, 10) == [(NOW + 100, 2), (NOW + 200, 3), (NOW + 300, 1)]
        assert ended_leases(bench.machine, NOW + 300, 2) == [(NOW + 100, 2), (NOW + 200, 3)]
    assert ended_leases(bench.machine, NOW + 99, 10) == []
    bench.apply(Retried(2, NOW, "lease expired"))
    assert ended_leases(bench.machine, NOW + 300, 1) == [(NOW + 200, 3)]


def test_a_lease_that_ended_is_told_once_though_it_was_extended_to_where_it_was() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1, 2, deadline=100)
    bench.apply(Extended(1, NOW + 900), Extended(1, NOW + 100), Extended(1, NOW + 100))
    assert ended_leases(bench.machine, NOW + 100, 10) == [(NOW + 100, 1), (NOW + 100, 2)]


def test_the_heap_of_deadlines_stays_small_however_many_leases_are_acked() -> None:
    machine = Bench(keep_payloads=True).machine
    now, place = NOW, Place()
    for i in range(1, 3001):
        apply(machine, enqueued(i), now, place)
        apply(machine, Leased([i], [i], [1], [now + 10**9]), now, place)
        apply(machine, Acked(MAIL, [i]), now, place)
        assert len(machine.deadlines) <= 64 + 2
    check(machine)
    assert next_wakeup_ms(machine) is None


def test_the_heap_of_deadlines_stays_small_however_often_a_lease_is_extended() -> None:
    bench = Bench(keep_payloads=True)
    bench.enqueue(10)
    bench.lease(*range(1, 11))
    for i in range(2000):
        apply(bench.machine, Extended(1 + i % 10, NOW + 30_001 + i), NOW, bench.place)
        assert len(bench.machine.deadlines) <= 64 + 2 * 10
    check(bench.machine)
    ended = ended_leases(bench.machine, NOW + 10**6, 100)
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
    assert look.find(bench.machine, "mail", "k", NOW + 10**12) == 1
    assert look.find(bench.machine, "mail", "other", NOW) is None
    assert look.find(bench.machine, "audit", "k", NOW) is None
    assert look.find(bench.machine, "unknown", "k", NOW) is None


def test_a_key_outlives_its_acked_job_by_the_window_of_the_queue() -> None:
    bench = keyed()
    bench.ack(1)
    assert look.find(bench.machine, "mail", "k", NOW + 999) == 1
    assert look.find(bench.machine, "mail", "k", NOW + 1000) is None
    assert look.live_bytes(bench.machine) == {1: KEY_BYTES}
    bench.apply(at=NOW + 999)
    assert bench.machine.keys.changed.keys() == {(MAIL, "k")}
    bench.apply(at=NOW + 1000)
    check(bench.machine)
    assert (bench.machine.keys.changed, look.live_bytes(bench.machine)) == ({}, {1: 0})


@pytest.mark.parametrize("end", [Cancelled(MAIL, 1), Purged(MAIL, [1]), Purged(MAIL, [1, 2])], ids=repr)
@pytest.mark.parametrize("is_loose", [False, True])
def test_a_key_of_a_job_whose_work_nobody_did_is_free_at_once(end: Event, is_loose: bool) -> None:
    bench = keyed()
    bench.enqueue(keys=["other"])
    if is_loose:
        bench.loosen(1)
    bench.apply(end)
    check(bench.machine)
    assert look.find(bench.machine, "mail", "k", NOW) is None
    bench.enqueue(keys=["k"])
    assert look.find(bench.machine, "mail", "k", NOW) == 3


def test_without_a_window_a_key_ends_with_its_job() -> None:
    bench = Bench(config=QueueConfig(idempotency_ttl=0))
    bench.enqueue(keys=["k"])
    bench.ack(1)
    assert bench.machine.keys.changed == {}
    assert look.find(bench.machine, "mail", "k", NOW) is None


def test_a_key_that_ended_can_be_used_again_though_the_clock_has_not_swept_it() -> None:
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    machine = bench.machine
    apply(machine, enqueued(2, keys=["k"]), NOW + 1000, bench.place)
    check(machine)
    assert look.find(machine, "mail", "k", NOW + 1000) == 2
    bench.apply(at=NOW + 2000)
    check(machine)
    assert look.find(machine, "mail", "k", NOW + 2000) == 2, "the old end is forgotten"


def test_keys_of_different_queues_have_nothing_to_do_with_each_other() -> None:
    bench = keyed()
    bench.enqueue(queue=AUDIT, keys=["k"])
    bench.apply(Cancelled(MAIL, 1))
    bench.apply(at=NOW + 1000)
    assert look.find(bench.machine, "audit", "k", bench.now) == 2


def test_the_end_of_a_job_leaves_a_key_alone_that_stands_for_another_by_now() -> None:
    """So a replay finds it that starts from a checkpoint which took the key's next job already."""
    bench = keyed()
    bench.lease(1)
    keys = bench.machine.keys.changed
    keys[MAIL, "k"].job_id = 50
    apply(bench.machine, Acked(MAIL, [1]), NOW, bench.place)
    assert bench.machine.jobs == {}
    assert (keys[MAIL, "k"].job_id, keys[MAIL, "k"].expires_ms) == (50, 0)
    del keys[MAIL, "k"]
    apply(bench.machine, enqueued(2, keys=["j"]), NOW, bench.place)
    apply(bench.machine, Leased([2], [9], [1], [NOW + 9]), NOW, bench.place)
    del keys[MAIL, "j"]
    apply(bench.machine, Acked(MAIL, [2]), NOW, bench.place)
    assert (bench.machine.jobs, keys) == ({}, {})


def test_a_batch_holds_the_keys_of_those_that_have_one() -> None:
    bench = Bench()
    bench.enqueue(3, keys=["a", None, "c"])
    assert {name: key.job_id for name, key in bench.machine.keys.changed.items()} == {(MAIL, "a"): 1, (MAIL, "c"): 3}
    assert [bench.job(i).key for i in (1, 2, 3)] == ["a", None, "c"]


def test_without_files_a_key_weighs_nothing() -> None:
    bench = Bench(keep_payloads=True)
    bench.enqueue(keys=["k"])
    bench.apply(Cancelled(MAIL, 1))
    bench.apply(at=NOW + TTL_MS)
    check(bench.machine)
    assert (look.live_bytes(bench.machine), bench.machine.keys.changed) == ({}, {})


# Copies and segments


@pytest.mark.parametrize("state", [READY, SCHEDULED, LEASED, DEAD])
def test_a_copied_job_is_the_same_job_in_another_place(state: int) -> None:
    bench = keyed()
    bench.lease(1)
    bench.machine.jobs[1].indexed = True
    if state == DEAD:
        bench.apply(Buried(1, NOW, "e"))
    elif state != LEASED:
        bench.apply(Retried(1, NOW + (500 if state == SCHEDULED else 0), "e"))
    before, states, wakeup = dump(bench.machine), bench.states(), next_wakeup_ms(bench.machine)
    bench.place = Place(2, 5000, 77)
    bench.apply(copied(bench.job(1)))
    entry = bench.job(1)
    assert dump(bench.machine) == before
    assert (bench.states(), next_wakeup_ms(bench.machine)) == (states, wakeup)
    assert (entry.segment, entry.offset, entry.lsn, entry.size) == (2, 5007, 77, 10 + COPY_BYTES)
    assert look.live_bytes(bench.machine) == {1: 0, 2: entry.size}
    assert entry.indexed
    assert bench.machine.changes is not None
    assert 1 in bench.machine.changes.jobs


@pytest.mark.parametrize("state", [READY, SCHEDULED, LEASED, DEAD])
def test_a_copied_job_that_is_unknown_comes_to_be(state: int) -> None:
    source = keyed()
    source.lease(1)
    entry = source.job(1)
    entry.state, entry.due_ms = state, NOW + 500 if state == SCHEDULED else 0
    event = copied(entry, id=41, token=12)
    bench = Bench()
    bench.mail.enqueued = 1  # what the snapshot says
    bench.apply(event)
    assert list(bench.states().values()) == [[41]]
    assert bench.job(41).state == state
    assert not bench.job(41).indexed
    assert (bench.machine.next_id, bench.machine.next_token) == (42, 13)
    assert look.find(bench.machine, "mail", "k", NOW) == 41
    if state == READY:
        assert bench.machine.woken == {"mail"}


def test_a_scheduled_job_whose_moment_has_come_is_copied_as_ready() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 500)
    event = copied(bench.job(1))
    bench.apply(event, at=NOW + 500)
    assert bench.states() == {"ready": [1]}


def test_a_copied_job_does_not_lower_the_next_id_or_token() -> None:
    bench = Bench()
    bench.enqueue(9)
    bench.lease(1)
    bench.lease(2)
    bench.apply(copied(bench.job(1)))
    assert (bench.machine.next_id, bench.machine.next_token) == (10, 3)


def test_a_copied_key_moves_to_its_new_segment_and_keeps_its_end() -> None:
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    bench.place = Place(2, 0, 9)
    bench.apply(KeyCopied(MAIL, "k", 1, NOW + 1000))
    assert look.live_bytes(bench.machine) == {1: 0, 2: KEY_BYTES}
    assert look.find(bench.machine, "mail", "k", NOW + 999) == 1
    bench.apply(at=NOW + 1000)
    assert bench.machine.keys.changed == {}


def test_a_copied_key_that_is_unknown_comes_to_be() -> None:
    bench = Bench()
    bench.apply(KeyCopied(MAIL, "k", 7, NOW + 1000))
    assert look.find(bench.machine, "mail", "k", NOW) == 7
    assert bench.machine.keys.changed.keys() == {(MAIL, "k")}
    assert bench.machine.keys.counts == {1: 1}


def test_dropped_segments_are_forgotten() -> None:
    bench = Bench()
    for segment in (1, 2, 3, 4):
        bench.place = Place(segment, 0, segment)
        bench.enqueue()
    bench.apply(Cancelled(MAIL, 1), Cancelled(MAIL, 2), Cancelled(MAIL, 3))
    bench.apply(SegmentsDropped(2))
    assert look.live_bytes(bench.machine).keys() == {3, 4}
    assert bench.machine.oldest_segment == 3
    bench.apply(SegmentsDropped(1))
    assert bench.machine.oldest_segment == 3


def test_what_ends_after_its_segment_was_dropped_is_not_subtracted_from_anything() -> None:
    """A replay does not let the clock act: it meets the drop before the ends that had come before it."""
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    apply(bench.machine, enqueued(2), NOW, bench.place)
    apply(bench.machine, SegmentsDropped(1), NOW + 1000, Place(2, 0, 9))
    apply(bench.machine, Cancelled(MAIL, 2), NOW + 1000, Place(2, 0, 10))
    advance(bench.machine, NOW + 1000)
    check(bench.machine)
    assert look.live_bytes(bench.machine) == {}


# What a checkpoint has to write


class Saved(NamedTuple):
    """A run as an index holds it."""

    queue: int
    priority: int
    state: int
    columns: Columns


class Shelf:
    """What stands for an index: saved runs and keys, in dicts."""

    def __init__(self) -> None:
        self.runs: dict[int, Saved] = {}
        self.keys: dict[tuple[int, str], tuple[int, int, int]] = {}
        self.reads = 0

    def columns(self, number: int) -> Columns:
        self.reads += 1
        return self.runs[number].columns.picked(slice(None))

    def key(self, queue: int, text: str) -> tuple[int, int, int] | None:
        return self.keys.get((queue, text))

    def key_names(self) -> list[tuple[int, str]]:
        return list(self.keys)

    def write_keys(self, keys: Mapping[tuple[int, str], Key]) -> None:
        for name, key in keys.items():
            if key.job_id:
                self.keys[name] = (key.job_id, key.expires_ms, key.segment)
            else:
                self.keys.pop(name, None)

    def ended_keys(self, now_ms: int) -> list[tuple[int, str]]:
        return [name for name, (_, expires_ms, _) in self.keys.items() if 0 < expires_ms <= now_ms]

    def copy(self) -> Shelf:
        again = Shelf()
        again.runs, again.keys.changed = dict(self.runs), dict(self.keys)
        return again


def ids_in(runs: Iterable[Run]) -> set[int]:
    return {i for run in runs for i in run.load().ids[run.at :]}


def changes_of(machine: Machine) -> tuple[set[int], set[int]]:
    """What changed since the last look: jobs by themselves, and those in the runs that changed."""
    taken, machine.changes = machine.changes, Changes()
    assert taken is not None
    return taken.jobs, ids_in(taken.runs)


def save(machine: Machine, shelf: Shelf) -> None:
    """A checkpoint in one moment: nothing is left to write, every run has a number and is on the shelf."""
    taken, machine.changes = machine.changes, Changes()
    assert taken is not None
    for run in taken.runs:
        if not run.number:
            run.number, machine.next_run = machine.next_run, machine.next_run + 1
        columns = run.load().picked(slice(run.at, None))
        columns.payloads = None
        shelf.runs[run.number] = Saved(run.queue.number, run.priority, run.state, columns)
    for number in taken.gone:
        del shelf.runs[number]
    for job_id in taken.jobs & machine.jobs.keys():
        machine.jobs[job_id].indexed = True
    shelf.write_keys(machine.keys.freeze())
    machine.keys.frozen = {}
    machine.keys.shelf = shelf


def runs_of(machine: Machine) -> list[Run]:
    return [run for waiting in machine.waiting.values() for _, window in waiting.each() for run in window.runs]


def put_away(machine: Machine, shelf: Shelf) -> None:
    save(machine, shelf)
    for run in runs_of(machine):
        run.put_away(shelf)
    for waiting in machine.waiting.values():
        for _, window in waiting.each():
            window.opens.clear()


def test_every_job_that_an_event_touches_is_to_be_written() -> None:
    bench = Bench()
    bench.enqueue(3)
    assert changes_of(bench.machine) == (set(), {1, 2, 3})
    bench.lease(1, 2)
    assert changes_of(bench.machine) == ({1, 2}, {3})
    for event in (Extended(1, NOW + 10**6), Retried(1, NOW, "e"), Buried(1, NOW, "e"), Redriven(MAIL, [1])):
        bench.apply(event)
        assert changes_of(bench.machine) == ({1}, set())
    bench.apply(Released(2, NOW, 0))
    assert changes_of(bench.machine) == ({2}, set())


def test_a_run_that_gets_longer_or_shorter_is_to_be_written() -> None:
    bench = Bench()
    bench.enqueue(5)
    changes_of(bench.machine)
    bench.enqueue()
    assert changes_of(bench.machine) == (set(), {1, 2, 3, 4, 5, 6})
    bench.apply(Cancelled(MAIL, 2))
    assert changes_of(bench.machine) == (set(), {1, 3, 4, 5, 6})
    bench.apply(Purged(MAIL, [3, 4]))
    assert changes_of(bench.machine) == (set(), {1, 5, 6})
    bench.apply(copied(bench.job(5)))
    assert changes_of(bench.machine) == (set(), {1, 5, 6})


def test_a_run_whose_jobs_become_ready_is_to_be_written() -> None:
    bench = Bench()
    bench.enqueue(2, due=NOW + 20)
    bench.enqueue(2, due=NOW + 30)
    changes_of(bench.machine)
    bench.apply(at=NOW + 20)
    assert changes_of(bench.machine) == (set(), {1, 2, 3, 4})


def test_a_saved_run_that_is_used_up_is_to_be_removed() -> None:
    bench, shelf = Bench(), Shelf()
    bench.enqueue(2)
    save(bench.machine, shelf)
    bench.lease(1)
    bench.lease(2)
    changes = bench.machine.changes
    assert changes is not None
    assert (changes.jobs, changes.runs, changes.gone) == ({1, 2}, set(), {1})


def test_a_job_that_never_was_in_the_index_leaves_nothing_to_write() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1)
    bench.apply(Acked(MAIL, [1]), Cancelled(MAIL, 2))
    assert changes_of(bench.machine) == (set(), set())


def test_the_end_of_a_job_in_the_index_is_to_be_written() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.loosen(1).indexed = True
    bench.loosen(2)
    changes_of(bench.machine)
    bench.apply(Purged(MAIL, [1, 2]))
    assert changes_of(bench.machine) == ({1}, set())


def test_a_job_in_the_index_that_was_put_into_a_run_is_to_be_removed_whatever_becomes_of_it_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shrink_runs(monkeypatch, few_jobs=0)
    for end in ("pack", "ack", "cancel", "purge"):
        bench = Bench()
        bench.enqueue(2)
        bench.lease(1, 2)
        bench.apply(Released(1, NOW, 0), Released(2, NOW, 0))
        for entry in bench.machine.jobs.values():
            entry.indexed = True
        changes_of(bench.machine)
        assert saving.pack(bench.machine, READY, bench.lines.ready[5] or Window(), 10)
        check(bench.machine)
        if end == "ack":
            bench.lease(1, 2)
            bench.apply(Acked(MAIL, [1, 2]))
        elif end == "cancel":
            bench.apply(Cancelled(MAIL, 2), Cancelled(MAIL, 1))
        elif end == "purge":
            bench.apply(Purged(MAIL, [1]), Purged(MAIL, [2]))
        jobs, _ = changes_of(bench.machine)
        assert jobs == {1, 2}, end


def test_every_key_that_changed_is_to_be_written_until_a_checkpoint_has_it() -> None:
    bench, shelf = keyed(), Shelf()
    machine = bench.machine
    assert machine.keys.changed.keys() == {(MAIL, "k")}
    save(machine, shelf)
    check(machine)
    assert (machine.keys.changed, shelf.keys) == ({}, {(MAIL, "k"): (1, 0, 1)})
    bench.ack(1)
    assert machine.keys.changed.keys() == {(MAIL, "k")}
    save(machine, shelf)
    check(machine)
    assert (machine.keys.changed, shelf.keys) == ({}, {(MAIL, "k"): (1, NOW + 1000, 1)})
    assert look.find(machine, "mail", "k", NOW + 999) == 1
    assert look.find(machine, "mail", "k", NOW + 1000) is None


def test_the_end_of_a_key_in_the_index_is_to_be_written() -> None:
    bench, shelf = keyed(), Shelf()
    machine = bench.machine
    bench.ack(1)
    save(machine, shelf)
    bench.apply(at=NOW + 999)
    machine.keys.sweep([(MAIL, "k"), (MAIL, "unknown")], bench.now)
    assert machine.keys.changed == {}, "its window is not over"
    bench.apply(at=NOW + 1000)
    machine.keys.sweep([(MAIL, "k")], bench.now)
    check(machine)
    assert {name: key.job_id for name, key in machine.keys.changed.items()} == {(MAIL, "k"): 0}
    assert (look.live_bytes(machine), machine.keys.counts) == ({1: 0}, {1: 0})
    save(machine, shelf)
    check(machine)
    assert (machine.keys.changed, shelf.keys) == ({}, {})


def test_a_key_of_a_living_job_or_of_another_one_by_now_is_not_swept() -> None:
    bench, shelf = keyed(), Shelf()
    bench.ack(1)
    save(bench.machine, shelf)
    apply(bench.machine, enqueued(2, keys=["k"]), NOW + 1000, bench.place)
    bench.machine.keys.sweep([(MAIL, "k")], NOW + 1000)
    check(bench.machine)
    assert look.find(bench.machine, "mail", "k", NOW + 1000) == 2


def test_a_key_that_never_was_in_the_index_leaves_nothing_to_write() -> None:
    bench = keyed()
    bench.apply(Cancelled(MAIL, 1))
    bench.apply(at=NOW + 1000)
    assert bench.machine.keys.changed == {}


def test_a_key_in_the_index_that_is_used_again_is_to_be_written() -> None:
    bench, shelf = keyed(), Shelf()
    bench.ack(1)
    save(bench.machine, shelf)
    apply(bench.machine, enqueued(2, keys=["k"]), NOW + 1000, bench.place)
    check(bench.machine)
    assert {name: key.job_id for name, key in bench.machine.keys.changed.items()} == {(MAIL, "k"): 2}
    assert bench.machine.keys.counts == {1: 0}


def test_keys_are_found_while_a_checkpoint_writes_them_and_change_beside_it() -> None:
    bench = Bench(config=QueueConfig(idempotency_ttl=1))
    bench.enqueue(3, keys=["a", "b", "c"])
    machine = bench.machine
    frozen = machine.keys.freeze()
    with pytest.raises(AssertionError, match="one checkpoint at a time"):
        machine.keys.freeze()
    assert [look.find(machine, "mail", text, NOW) for text in "abc"] == [1, 2, 3]
    bench.ack(2)
    bench.apply(Cancelled(MAIL, 3))
    check(machine)
    assert {text: key.expires_ms for (_, text), key in frozen.items()} == {"a": 0, "b": 0, "c": 0}, "as they were"
    assert [look.find(machine, "mail", text, NOW) for text in "abc"] == [1, 2, None]
    assert {text: key.job_id for (_, text), key in machine.keys.changed.items()} == {"b": 2, "c": 0}


def test_keys_that_a_failed_checkpoint_took_are_still_to_be_written_and_still_end() -> None:
    bench = Bench(config=QueueConfig(idempotency_ttl=1))
    bench.enqueue(3, keys=["a", "b", "c"])
    bench.ack(1, 2)
    machine = bench.machine
    machine.keys.freeze()
    apply(bench.machine, enqueued(4, keys=["b"]), NOW, bench.place)
    assert next_wakeup_ms(machine) is None
    assert machine.wake_ms == NEVER_MS
    saving.thaw_keys(machine)
    check(machine)
    assert machine.keys.frozen == {}
    assert machine.wake_ms == NOW + 1000
    assert {text: key.job_id for (_, text), key in machine.keys.changed.items()} == {"a": 1, "b": 4, "c": 3}
    bench.apply(at=NOW + 1000)
    check(machine)
    assert [look.find(machine, "mail", text, bench.now) for text in "abc"] == [None, 4, 3]
    assert machine.keys.changed.keys() == {(MAIL, "b"), (MAIL, "c")}


# Saving and loading


def reload(machine: Machine, entries: Iterable[tuple[Entry, int]] = (), shelf: Shelf | None = None) -> Machine:
    again = Machine()
    saving.load(again, saving.snapshot(machine))
    for queue, segment in queues_in(machine).values():
        saving.load_queue(again, queue, segment)
    for entry, state in entries:
        saving.load_entry(again, entry, state)
    if shelf is not None:
        again.keys.shelf = shelf
        for number, saved in shelf.runs.items():
            saving.load_run(again, *shelved(number, saved, again, shelf))
        again.keys.load_counts(machine.keys.counts.items())
    return again


def shelved(number: int, saved: Saved, machine: Machine, shelf: Shelf) -> tuple[Run, list[tuple[int, int]]]:
    """A run as an index gives it back, and its bytes per segment."""
    queue, priority, state, columns = saved
    ids, dues = columns.ids, columns.dues
    head, last = ((dues[0], ids[0]), (dues[-1], ids[-1])) if state == SCHEDULED else (ids[0], ids[-1])
    run = Run.shelved(machine.numbers[queue], priority, state, number, len(ids), head, last, min(ids), max(ids), shelf)
    return run, list(columns.live().items())


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
    check(again)
    assert attrs.asdict(saving.snapshot(again)) == attrs.asdict(saving.snapshot(bench.machine))
    queue = again.queues["mail"]
    assert (queue.enqueued, queue.acked, queue.cancelled, queue.purged) == (4, 1, 2, 1)
    assert (again.next_id, again.reserved_id, again.oldest_segment, again.now_ms) == (5, 50, 4, NOW + 9)
    assert queue.config.paused
    assert (queue.ttl_ms, again.numbers[MAIL]) == (1000, queue)


def packed_dead_letters() -> Bench:
    """Dead letters 1 to 5, of which 2 to 5 are in a run; the index knows 2 and 3 from before."""
    bench = Bench()
    bench.enqueue(5)
    bench.bury(1, 2, 3, 4, 5)
    for job_id in (2, 3):
        bench.job(job_id).indexed = True
    for state, window in saving.crowded(bench.machine, 0):
        assert saving.pack(bench.machine, state, window, 128)
    assert bench.machine.jobs.keys() == {1}
    return bench


def test_a_redrive_of_one_dead_letter_takes_it_from_where_the_decision_found_it() -> None:
    with small(1000, 1):
        bench = packed_dead_letters()
        for job_id, in_run in ((4, True), (1, False)):
            event = decide.redrive(bench.machine, "mail", [job_id], None)
            assert event is not None
            assert (event.found is not None) == in_run
            bench.apply(event)
        assert bench.states() == {"ready": [1, 4], "dead": [2, 3, 5]}
        assert (bench.job(4).attempts, bench.job(4).died_at_ms) == (0, 0)


def test_what_the_index_has_of_a_packed_job_is_its_own_again_when_it_leaves_the_run() -> None:
    with small(1000, 1):
        bench = packed_dead_letters()
        changes = bench.machine.changes
        assert changes is not None
        assert changes.packed == {2, 3}
        assert (bench.loosen(4).indexed, changes.packed) == (False, {2, 3})
        assert (bench.loosen(2).indexed, changes.packed) == (True, {3})
        assert 2 in changes.jobs


def test_a_number_that_has_another_name_leaves_none_of_the_old_one() -> None:
    machine = Bench().machine
    apply(machine, QueueCreated(MAIL, "post"), NOW, Place())
    assert (machine.queues.keys(), machine.numbers[MAIL].name) == ({"post", "audit"}, "post")


def test_a_snapshot_is_loaded_into_an_empty_machine_only() -> None:
    machine = Bench().machine
    with pytest.raises(AssertionError, match="a snapshot is loaded into an empty machine"):
        saving.load(machine, Snapshot(1, 1, 1, 0, []))


def loaded(bench: Bench, shelf: Shelf) -> Machine:
    """What an opening makes of a checkpoint of this moment."""
    save(bench.machine, shelf)
    again = reload(bench.machine, shelf=shelf)
    for _, entry in sorted(bench.machine.jobs.items()):
        saving.load_entry(again, *clone(entry, again.numbers))
    return again


def test_loaded_jobs_are_where_they_were_and_nothing_about_them_is_to_be_written() -> None:
    bench, shelf = keyed(), Shelf()
    bench.enqueue(4, priority=9)
    bench.enqueue(2, due=NOW + 500)
    bench.lease(2, 3, deadline=700)
    bench.bury(4)
    again = loaded(bench, shelf)
    assert shelf.reads == 0, "an opening reads the heads of the runs alone"
    assert (again.next_token, next_wakeup_ms(again)) == (4, NOW + 500)
    assert again.woken == {"mail"}
    check(again)
    assert dump(again) == dump(bench.machine)
    assert look.live_bytes(again) == look.live_bytes(bench.machine)
    assert again.next_run == bench.machine.next_run
    assert again.jobs.keys() == {2, 3, 4}
    assert all(entry.indexed for entry in again.jobs.values())
    assert changes_of(again) == (set(), set())
    assert all(run.columns is None for run in runs_of(again)), "to look at them brings nothing into memory"


@pytest.mark.parametrize("is_loose", [True, False])
def test_a_loaded_job_of_a_paused_queue_wakes_nobody(is_loose: bool) -> None:
    bench = Bench(config=QueueConfig(paused=True))
    bench.enqueue()
    if is_loose:
        bench.loosen(1)
    again = loaded(bench, Shelf())
    check(again)
    assert len(again.jobs) == is_loose
    assert again.woken == set()


@pytest.mark.parametrize("state", [READY, SCHEDULED, LEASED, DEAD])
def test_a_loaded_job_can_be_loose_in_every_state(state: int) -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.lease(1)
    if state == DEAD:
        bench.bury(1)
    elif state != LEASED:
        bench.apply(Retried(1, NOW + (500 if state == SCHEDULED else 0), "e"))
    again = loaded(bench, Shelf())
    check(again)
    assert dump(again) == dump(bench.machine)
    assert again.jobs[1].state == state
    assert changes_of(again) == (set(), set())


def test_a_loaded_key_keeps_its_end_and_need_not_be_written() -> None:
    bench, shelf = keyed(), Shelf()
    bench.ack(1)
    again = loaded(bench, shelf)
    check(again)
    assert look.find(again, "mail", "k", NOW + 999) == 1
    assert look.find(again, "mail", "k", NOW + 1000) is None
    assert look.live_bytes(again) == {1: KEY_BYTES}
    assert again.keys.changed == {}


def test_without_files_nothing_is_noted_for_an_index() -> None:
    machine = Machine(keep_payloads=True)
    apply(machine, QueueCreated(MAIL, "mail"), NOW, Place())
    apply(machine, KeyCopied(MAIL, "k", 1, NOW + 1000), NOW, Place())
    assert machine.changes is None
    apply(machine, copied(loose_entry(machine.numbers[MAIL], 3)), NOW, Place())
    apply(machine, Leased([3], [1], [1], [NOW + 5]), NOW, Place())
    apply(machine, Released(3, NOW, 0), NOW, Place())
    assert machine.changes is None
    assert machine.jobs[3].indexed is False
    saving.load_entry(machine, loose_entry(machine.numbers[MAIL], 4), READY)
    assert machine.changes is None


def loose_entry(queue: Queue, job_id: int) -> Entry:
    return Entry(job_id, queue, Spec(5, None, POLICY, None, NO_HEADERS), NOW, 0, None)


def test_a_key_that_was_saved_after_its_job_gets_its_end_from_the_log() -> None:
    bench, shelf = keyed(), Shelf()
    again = loaded(bench, shelf)
    shelf.keys[MAIL, "k"] = (1, NOW + 1000, 1)
    again.keys.load_counts([(1, 1)])
    apply(again, Leased([1], [1], [1], [NOW + 30_000]), NOW, Place(1, 0, 8))
    apply(again, Acked(MAIL, [1], NOW + 1005), NOW + 5, Place(1, 0, 9))
    check(again)
    assert look.find(again, "mail", "k", NOW + 1004) == 1
    assert again.keys.counts == {1: 1}
    advance(again, NOW + 1005)
    assert {name: key.job_id for name, key in again.keys.changed.items()} == {(MAIL, "k"): 0}


def test_a_key_that_was_saved_with_the_next_job_is_left_alone_by_the_end_of_the_one_before() -> None:
    bench, shelf = keyed(), Shelf()
    again = loaded(bench, shelf)
    shelf.keys[MAIL, "k"] = (2, 0, 1)
    apply(again, Cancelled(MAIL, 1), NOW + 5, Place(1, 0, 9))
    assert (again.keys.changed, again.keys.counts) == ({}, {})
    apply(again, enqueued(2, keys=["k"]), NOW + 2000, Place(1, 0, 10))
    check(again)
    assert look.find(again, "mail", "k", NOW + 2000) == 2


def test_a_scheduled_run_that_is_loaded_falls_due_at_its_moment() -> None:
    bench = Bench()
    bench.enqueue(3, due=NOW + 500)
    again = loaded(bench, Shelf())
    assert next_wakeup_ms(again) == NOW + 500
    advance(again, NOW + 500)
    check(again)
    assert waiting_of(again, "mail").ids(READY) == [1, 2, 3]


# Runs


@contextlib.contextmanager
def small(run_jobs: int, few_jobs: int = 1) -> Iterator[None]:
    """Runs that are full soon."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_runs(patch, run_jobs, few_jobs)
        yield


def cells(window: Window | None) -> list[list[int]]:
    """The ids in each run of a window."""
    assert window is not None
    return [[run.load().ids[i] for i in run.cells()] for run in window.runs]


def test_a_batch_fills_the_open_run_and_goes_on_in_new_ones() -> None:
    with small(4):
        bench = Bench()
        bench.enqueue(3)
        bench.enqueue(7, keys=["a", None, "c", None, "e", None, "g"], length=20)
        assert cells(bench.lines.ready[5]) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    jobs = [bench.job(i) for i in range(4, 11)]
    assert [e.offset for e in jobs] == [1040 + 20 * i for i in range(7)]
    assert [e.crc for e in jobs] == list(range(1000, 1007))
    assert [e.key for e in jobs] == ["a", None, "c", None, "e", None, "g"]
    assert look.job(bench.machine, 99) is None


def test_a_batch_that_is_kept_in_memory_is_divided_with_its_payloads() -> None:
    with small(4):
        bench = Bench(keep_payloads=True)
        bench.enqueue(6, length=2)
        assert cells(bench.lines.ready[5]) == [[1, 2, 3, 4], [5, 6]]
    assert [bench.job(i).payload for i in range(1, 7)] == [b"AA", b"BB", b"CC", b"DD", b"EE", b"FF"]


@pytest.mark.parametrize("due", [0, NOW + 50])
@pytest.mark.parametrize("keep_payloads", [True, False])
def test_jobs_whose_ids_were_told_long_before_find_their_place(due: int, keep_payloads: bool) -> None:
    bench = Bench(keep_payloads=keep_payloads)
    for first_id in (101, 51, 31, 11, 41):
        bench.apply(enqueued(first_id, 2, due=due, keys=None if first_id > 11 else ["a", None]))
    assert bench.machine.jobs.keys() == {31, 32, 11, 12, 41, 42}
    assert bench.states() == {("scheduled" if due else "ready"): [11, 12, 31, 32, 41, 42, 51, 52, 101, 102]}
    entry = bench.job(12)
    assert (entry.offset, entry.crc, entry.key, bench.job(11).key) == (bench.place.body_offset + 50, 1001, None, "a")
    assert entry.payload == (b"B" * 10 if keep_payloads else None)
    assert entry.spec is bench.job(11).spec
    bench.apply(at=NOW + 50)
    window = bench.lines.ready[5]
    assert window is not None
    assert look.head(bench.machine, window, 9)[0] == [11, 12, 31, 32, 41, 42, 51, 52, 101]


def test_what_comes_out_of_order_while_the_open_runs_are_full_begins_a_run() -> None:
    with small(2, 64):
        bench = Bench()
        for first_id in (101, 51, 31, 11):
            bench.apply(enqueued(first_id, 2))
        assert cells(bench.lines.ready[5]) == [[11, 12], [31, 32], [51, 52], [101, 102]]


def test_a_lease_takes_from_the_head_of_overlapping_runs_and_loose_jobs() -> None:
    with small(3):
        bench = Bench()
        for first_id in (10, 1, 4, 20):
            bench.apply(enqueued(first_id, 3))
        bench.loosen(11)
        window = bench.lines.ready[5]
        assert window is not None
        ids, attempts, visibilities = look.head(bench.machine, window, 8)
        assert (ids, attempts, visibilities) == ([1, 2, 3, 4, 5, 6, 10, 11], [0] * 8, [None] * 8)
        places = [(MAIL, 5, 8)]
        bench.apply(Leased(ids, list(range(1, 9)), [1] * 8, [NOW + 9] * 8, places))
        assert bench.states() == {"ready": [12, 20, 21, 22], "leased": ids}
        assert [bench.job(i).token for i in ids] == list(range(1, 9))


def test_a_replayed_lease_finds_its_jobs_wherever_they_are() -> None:
    """Those that were in the way when it was written may be gone, and the other way round."""
    bench = Bench()
    bench.enqueue(8)
    bench.apply(Leased([3, 4, 99, 1, 2, 6, 8], list(range(1, 8)), [1] * 7, [NOW + 9] * 7, [(MAIL, 5, 7)]))
    assert bench.states() == {"ready": [5, 7], "leased": [1, 2, 3, 4, 6, 8]}
    bench.apply(Leased([5, 7, 9], [8, 9, 10], [1] * 3, [NOW + 9] * 3, [(MAIL, 5, 3)]))
    assert bench.states() == {"leased": [1, 2, 3, 4, 5, 6, 7, 8]}
    bench.apply(Leased([9], [11], [1], [NOW + 9], [(MAIL, 7, 1)]))


def test_a_run_becomes_ready_as_a_whole_or_in_two_parts() -> None:
    bench = Bench()
    for due, count in ((100, 3), (200, 2), (300, 1)):
        bench.enqueue(count, due=NOW + due)
    bench.apply(at=NOW + 100)
    assert (cells(bench.lines.ready[5]), cells(bench.lines.scheduled[5])) == ([[1, 2, 3]], [[4, 5, 6]])
    bench.apply(at=NOW + 250)
    assert bench.states() == {"ready": [1, 2, 3, 4, 5], "scheduled": [6]}
    bench.apply(at=NOW + 300)
    assert bench.states() == {"ready": [1, 2, 3, 4, 5, 6]}
    assert next_wakeup_ms(bench.machine) is None


def test_jobs_that_fall_due_in_another_order_than_that_of_their_ids_are_ready_by_id() -> None:
    bench = Bench()
    bench.apply(enqueued(5, 2, due=NOW + 10), enqueued(1, 2, due=NOW + 20), enqueued(3, due=NOW + 30))
    assert cells(bench.lines.scheduled[5]) == [[5, 6, 1, 2, 3]]
    bench.apply(at=NOW + 40)
    assert cells(bench.lines.ready[5]) == [[1, 2, 3, 5, 6]]


def test_jobs_that_came_one_by_one_and_fall_due_in_another_order_are_ready_by_id() -> None:
    bench = Bench()
    bench.apply(enqueued(5, due=NOW + 10), enqueued(1, due=NOW + 20), enqueued(3, due=NOW + 30))
    assert cells(bench.lines.scheduled[5]) == [[5, 1, 3]]
    changes_of(bench.machine)
    bench.apply(at=NOW + 25)
    assert (cells(bench.lines.ready[5]), cells(bench.lines.scheduled[5])) == ([[1, 5]], [[3]])
    assert changes_of(bench.machine) == (set(), {1, 3, 5})


def test_a_priority_without_scheduled_jobs_has_nothing_to_make_ready() -> None:
    bench = Bench()
    assert _ripen(bench.machine, bench.mail, 3, NOW, 10) == 0


def test_a_storm_of_loose_jobs_that_fall_due_is_taken_in_parts() -> None:
    bench = Bench(keep_payloads=True)
    count = RIPE_JOBS + 10
    machine = bench.machine
    apply(machine, enqueued(1, count), NOW, Place())
    ids = list(range(1, count + 1))
    apply(machine, Leased(ids, ids, [1] * count, [NOW + 10**6] * count, [(MAIL, 5, count)]), NOW, Place())
    for i in ids:
        apply(machine, Retried(i, NOW + 100, None), NOW, Place())
    check(machine)
    advance(machine, NOW + 100)
    check(machine)
    assert machine.queues["mail"].counts == [RIPE_JOBS, 10, 0, 0]
    assert machine.wake_ms <= NOW + 100
    advance(machine, NOW + 100)
    check(machine)
    assert machine.queues["mail"].counts == [count, 0, 0, 0]
    assert machine.wake_ms == NEVER_MS


def test_loose_jobs_are_put_into_a_run_but_for_the_head() -> None:
    with small(3, few_jobs=2):
        bench = Bench()
        bench.enqueue(3)
        bench.enqueue(6)
        ids = list(range(1, 10))
        bench.lease(*ids)
        for i in ids:
            bench.apply(Retried(i, NOW, f"e{i}"))
        before = dump(bench.machine)
        assert saving.crowded(bench.machine, 9) == []
        ((state, window),) = saving.crowded(bench.machine, 8)
        assert (state, window) == (READY, bench.lines.ready[5])
        more = [saving.pack(bench.machine, state, window, 10) for _ in range(4)]
        check(bench.machine)
        assert more == [True, True, True, False]
        assert (cells(window), list(window.loose)) == ([[3], [4, 5, 6], [7, 8, 9]], [1, 2])
        assert dump(bench.machine) == before
        assert saving.crowded(bench.machine, 0) == []
        assert changes_of(bench.machine) == ({1, 2}, set(range(3, 10)))


def test_scheduled_and_dead_jobs_too_are_put_into_runs() -> None:
    with small(10, few_jobs=0):
        bench = Bench(keep_payloads=True)
        bench.enqueue(6)
        bench.lease(*range(1, 7))
        for i in (1, 2, 3):
            bench.apply(Retried(i, NOW + 100 - i, f"e{i}"))
        bench.bury(4, 5)
        before = dump(bench.machine)
        for state, window in saving.crowded(bench.machine, 0):
            assert saving.pack(bench.machine, state, window, 10)
        check(bench.machine)
        assert (cells(bench.lines.scheduled[5]), cells(bench.lines.dead[5])) == ([[3, 2, 1]], [[4, 5]])
        assert (dump(bench.machine), set(bench.machine.jobs)) == (before, {6})
        bench.apply(Redriven(MAIL, [5]))
        assert bench.states() == {"ready": [5], "scheduled": [1, 2, 3], "leased": [6], "dead": [4]}
        assert bench.job(4).payload == b"D" * 10


def test_a_run_job_that_was_delivered_before_keeps_its_count() -> None:
    with small(10, few_jobs=0):
        bench = Bench()
        bench.enqueue(3)
        bench.lease(1, 2)
        bench.apply(Retried(1, NOW, "boom"), Released(2, NOW, 0))
        ((state, window),) = saving.crowded(bench.machine, 0)
        assert saving.pack(bench.machine, state, window, 10)
        assert look.head(bench.machine, window, 3) == ([1, 2, 3], [1, 0, 0], [None] * 3)
        bench.lease(1, 2)
        assert (bench.job(1).attempts, bench.job(2).attempts, bench.job(1).last_error) == (2, 1, "boom")


def test_a_copied_job_in_a_run_goes_on_waiting_where_it_is() -> None:
    bench = keyed()
    bench.enqueue(2)
    before = dump(bench.machine)
    bench.place = Place(2, 5000, 77)
    bench.apply(copied(bench.job(1)), copied(bench.job(3)))
    assert dump(bench.machine) == before
    assert bench.machine.jobs == {}
    for entry in (bench.job(1), bench.job(3)):
        assert (entry.segment, entry.offset, entry.lsn, entry.size) == (2, 5007, 77, 10 + COPY_BYTES)
    assert look.live_bytes(bench.machine) == {1: bench.job(2).size, 2: 2 * (10 + COPY_BYTES)}
    apply(bench.machine, SegmentsDropped(2), NOW, Place(3, 0, 79))
    apply(bench.machine, copied(bench.job(1)), NOW, Place(3, 100, 80))
    assert look.live_bytes(bench.machine) == {3: 10 + COPY_BYTES}, "of a segment that is gone nothing is subtracted"


def test_many_copies_in_order_become_a_run_again_and_others_find_their_place() -> None:
    source = Bench()
    source.enqueue(30)
    bench = Bench()
    for job_id in (11, 12, 21, 22, 5, 6, 7, 13, 1, 2, 14, 23):
        bench.mail.enqueued += 1
        bench.apply(copied(source.job(job_id)))
    assert cells(bench.lines.ready[5]) == [[5, 6, 7, 13, 14], [11, 12, 21, 22, 23]]
    assert bench.machine.jobs.keys() == {1, 2}
    assert bench.states() == {"ready": [1, 2, 5, 6, 7, 11, 12, 13, 14, 21, 22, 23]}


def test_a_copied_job_with_a_delay_is_waited_for() -> None:
    source = Bench()
    source.enqueue(due=NOW + 70)
    bench = Bench()
    bench.mail.enqueued = 1
    bench.apply(copied(source.job(1)))
    assert next_wakeup_ms(bench.machine) == NOW + 70


def test_a_purge_of_many_leaves_the_rest_of_each_run() -> None:
    with small(4):
        bench = Bench(config=QueueConfig(idempotency_ttl=1))
        bench.enqueue(10, keys=[f"k{i}" if i % 2 else None for i in range(1, 11)])
        bench.enqueue(2, priority=1)
        bench.enqueue(2, due=NOW + 5)
        bench.loosen(6)
        bench.apply(Purged(MAIL, [2, 3, 5, 6, 7, 8, 9, 13]))
        assert bench.states() == {"ready": [1, 4, 10, 11, 12], "scheduled": [14]}
        assert bench.mail.purged == 8
        assert {text: key.expires_ms for (_, text), key in bench.machine.keys.changed.items()} == {"k1": 0}


def test_a_job_that_comes_again_after_its_segment_was_dropped_is_not_subtracted_from_anything() -> None:
    bench = Bench()
    bench.enqueue()
    bench.lease(1)
    apply(bench.machine, SegmentsDropped(1), NOW, Place(2, 0, 9))
    bench.place = Place(2, 0, 10)
    apply_uncounted(bench, enqueued(1))
    assert look.live_bytes(bench.machine) == {2: bench.job(1).size}


def test_a_purge_after_its_segment_was_dropped_subtracts_nothing() -> None:
    bench = Bench()
    bench.enqueue(3)
    machine = bench.machine
    apply(machine, SegmentsDropped(1), NOW, Place(2, 0, 9))
    apply(machine, Purged(MAIL, [1, 3]), NOW, Place(2, 0, 10))
    assert look.live_bytes(machine) == {}
    assert waiting_of(machine, "mail").ids(READY) == [2]


def test_jobs_are_looked_for_quicker_where_queue_and_priority_are_known() -> None:
    bench = Bench()
    bench.enqueue(3)
    bench.enqueue(2, queue=AUDIT, priority=1)
    bench.lease(3)
    machine = bench.machine
    found = [look.job(machine, i, *where) for i, where in ((1, (MAIL, 5)), (4, (AUDIT,)), (3, (MAIL, 5)))]
    assert [entry and entry.id for entry in found] == [1, 4, 3]
    assert [look.job(machine, 1, MAIL, 4), look.job(machine, 1, AUDIT), look.job(machine, 9)] == [None, None, None]


def test_the_living_jobs_of_a_range_are_found_in_runs_and_beside_them() -> None:
    with small(3):
        bench = Bench()
        bench.enqueue(6)
        bench.enqueue(2, due=NOW + 5)
        bench.lease(2, 5)
        bench.apply(Acked(MAIL, [2]))
        alive = partial(look.alive, bench.machine)
        assert alive(MAIL, 5, 1, 8) == {1, 3, 4, 5, 6, 7, 8}
        assert (alive(MAIL, 5, 2, 2), alive(MAIL, 5, 4, 4), alive(MAIL, 5, 5, 7)) == (set(), {4}, {5, 6, 7})
        assert alive(MAIL, 4, 1, 8) == {5}


def test_a_listing_of_scheduled_jobs_is_by_id_too() -> None:
    with small(3):
        bench = Bench()
        for first_id, due in ((1, 90), (4, 80), (7, 70), (10, 60), (13, 75)):
            bench.apply(enqueued(first_id, 3, due=NOW + due))
        bench.loosen(5)
        bench.loosen(11)
        assert bench.listed(SCHEDULED) == bench.listed(None) == list(range(1, 16))
        assert bench.listed(SCHEDULED, after=4, limit=3) == [5, 6, 7]
        assert bench.listed(None, after=11, limit=2) == [12, 13]
        assert bench.listed(SCHEDULED, after=15) == bench.listed(SCHEDULED, limit=0) == []


def test_a_listing_goes_on_inside_a_run() -> None:
    with small(4):
        bench = Bench()
        bench.enqueue(10)
        bench.loosen(6)
        assert [bench.listed(READY, after, 3) for after in (0, 3, 5, 9, 10)] == [
            [1, 2, 3], [4, 5, 6], [6, 7, 8], [10], [],
        ]  # fmt: skip


def test_runs_that_are_away_come_back_when_they_are_asked_for() -> None:
    with small(4):
        bench, shelf = keyed(), Shelf()
        bench.enqueue(9)
        bench.enqueue(5, due=NOW + 100)
        before = dump(bench.machine)
        put_away(bench.machine, shelf)
        check(bench.machine)
        assert dump(bench.machine) == before
        assert all(run.columns is None for run in runs_of(bench.machine))
        bench.lease(1, 2)
        bench.apply(Cancelled(MAIL, 6), Purged(MAIL, [9, 10]))
        bench.enqueue()
        bench.apply(at=NOW + 100)
        assert bench.states() == {"ready": [3, 4, 5, 7, 8, *range(11, 17)], "leased": [1, 2]}
        assert look.stats(bench.machine, "mail", NOW + 200).oldest_age == 0.2


# Payloads in memory


def test_payloads_stay_in_memory_until_there_are_too_many_and_the_oldest_go_first() -> None:
    with small(4):
        bench = Bench()
        bench.machine = Machine(cache_bytes=12 * (100 + PAYLOAD_BYTES + JOB_BYTES) + 4 * RECORD_BYTES)
        bench.apply(QueueCreated(MAIL, "mail"))
        for count in (4, 3, 1, 4):
            bench.enqueue(count, length=100)
        assert all(bench.job(i).payload is not None for i in range(1, 13))
        bench.lease(1)
        entry = bench.machine.jobs[1]
        assert entry.payload == b"A" * 100
        bench.enqueue(4, length=100)
        assert [i for i in range(2, 17) if bench.job(i).payload is None] == list(range(2, 9))
        for count in (4, 4, 4, 4):
            bench.enqueue(count, length=100)
        kept = [i for i in range(2, 33) if bench.job(i).payload is not None]
        assert kept == list(range(kept[0], 33)), "the newest stay"
        assert 4 <= len(kept) <= 12
        assert entry.payload == b"A" * 100


def test_payloads_that_left_with_their_jobs_are_not_counted() -> None:
    with small(4):
        bench = Bench()
        bench.machine = Machine(cache_bytes=2000)
        bench.apply(QueueCreated(MAIL, "mail"))
        for _ in range(20):
            ids = bench.enqueue(4, length=100)
            assert all(bench.job(i).payload is not None for i in ids)
            bench.lease(*ids)
            bench.apply(Acked(MAIL, ids))
        assert len(bench.machine.cache._columns) <= 4
        bench.apply(attrs.evolve(enqueued(bench.machine.next_id), payloads=()))
        assert bench.job(bench.machine.next_id - 1).payload is None, "a replay has none"


def test_a_single_payload_that_is_too_much_does_not_stay() -> None:
    bench = Bench()
    bench.machine = Machine(cache_bytes=500)
    bench.apply(QueueCreated(MAIL, "mail"))
    bench.enqueue(length=1000)
    assert bench.job(1).payload is None
    assert (bench.machine.cache.size, len(bench.machine.cache._columns)) == (0, 0)


def test_columns_whose_jobs_are_all_gone_do_not_count_when_others_have_to_go() -> None:
    counted = 2 * (100 + PAYLOAD_BYTES) + 8 * (400 + PAYLOAD_BYTES)
    with small(2):
        bench = Bench()
        bench.machine = Machine(cache_bytes=counted - 1)
        bench.apply(QueueCreated(MAIL, "mail"))
        bench.enqueue(2, length=100)
        bench.apply(Leased([1, 2], [1, 2], [1, 1], [NOW + 9] * 2, [(MAIL, 5, 2)]))
        for _ in range(4):
            bench.enqueue(2, length=400)
        assert [i for i in range(3, 11) if bench.job(i).payload is None] == [3, 4]
        assert bench.machine.cache.size == 6 * (400 + PAYLOAD_BYTES)
        assert all(bench.machine.jobs[i].payload for i in (1, 2))


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
    assert look.stats(machine, "mail", NOW + 250) == mail
    assert look.stats(machine, "audit", NOW) == audit
    assert look.stats(machine, None, NOW + 250) == attrs.evolve(mail, scheduled=2, enqueued=6)
    assert look.stats(machine, "unknown", NOW) == QueueStats()
    bench.apply(Cancelled(MAIL, 4), Purged(MAIL, [3]))
    assert (look.stats(machine, "mail", NOW).cancelled, look.stats(machine, "mail", NOW).purged) == (1, 1)


def test_the_oldest_age_is_that_of_the_oldest_ready_job_of_any_priority() -> None:
    bench = Bench()
    bench.enqueue(priority=0)
    bench.apply(at=NOW + 100)
    bench.enqueue(priority=9)
    bench.apply(at=NOW + 200)
    bench.enqueue(queue=AUDIT)
    machine = bench.machine
    assert look.stats(machine, "mail", NOW + 1000).oldest_age == 1.0
    assert look.stats(machine, None, NOW + 1000).oldest_age == 1.0
    assert look.stats(machine, "audit", NOW + 1000).oldest_age == 0.8
    bench.lease(1)
    assert look.stats(machine, "mail", NOW + 1000).oldest_age == 0.9


def test_a_listing_is_by_id_over_all_states_or_of_one() -> None:
    bench = Bench()
    for priority in (1, 9, 5, 3, 7, 0):
        bench.enqueue(priority=priority)
    bench.enqueue(due=NOW + 10)
    bench.lease(6, 2)
    bench.bury(4)
    ids = bench.listed
    assert ids(None) == [1, 2, 3, 4, 5, 6, 7]
    assert [ids(state) for state in (READY, SCHEDULED, LEASED, DEAD)] == [[1, 3, 5], [7], [2, 6], [4]]
    assert ids(None, after=2, limit=3) == [3, 4, 5]
    assert ids(LEASED, after=2) == [6]
    assert ids(DEAD, after=4) == ids(None, after=7) == ids(None, limit=0) == []
    assert look.listing(bench.machine, "unknown", None, 0, 10) == []


def test_leased_jobs_too_are_listed_by_id() -> None:
    bench = Bench()
    bench.enqueue(16)
    bench.lease(16, 9)  # a set of these two does not come in this order by itself
    assert sorted(bench.mail.leased) == bench.listed(LEASED) == [9, 16]


def test_a_queue_counts_what_takes_a_place_in_it() -> None:
    bench = Bench()
    bench.enqueue(3)
    bench.enqueue(due=NOW + 5)
    bench.lease(1)
    bench.bury(2)
    assert bench.mail.occupied() == 3


def test_a_dump_is_the_same_for_the_same_state_whatever_the_way_to_it() -> None:
    one, two = Bench(), Bench()
    one.enqueue(2, keys=["a", "b"])
    two.enqueue(keys=["a"])
    two.enqueue(keys=["b"])
    for bench in (one, two):
        bench.lease(1)
    two.apply(Released(1, NOW, 0))
    assert dump(one.machine) != dump(two.machine)
    two.apply(Leased([1], [1], [1], [NOW + 30_000]))
    for job_id in (1, 2):
        two.loosen(job_id).crc = one.job(job_id).crc
    assert dump(one.machine) == dump(two.machine)


# What check finds


def damage_number(bench: Bench) -> None:
    bench.machine.numbers[MAIL] = bench.machine.numbers[AUDIT]


def damage_counts(bench: Bench) -> None:
    bench.mail.counts[READY] += 1


def damage_leased(bench: Bench) -> None:
    bench.mail.leased.add(1)


def damage_two_sets(bench: Bench) -> None:
    window = bench.lines.window(DEAD, 5)
    bench.loosen(1)
    window.add(1)


def damage_two_places(bench: Bench) -> None:
    bench.machine.jobs[1] = bench.job(1)


def damage_other_queue(bench: Bench) -> None:
    bench.loosen(1).queue = bench.machine.queues["audit"]


def damage_other_priority(bench: Bench) -> None:
    entry = bench.loosen(1)
    bench.lines.window(READY, 5).discard(1)
    bench.lines.window(READY, 4).add(entry.id)


def damage_totals(bench: Bench) -> None:
    bench.mail.acked += 1


def damage_key_of_a_living_job(bench: Bench) -> None:
    bench.machine.keys.changed[MAIL, "k"].expires_ms = NOW + 1


def damage_key_of_nobody(bench: Bench) -> None:
    bench.machine.keys.changed[MAIL, "k"].job_id = 99


def damage_key_of_another(bench: Bench) -> None:
    bench.machine.keys.changed[MAIL, "k"].job_id = 2


def damage_key_of_another_queue(bench: Bench) -> None:
    bench.machine.keys.changed[AUDIT, "k"] = bench.machine.keys.changed.pop((MAIL, "k"))


def damage_key_counts(bench: Bench) -> None:
    bench.machine.keys.counts[1] = 1


def damage_state(bench: Bench) -> None:
    bench.loosen(2).state = DEAD


def damage_loose_due(bench: Bench) -> None:
    bench.loosen(4).due_ms += 1


def damage_due(bench: Bench) -> None:
    bench.machine.due.clear()


def damage_late_due(bench: Bench) -> None:
    bench.machine.due[:] = [(NOW + 501, MAIL, 5)]


def damage_next_id(bench: Bench) -> None:
    bench.machine.next_id = 2


def damage_live(bench: Bench) -> None:
    bench.machine.live[1] += 1


def damage_window(bench: Bench) -> None:
    bench.lines.window(READY, 5).count += 1
    bench.mail.counts[READY] += 1


def damage_run(bench: Bench) -> None:
    columns = bench.lines.window(READY, 5).runs[0].load()
    columns.ids[0], columns.ids[1] = columns.ids[1], columns.ids[0]


@pytest.mark.parametrize(
    "damage", [value for name, value in globals().items() if name.startswith("damage_")], ids=lambda f: f.__name__[7:]
)
def test_check_finds(damage: Any) -> None:
    bench = Bench()
    bench.enqueue(3, keys=["k", None, None])
    bench.enqueue(2, due=NOW + 500)
    check(bench.machine)
    damage(bench)
    with pytest.raises(AssertionError):
        check(bench.machine)


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
        self.numbered = 0
        self.told: list[int] = []  # ids that a transaction will use
        for number, name in ((MAIL, "mail"), (AUDIT, "audit"), (3, "empty")):
            self.write(QueueCreated(number, name))
        self.write(QueueConfigured(MAIL, QueueConfig(idempotency_ttl=0.2)))

    def write(self, *events: Event) -> None:
        """One record."""
        self.lsn += 1
        place = Place(self.segment, 100 * self.lsn, self.lsn)
        advance(self.machine, self.now)
        for event in events:
            self.log.append((self.lsn, event, self.now, place))
            apply(self.machine, event, self.now, place)

    def job(self, job_id: int) -> Entry:
        entry = look.job(self.machine, job_id)
        assert entry is not None
        return entry

    def step(self, kind: int, a: int, b: int) -> None:
        """`kind` says what is done, `a` to which job or queue, `b` how."""
        machine = self.machine
        advance(machine, self.now)
        by_state: dict[int, list[int]] = {READY: [], SCHEDULED: [], LEASED: [], DEAD: []}
        for entry in sorted(look.everything(machine), key=lambda each: each.id):
            by_state[entry.state].append(entry.id)
        leased, dead = by_state[LEASED], by_state[DEAD]
        resting = sorted(by_state[READY] + by_state[SCHEDULED] + dead)
        later = self.now + 50 * b
        match kind:
            case 0:
                queue = machine.numbers[1 + a % 2]
                text = ("k", "j", None, None)[b % 4]
                free = text is not None and look.find(machine, queue.name, text, self.now) is None
                self.write(
                    enqueued(machine.next_id, queue=queue.number, priority=a, due=later, keys=[text] if free else None)
                )
            case 1:
                self.write(enqueued(machine.next_id, 2 + b, queue=1 + a % 2, due=later if a > 4 else 0))
            case 2 if by_state[READY]:
                ids = by_state[READY][a % len(by_state[READY]) :][: 1 + b % 2]
                places: list[tuple[int, int, int]] = []
                if b > 3:
                    ids, places = self.head(1 + a % 2, b)
                if ids:
                    tokens = [machine.next_token + i for i in range(len(ids))]
                    attempts = [self.job(i).attempts + 1 for i in ids]
                    self.write(Leased(ids, tokens, attempts, [later] * len(ids), places))
            case 3 if leased:
                entry = self.job(leased[a % len(leased)])
                same = [i for i in leased if self.job(i).queue is entry.queue]
                until_ms = keys_until_ms(entry.queue, self.now)
                self.write(Acked(entry.queue.number, same if b % 2 else [entry.id], until_ms))
            case 4 if leased:
                for job_id in leased[a % len(leased) :][: 1 + b // 3]:
                    entry = self.job(job_id)
                    self.write(
                        (
                            Retried(job_id, later, f"e{b}"), Released(job_id, later, entry.attempts - 1),
                            Buried(job_id, self.now, f"d{b}"), Extended(job_id, entry.deadline_ms + b),
                        )[b % 4]
                    )  # fmt: skip
            case 5 if resting:
                entry = self.job(resting[a % len(resting)])
                self.write(Cancelled(entry.queue.number, entry.id))
            case 6:
                ids = [i for i in resting if self.job(i).queue.number == 1 + a % 2]
                if ids:
                    self.write(Purged(1 + a % 2, ids[a // 2 :][: 1 + b] or ids[:1]))
            case 7 if dead:
                number = self.job(dead[0]).queue.number
                self.write(Redriven(number, [i for i in dead if self.job(i).queue.number == number][: 1 + b]))
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
                first_id = machine.take_ids(b)
                self.told += range(first_id, first_id + b)
            case 13:
                self.pack()
            case 15:
                self.write(QueueRemoved(3))
            case 14 if self.told:
                job_id = self.told.pop(a % len(self.told))
                text = ("k", "j", None, None)[b % 4]
                free = text is not None and look.find(machine, "mail", text, self.now) is None
                self.write(enqueued(job_id, due=later if a % 2 else 0, keys=[text] if free else None))

            case 16 if b:
                self.numbered += 1
                answer: Any = (None, [[1, 2], None], True, [JobId(5, created=True)])[b % 4]
                self.write(Called(1 + a % 3, self.numbered, max(0, self.numbered - b), answer))
            case 16:
                self.write(SessionEnded(1 + a % 3))

    def head(self, number: int, count: int) -> tuple[list[int], list[tuple[int, int, int]]]:
        """The most urgent jobs of a queue, and where they wait."""
        ids: list[int] = []
        places: list[tuple[int, int, int]] = []
        for priority in range(9, -1, -1):
            window = self.machine.waiting[number].ready[priority]
            if window and len(ids) < count:
                here = look.head(self.machine, window, count - len(ids))[0]
                ids += here
                places.append((number, priority, len(here)))
        return ids, places

    def compact(self) -> None:
        """Copy what lives in the oldest segments to the last one, and drop them."""
        machine = self.machine
        upto = self.segment
        self.segment += 1
        events: list[Event] = [
            copied(e) for e in sorted(look.everything(machine), key=lambda each: each.id) if e.segment <= upto
        ]
        events += [
            KeyCopied(number, text, key.job_id, key.expires_ms)
            for (number, text), key in machine.keys.all().items()
            if key.expires_ms and key.segment <= upto
        ]
        if events:
            self.write(*events)
        for queue in list(self.machine.numbers.values()):
            if queue.segment <= upto:
                self.write(saving.queue_copied(queue))
        self.write(SegmentsDropped(upto))

    def pack(self) -> None:
        for state, window in saving.crowded(self.machine, 0):
            while saving.pack(self.machine, state, window, 3):
                pass


class TakenRun(NamedTuple):
    """A run as it was when a checkpoint began: these cells of its columns."""

    run: Run
    state: int
    columns: Columns
    cells: list[int]


def take_run(run: Run, machine: Machine) -> TakenRun:
    if not run.number:
        run.number, machine.next_run = machine.next_run, machine.next_run + 1
    columns = run.load()
    return TakenRun(run, run.state, columns, list(run.cells()))


def put_run(shelf: Shelf, taken: TakenRun) -> None:
    """What is written of it, later on: what was taken has not changed."""
    run, state, columns, cells = taken
    shelf.runs[run.number] = Saved(run.queue.number, run.priority, state, columns.picked(cells))


class Index(NamedTuple):
    """All that an opening has besides the log: a snapshot, loose jobs, runs and keys."""

    snapshot: Snapshot
    queues: dict[int, tuple[QueueCopied, int]]
    jobs: dict[int, tuple[Entry, int]]
    shelf: Shelf
    key_counts: dict[int, int]


def queues_in(machine: Machine) -> dict[int, tuple[QueueCopied, int]]:
    return {number: (saving.queue_copied(queue), queue.segment) for number, queue in machine.numbers.items()}


class Capture:
    """A checkpoint of everything at one moment; its parts can be put together with those of other moments."""

    def __init__(self, machine: Machine) -> None:
        self.snapshot, self.queues = saving.snapshot(machine), queues_in(machine)
        self.jobs = {i: clone(entry, machine.numbers) for i, entry in machine.jobs.items()}
        self.runs = [take_run(run, machine) for run in runs_of(machine)]
        self.keys = dict(machine.keys.changed)
        self.key_counts = dict(machine.keys.counts)

    def index(self, jobs: dict[int, tuple[Entry, int]], last: Capture) -> Index:
        """The counters and runs of this moment, and the keys of a later one."""
        shelf = Shelf()
        for run in self.runs:
            put_run(shelf, run)
        shelf.write_keys(last.keys)
        return Index(self.snapshot, self.queues, jobs, shelf, last.key_counts)


def recovered(index: Index | None, log: Sequence[tuple[int, Event, int, Place]], now_ms: int) -> Machine:
    """What an opening makes of a checkpoint and the log behind it."""
    machine = Machine()
    if index is not None:
        snapshot = decode_snapshot(encode_snapshot(index.snapshot))  # it is loaded once, and changed from there on
        saving.load(machine, snapshot)
        for queue, segment in index.queues.values():
            saving.load_queue(machine, queue, segment)
        for _, (entry, state) in sorted(index.jobs.items()):
            saving.load_entry(machine, *clone_as(entry, state, machine.numbers))
        for number, saved in sorted(index.shelf.runs.items()):
            saving.load_run(machine, *shelved(number, saved, machine, index.shelf))
        machine.keys.load_counts(index.key_counts.items())
        machine.keys.shelf = index.shelf
    for _, event, at_ms, place in log:
        advance(machine, max(machine.now_ms, at_ms))
        apply(machine, event, at_ms, place)
    resume(machine, now_ms, 1)
    check(machine)
    return machine


def clone_as(entry: Entry, state: int, queues: dict[int, Queue]) -> tuple[Entry, int]:
    return clone(entry, queues)[0], state


def same_state(found: Machine, expected: Machine) -> None:
    for machine in (found, expected):
        # A key that ended on the shelf weighs something until the keeper sweeps it.
        machine.keys.sweep(list(machine.keys.all()), machine.now_ms)
    assert dump(found) == dump(expected)
    assert {s: n for s, n in found.keys.counts.items() if n} == {s: n for s, n in expected.keys.counts.items() if n}
    assert {s: n for s, n in look.live_bytes(found).items() if n} == {
        s: n for s, n in look.live_bytes(expected).items() if n
    }
    assert found.oldest_segment == expected.oldest_segment
    assert found.next_id == max(expected.next_id, expected.reserved_id)
    assert next_wakeup_ms(found) == next_wakeup_ms(expected)
    for queue in expected.queues.values():
        windows = [waiting_of(machine, queue.name).ready for machine in (expected, found)]
        for one, other in zip(*windows, strict=True):
            heads = [
                look.head(machine, window, 1000)[0] if window else []
                for machine, window in ((expected, one), (found, other))
            ]
            assert heads[0] == heads[1]


STORY = [
    (0, 1, 0), (0, 0, 1), (1, 0, 0), (2, 0, 1), (4, 0, 0), (0, 2, 6), (8, 0, 7), (2, 1, 3), (4, 0, 2), (10, 0, 0),
    (2, 0, 3), (4, 0, 1), (5, 0, 0), (7, 0, 0), (2, 0, 2), (3, 0, 1), (12, 0, 5), (1, 1, 0), (2, 2, 3), (11, 0, 0),
    (14, 1, 0), (1, 0, 4), (2, 0, 5), (4, 0, 6), (4, 0, 7), (14, 1, 3), (13, 0, 0), (2, 0, 6), (4, 0, 4), (14, 0, 2),
    (4, 0, 3), (8, 7, 0), (15, 0, 0), (0, 0, 4), (0, 1, 4), (6, 1, 1), (9, 0, 2), (2, 0, 3), (4, 1, 2), (3, 0, 0),
    (8, 3, 3), (1, 6, 3), (13, 0, 0), (0, 0, 0), (11, 0, 0), (7, 0, 4), (2, 0, 3), (3, 1, 1), (8, 2, 1), (1, 0, 3),
    (6, 0, 2), (16, 0, 1), (16, 1, 2), (16, 0, 3), (11, 0, 0), (16, 1, 0), (16, 0, 5), (11, 0, 0), (0, 0, 0),
]  # fmt: skip
KEEPERS = (11, 13)
"""Steps of the engine's keeper, which makes the checkpoints too: neither falls into one."""
SIZES = [(2, 0), (3, 1), (5, 2), (1000, 1)]


@pytest.mark.parametrize(("run_jobs", "few_jobs"), SIZES)
def test_a_replay_from_any_point_on_any_later_state_gives_the_same_state(run_jobs: int, few_jobs: int) -> None:
    """Counters and runs are those of the point, loose jobs and keys those of a later moment: all pairs of the two."""
    with small(run_jobs, few_jobs):
        writer = Writer()
        captures: list[tuple[int, int, Capture]] = []
        indexes: list[tuple[int, Index]] = []
        kinds = set()
        for kind, a, b in STORY:
            before = writer.lsn
            writer.step(kind, a, b)
            kinds |= {type(event) for lsn, event, _, _ in writer.log if lsn > before}
            check(writer.machine)
            if kind in KEEPERS:
                captures.clear()
            now = Capture(writer.machine)
            captures.append((writer.lsn, kind, now))
            for lsn, _, start in captures:
                indexes.append((lsn, start.index({i: now.jobs[i] for i in start.jobs if i in now.jobs}, now)))
        advance(writer.machine, writer.now)
        assert kinds == set(Event.__args__) - {QueueCreated}, "the story has to tell of everything"
        assert len(indexes) > 100
        for lsn, index in indexes:
            log = [record for record in writer.log if record[0] > lsn]
            same_state(recovered(index, log, writer.now), writer.machine)


@pytest.mark.parametrize(("run_jobs", "few_jobs"), SIZES)
def test_a_replay_of_the_whole_log_gives_the_same_state(run_jobs: int, few_jobs: int) -> None:
    with small(run_jobs, few_jobs):
        writer = Writer()
        for step in STORY:
            writer.step(*step)
        advance(writer.machine, writer.now)
        same_state(recovered(None, writer.log, writer.now), writer.machine)


steps = st.tuples(st.sampled_from([*range(15), 16]), st.integers(0, 7), st.integers(0, 7))
calls = steps.filter(lambda step: step[0] not in KEEPERS)
sizes = st.sampled_from(SIZES)


@settings(max_examples=120, deadline=None)
@given(sizes, st.lists(steps, max_size=25), st.lists(calls, max_size=25), st.data())
def test_a_checkpoint_taken_in_slices_is_made_whole_by_the_replay(
    size: tuple[int, int], first: list[tuple[int, int, int]], second: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Runs are taken at the first moment, each loose job at a moment of its own, and the keys at the last one."""
    with small(*size):
        writer = Writer()
        for step in first:
            writer.step(*step)
        captures = [Capture(writer.machine)]
        lsn = writer.lsn
        for step in second:
            writer.step(*step)
            check(writer.machine)
            captures.append(Capture(writer.machine))
        advance(writer.machine, writer.now)
        jobs, last = {}, 0
        for job_id in captures[0].jobs:
            at = data.draw(st.integers(0, len(captures) - 1))
            last = max(last, at)
            if job_id in captures[at].jobs:
                jobs[job_id] = captures[at].jobs[job_id]
        index = captures[0].index(jobs, captures[data.draw(st.integers(last, len(captures) - 1))])
        log = [record for record in writer.log if record[0] > lsn]
        same_state(recovered(index, log, writer.now), writer.machine)


class Keeper:
    """Checkpoints as the durable engine makes them: what changed is written into an index that lives on."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.index: Index | None = None
        self.shelf = Shelf()
        self.jobs: dict[int, tuple[Entry, int]] = {}
        self.queues: dict[int, tuple[QueueCopied, int]] = {}
        self.lsn = 0
        self.at_once = 1  # calls that come between two parts of a checkpoint

    def checkpoint(self, meanwhile: Iterable[tuple[int, int, int]], *, fails: bool = False) -> None:
        """With calls of somebody else's wherever there is room for them; if it fails, nothing was written."""
        writer, machine = self.writer, self.writer.machine
        calls = iter(meanwhile)
        machine.keys.sweep(self.shelf.ended_keys(machine.now_ms), machine.now_ms)
        for state, window in saving.crowded(machine, 0):
            while saving.pack(machine, state, window, 2):
                self.call(calls)
        taken, machine.changes = machine.changes, Changes()
        assert taken is not None
        snapshot, lsn = saving.snapshot(machine), writer.lsn
        now = queues_in(machine)
        queues = {number: now.get(number) for number in taken.queues}
        runs = [take_run(run, machine) for run in taken.runs]
        loose = taken.jobs - taken.packed  # the others are in a run, which is where they are written
        jobs: dict[int, tuple[Entry, int] | None] = {}
        self.call(calls)
        for part in (0, 1):
            for job_id in sorted(taken.jobs)[part::2]:
                entry = machine.jobs.get(job_id) if job_id in loose else None
                jobs[job_id] = None if entry is None else clone(entry, machine.numbers)
                if entry is not None:
                    entry.indexed = True
            self.call(calls)
        keys, key_counts = machine.keys.freeze(), dict(machine.keys.counts)
        self.call(calls)
        if fails:
            self.take_back(taken)
            return
        for name, value in jobs.items():
            if value is None:
                self.jobs.pop(name, None)
            else:
                self.jobs[name] = value
        for number in taken.gone:
            self.shelf.runs.pop(number, None)  # it may have had its number from one that failed
        for run in runs:
            put_run(self.shelf, run)
        self.shelf.write_keys(keys)
        for number, queue in queues.items():
            if queue is None:
                self.queues.pop(number, None)
            else:
                self.queues[number] = queue
        self.index, self.lsn = Index(snapshot, dict(self.queues), self.jobs, self.shelf, key_counts), lsn
        self.call(calls)
        machine.keys.frozen = {}
        machine.keys.shelf = self.shelf
        self.put_away([run for run, *_ in runs])

    def take_back(self, taken: Changes) -> None:
        changes = self.writer.machine.changes
        assert changes is not None
        changes.jobs |= taken.jobs
        for job_id in taken.packed:
            if (entry := self.writer.machine.jobs.get(job_id)) is None:
                changes.packed.add(job_id)
            else:
                entry.indexed = True
        changes.gone |= taken.gone
        changes.queues |= taken.queues
        for run in taken.runs:
            (changes.runs.add if run.left else changes.runs.discard)(run)
        saving.thaw_keys(self.writer.machine)

    def put_away(self, runs: Iterable[Run]) -> None:
        changes = self.writer.machine.changes
        assert changes is not None
        for run in runs:
            if run.left and run.number and run.columns is not None and run not in changes.runs:
                window = self.writer.machine.waiting[run.queue.number].window(run.state, run.priority)
                if run not in window.opens and run not in window.runs[:1]:
                    run.put_away(self.shelf)

    def call(self, calls: Iterator[tuple[int, int, int]]) -> None:
        for step in itertools.islice(calls, self.at_once):
            self.writer.step(*step)

    def crash(self) -> None:
        """Open again and go on from there; nobody may see the difference."""
        writer = self.writer
        advance(writer.machine, writer.now)
        log = [record for record in writer.log if record[0] > self.lsn]
        again = recovered(self.index, log, writer.now)
        same_state(again, writer.machine)
        again.next_token = writer.machine.next_token
        writer.machine = again
        writer.machine.reserved_id = max(again.reserved_id, again.next_id)


@pytest.mark.parametrize("end", [[], [(4, 0, 0)], [(3, 0, 1)], [(4, 0, 0), (5, 0, 0)], [(4, 0, 0), (6, 0, 7)]])
@pytest.mark.parametrize("before", range(7))
@pytest.mark.parametrize("at_once", [1, 3])
def test_jobs_that_are_put_into_runs_at_a_checkpoint_are_in_the_index_once(
    at_once: int, before: int, end: list[tuple[int, int, int]]
) -> None:
    """They are in the index as loose ones, and are delivered while the checkpoint goes on."""
    with small(4):
        writer = Writer()
        keeper = Keeper(writer)
        for step in [(1, 0, 5), (2, 0, 7), (4, 0, 4), (4, 0, 4), (4, 0, 4), (4, 0, 4), (8, 7, 7)]:
            writer.step(*step)
        with small(4, 100):
            keeper.checkpoint([])
        assert len(keeper.jobs) > 4
        keeper.crash()
        keeper.at_once = at_once
        keeper.checkpoint([*[(10, 0, 0)] * before * at_once, (2, 0, 7), *end])
        keeper.crash()
        keeper.checkpoint([])
        keeper.crash()


@settings(max_examples=300, deadline=None)
@example((2, 0), 1, [(0, 0, 0), [(5, 0, 0), (8, 1, 0)], [(8, 4, 0)], "crash", (11, 0, 0)])
@given(
    sizes,
    st.integers(1, 4),
    st.lists(
        st.one_of(
            steps, steps, steps, st.just("crash"), st.just("put away"), st.lists(calls, max_size=6),
            st.tuples(st.lists(calls, max_size=6)),
        ),
        max_size=60,
    ),
)  # fmt: skip
def test_an_index_that_is_fed_with_the_changes_alone_is_enough_at_every_opening(
    size: tuple[int, int],
    at_once: int,
    actions: list[tuple[int, int, int] | list[tuple[int, int, int]] | tuple[list[tuple[int, int, int]]] | str],
) -> None:
    """A list of calls is a checkpoint with these between its parts; one in a tuple is one that fails."""
    with small(*size):
        writer = Writer()
        keeper = Keeper(writer)
        keeper.at_once = at_once
        for action in actions:
            if action == "crash":
                keeper.crash()
            elif isinstance(action, str):
                keeper.put_away(runs_of(writer.machine))
            elif isinstance(action, list):
                keeper.checkpoint(action)
            elif len(action) == 1:
                keeper.checkpoint(action[0], fails=True)
            else:
                writer.step(*action)
            check(writer.machine)
        keeper.crash()


# What the caller's worst day does to memory, and to the machine


def test_delayed_jobs_that_are_cancelled_leave_no_moment_behind() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 50, priority=1)
    for job_id in range(2, 3000):
        bench.enqueue(due=NOW + 10_000 + job_id)
        bench.apply(Cancelled(MAIL, job_id))
        assert len(bench.machine.due) <= 200
    check(bench.machine)
    bench.apply(at=NOW + 50)
    assert bench.states()["ready"] == [1], "none that counts was dropped"


def test_looking_for_leases_that_ended_changes_nothing() -> None:
    """So whatever breaks in, no deadline is forgotten."""
    bench = Bench()
    bench.enqueue(50)
    for job_id in range(1, 51):
        bench.lease(job_id, deadline=1 + job_id * 37 % 50)
    apply(bench.machine, Extended(3, NOW + 1000), NOW, bench.place)
    before = list(bench.machine.deadlines)
    expected = sorted((NOW + 1 + i * 37 % 50, i) for i in range(1, 51) if i != 3)
    for limit in (1, 7, 100):
        assert ended_leases(bench.machine, NOW + 100, limit) == expected[:limit]
    assert ended_leases(bench.machine, NOW + 20, 100) == [pair for pair in expected if pair[0] <= NOW + 20]
    assert bench.machine.deadlines == before


@pytest.mark.parametrize("loose", [(), (2, 5, 9), tuple(range(1, 13))], ids=["runs", "some loose", "all loose"])
@pytest.mark.parametrize("few_jobs", [1, 100], ids=["many", "few"])
def test_a_redrive_takes_dead_letters_of_one_queue_out_of_their_runs(loose: tuple[int, ...], few_jobs: int) -> None:
    with small(4, few_jobs):
        bench = Bench()
        for i in range(12):
            bench.enqueue(keys=[f"k{i}"], priority=1 + i % 2)
        bench.bury(*range(1, 13))
        for state, window in saving.crowded(bench.machine, 0):
            while saving.pack(bench.machine, state, window, 3):
                pass
        for job_id in loose:
            bench.loosen(job_id)
        apply(bench.machine, QueueCreated(9, "between"), NOW, Place())
        bench.apply(Redriven(MAIL, [2, 3, 5, 8, 9, 12, 77]))
        check(bench.machine)
        assert bench.states() == {"ready": [2, 3, 5, 8, 9, 12], "dead": [1, 4, 6, 7, 10, 11]}
        for job_id in (2, 9):
            job = bench.job(job_id)
            assert (job.attempts, job.died_at_ms, job.due_ms, job.key) == (0, 0, 0, f"k{job_id - 1}")
            assert job.token, "tokens go on above this one"
        assert look.head(bench.machine, bench.lines.window(READY, 2), 9)[0] == [2, 8, 12]
        bench.apply(Redriven(MAIL, list(range(1, 13))))  # of some that are ready already: as a replay may meet it
        assert bench.states()["ready"] == list(range(1, 13))


def test_a_removed_queue_is_unknown_and_its_number_is_not_given_again() -> None:
    bench = Bench()
    bench.enqueue(due=NOW + 5)
    bench.apply(Cancelled(MAIL, 1), QueueRemoved(AUDIT), QueueRemoved(MAIL), QueueRemoved(77))
    assert bench.machine.queues == {}
    assert bench.machine.next_queue == AUDIT + 1
    advance(bench.machine, NOW + 10)
    assert next_wakeup_ms(bench.machine) is None
    assert look.alive(bench.machine, MAIL, 5, 1, 9) == set()
    assert look.job(bench.machine, 1, MAIL) is None
    check(bench.machine)


def test_a_queue_that_holds_a_job_is_kept_by_a_salvaged_log() -> None:
    bench = Bench()
    bench.enqueue()
    bench.apply(QueueRemoved(MAIL))
    assert bench.states()["ready"] == [1]


# Places that only a replay, a look in parts or a removed queue comes to


def test_a_token_is_expected_where_a_rate_limit_on_lease_is_and_once() -> None:
    bench = Bench()
    expect_token(bench.machine, bench.mail, NOW)
    bench.apply(QueueConfigured(MAIL, QueueConfig(rate_limit=RateLimit(1, 1, "enqueue"))))
    expect_token(bench.machine, bench.mail, NOW)
    assert bench.machine.tokens == []
    bench.apply(QueueConfigured(MAIL, QueueConfig(rate_limit=RateLimit(1, 1))))
    bench.enqueue()
    bench.lease(1)
    for _ in range(3):
        expect_token(bench.machine, bench.mail, NOW)
    assert bench.machine.tokens == [(NOW + 1000, MAIL)]


def test_a_redrive_of_a_job_that_is_gone_brings_back_the_others() -> None:
    with small(4, 3):
        bench = Bench()
        bench.enqueue(10)
        bench.bury(*range(1, 11))
        for state, window in saving.crowded(bench.machine, 0):
            saving.pack(bench.machine, state, window, 4)
        assert 8 not in bench.machine.jobs, "it is in a run"
        bench.apply(Purged(MAIL, [8]))
        bench.apply(Redriven(MAIL, [8, 9]))
        assert bench.states() == {"ready": [9], "dead": [1, 2, 3, 4, 5, 6, 7, 10]}


def test_a_key_of_a_removed_queue_that_a_replay_meets_is_held_until_it_ends() -> None:
    bench = Bench()
    bench.apply(KeyCopied(99, "k", 1, NOW + 5))
    assert bench.machine.keys.get(99, "k") is not None
    bench.apply(at=NOW + 5)
    assert bench.machine.keys.get(99, "k") is None


def test_ids_and_jobs_are_read_in_parts_as_far_as_they_are_there() -> None:
    with small(4):
        bench = Bench()
        bench.enqueue(6)
        for job_id in (5, 6):
            bench.loosen(job_id)
        machine = bench.machine
        for below, count, expected in ((6, 9, [1, 2, 3, 4, 5]), (9, 5, [1, 2, 3, 4, 5]), (1, 9, [])):
            found: list[int] = []
            while part := look.some_ids(machine, bench.mail, (READY,), below, count):
                found += part
                bench.apply(Purged(MAIL, part))
            assert found[: len(expected)] == expected
            bench = Bench()
            bench.enqueue(6)
            for job_id in (5, 6):
                bench.loosen(job_id)
            machine = bench.machine
        (run,) = bench.lines.window(READY, 5).runs
        assert [entry.id for entry in look.listed(machine, "mail", run, [2, 5, 77])] == [2, 5]
        assert list(look.listed(machine, "unknown", None, [1])) == []


def test_a_key_that_ended_on_the_shelf_after_its_segment_went_weighs_nothing() -> None:
    bench, shelf = keyed(), Shelf()
    bench.ack(1)
    save(bench.machine, shelf)
    bench.apply(SegmentsDropped(1), at=NOW + 1000)
    check(bench.machine)
    assert look.find(bench.machine, "mail", "k", bench.now) is None

"""The rules: what events a call leads to, what it is refused for, and that deciding changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rivetq.engine import Ack, Deadline, Enqueue, Extend, KeyStands, Nack, Operation, Reject, Release
from rivetq.errors import (
    DuplicateJobError,
    JobNotFoundError,
    LeaseLostError,
    QueueFullError,
    RateLimitedError,
    RivetQError,
    UsageError,
)
from rivetq.machine import decide, look
from rivetq.machine.advance import advance, expect_token, next_wakeup_ms
from rivetq.machine.apply import apply
from rivetq.machine.check import check, dump
from rivetq.machine.commit import decide_commit
from rivetq.machine.entry import Entry
from rivetq.machine.events import (
    Acked,
    Buried,
    Cancelled,
    Enqueued,
    Event,
    Extended,
    IdsReserved,
    Leased,
    Purged,
    QueueConfigured,
    QueueCreated,
    Redriven,
    Released,
    Retried,
)
from rivetq.machine.machine import Machine
from rivetq.machine.queue import DEAD, LEASED, READY, SCHEDULED
from rivetq.machine.snapshot import Place
from rivetq.model import QueueConfig, RateLimit, RetryPolicy

NOW = 1_000_000
FLAT = RetryPolicy(max_attempts=3, base=1, factor=2, jitter="none")


def acked(number: int, ids: Sequence[int]) -> Acked:
    """Of a queue with the usual window for keys."""
    return Acked(number, ids, NOW + 86_400_000)


class Bench:
    """A machine that asks `decide` and applies what it says; every question is checked to change nothing."""

    def __init__(self, *, id_block: int = 0, **config: Any) -> None:
        self.machine = Machine(keep_payloads=True, id_block=id_block)
        self.now = NOW
        self.configure("q", retry=FLAT, **config)

    def ask(self, question: Callable[..., Any], *args: Any, **options: Any) -> Any:
        before = self.state()
        try:
            return question(self.machine, *args, **options)
        finally:
            assert self.state() == before, "to decide changed something"
            check(self.machine)

    def state(self) -> object:
        machine = self.machine
        buckets = {
            name: q.bucket and tuple(getattr(q.bucket, slot) for slot in q.bucket.__slots__)
            for name, q in machine.queues.items()
        }
        numbers = (machine.next_id, machine.reserved_id, machine.next_token, machine.now_ms, sorted(machine.numbers))
        leased = {(e.deadline_ms, e.id) for e in machine.jobs.values() if e.state == LEASED}
        assert leased <= set(machine.deadlines), "a lease would never end"
        return copy.deepcopy((dump(machine), buckets, numbers, machine.woken))

    def apply(self, events: Sequence[Event]) -> None:
        advance(self.machine, self.now)
        for event in events:
            apply(self.machine, event, self.now, Place())
            check(self.machine)

    def at(self, now: int) -> None:
        self.now = now
        self.apply([])

    def plan(self, *operations: Operation) -> tuple[list[Event], list[Any]]:
        events, answers = self.ask(decide_commit, operations, self.now)
        return events, answers

    def commit(self, *operations: Operation) -> list[Any]:
        events, answers = self.plan(*operations)
        self.apply(events)
        return answers

    def configure(self, name: str, **changes: Any) -> None:
        self.apply(self.ask(decide.configure, name, changes)[0])

    def enqueue(self, count: int = 1, queue: str = "q", **options: Any) -> list[int]:
        ids: list[int] = self.commit(Enqueue(queue, [b"p"] * count, **options))[0]
        return ids

    def lease(self, max_jobs: int = 1, *names: str, visibility: int | None = None) -> list[tuple[int, int]]:
        event, _ = self.ask(decide.lease, names or ("q",), max_jobs, visibility, self.now)
        if event is None:
            return []
        self.apply([event])
        return list(zip(event.ids, event.tokens, strict=True))

    def one(self, **options: Any) -> tuple[int, int]:
        """A job that is leased: id and token."""
        (job_id,) = self.enqueue(**options)
        self.machine.now_ms = self.now
        found = dict(self.lease(100))
        return job_id, found[job_id]

    def state_of(self, job_id: int) -> int:
        return self.job(job_id).state

    def job(self, job_id: int) -> Entry:
        """The job, wherever it is; a copy if it is in a run."""
        entry = look.job(self.machine, job_id)
        assert entry is not None, f"no job {job_id}"
        return entry


# Enqueue


def test_jobs_get_the_next_ids_in_order() -> None:
    bench = Bench()
    assert bench.enqueue(3) == [1, 2, 3]
    assert bench.commit(Enqueue("q", [b"a"]), Enqueue("new", [b"b", b"c"])) == [[4], [5, 6]]
    assert bench.machine.next_id == 7


def test_what_is_written_is_absolute_and_complete() -> None:
    bench = Bench()
    options: dict[str, Any] = {
        "priority": 8,
        "delay_ms": 250,
        "headers": {"h": "1"},
        "visibility_ms": 9,
        "keys": ["k", None],
    }
    events, answers = bench.plan(Enqueue("q", [b"a", b"bcd"], **options))
    assert answers == [[1, 2]]
    assert events == [
        Enqueued(1, 1, 8, NOW + 250, 3, FLAT, 9, [1, 3], [b"a", b"bcd"], {"h": "1"}, ["k", None]),
    ]


def test_no_payloads_make_no_event_whether_the_queue_exists_or_not() -> None:
    machine = Machine()
    assert decide_commit(machine, [Enqueue("mail", [])], 5) == ([], [[]])
    for event in decide_commit(machine, [Enqueue("mail", [b""])], 5)[0]:
        apply(machine, event, 5, Place())
    assert decide_commit(machine, [Enqueue("mail", [])], 5) == ([], [[]])


def test_without_a_delay_there_is_no_due_moment() -> None:
    events, _ = Bench().plan(Enqueue("q", [b"a"]))
    assert isinstance(events[0], Enqueued)
    assert (events[0].due_ms, events[0].keys, events[0].headers) == (0, None, {})


@pytest.mark.parametrize(
    ("queue", "options", "attempts", "policy"),
    [
        ("q", {}, 3, FLAT),
        ("q", {"max_attempts": 9}, 9, FLAT),
        ("q", {"retry": RetryPolicy(max_attempts=7)}, 7, RetryPolicy(max_attempts=7)),
        ("q", {"retry": RetryPolicy(max_attempts=None)}, None, RetryPolicy(max_attempts=None)),
        ("q", {"retry": RetryPolicy(max_attempts=7), "max_attempts": 1}, 1, RetryPolicy(max_attempts=7)),
        ("new", {}, 5, RetryPolicy()),
    ],
)
def test_the_call_s_attempts_win_over_its_policy_and_that_over_the_queue_s(
    queue: str, options: dict[str, Any], attempts: int | None, policy: RetryPolicy
) -> None:
    events, _ = Bench().plan(Enqueue(queue, [b"a"], **options))
    event = events[-1]
    assert isinstance(event, Enqueued)
    assert (event.max_attempts, event.retry) == (attempts, policy)


def test_the_policy_of_a_queue_at_the_time_of_the_enqueue_stays_with_the_job() -> None:
    bench = Bench()
    bench.enqueue()
    bench.configure("q", retry=RetryPolicy(max_attempts=99))
    assert bench.job(1).spec.retry == FLAT


def test_a_queue_comes_to_be_with_its_first_enqueue_once_per_commit() -> None:
    bench = Bench()
    events, _ = bench.plan(*(Enqueue(name, [b"a"]) for name in ("b", "c", "b")))
    assert [e for e in events if isinstance(e, QueueCreated)] == [QueueCreated(2, "b"), QueueCreated(3, "c")]
    assert [e.queue for e in events if isinstance(e, Enqueued)] == [2, 3, 2]
    bench.apply(events)
    assert not any(isinstance(e, QueueCreated) for e in bench.plan(Enqueue("b", [b"a"]))[0])


def test_promised_ids_are_the_ids() -> None:
    bench = Bench()
    bench.apply([IdsReserved(100)])
    first = bench.machine.take_ids(2)
    assert bench.enqueue() == [3]
    assert bench.commit(Enqueue("q", [b"a", b"b"], promised=first)) == [[1, 2]]
    assert bench.machine.next_id == 4


# Reservations


def test_without_a_block_no_ids_are_reserved_by_a_commit() -> None:
    assert [type(e) for e in Bench().plan(Enqueue("q", [b"a"]))[0]] == [Enqueued]


def test_a_commit_reserves_a_block_of_ids_when_the_last_one_is_used_up() -> None:
    bench = Bench(id_block=10)
    assert [type(e) for e in bench.plan(Enqueue("q", [b"a"]))[0]] == [IdsReserved, Enqueued]
    bench.enqueue()
    assert bench.machine.reserved_id == 12
    assert [type(e) for e in bench.plan(Enqueue("q", [b"a"] * 10))[0]] == [Enqueued]
    assert bench.plan(Enqueue("q", [b"a"] * 11))[0][0] == IdsReserved(23)


def test_all_ids_of_a_commit_are_reserved() -> None:
    bench = Bench(id_block=3)
    bench.commit(*(Enqueue("q", [b"a"] * 2) for _ in range(5)))
    assert bench.machine.next_id == 11
    assert bench.machine.reserved_id >= 11


def test_a_reservation_is_written_only_if_none_covers_the_ids() -> None:
    bench = Bench()
    assert bench.ask(decide.ids, 5, 100) == IdsReserved(106)
    bench.apply([IdsReserved(106)])
    assert bench.ask(decide.ids, 105, 100) is None
    assert bench.ask(decide.ids, 106, 0) == IdsReserved(107)


# Idempotency keys


def test_a_key_that_stands_for_a_job_creates_nothing_and_answers_its_id() -> None:
    bench = Bench()
    bench.enqueue(keys=["k"])
    assert bench.plan(Enqueue("q", [b"x"], keys=["k"])) == ([], [[1]])
    assert bench.plan(Enqueue("other", [b"x"], keys=["k"]))[1] == [[2]], "keys are per queue"


def test_only_the_fresh_ones_of_a_batch_become_jobs() -> None:
    bench = Bench()
    bench.enqueue(keys=["k"])
    events, answers = bench.plan(Enqueue("q", [b"0", b"1", b"2", b"3", b"4"], keys=["a", "k", None, "a", "b"]))
    assert answers == [[2, 1, 3, 2, 4]]
    (event,) = events
    assert isinstance(event, Enqueued)
    assert (event.payloads, event.keys, event.lengths) == ([b"0", b"2", b"4"], ["a", None, "b"], [1, 1, 1])


def test_a_key_of_an_earlier_operation_of_the_commit_counts() -> None:
    bench = Bench()
    answers = bench.commit(Enqueue("q", [b"a"], keys=["k"]), Enqueue("q", [b"b", b"c"], keys=["k", "j"]))
    assert answers == [[1], [1, 2]]


def test_a_key_that_outlives_its_job_counts_until_its_window_ends() -> None:
    bench = Bench(idempotency_ttl=1)
    job_id, token = bench.one(keys=["k"])
    bench.commit(Ack(job_id, token))
    bench.at(NOW + 999)
    assert bench.plan(Enqueue("q", [b"x"], keys=["k"])) == ([], [[1]])
    bench.at(NOW + 1000)
    assert bench.enqueue(keys=["k"]) == [2]


def test_a_duplicate_is_answered_though_the_queue_is_full_and_over_its_rate() -> None:
    bench = Bench(max_jobs=1, rate_limit=RateLimit(0.001, 1, "enqueue"))
    bench.enqueue(keys=["k"])
    assert bench.enqueue(keys=["k"]) == [1]


def test_a_duplicate_is_an_error_if_asked_for() -> None:
    bench = Bench()
    bench.enqueue(2, keys=[None, "k"])
    with pytest.raises(DuplicateJobError, match="'q': idempotency key 'k' stands for job 2; nothing was enq") as caught:
        bench.plan(Enqueue("q", [b"x", b"y"], keys=["new", "k"], raise_on_duplicate=True))
    assert (caught.value.job_id, caught.value.queue, caught.value.key) == (2, "q", "k")


def test_a_key_twice_in_one_batch_is_an_error_if_asked_for_and_names_the_id_of_the_first() -> None:
    bench = Bench()
    bench.enqueue(5)
    with pytest.raises(DuplicateJobError, match="'k' comes twice in one batch") as caught:
        bench.plan(Enqueue("q", [b""] * 4, keys=["a", None, "k", "k"], raise_on_duplicate=True))
    assert (caught.value.job_id, caught.value.key) == (8, "k")


def test_a_promised_id_cannot_be_kept_if_its_key_was_taken_meanwhile() -> None:
    bench = Bench()
    bench.apply([IdsReserved(100)])
    first = bench.machine.take_ids(1)
    bench.enqueue(keys=["k"])
    with pytest.raises(DuplicateJobError) as caught:
        bench.plan(Enqueue("q", [b"x"], keys=["k"], promised=first))
    assert caught.value.job_id == 2


# Room and rates


def test_a_full_queue_takes_no_more() -> None:
    bench = Bench(max_jobs=3)
    bench.enqueue(2)
    bench.enqueue(delay_ms=10)
    bench.lease(1)
    with pytest.raises(
        QueueFullError, match="queue 'q' is full: 3 of max_jobs=3 places are taken and 1 more"
    ) as caught:
        bench.enqueue()
    assert (caught.value.queue, caught.value.max_jobs) == ("q", 3)


def test_a_batch_is_taken_whole_or_not_at_all() -> None:
    bench = Bench(max_jobs=3)
    bench.enqueue(1)
    with pytest.raises(QueueFullError):
        bench.enqueue(3)
    assert bench.enqueue(2) == [2, 3]


@pytest.mark.parametrize("end", [Ack, Reject, Nack], ids=["ack", "reject", "last nack"])
def test_the_end_of_a_job_makes_room_for_another_in_the_same_commit(end: type[Ack]) -> None:
    bench = Bench(max_jobs=1)
    job_id, token = bench.one(max_attempts=1)
    assert bench.commit(Enqueue("q", [b"x"]), end(job_id, token)) == [[2], None]


@pytest.mark.parametrize("back", [Nack, Release, lambda i, t: Extend(i, t, 1)], ids=["nack", "release", "extend"])
def test_a_job_that_comes_back_is_never_refused_and_makes_no_room(back: Callable[[int, int], Operation]) -> None:
    bench = Bench(max_jobs=1)
    job_id, token = bench.one()
    with pytest.raises(QueueFullError):
        bench.plan(back(job_id, token), Enqueue("q", [b"x"]))
    bench.configure("q", max_jobs=0)
    bench.commit(back(job_id, token))


def test_dead_letters_take_no_place() -> None:
    bench = Bench(max_jobs=1)
    bench.commit(Reject(*bench.one()))
    assert bench.enqueue() == [2]


def test_a_new_queue_has_no_limits() -> None:
    assert len(Bench().enqueue(50, queue="new")) == 50


def test_a_limit_of_one_queue_is_not_that_of_another() -> None:
    bench = Bench(max_jobs=1)
    bench.enqueue()
    bench.configure("free", max_jobs=100)
    bench.enqueue(3, queue="free")


def test_an_enqueue_over_the_rate_is_refused_and_told_when_to_come_again() -> None:
    bench = Bench(rate_limit=RateLimit(4, 3, "enqueue"))
    bench.enqueue(3)
    with pytest.raises(RateLimitedError, match=r"over its rate of 4 jobs a second; .* again in 0.500 s") as caught:
        bench.enqueue(2)
    assert (caught.value.queue, caught.value.retry_after) == ("q", 0.5)
    bench.at(NOW + 499)
    with pytest.raises(RateLimitedError):
        bench.enqueue(2)
    bench.at(NOW + 500)
    bench.enqueue(2)


def test_a_batch_larger_than_the_burst_can_never_pass() -> None:
    bench = Bench(rate_limit=RateLimit(1000, 3, "enqueue"))
    with pytest.raises(UsageError, match="4 jobs in a batch never pass its rate limit with burst=3; split it"):
        bench.enqueue(4)
    assert len(bench.enqueue(4, keys=["a", "a", "b", "c"])) == 4, "three jobs"


def test_enqueues_that_together_exceed_the_burst_never_pass() -> None:
    bench = Bench(rate_limit=RateLimit(1000, 3, "enqueue"))
    with pytest.raises(UsageError, match="never pass"):
        bench.plan(Enqueue("q", [b"a"] * 2), Enqueue("q", [b"b"] * 2))


def test_enqueues_that_together_exceed_the_tokens_are_over_the_rate() -> None:
    bench = Bench(rate_limit=RateLimit(1000, 3, "enqueue"))
    bench.enqueue(2)
    with pytest.raises(RateLimitedError):
        bench.plan(Enqueue("q", [b"a"]), Enqueue("q", [b"b"]))


def test_two_extends_of_one_lease_give_the_longer() -> None:
    bench = Bench()
    job_id, token = bench.one()
    events, answers = bench.plan(Extend(job_id, token, 100_000), Extend(job_id, token, 50_000))
    assert answers == [Deadline(NOW + 100_000, 100_000)] * 2
    assert events == [Extended(job_id, NOW + 100_000)]


def test_a_rate_on_lease_does_not_concern_an_enqueue() -> None:
    bench = Bench(rate_limit=RateLimit(0.001, 1, "lease"))
    assert len(bench.enqueue(50)) == 50


# Answers to a lease


def test_an_ack_ends_the_job() -> None:
    bench = Bench()
    job_id, token = bench.one()
    events, answers = bench.plan(Ack(job_id, token))
    assert (events, answers) == ([acked(1, [1])], [None])


def test_acks_of_one_queue_in_a_row_are_one_event() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.enqueue(queue="r")
    bench.enqueue()
    held = bench.lease(9, "q", "r")
    assert [job_id for job_id, _ in held] == [1, 2, 4, 3]
    events, _ = bench.plan(*(Ack(*one) for one in sorted(held)))
    assert events == [acked(1, [1, 2]), acked(2, [3]), acked(1, [4])]
    events, _ = bench.plan(Ack(*held[0]), Nack(*held[1], delay_ms=5), Ack(*held[2]))
    assert events == [acked(1, [1]), Retried(2, NOW + 5, None), acked(1, [4])]


def test_a_nack_retries_by_the_policy_of_the_job_from_now() -> None:
    bench = Bench()
    job_id, token = bench.one()
    assert bench.plan(Nack(job_id, token, "boom"))[0] == [Retried(1, NOW + 1000, "boom")]
    bench.commit(Nack(job_id, token, "boom"))
    bench.at(NOW + 1000)
    ((job_id, token),) = bench.lease()
    assert bench.plan(Nack(job_id, token))[0] == [Retried(1, bench.now + 2000, None)]


@pytest.mark.parametrize("delay_ms", [0, 7])
def test_a_nack_with_a_delay_of_its_own_does_not_ask_the_policy(delay_ms: int) -> None:
    bench = Bench()
    assert bench.plan(Nack(*bench.one(), delay_ms=delay_ms))[0] == [Retried(1, NOW + delay_ms, None)]


def test_the_last_attempt_that_fails_makes_a_dead_letter_whatever_the_delay() -> None:
    bench = Bench()
    held = bench.one(max_attempts=2)
    bench.commit(Nack(*held, delay_ms=0))
    ((job_id, token),) = bench.lease()
    assert bench.plan(Nack(job_id, token, "e", delay_ms=9))[0] == [Buried(1, NOW, "e")]


def test_a_job_without_an_end_is_retried_for_ever() -> None:
    bench = Bench()
    held = bench.one(retry=RetryPolicy(max_attempts=None, base=0))
    bench.machine.jobs[1].attempts = 10**9
    assert bench.plan(Nack(*held))[0] == [Retried(1, NOW, None)]


def test_a_release_refunds_the_attempt() -> None:
    bench = Bench()
    assert bench.plan(Release(*bench.one(), delay_ms=40))[0] == [Released(1, NOW + 40, 0)]


def test_a_reject_makes_a_dead_letter_now() -> None:
    bench = Bench()
    assert bench.plan(Reject(*bench.one(), error="never"))[0] == [Buried(1, NOW, "never")]


def test_an_extension_moves_the_deadline_forward_only() -> None:
    bench = Bench()
    held = bench.one()
    assert bench.plan(Extend(*held, extra_ms=40_000)) == ([Extended(1, NOW + 40_000)], [Deadline(NOW + 40_000, 40_000)])
    assert bench.plan(Extend(*held, extra_ms=30_000)) == ([], [Deadline(NOW + 30_000, 30_000)])
    assert bench.plan(Extend(*held, extra_ms=0)) == ([], [Deadline(NOW + 30_000, 30_000)])


# The fence


def lost(bench: Bench, job_id: int, token: int) -> str:
    """Why the lease was lost, said alike by every verb and by `check`; nothing changes."""
    texts = set()
    for operation in (
        Ack(job_id, token), Nack(job_id, token), Release(job_id, token), Reject(job_id, token),
        Extend(job_id, token, 1),
    ):  # fmt: skip
        for question in (lambda m, o, now: decide_commit(m, [o], now), decide.check):
            with pytest.raises(LeaseLostError) as caught:
                bench.ask(question, operation, bench.now)
            assert (caught.value.job_id, caught.value.token) == (job_id, token)
            assert caught.value.outcome == "not_done"
            texts.add(str(caught.value))
    (text,) = texts
    head, tail = f"job {job_id}: lease {token} was lost (", "); the job may run again elsewhere, so discard this result"
    assert text.startswith(head)
    assert text.endswith(tail)
    return text[len(head) : -len(tail)]


def test_a_lease_of_a_settled_job_says_so() -> None:
    bench = Bench()
    held = bench.one()
    bench.commit(Ack(*held))
    assert lost(bench, *held) == "the job was settled already, or removed"
    assert lost(bench, 99, 1) == "the job was settled already, or removed"


def test_a_lease_of_a_job_that_was_delivered_again_says_so() -> None:
    bench = Bench()
    held = bench.one()
    bench.commit(Release(*held))
    bench.lease()
    assert lost(bench, *held) == "the job was delivered again"


def test_a_lease_that_never_was_says_so() -> None:
    bench = Bench()
    job_id, token = bench.one()
    assert lost(bench, job_id, token + 1) == "no such delivery was made"


def test_a_lease_is_lost_at_its_deadline_noticed_or_not_and_says_how_long_ago() -> None:
    bench = Bench()
    held = bench.one()
    bench.at(NOW + 29_999)
    assert bench.plan(Ack(*held))[0]
    bench.at(NOW + 30_000)
    assert lost(bench, *held) == "it expired 0 ms ago"
    bench.at(NOW + 31_200)
    assert lost(bench, *held) == "it expired 1200 ms ago"


def test_a_lease_that_ended_is_said_to_be_settled() -> None:
    bench = Bench()
    for end in (lambda held: Nack(*held, error="boom"), lambda held: Release(*held, delay_ms=5)):
        held = bench.one()
        bench.commit(end(held))
        assert lost(bench, *held) == "it was settled before, or ended"


def test_acks_of_one_queue_that_follow_each_other_are_one_event_alone_and_beside_others() -> None:
    bench = Bench()
    bench.enqueue(3)
    bench.enqueue(2, queue="r")
    held = bench.lease(3) + bench.lease(2, "r")
    acks: list[Operation] = [Ack(*held[i]) for i in (0, 1, 3, 4, 2)]
    expected = [acked(1, [1, 2]), acked(2, [4, 5]), acked(1, [3])]
    assert bench.plan(*acks) == (expected, [None] * 5)
    events, answers = bench.plan(*acks, Enqueue("q", [b"p"]))
    assert (events[:3], len(events), answers) == (expected, 4, [None] * 5 + [[6]])


@pytest.mark.parametrize("others", [0, 1])
def test_one_lost_lease_among_acks_refuses_all(others: int) -> None:
    bench = Bench()
    bench.enqueue(3)
    held = bench.lease(3)
    more = [Enqueue("q", [b"p"])] * others
    with pytest.raises(LeaseLostError, match="no such delivery was made"):
        bench.plan(Ack(*held[0]), Ack(held[1][0], 99), *more)
    with pytest.raises(LeaseLostError, match="job 1: lease 1 is settled twice in one call; nothing was changed"):
        bench.plan(Ack(*held[0]), Ack(*held[1]), Ack(*held[0]), *more)
    assert len(bench.plan(*(Ack(*each) for each in held))[0]) == 1


@pytest.mark.parametrize("second", [Ack, Nack, Release, Reject, lambda i, t: Extend(i, t, 9)])
def test_a_lease_is_settled_once_per_commit(second: Callable[[int, int], Operation]) -> None:
    bench = Bench()
    held = bench.one()
    with pytest.raises(
        LeaseLostError, match="job 1: lease 1 is settled twice in one call; nothing was changed"
    ) as caught:
        bench.plan(Release(*held), second(*held))
    assert (caught.value.job_id, caught.value.token) == held


def test_an_extension_settles_nothing() -> None:
    bench = Bench()
    held = bench.one()
    assert bench.plan(Extend(*held, extra_ms=90_000), Ack(*held)) == (
        [Extended(1, NOW + 90_000), acked(1, [1])],
        [Deadline(NOW + 90_000, 90_000), None],
    )


def test_in_a_partial_commit_each_answer_stands_alone() -> None:
    bench = Bench()
    first, second, third = bench.enqueue(3)
    tokens = dict(bench.lease(3))
    lost = Ack(second, 99)
    operations = [
        Ack(first, tokens[first]), lost, Nack(third, tokens[third], "e", 0), Ack(first, tokens[first]),
        Extend(second, tokens[second], 90_000),
    ]  # fmt: skip
    events, answers = bench.ask(decide_commit, operations, bench.now, partial=True)
    assert [type(event) for event in events] == [Acked, Retried, Extended]
    assert (answers[0], answers[2], answers[4]) == (None, None, Deadline(NOW + 90_000, 90_000))
    assert [(answer.token, why in answer.why) for answer, why in ((answers[1], "no such"), (answers[3], "twice"))] == [
        (99, True), (tokens[first], True),
    ]  # fmt: skip
    bench.apply(events)
    acks = [Ack(second, tokens[second]), lost]
    events, answers = bench.ask(decide_commit, acks, bench.now, partial=True)
    assert events == [acked(1, [second])]
    assert (answers[0], answers[1].token) == (None, 99)
    with pytest.raises(LeaseLostError):
        bench.ask(decide_commit, acks, bench.now)


@pytest.mark.parametrize("operation", [Enqueue("q", [b""]), KeyStands("q", "k", 1)])
def test_a_partial_commit_is_of_answers_only(operation: Operation) -> None:
    with pytest.raises(UsageError, match="answers to leases"):
        Bench().ask(decide_commit, [operation], NOW, partial=True)


def test_one_bad_operation_refuses_all() -> None:
    bench = Bench()
    held = bench.one()
    with pytest.raises(LeaseLostError):
        bench.plan(Enqueue("new", [b"a"]), Ack(*held), Ack(7, 7))
    assert bench.state_of(1) == LEASED


def test_a_check_of_an_enqueue_tells_what_its_keys_stand_for_now() -> None:
    bench = Bench()
    bench.enqueue(keys=["k"])
    assert bench.ask(decide.check, Enqueue("q", [b""] * 3, keys=["x", "k", None]), NOW) == [None, 1, None]
    assert bench.ask(decide.check, Enqueue("q", [b""]), NOW) == []
    assert bench.ask(decide.check, Enqueue("new", [b""], keys=["k"]), NOW) == [None]


def test_a_check_of_a_lease_in_force_has_nothing_to_say() -> None:
    bench = Bench()
    assert bench.ask(decide.check, Ack(*bench.one()), NOW) == []


# Lease


def test_the_most_urgent_jobs_are_leased_first_and_then_the_oldest() -> None:
    bench = Bench()
    for priority in (0, 5, 9, 5, 9):
        bench.enqueue(priority=priority)
    assert [i for i, _ in bench.lease(2)] == [3, 5]
    assert [i for i, _ in bench.lease(2)] == [2, 4]
    assert [i for i, _ in bench.lease(2)] == [1]
    assert bench.lease(2) == []


def test_deliveries_have_tokens_attempts_and_deadlines() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.enqueue(visibility_ms=70)
    event, limited = bench.ask(decide.lease, ["q"], 3, None, NOW)
    assert (event, limited) == (
        Leased([1, 2, 3], [1, 2, 3], [1] * 3, [NOW + 30_000] * 2 + [NOW + 70], [(1, 5, 3)]),
        [],
    )
    event, _ = bench.ask(decide.lease, ["q"], 3, 5, NOW)
    assert event.deadlines_ms == [NOW + 5] * 3, "the call's timeout wins"
    event, _ = bench.ask(decide.lease, ["q"], 3, 0, NOW)
    assert event.deadlines_ms == [NOW] * 3, "none at all is a timeout too"


def test_a_job_with_no_visibility_timeout_of_its_own_has_the_queue_s() -> None:
    bench = Bench(visibility_timeout=1.5)
    bench.enqueue(visibility_ms=0)
    bench.enqueue()
    event, _ = bench.ask(decide.lease, ["q"], 9, None, NOW)
    assert event.deadlines_ms == [NOW, NOW + 1500]


def test_queues_are_asked_in_the_order_given() -> None:
    bench = Bench()
    bench.enqueue(2, queue="low", priority=9)
    bench.enqueue(2, queue="high", priority=0)
    assert [i for i, _ in bench.lease(3, "high", "low")] == [3, 4, 1]


def test_no_queue_is_asked_for_more_than_was_wanted() -> None:
    bench = Bench()
    bench.enqueue(5)
    bench.enqueue(5, queue="r")
    assert [i for i, _ in bench.lease(5, "q", "r")] == [1, 2, 3, 4, 5]


def test_a_queue_that_is_unknown_empty_or_paused_gives_nothing() -> None:
    bench = Bench()
    bench.configure("empty")
    bench.enqueue(queue="paused")
    bench.configure("paused", paused=True)
    bench.enqueue(delay_ms=5)
    assert bench.ask(decide.lease, ["unknown", "empty", "paused", "q"], 9, None, NOW) == (None, [])


def test_a_rate_limit_gives_what_the_bucket_allows_and_tells_when_there_is_more() -> None:
    bench = Bench(rate_limit=RateLimit(2, 3, "lease"))
    bench.enqueue(2, priority=9)
    bench.enqueue(3)
    assert [i for i, _ in bench.lease(9)] == [1, 2, 3]
    assert bench.ask(decide.lease, ["q"], 9, None, NOW) == (None, [bench.machine.queues["q"]])
    expect_token(bench.machine, bench.machine.queues["q"], NOW)
    assert next_wakeup_ms(bench.machine) == NOW + 500
    bench.at(NOW + 500)
    assert [i for i, _ in bench.lease(9)] == [4]


def test_the_first_of_several_buckets_is_waited_for() -> None:
    bench = Bench(rate_limit=RateLimit(2, 1, "lease"))
    for name, per_second in (("slow", 1), ("fast", 10)):
        bench.configure(name, rate_limit=RateLimit(per_second, 1, "lease"))
    for name in ("q", "slow", "fast"):
        bench.enqueue(2, queue=name)
        assert len(bench.lease(9, name)) == 1
    queues = [bench.machine.queues[name] for name in ("q", "slow", "fast")]
    assert bench.ask(decide.lease, ["q", "slow", "fast"], 9, None, NOW) == (None, queues)
    for queue in queues:
        expect_token(bench.machine, queue, NOW)
    for moment_ms, name in ((NOW + 100, "fast"), (NOW + 500, "q"), (NOW + 1000, "slow")):
        assert next_wakeup_ms(bench.machine) == moment_ms
        bench.machine.woken.clear()
        advance(bench.machine, moment_ms)
        assert bench.machine.woken == {name}, "each is woken at its token"
    assert not bench.machine.tokens
    bench = Bench(rate_limit=RateLimit(2, 1, "lease"))
    bench.configure("slow", rate_limit=RateLimit(1, 1, "lease"))
    for name in ("q", "slow"):
        bench.enqueue(2, queue=name)
        assert len(bench.lease(9, name)) == 1
    bench.enqueue(queue="free")
    assert [i for i, _ in bench.lease(9, "q", "slow", "free")] == [5], "a used-up rate does not hold up the next queue"


def test_a_rate_on_enqueue_does_not_concern_a_lease() -> None:
    bench = Bench(rate_limit=RateLimit(0.001, 3, "enqueue"))
    bench.enqueue(3)
    assert len(bench.lease(3)) == 3


# Leases that end by themselves


def test_an_expired_lease_is_a_nack_at_its_deadline() -> None:
    bench = Bench()
    bench.one()
    assert bench.ask(decide.expiry, NOW + 29_999) == []
    assert bench.ask(decide.expiry, NOW + 99_999) == [Retried(1, NOW + 31_000, "lease expired")]


def test_an_expired_lease_of_the_last_attempt_makes_a_dead_letter_at_its_deadline() -> None:
    bench = Bench()
    bench.one(max_attempts=1)
    assert bench.ask(decide.expiry, NOW + 99_999) == [Buried(1, NOW + 30_000, "lease expired")]


def test_a_storm_of_expiries_comes_in_batches() -> None:
    bench = Bench()
    apply(bench.machine, bench.plan(Enqueue("q", [b""] * 2500))[0][0], NOW, Place())
    apply(bench.machine, bench.ask(decide.lease, ["q"], 2500, None, NOW)[0], NOW, Place())
    sizes = []
    while events := bench.ask(decide.expiry, NOW + 30_000):
        sizes.append(len(events))
        for event in events:
            apply(bench.machine, event, NOW + 30_000, Place())
    assert sizes == [decide.EXPIRY_BATCH] * 2 + [500]


def test_the_leases_of_a_former_owner_end_first_attempts_at_once_later_ones_by_policy() -> None:
    bench = Bench()
    bench.enqueue(2)
    bench.enqueue(max_attempts=2)
    bench.enqueue(max_attempts=1, queue="r")
    for job_id, token in bench.lease(3)[1:]:
        bench.commit(Nack(job_id, token, delay_ms=0))
    bench.lease(3, "q", "r")
    assert bench.ask(decide.owner_gone, NOW + 5) == [
        Retried(1, NOW + 5, "owner gone"),
        Retried(2, NOW + 2005, "owner gone"),
        Buried(3, NOW + 5, "owner gone"),
        Buried(4, NOW + 5, "owner gone"),
    ]


# Whole queues


def all_states(bench: Bench) -> None:
    """Job 1 is leased, 2 ready, 3 scheduled, 4 dead."""
    bench.enqueue(priority=9)
    bench.lease()
    bench.enqueue()
    bench.enqueue(delay_ms=50)
    bench.enqueue(priority=9)
    bench.commit(Reject(*bench.lease()[0]))
    assert [bench.state_of(i) for i in (1, 2, 3, 4)] == [LEASED, READY, SCHEDULED, DEAD]


@pytest.mark.parametrize(("state", "ids"), [(None, [2, 3, 4]), (READY, [2]), (SCHEDULED, [3]), (DEAD, [4])])
def test_a_purge_removes_what_is_not_leased_or_one_state(state: int | None, ids: list[int]) -> None:
    bench = Bench()
    all_states(bench)
    assert bench.ask(decide.purge, "q", state) == Purged(1, ids)


def test_a_purge_of_nothing_is_no_event() -> None:
    bench = Bench()
    bench.one()
    assert bench.ask(decide.purge, "q", None) is None
    assert bench.ask(decide.purge, "unknown", None) is None


def test_a_job_can_be_cancelled_unless_it_is_leased_or_gone() -> None:
    bench = Bench()
    all_states(bench)
    assert [bench.ask(decide.cancel, i) for i in range(1, 6)] == [None, *(Cancelled(1, i) for i in (2, 3, 4)), None]


def dead_letters(bench: Bench, count: int) -> None:
    bench.enqueue(count)
    bench.commit(*(Reject(*held) for held in bench.lease(count)))


def test_dead_letters_come_back_lowest_ids_first() -> None:
    bench = Bench()
    dead_letters(bench, 4)
    assert bench.ask(decide.redrive, "q", None, None) == Redriven(1, [1, 2, 3, 4])
    assert bench.ask(decide.redrive, "q", None, 2) == Redriven(1, [1, 2])
    assert bench.ask(decide.redrive, "q", [4, 2, 4, 1], None) == Redriven(1, [1, 2, 4])
    assert bench.ask(decide.redrive, "q", [4, 2, 1], 2) == Redriven(1, [1, 2])


def test_a_redrive_of_nothing_is_no_event() -> None:
    bench = Bench()
    dead_letters(bench, 1)
    for name, ids, limit in (("unknown", None, None), ("q", [], None), ("q", None, 0), ("unknown", [], 5)):
        assert bench.ask(decide.redrive, name, ids, limit) is None
    bench.configure("empty")
    assert bench.ask(decide.redrive, "empty", None, None) is None


def test_only_dead_letters_of_the_queue_can_be_named() -> None:
    bench = Bench()
    dead_letters(bench, 1)
    bench.enqueue()
    bench.configure("r")
    for name, job_id in (("q", 2), ("q", 99), ("r", 1), ("unknown", 1)):
        with pytest.raises(
            JobNotFoundError, match=f"job {job_id} is no dead letter of queue '{name}'; nothing"
        ) as caught:
            bench.ask(decide.redrive, name, [1, job_id] if name == "q" else [job_id], 1)
        assert caught.value.job_id == job_id


def test_a_configuration_creates_its_queue_and_changes_what_is_given() -> None:
    bench = Bench()
    assert bench.ask(decide.configure, "new", {}) == ([], QueueConfig())
    assert bench.ask(decide.configure, "new", {"paused": False}) == ([], QueueConfig())
    assert bench.ask(decide.configure, "new", {"max_jobs": None}) == ([QueueCreated(2, "new")], QueueConfig())
    config = QueueConfig(max_jobs=5)
    events = [QueueCreated(2, "new"), QueueConfigured(2, config)]
    assert bench.ask(decide.configure, "new", {"max_jobs": 5}) == (events, config)
    bench.configure("q", max_jobs=5)
    config = QueueConfig(retry=FLAT, max_jobs=5, visibility_timeout=1.0)
    assert bench.ask(decide.configure, "q", {"visibility_timeout": 1.0}) == ([QueueConfigured(1, config)], config)


def test_a_configuration_that_changes_nothing_is_no_event() -> None:
    bench = Bench()
    config = bench.machine.queues["q"].config
    assert bench.ask(decide.configure, "q", {}) == ([], config)
    assert bench.ask(decide.configure, "q", {"retry": attrs.evolve(FLAT), "paused": False}) == ([], config)


def test_a_pause_is_a_change_of_the_configuration() -> None:
    bench = Bench()
    (event,), config = bench.ask(decide.configure, "q", {"paused": True})
    assert event.config.paused
    assert config.paused
    bench.configure("q", paused=True)
    assert bench.ask(decide.configure, "q", {"paused": True})[0] == []
    assert len(bench.ask(decide.configure, "q", {"paused": False})[0]) == 1


# Any calls in any order


ids = st.integers(1, 6)
names = st.sampled_from(["q", "r", "s"])
keys = st.sampled_from([None, "k", "j"])
operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(
        Enqueue, names, st.just([b"a", b"b"]), priority=st.integers(0, 9), delay_ms=st.sampled_from([0, 0, 60]),
        keys=st.none() | st.lists(keys, min_size=2, max_size=2), raise_on_duplicate=st.booleans(),
    ),
    st.builds(Ack, ids, ids), st.builds(Nack, ids, ids, st.just("e"), st.sampled_from([None, 0])),
    st.builds(Release, ids, ids), st.builds(Reject, ids, ids), st.builds(Extend, ids, ids, st.integers(0, 50_000)),
)  # fmt: skip
changes = st.sampled_from([{}, {"max_jobs": 3}, {"paused": True}, {"paused": False}])
calls = st.one_of(
    st.lists(operations, min_size=1, max_size=4),
    st.tuples(st.just(decide.lease), st.permutations(["q", "r", "s"]), st.integers(1, 4), st.sampled_from([None, 40])),
    st.tuples(st.just("time"), st.integers(1, 5000)),
    st.tuples(st.just(decide.purge), names, st.sampled_from([None, READY, SCHEDULED, DEAD])),
    st.tuples(st.just(decide.cancel), ids),
    st.tuples(st.just(decide.redrive), names, st.none() | st.lists(ids, max_size=2), st.none() | st.integers(1, 2)),
    st.tuples(st.just(decide.configure), names, changes),
    st.tuples(st.just(decide.owner_gone)),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.lists(calls, max_size=25))
def test_any_call_leads_to_events_that_fit_or_to_an_error_of_the_tree_and_changes_nothing_itself(history: Any) -> None:
    bench = Bench(id_block=7)
    bench.configure("r", rate_limit=RateLimit(1, 4, "enqueue"), idempotency_ttl=0.05)
    bench.configure("s", rate_limit=RateLimit(1, 2, "lease"), max_jobs=4)
    for call in history:
        if isinstance(call, tuple) and call[0] == "time":
            bench.at(bench.now + call[1])
            bench.apply(bench.ask(decide.expiry, bench.now))
            assert bench.ask(decide.expiry, bench.now) == []
            continue
        before = look.stats(bench.machine, None, bench.now)
        try:
            if isinstance(call, list):
                events, answers = bench.plan(*call)
                assert len(answers) == len(call)
            elif call[0] is decide.lease:
                found, limited = bench.ask(*call, bench.now)
                events = [] if found is None else [found]
                assert all(not queue.bucket.available(bench.now) for queue in limited)
            else:
                found = bench.ask(*call, *([bench.now] if call[0] is decide.owner_gone else []))
                found = found[0] if call[0] is decide.configure else found
                events = found if isinstance(found, list) else [found] if found is not None else []
        except RivetQError:
            continue
        bench.apply(events)
        after = look.stats(bench.machine, None, bench.now)
        assert after.enqueued - before.enqueued == sum(len(e.lengths) for e in events if isinstance(e, Enqueued))
        for name in ("r", "s"):
            limit = bench.machine.queues[name].config.max_jobs
            if isinstance(call, list) and limit is not None and any(isinstance(e, Enqueued) for e in events):
                grown = {e.queue for e in events if isinstance(e, Enqueued)}
                queue = bench.machine.queues[name]
                assert queue.number not in grown or queue.occupied() <= limit

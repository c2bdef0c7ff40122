"""For tests: the whole state in canonical order, and every invariant of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .entry import Entry
from .look import everything
from .machine import Machine
from .queue import DEAD, LEASED, NEVER_MS, READY, SCHEDULED, STATES
from .sessions import answered


def dump(machine: Machine) -> dict[str, Any]:
    """The whole state in canonical order, for comparing two machines."""
    jobs = [facts(e) for e in sorted(everything(machine), key=lambda entry: entry.id)]
    keys = sorted(
        (machine.numbers[number].name, text, key.job_id, key.expires_ms)
        for (number, text), key in machine.keys.all().items()
        if not key.expires_ms or key.expires_ms > machine.now_ms
    )
    queues = sorted(
        (q.name, q.config, q.config.paused, q.enqueued, q.acked, q.cancelled, q.purged)
        for q in machine.numbers.values()
    )
    sessions = {s.id: (s.done_below, s.answers) for s in machine.sessions.values()}
    return {"jobs": jobs, "keys": keys, "queues": queues, "sessions": sessions}


def check(machine: Machine) -> None:
    """Assert every relation between the structures; for tests, it looks at everything."""
    jobs = {entry.id: entry for entry in everything(machine)}
    present: dict[int, list[int]] = {number: [0, 0, 0, 0] for number in machine.numbers}
    total = 0
    for entry in everything(machine):
        total += 1
        present[entry.queue.number][entry.state] += 1
        assert entry.id < machine.next_id, f"job {entry.id} is not below the next id {machine.next_id}"
    assert total == len(jobs), "a job is in two places"
    loose: dict[int, int] = {}
    first_due = NEVER_MS
    for queue in machine.numbers.values():
        assert machine.numbers[queue.number] is queue, f"queue {queue.name!r}: number {queue.number} is another's"
        assert queue.counts == present[queue.number], f"queue {queue.name!r}: counts {queue.counts} are off"
        assert queue.counts[LEASED] == len(queue.leased), f"queue {queue.name!r}: leased count is off"
        ended = queue.acked + queue.cancelled + queue.purged
        accounted = sum(queue.counts) + ended
        assert queue.enqueued == accounted, f"queue {queue.name!r}: {queue.enqueued} in, {accounted} accounted for"
        loose.update(dict.fromkeys(queue.leased, LEASED))
        waiting = machine.waiting[queue.number]
        for state, windows in ((READY, waiting.ready), (SCHEDULED, waiting.scheduled), (DEAD, waiting.dead)):
            for priority, window in enumerate(windows):
                if window is None:
                    continue
                window.check()
                for key in window.loose:
                    entry = machine.jobs[key[1] if window.by_due else key]
                    assert entry.id not in loose, f"job {entry.id} is in two sets"
                    loose[entry.id] = state
                    assert (entry.queue, entry.spec.priority) == (queue, priority), f"job {entry.id} is misplaced"
                    assert not window.by_due or key[0] == entry.due_ms, f"job {entry.id} is due at another moment"
                if state == SCHEDULED and window.count:
                    first_due = min(first_due, window.first()[0])
                    waits = {(number, each) for _, number, each in machine.due}
                    assert (queue.number, priority) in waits, f"queue {queue.name!r}: its due jobs are not waited for"
    assert loose == {i: e.state for i, e in machine.jobs.items()}, "the sets and the jobs' states differ"
    assert not machine.due or machine.due[0][0] <= first_due, "a due moment would be missed"
    _check_segments(machine, jobs)


def _check_segments(machine: Machine, jobs: dict[int, Entry]) -> None:
    """What lives in each segment, and where keys and queues were written."""
    live: dict[int, int] = {}
    for entry in jobs.values():
        live[entry.segment] = live.get(entry.segment, 0) + entry.size
    counts: dict[int, int] = {}
    for (number, text), key in machine.keys.all().items():
        job = jobs.get(key.job_id)
        if key.expires_ms:
            assert job is None, f"key {text!r}: its job {key.job_id} lives and it has an end"
            if key.expires_ms <= machine.now_ms and key.segment < machine.oldest_segment:
                continue  # over, and still on the shelf when its segment went: it weighs nothing any more
            counts[key.segment] = counts.get(key.segment, 0) + 1
        else:
            assert job is not None, f"key {text!r} stands for no living job"
            assert job.key == text, f"key {text!r} stands for job {job.id}, which has {job.key!r}"
            assert job.queue.number == number, f"key {text!r} stands for a job of another queue"
    for kept in (live, counts):
        kept.pop(0, None)
    counted = {s: n for s, n in machine.live.items() if n and s}
    assert {s: n for s, n in live.items() if n} == counted, f"live bytes: counted {counted}, found {live}"
    weight = answered(machine)
    assert machine.answered == weight, f"answers weigh {machine.answered}, found {weight}"
    homes = Counter(queue.segment for queue in machine.numbers.values() if queue.segment)
    counted = {s: n for s, n in machine.homes.items() if n}
    assert homes == counted, f"queues per segment: counted {counted}, found {dict(homes)}"
    counted = {s: n for s, n in machine.keys.counts.items() if n and s}
    assert counts == counted, f"keys per segment: counted {counted}, found {counts}"


def facts(e: Entry) -> tuple[Any, ...]:
    """All facts of a job except its place in the log; for comparing."""
    return (
        e.id, e.queue.name, STATES[e.state].value, e.spec.priority, e.attempts, e.token, e.spec.max_attempts,
        e.spec.retry, e.spec.visibility_ms, e.enqueued_at_ms, e.due_ms if e.state == SCHEDULED else 0,
        e.deadline_ms if e.state == LEASED else 0, e.died_at_ms, e.last_error, dict(e.spec.headers), e.key,
        e.length, e.crc,
    )  # fmt: skip

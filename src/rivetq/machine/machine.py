"""The state of all queues, and the steps that several changes share. It has no clock, files or threads.

`apply` is the only writer of state and cannot fail; the live path and recovery share it. `advance` is the part of the
rules that the clock alone decides (a delay falls due, a key's window ends); it writes no events. The decisions that
lead to events are in `decide`, answers are in `look`, and `saving` moves the state to the index and back.

The states of a job, and what moves it, are in `transitions`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from .cache import Cache
from .columns import Columns
from .entry import Entry
from .events import Event
from .keys import Key, Keys
from .queue import DEAD, LEASED, NEVER_MS, READY, SCHEDULED, Queue
from .run import Run
from .snapshot import Changes, Session
from .transitions import FROM, GONE, name
from .waiting import Waiting
from .window import FEW_JOBS, Window

Found = tuple[int, Window, Run, int]
"""State, window, run and cell of a job."""


class Machine:
    """All queues. Not thread-safe: the engine's lock is around every call.

    Args:
        keep_payloads: nothing is on a disk: payloads stay here, and no changes are noted for a checkpoint.
        cache_bytes: memory for payloads of waiting jobs, if there is a disk to read the others from.
        id_block: ids that one record reserves; 0: no reservation is needed.
    """

    def __init__(self, *, keep_payloads: bool = False, cache_bytes: int = 0, id_block: int = 0) -> None:
        self.jobs: dict[int, Entry] = {}  # the loose ones: leased, come back, or otherwise not in a run
        self.queues: dict[str, Queue] = {}
        self.numbers: dict[int, Queue] = {}  # all of them; in a replay some whose names come later
        self.waiting: dict[int, Waiting] = {}  # by the numbers of the queues
        self.keys = Keys()
        self.next_id = 1
        self.reserved_id = 1
        self.next_token = 1
        self.next_run = 1
        self.next_queue = 1
        self.oldest_segment = 1
        self.now_ms = 0  # the latest moment that the state has seen: the time line never steps back
        self.wake_ms = NEVER_MS  # nothing happens by the clock alone before this; may be earlier than what does happen
        self.live: dict[int, int] = {}  # bytes of living jobs per segment; see `live_bytes`
        self.homes: dict[int, int] = {}  # how many queues were written last in each segment
        self.answered = 0  # what the answers of all sessions weigh
        self.sessions: dict[int, Session] = {}  # those that called last are at the end
        self.changes: Changes | None = None if keep_payloads else Changes()
        self.woken: set[str] = set()  # queues in which something became ready since the engine last looked
        self.due: list[tuple[int, int, int]] = []  # heap of (due_ms, queue number, priority); stale ones are skipped
        self.due_limit = FEW_JOBS  # above it the stale ones are dropped
        self.tokens: list[tuple[int, int]] = []  # heap of (moment of a token, queue number); stale ones are skipped
        self.deadlines: list[tuple[int, int]] = []  # heap of (deadline_ms, id); stale pairs are skipped
        self.leased_count = 0
        self.keep_payloads = keep_payloads
        self.is_live = False
        """True: the events that are applied were just decided on this state. False in a replay."""
        self.cache = Cache(cache_bytes)
        self.id_block = id_block
        self.grain_ms = 0
        """The grain of the clock, which rounds moments down. A job is due this much later, so that no delay is too
        short."""
        self.ahead_ms: Callable[[int], int] | None = None
        """Gets a moment of the time line; returns how far the wall clock is ahead of it. Used for `eta_ms` only, and
        no part of the state. None: both show the same."""
        self.unbegun: set[int] = set()
        """Tokens of a former owner's leases that were taken in advance and never begun: their attempts do not count."""
        self.promised: dict[int, int] = {}  # ids that were told in advance and have no job yet: first id -> how many

    def take_ids(self, count: int) -> int:
        """The first of `count` ids that no other caller gets. A reservation covers them (see decide.ids)."""
        first, self.next_id = self.next_id, self.next_id + count
        assert self.next_id <= self.reserved_id, f"ids up to {self.next_id} told, reserved are {self.reserved_id}"
        self.promised[first] = count
        return first

    # Moments at which the clock acts

    def expect(self, at_ms: int) -> None:
        if at_ms < self.wake_ms:
            self.wake_ms = at_ms

    def expect_due(self, window: Window, key: tuple[int, int], queue: Queue, priority: int) -> None:
        """A scheduled job was added."""
        if window.first() == key:
            heapq.heappush(self.due, (key[0], queue.number, priority))
            self.expect(key[0] + self.grain_ms)
            if len(self.due) > self.due_limit:
                self.trim_due()

    def trim_due(self) -> None:
        """Drop stale moments. Cancelled jobs leave theirs behind, which would fill memory until the moments come.

        Costs O(queues), each time that half of them are stale.
        """
        self.due = [
            (window.first()[0], queue.number, priority)
            for queue in self.numbers.values()
            for priority, window in enumerate(self.waiting[queue.number].scheduled)
            if window is not None and window.count
        ]
        heapq.heapify(self.due)
        self.due_limit = FEW_JOBS + 2 * len(self.due)

    def push_deadline(self, entry: Entry) -> None:
        heapq.heappush(self.deadlines, (entry.deadline_ms, entry.id))
        self.expect(entry.deadline_ms)
        self.trim_deadlines()

    def trim_deadlines(self) -> None:
        if len(self.deadlines) > 64 + 2 * self.leased_count:
            # Acked leases leave their pair behind; without this a fast consumer would fill memory until the deadlines.
            self.deadlines = [
                (e.deadline_ms, e.id) for q in self.numbers.values() for e in map(self.jobs.__getitem__, q.leased)
            ]
            heapq.heapify(self.deadlines)

    # State changes that several events share

    def known(self, job_id: int) -> Entry | None:
        """A loose job, which is about to change. Events that end a delivery are about leased jobs, which are loose."""
        entry = self.jobs.get(job_id)
        if entry is not None:
            self.note(entry)
        return entry

    def meets(self, kind: type[Event], entry: Entry | None) -> None:
        """An event of this kind is about to change a job. While the machine is live, assert that it may."""
        state = GONE if entry is None else entry.state
        assert not self.is_live or state in FROM[kind], f"{kind.__name__} of a job that is {name(state)}"

    def note(self, entry: Entry) -> None:
        if self.changes is not None:
            self.changes.jobs.add(entry.id)

    def touch(self, run: Run, new: int = 0) -> None:
        """A run changed (it got so many new jobs), or was used up."""
        changes = self.changes
        if changes is None:
            return
        changes.cells += new
        if run.left:
            changes.runs.add(run)
        else:
            changes.runs.discard(run)
            if run.number:
                changes.gone.add(run.number)

    def locate(
        self, job_id: int, queues: Iterable[Queue], state: int | None = None, priority: int | None = None
    ) -> Found | None:
        """Where a job is that is in a run of one of these queues. Costs two bisections for each of their windows."""
        for queue in queues:
            for each, window in self.waiting[queue.number].each(priority):
                if window.runs and (state is None or state == each) and (found := window.find(job_id)) is not None:
                    return each, window, *found
        return None

    def loosen(self, job_id: int, queues: Iterable[Queue], state: int | None = None) -> Entry | None:
        """A job as an object, taken out of its run if it is in one; it is about to change."""
        entry = self.known(job_id)
        if entry is not None:
            return entry
        found = self.locate(job_id, queues, state)
        if found is None:
            return None
        entry, window = self.take_out(found), found[1]
        entry.queue.counts[entry.state] += 1
        window.add((entry.due_ms, job_id) if window.by_due else job_id)
        return entry

    def take_out(self, found: Found) -> Entry:
        """A job that was in a run, as an object. It is in the set of no state yet; its caller puts it into one."""
        state, window, run, i = found
        head = run.head
        entry = run.pluck(i)
        window.plucked(run, head)
        self.touch(run)
        run.queue.counts[state] -= 1
        self.jobs[entry.id] = entry
        self.unpack((entry,))
        self.note(entry)
        return entry

    def unpack(self, entries: Iterable[Entry]) -> None:
        """These jobs just left runs. What the index has of them from the time before is theirs again."""
        if self.changes is not None and self.changes.packed:
            for entry in entries:
                if entry.id in self.changes.packed:
                    self.changes.packed.discard(entry.id)
                    entry.indexed = True

    def lose(self, found: Found) -> None:
        """A job in a run is gone for good, and its key is free."""
        state, window, run, i = found
        columns, queue, head = run.load(), run.queue, run.head
        job_id, segment = columns.ids[i], columns.segments[i]
        key = None if columns.keys is None else columns.keys[i]
        if segment in self.live:
            self.live[segment] -= columns.sizes[i]
        run.cut(i)
        window.plucked(run, head)
        self.touch(run)
        queue.counts[state] -= 1
        if key is not None:
            self.free_key(queue, key, job_id)

    def numbered(self, number: int) -> tuple[Queue, ...]:
        """The queue of a number, unless it was removed."""
        queue = self.numbers.get(number)
        return () if queue is None else (queue,)

    def wait(self, entry: Entry, due_ms: int, now_ms: int) -> None:
        """Put a job back to its place: ready, or scheduled until `due_ms`."""
        self.leave(entry)
        entry.due_ms = due_ms
        self.enter(entry, SCHEDULED if due_ms > now_ms else READY)

    def enter(self, entry: Entry, state: int) -> None:
        """Put a job into the set of its state; not for a lease."""
        entry.state = state
        entry.queue.counts[state] += 1
        self.line_up(entry)
        if state == READY:
            self.wake(entry.queue)

    def line_up(self, entry: Entry) -> None:
        queue, priority = entry.queue, entry.spec.priority
        window = self.waiting[queue.number].window(entry.state, priority)
        if window.by_due:
            key = (entry.due_ms, entry.id)
            window.add(key)
            self.expect_due(window, key, queue, priority)
        else:
            window.add(entry.id)

    def leave(self, entry: Entry) -> None:
        """Take a job out of the set of its state."""
        queue = entry.queue
        state = entry.state
        queue.counts[state] -= 1
        if state == LEASED:
            queue.leased.discard(entry.id)
            self.leased_count -= 1
        else:
            self.waiting[queue.number].window(state, entry.spec.priority).discard(
                (entry.due_ms, entry.id) if state == SCHEDULED else entry.id
            )

    def drop(self, entry: Entry) -> None:
        """Take a job out of all structures except its key."""
        self.leave(entry)
        del self.jobs[entry.id]
        if entry.segment in self.live:
            self.live[entry.segment] -= entry.size

    def remove(self, ids: Iterable[int], keys_until_ms: int | None = None) -> None:
        """Remove loose jobs for good. With `keys_until_ms` (an ack) their keys stay until then, else they are free.

        Costs O(ids), and a bisection for each that was not leased.
        """
        changed = set[int]() if self.changes is None else self.changes.jobs
        live, jobs = self.live, self.jobs
        is_acked = keys_until_ms is not None
        may_be_leased, may_be_other = is_acked or not self.is_live, not is_acked or not self.is_live
        for job_id in ids:
            entry = jobs.pop(job_id, None)
            if entry is None:
                assert may_be_other, f"ack of job {job_id}, which is gone"
                continue
            if entry.state == LEASED:  # as it is after nearly every delivery
                assert may_be_leased, f"removal of job {job_id}, which is leased"
                queue = entry.queue
                queue.counts[LEASED] -= 1
                queue.leased.discard(job_id)
                self.leased_count -= 1
            else:
                assert may_be_other, f"ack of job {job_id}, which is {name(entry.state)}"
                self.leave(entry)
            if entry.segment in live:
                live[entry.segment] -= entry.size
            if entry.indexed or (self.changes is not None and job_id in self.changes.packed):
                changed.add(job_id)
            else:
                changed.discard(job_id)
            if entry.key is None:
                continue
            if keys_until_ms is None:
                self.free_key(entry.queue, entry.key, job_id)
            else:
                self.end_key(entry.queue, entry.key, job_id, entry.segment, keys_until_ms)

    def insert(self, entry: Entry, state: int, now_ms: int) -> None:
        """Put a whole job from the index or a copy into the structures of its state."""
        if entry.segment:
            self.live[entry.segment] = self.live.get(entry.segment, 0) + entry.size
        if state == LEASED:
            self.jobs[entry.id] = entry
            entry.state = LEASED
            entry.queue.counts[LEASED] += 1
            entry.queue.leased.add(entry.id)
            self.leased_count += 1
            self.note(entry)
            self.push_deadline(entry)
            return
        if state != DEAD:
            state = SCHEDULED if entry.due_ms > now_ms else READY
        window = self.waiting[entry.queue.number].window(state, entry.spec.priority)
        key = (entry.due_ms, entry.id) if window.by_due else entry.id
        run = None if entry.indexed else window.open_for(key)
        if entry.indexed or (run is None and len(window.opens) > 1 and not window.opens[0].is_full):
            self.jobs[entry.id] = entry
            self.note(entry)
            self.enter(entry, state)
            return
        # Copies come in ascending order, too. In a rebuild many of them become runs again.
        entry.queue.counts[state] += 1
        if run is None:
            columns = Columns()
            columns.add(entry)
            run = Run(entry.queue, entry.spec.priority, columns, state)
            window.insert(run, is_open=True)
            if window.by_due:
                self.expect_due(window, run.head, entry.queue, entry.spec.priority)
        else:
            run.load().add(entry)
            window.grown(run, 1)
        self.touch(run, 1)
        if state == READY:
            self.wake(entry.queue)

    def changed_queue(self, number: int) -> Queue:
        """A queue whose totals or configuration are about to change."""
        if self.changes is not None:
            self.changes.queues.add(number)
        return self.numbers[number]

    def add_queue(self, number: int) -> Queue:
        """A queue whose name is not known yet."""
        queue = self.numbers[number] = Queue(number, "")
        self.waiting[number] = Waiting()
        self.next_queue = max(self.next_queue, number + 1)
        return queue

    def name_queue(self, number: int, name: str, segment: int) -> None:
        """A queue, new or not, has this name, and was written in this segment."""
        queue = self.numbers.get(number) or self.add_queue(number)
        if queue.name != name and self.queues.get(queue.name) is queue:
            del self.queues[queue.name]  # in a salvage: the record of its removal is missing
        queue.name = name
        self.queues[name] = queue
        self._settle(queue, segment)
        if self.changes is not None:
            self.changes.queues.add(number)

    def forget_queue(self, queue: Queue) -> None:
        self._settle(queue, 0)
        del self.numbers[queue.number], self.waiting[queue.number]
        self.queues.pop(queue.name, None)
        self.woken.discard(queue.name)
        if self.changes is not None:
            self.changes.queues.add(queue.number)

    def _settle(self, queue: Queue, segment: int) -> None:
        """A queue was written to another segment; 0: to none."""
        if queue.segment in self.homes:
            self.homes[queue.segment] -= 1
        queue.segment = segment
        if segment:
            self.homes[segment] = self.homes.get(segment, 0) + 1

    def wake(self, queue: Queue) -> None:
        if queue.counts[READY] and not queue.config.paused:
            self.woken.add(queue.name)

    # Keys

    def hold_key(self, number: int, text: str, key: Key) -> None:
        self.keys.hold(number, text, key)
        if (queue := self.numbers.get(number)) is not None:
            queue.keyed = True
        if key.expires_ms:
            self.expect(key.expires_ms)

    def end_key(self, queue: Queue, text: str, job_id: int, segment: int, until_ms: int) -> None:
        """The job ended. Its key stands for it until `until_ms`; 0: the key is free."""
        key = self.keys.get(queue.number, text)
        if key is None or key.job_id != job_id:
            return  # a replay that met the key's next job first
        if until_ms:
            self.hold_key(queue.number, text, Key(job_id, segment, until_ms))
        else:
            self.keys.forget(queue.number, text)

    def free_key(self, queue: Queue, text: str, job_id: int) -> None:
        """The job was cancelled or purged. Its work was not done, so a second enqueue makes a job."""
        key = self.keys.get(queue.number, text)
        if key is not None and key.job_id == job_id:
            self.keys.forget(queue.number, text)

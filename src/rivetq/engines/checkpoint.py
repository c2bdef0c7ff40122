"""Checkpoints: write all changes since the last one into the index. A recovery then replays only the log behind it.

They also keep memory within bounds. What is in the index need not be in memory: runs are put away, keys are frozen.
All of this runs in the keeper's thread, in slices under the lock while calls go on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, starmap
from typing import Any, NamedTuple

import lmdb

from ..clock import Clock
from ..machine import saving
from ..machine.columns import Columns
from ..machine.events import QueueCopied
from ..machine.machine import Machine
from ..machine.run import Run
from ..machine.snapshot import Changes, Snapshot
from ..storage.index import Index
from ..storage.index_values import encode_entry, encode_queue, encode_run
from .durable import DurableEngine

logger = logging.getLogger("rivetq")

CHECKPOINT_BYTES = 64 * 2**20
"""About how many bytes of log a recovery may have to replay. A smaller segment lowers it."""
CHECKPOINT_S = 30.0
SLICE = 50
"""Jobs per hold of the lock during a checkpoint: some 200 us."""
WORK_S, REST_S = 0.001, 0.0001
"""A background thread that never pauses makes every other thread wait for the interpreter's 5 ms switch interval after
each system call. To avoid that, this one rests for a moment after each millisecond of work. It does not rest more
often: after each rest it may have to wait that long itself."""
SWEEP_KEYS = 100_000
"""The most ended keys that one checkpoint removes."""
PACK_SLICE = 128
"""Loose jobs that are put into a run per hold of the lock."""
RESIDENT_RUNS = 2
"""Runs at the head of a window that stay in memory: the one that is leased from, and the next."""
LOOSE_SHARE = 8
"""A job or key that is an object takes some eight times as much memory as one in a run."""
RUNS_READ = 64
"""Runs read back from the index after which those not at a head are put away again."""


class CheckpointingEngine(DurableEngine):
    """Keeps an index beside the log.

    Args:
        machine, clock, now_ms, boot_ms, durable: see `DurableEngine`.
        index: of the same directory, open.
        segment_bytes: the size of a segment.
        window_jobs: the most jobs that wait in memory for a checkpoint.
    """

    def __init__(
        self,
        machine: Machine,
        clock: Clock,
        now_ms: int,
        boot_ms: int,
        *,
        index: Index,
        segment_bytes: int,
        window_jobs: int,
        **durable: Any,
    ) -> None:
        self._index = index
        self._segment_bytes = segment_bytes
        self._checkpoint_bytes = min(CHECKPOINT_BYTES, segment_bytes)
        self._window_jobs = window_jobs
        self._keeper_lock = threading.Lock()  # one checkpoint or compaction at a time
        self._runs_read = 0  # how many runs the index had read back when runs were last put away
        self._not_before_s = 0.0  # no automatic checkpoint before this: one failed, and each attempt starts from zero
        self._rested_s = 0.0  # when the keeper last gave way to others
        self._checkpoints = 0
        super().__init__(machine, clock, now_ms, boot_ms, **durable)

    def _look(self, read: Callable[[int], Any]) -> Any:
        value = super()._look(read)
        if self._keeps_much():
            self._keeper_poked.set()  # what was looked at does not stay in memory
        return value

    def _keeps_much(self) -> bool:
        """Whether many runs were read back since runs were last put away."""
        return self._index.reads - self._runs_read > RUNS_READ

    def _is_due(self) -> bool:
        """Whether a checkpoint is due: the log to replay, or what waits in memory for one, is long."""
        machine = self._machine
        changes = machine.changes
        return changes is not None and (
            self._unsaved_bytes > self._checkpoint_bytes
            or changes.cells > self._window_jobs
            or len(changes.jobs) + len(machine.keys.changed) > self._window_jobs // LOOSE_SHARE
        )

    def _checkpoint(self, *, last: bool = False) -> None:
        """Write what changed since the last one into the index. Caller holds _keeper_lock, not _lock.

        Runs are written as they were at `lsn`: their columns are shared, and the part that was taken never changes.
        Loose jobs and keys are taken in slices while calls go on; replay from `lsn` makes them whole (see events).
        """
        if not last:
            self._check()  # close() may have run while this caller waited for _keeper_lock
        with self._or_fail():
            self._check_files()
        machine = self._machine
        self._tidy()
        taken, unsaved = Changes(), 0
        try:
            with self._lock:
                changes = machine.changes
                assert changes is not None
                snapshot, lsn = saving.snapshot(machine), self._last_lsn()
                runs = [self._take_run(run) for run in changes.runs]
                queues = [(number, self._take_queue(number)) for number in changes.queues]
                unsaved = self._unsaved_bytes
                # Last, and in one statement: an exception finds the changes either here or there.
                taken, machine.changes, self._unsaved_bytes = changes, Changes(), 0
            # What was in a run at that moment is written with it, even if it leaves it before its slice.
            loose = sorted(taken.jobs - taken.packed)
            jobs = [item for part in self._slices(loose) for item in self._take_jobs(part)]
            jobs += [(job_id.to_bytes(8, "big"), None) for job_id in taken.jobs & taken.packed]
            with self._lock:
                # Keys last. A job that ended after `lsn` and before its slice is missing in the index, and replay skips
                # the end of a job that it does not know. The index therefore must have the key that the job left.
                keys = machine.keys.freeze()
                key_counts = dict(machine.keys.counts)
                last_lsn = self._last_lsn()
            self._wait_durable(last_lsn)  # the index is never ahead of the disk
            with self._or_fail():
                self._check_files()  # once more: the write took a while
            gone = [(number.to_bytes(8, "big"), None) for number in sorted(taken.gone)]
            is_written = self._write_index(
                lsn,
                snapshot,
                jobs=self._paced(jobs),
                runs=chain(self._paced(gone), map(_encode_run, self._paced(runs))),
                queues=starmap(_encode_queue, self._paced(queues)),
                keys=self._paced(list(keys.items())),
                key_counts=key_counts,
            )
            if not is_written:
                self._take_back(taken, unsaved)
                return
            with self._lock:
                machine.keys.written(self._index)
        except BaseException:  # even if the write succeeded: then the same is written once more
            self._take_back(taken, unsaved)
            raise
        if self._keeps_much():
            self._put_away_all()
        else:
            self._put_away({run.queue.number for run in taken.runs})

    def _write_index(self, lsn: int, snapshot: Snapshot, **changes: Any) -> bool:
        """False: the transaction did not happen. The index is unchanged, and its content is still needed."""
        try:
            self._index.write(self._log.log_id, lsn, snapshot, **changes)
        except (lmdb.Error, OSError, ValueError) as error:
            logger.warning("rivetq: %s: the index could not be written, it is tried again: %s", self._path, error)
            self._not_before_s = time.monotonic() + CHECKPOINT_S
            return False
        self._checkpoints += 1
        return True

    def _tidy(self) -> None:
        """Prepare a checkpoint: forget expired keys and pack loose jobs into runs."""
        machine = self._machine
        for part in self._slices(self._index.ended_keys(machine.now_ms, SWEEP_KEYS)):
            with self._lock:
                machine.keys.sweep(part, machine.now_ms)
        with self._lock:
            crowded = saving.crowded(machine, self._window_jobs // LOOSE_SHARE)
        for state, window in crowded:
            more = True
            while more:
                self._rest()
                with self._lock:
                    more = saving.pack(machine, state, window, PACK_SLICE)

    # What it takes

    def _take_run(self, run: Run) -> _TakenRun:
        # Caller holds self._lock.
        if not run.number:
            run.number, self._machine.next_run = self._machine.next_run, self._machine.next_run + 1
        columns = run.load()
        return _TakenRun(run, run.state, columns, run.at, len(columns), bytes(run.gone or b""))

    def _take_queue(self, number: int) -> tuple[QueueCopied, int] | None:
        # Caller holds self._lock. None: the queue was removed.
        queue = self._machine.numbers.get(number)
        return None if queue is None else (saving.queue_copied(queue), queue.segment)

    def _put_away_all(self) -> None:
        """`_put_away` for all queues. Costs a walk over all of them."""
        self._runs_read = self._index.reads  # first: runs that are read meanwhile are put away the next time
        self._put_away(list(self._machine.waiting))

    def _put_away(self, numbers: Iterable[int]) -> None:
        """Let go of the columns of these queues' runs that are unchanged in the index. Exceptions: runs at the head of
        a window, and runs that still grow or have payloads in memory."""
        machine = self._machine
        with self._lock:
            found = (machine.waiting.get(number) for number in numbers)
            windows = [window for waiting in found if waiting is not None for _, window in waiting.each()]
        loaded: list[Run] = []
        for window in windows:
            with self._lock:
                loaded += [
                    run
                    for run in window.runs[RESIDENT_RUNS:]
                    if run.columns is not None and run.columns.payloads is None and run not in window.opens
                ]
        for part in self._slices(loaded):
            with self._lock:
                changes = machine.changes
                assert changes is not None
                for run in part:
                    if run.left and run.number and run not in changes.runs:
                        run.put_away(self._index)

    def _take_jobs(self, ids: list[int]) -> list[tuple[bytes, bytes | None]]:
        items: list[tuple[bytes, bytes | None]] = []
        with self._lock:
            for job_id in ids:
                entry = self._machine.jobs.get(job_id)
                if entry is not None:
                    entry.indexed = True
                items.append((job_id.to_bytes(8, "big"), None if entry is None else encode_entry(entry)))
        return items

    def _take_back(self, taken: Changes, unsaved: int) -> None:
        """The checkpoint did not happen: the changes that it took must be written by the next one."""
        machine = self._machine
        with self._lock:
            changes = machine.changes
            assert changes is not None
            self._unsaved_bytes += unsaved
            changes.jobs |= taken.jobs
            for job_id in taken.packed:
                if (entry := machine.jobs.get(job_id)) is None:
                    changes.packed.add(job_id)
                else:  # it left its run meanwhile
                    entry.indexed = True
            changes.cells += taken.cells
            changes.gone |= taken.gone
            changes.queues |= taken.queues
            for run in taken.runs:
                (changes.runs.add if run.left else changes.runs.discard)(run)
            saving.thaw_keys(machine)

    # The pace of the keeper. Caller holds _keeper_lock.

    def _rest(self) -> None:
        if time.monotonic() - self._rested_s > WORK_S:
            time.sleep(REST_S)
            self._rested_s = time.monotonic()

    def _slices(self, items: list[Any]) -> Iterator[list[Any]]:
        for start in range(0, len(items), SLICE):
            yield items[start : start + SLICE]
            self._rest()

    def _paced(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self._rest()

    def forked(self) -> None:
        super().forked()
        self._keeper_lock = threading.Lock()
        self._index.forget()


class _TakenRun(NamedTuple):
    """A run as it was when a checkpoint began: cells `start` to `stop` of its columns, without the holes in `gone`."""

    run: Run
    state: int
    columns: Columns
    start: int
    stop: int
    gone: bytes


def _encode_run(taken: _TakenRun) -> tuple[bytes, bytes]:
    run, state, columns, start, stop, gone = taken
    cells: Sequence[int] | slice = slice(start, stop)  # others may append to it meanwhile
    if gone:
        cells = [i for i in range(start, stop) if i >= len(gone) or not gone[i]]
    columns = columns.picked(cells)
    return run.number.to_bytes(8, "big"), encode_run(run.number, run.queue, run.priority, state, columns)


def _encode_queue(number: int, taken: tuple[QueueCopied, int] | None) -> tuple[bytes, bytes | None]:
    return (number.to_bytes(4, "big"), None) if taken is None else encode_queue(*taken)

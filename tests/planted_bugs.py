"""The bugs that `planted.py` plants, each with the test that sees it: first the core's, then those of its surroundings.

Where the code changes, its entry goes along: `test_planted.py` fails if the text to be replaced is not there once.
"""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """A place in the code and what a tired programmer might have written there."""

    name: str
    file: str
    """In src/rivetq."""
    right: str
    """A text that is in it once."""
    wrong: str
    caught_by: str
    """The test, in tests, that must turn red."""


BUGS = (
    Bug(
        "ack before fsync",
        "group.py",
        "        waiter = _Waiter(lsn)\n        try:\n            self._join(waiter)",
        "        if lsn:\n            return self._target.write(lsn)\n"
        "        waiter = _Waiter(lsn)\n        try:\n            self._join(waiter)",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[sequences]",
    ),
    Bug(
        "no directory fsync",
        "segment.py",
        "        self._disk.sync_directory(os.path.dirname(final_path))\n",
        "",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[sequences]",
    ),
    Bug(
        "mark before sync",
        "log.py",
        "            self._syncing = threading.get_ident()\n",
        "            self._syncing = threading.get_ident()\n"
        "            write_all(self._disk, self._mark_fd, encode_mark(self._log_id, lsn), 0)\n",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[crash]",
    ),
    Bug(
        "no chain",
        "segment.py",
        " or frame.previous != self.last_crc:",
        ":",
        "test_segment.py::test_a_frame_of_another_history_ends_the_scan",
    ),
    Bug(
        "no epoch",
        "recovery.py",
        "epoch=last.epoch + 1,",
        "epoch=last.epoch,",
        "test_recovery.py::test_every_opening_begins_a_segment_and_an_epoch",
    ),
    Bug(
        "short write ignored",
        "segment.py",
        "        if written < end:\n            write_all(self._disk, self._fd, data[written - offset :], written)\n",
        "",
        "test_disk_full.py::test_a_short_write_is_completed",
    ),
    Bug(
        "fsync retried",
        "log.py",
        "                done.extend(map(self._disk.fdatasync, (file.fd,)))\n",
        "                try:\n"
        "                    done.extend(map(self._disk.fdatasync, (file.fd,)))\n"
        "                except OSError:\n"
        "                    done.extend(map(self._disk.fdatasync, (file.fd,)))\n",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[errors]",
    ),
    Bug(
        "checkpoint ahead of the log",
        "local.py",
        "            self._wait_durable(last_lsn)  # the index is never ahead of the disk\n",
        "",
        "test_simulation.py::test_no_power_cut_takes_what_was_promised",
    ),
    Bug(
        "segment dropped early",
        "local.py",
        "        self._checkpoint()  # which syncs the copies; the index now points at them\n",
        "        self._log.drop(upto)\n        self._checkpoint()\n",
        "test_simulation.py::test_no_power_cut_takes_what_was_promised",
    ),
    Bug(
        "counter not logged",
        "machine.py",
        "QueueSnapshot(q.number, q.name, q.config, q.enqueued, q.acked, q.cancelled, q.purged)",
        "QueueSnapshot(q.number, q.name, q.config, q.enqueued, 0, q.cancelled, q.purged)",
        "test_housekeeping.py::test_a_job_that_ends_while_a_checkpoint_is_taken_leaves_its_key[before its slice]",
    ),
    Bug(
        "lease not fenced",
        "decide.py",
        "entry.state == LEASED and entry.token == token and entry.deadline_ms > now_ms",
        "entry.state == LEASED and entry.deadline_ms > now_ms",
        "test_decide.py::test_a_lease_of_a_job_that_was_delivered_again_says_so",
    ),
    Bug(
        "zero header accepted",
        "segment.py",
        "            if frame is None or frame.lsn",
        "            if frame is None and self._data[at : at + HEADER_BYTES] == bytes(HEADER_BYTES):\n"
        "                self.end, self.next_lsn = at + HEADER_BYTES, self.next_lsn + 1\n"
        "                continue\n"
        "            if frame is None or frame.lsn",
        "test_segment.py::test_frames_are_read_in_order_up_to_the_zeros",
    ),
    Bug(
        "used-up runs forgotten",
        "local.py",
        "            changes.gone |= taken.gone\n",
        "",
        "test_local.py::test_after_a_checkpoint_that_failed_the_next_one_takes_acked_jobs_of_saved_runs_away",
    ),
    Bug(
        "packed jobs forgotten",
        "local.py",
        "            changes.packed |= taken.packed\n",
        "",
        "test_local.py::test_after_a_checkpoint_that_failed_the_next_one_takes_acked_single_jobs_away",
    ),
    Bug(
        "wake-up kept",
        "live.py",
        "            if self._lessees:\n"
        "                self._wake_lessees(queues)  # this one may have been woken for another of its queues\n",
        "",
        "test_threads.py::test_who_was_woken_for_two_queues_and_takes_from_one_wakes_the_next_for_the_other[soon]",
    ),
    Bug(
        "reservation not looked at again",
        "live.py",
        "                if decide.ids(self._machine, count, 0) is None:\n                    return",
        "                if True:\n                    return",
        "test_threads.py::test_two_transactions_that_meet_in_one_reservation_get_ids_of_their_own",
    ),
    Bug(
        "loop waits for the disk",
        "local.py",
        '        must_sync = self._fsync == "always" or self._log.durable_lsn < self._must_sync_lsn <= lsn\n',
        '        must_sync = self._fsync == "always"\n',
        "test_aio.py::test_in_a_relaxed_mode_an_id_is_told_when_its_block_is_on_disk_and_the_loop_does_not_wait_for_that[never]",
    ),
    Bug(
        "close not shielded",
        "aio.py",
        "await asyncio.shield(self._in_thread(self._opened.close))",
        "await self._in_thread(self._opened.close)",
        "test_aio.py::test_a_close_that_is_cancelled_while_all_threads_are_busy_closes_all_the_same",
    ),
)

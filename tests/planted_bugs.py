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
        "storage/group_commit.py",
        "        waiter = _Waiter(lsn)\n        try:\n            self._join(waiter)",
        "        if lsn:\n            return self._target.write(lsn)\n"
        "        waiter = _Waiter(lsn)\n        try:\n            self._join(waiter)",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[sequences]",
    ),
    Bug(
        "no directory fsync",
        "storage/segment.py",
        "        self._disk.sync_directory(os.path.dirname(final_path))\n",
        "",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[sequences]",
    ),
    Bug(
        "mark before sync",
        "storage/log.py",
        "            self._syncing = threading.get_ident()\n",
        "            self._syncing = threading.get_ident()\n"
        "            write_all(self._disk, self._mark_fd, encode_mark(self._log_id, lsn), 0)\n",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[crash]",
    ),
    Bug(
        "no chain",
        "storage/segment.py",
        " or frame.previous != self.last_crc:",
        ":",
        "test_segment.py::test_a_frame_of_another_history_ends_the_scan",
    ),
    Bug(
        "no epoch",
        "storage/recovery.py",
        "epoch=last.epoch + 1,",
        "epoch=last.epoch,",
        "test_recovery.py::test_every_opening_begins_a_segment_and_an_epoch",
    ),
    Bug(
        "short write ignored",
        "storage/segment.py",
        "        if written < end:\n            write_all(self._disk, self._fd, data[written - offset :], written)\n",
        "",
        "test_disk_full.py::test_a_short_write_is_completed",
    ),
    Bug(
        "fsync retried",
        "storage/log.py",
        "                done.extend(map(self._disk.fdatasync, (file.fd,)))\n",
        "                try:\n"
        "                    done.extend(map(self._disk.fdatasync, (file.fd,)))\n"
        "                except OSError:\n"
        "                    done.extend(map(self._disk.fdatasync, (file.fd,)))\n",
        "test_sweeps.py::test_nothing_that_goes_wrong_breaks_a_promise[errors]",
    ),
    Bug(
        "checkpoint ahead of the log",
        "engines/checkpoint.py",
        "            self._wait_durable(last_lsn)  # the index is never ahead of the disk\n",
        "",
        "test_simulation.py::test_no_power_cut_takes_what_was_promised",
    ),
    Bug(
        "segment dropped early",
        "engines/compaction.py",
        "        self._checkpoint()  # which syncs the copies; the index now points at them\n",
        "        self._log.drop(upto)\n        self._checkpoint()\n",
        "test_simulation.py::test_no_power_cut_takes_what_was_promised",
    ),
    Bug(
        "counter not logged",
        "machine/saving.py",
        "queue.enqueued, queue.acked, queue.cancelled",
        "queue.enqueued, 0, queue.cancelled",
        "test_housekeeping.py::test_a_job_that_ends_while_a_checkpoint_is_taken_leaves_its_key[before its slice]",
    ),
    Bug(
        "lease not fenced",
        "machine/decide.py",
        "entry.state == LEASED and entry.token == token and entry.deadline_ms > now_ms",
        "entry.state == LEASED and entry.deadline_ms > now_ms",
        "test_decide.py::test_a_lease_of_a_job_that_was_delivered_again_says_so",
    ),
    Bug(
        "zero header accepted",
        "storage/segment.py",
        "            if frame is None or frame.lsn",
        "            if frame is None and self._data[at : at + HEADER_BYTES] == bytes(HEADER_BYTES):\n"
        "                self.end, self.next_lsn = at + HEADER_BYTES, self.next_lsn + 1\n"
        "                continue\n"
        "            if frame is None or frame.lsn",
        "test_segment.py::test_frames_are_read_in_order_up_to_the_zeros",
    ),
    Bug(
        "used-up runs forgotten",
        "engines/checkpoint.py",
        "            changes.gone |= taken.gone\n",
        "",
        "test_local.py::test_after_a_checkpoint_that_failed_the_next_one_takes_acked_jobs_of_saved_runs_away",
    ),
    Bug(
        "packed jobs forgotten",
        "engines/checkpoint.py",
        "                    changes.packed.add(job_id)\n",
        "                    pass\n",
        "test_local.py::test_after_a_checkpoint_that_failed_the_next_one_takes_acked_single_jobs_away",
    ),
    Bug(
        "wake-up kept",
        "engines/leasing.py",
        "            if self._lessees.lines:\n"
        "                self._wake_lessees(queues)  # this one may have been woken for another of its queues\n",
        "",
        "test_threads.py::test_who_was_woken_for_two_queues_and_takes_from_one_wakes_the_next_for_the_other[soon]",
    ),
    Bug(
        "reservation not looked at again",
        "engines/live.py",
        "                if decide.ids(self._machine, count, 0) is None:\n                    first_id",
        "                if True:\n                    first_id",
        "test_threads.py::test_two_transactions_that_meet_in_one_reservation_get_ids_of_their_own",
    ),
    Bug(
        "loop waits for the disk",
        "engines/durable.py",
        "        if not self._is_to_sync(lsn) or",
        '        if self._fsync != "always" or',
        "test_aio.py::test_in_a_relaxed_mode_an_id_is_told_when_its_block_is_on_disk_and_the_loop_does_not_wait_for_that[never]",
    ),
    Bug(
        "close not shielded",
        "aio.py",
        "await asyncio.shield(self._in_thread(self._opened.close))",
        "await self._in_thread(self._opened.close)",
        "test_aio.py::test_a_close_that_is_cancelled_while_all_threads_are_busy_closes_all_the_same",
    ),
    Bug(
        "lost lease given back raises",
        "aio.py",
        "        with suppress(RivetQError):  # lost or closed: then they come again by themselves\n"
        "            self.broker",
        "        if True:\n            self.broker",
        "test_aio.py::test_what_cannot_be_given_back_any_more_disturbs_nobody",
    ),
    Bug(
        "mailbox woken before it is empty",
        "aio.py",
        "        self._is_woken = False\n        self._deliver()",
        "        self._deliver()\n        self._is_woken = False",
        "test_aio.py::test_an_answer_that_comes_while_the_loop_looks_is_not_left_lying",
    ),
    Bug(
        "mailbox of a former loop",
        "aio.py",
        "if self._mailbox is None or self._mailbox.loop is not loop:",
        "if self._mailbox is None:",
        "test_tasks.py::test_aenqueue_is_enqueue_awaited",
    ),
    Bug(
        "timer of a lease left",
        "aio.py",
        "            if timer is not None:\n                timer.cancel()\n",
        "            pass\n",
        "test_aio.py::test_a_lease_that_got_its_job_leaves_no_timer_behind",
    ),
    Bug(
        "opened broker forgotten",
        "aio.py",
        "                for broker in opened:\n                    threading",
        "                for broker in ():\n                    threading",
        "test_aio.py::test_an_opening_that_is_cancelled_when_it_is_through_frees_the_directory_too",
    ),
    Bug(
        "unwanted broker kept open",
        "aio.py",
        "                if unwanted.is_set():\n                    opened[0].close()\n",
        "",
        "test_aio.py::test_an_opening_that_is_cancelled_frees_the_directory",
    ),
    Bug(
        "thread behind a close",
        "aio.py",
        "        self.broker._engine.check_open()  # no thread begins for what raises\n",
        "",
        "test_aio.py::test_no_thread_outlives_a_close_and_none_begins_behind_it",
    ),
    Bug(
        "error given back",
        "aio.py",
        "if self._unwanted is not None and error is None:",
        "if self._unwanted is not None:",
        "test_aio.py::test_an_error_that_nobody_waits_for_is_not_given_back",
    ),
    Bug(
        "ticks without end",
        "schedules/when.py",
        "if tick > now or len(ticks) == TICKS:",
        "if tick > now:",
        "test_schedules.py::test_one_transaction_has_a_hundred_ticks_at_most_and_waits_for_the_next",
    ),
    Bug(
        "record of a former schedule fires",
        "schedules/scheduler.py",
        ' or (schedule is not None and content["spec"] != schedule.spec.text)',
        "",
        "test_schedules.py::test_a_record_that_was_held_while_its_schedule_was_changed_fires_nothing",
    ),
    Bug(
        "record dies of five deaths",
        "schedules/scheduler.py",
        "            max_attempts=2**31 - 1,\n",
        "",
        "test_schedules.py::test_a_record_outlives_any_number_of_deaths_of_who_fires_it",
    ),
    Bug(
        "dead record stays dead",
        "schedules/scheduler.py",
        "                elif job.state == JobState.DEAD:  # a worker took it for one of its own jobs\n"
        "                    self._broker.redrive(SCHEDULES, job_ids=[job.id])\n",
        "",
        "test_schedules.py::test_a_record_that_somebody_rejected_comes_back_with_the_next_start",
    ),
    Bug(
        "two records of a schedule",
        "schedules/scheduler.py",
        "if job not in valid[-1:]:",
        "if job not in valid:",
        "test_schedules.py::test_of_two_records_of_a_schedule_one_is_left",
    ),
    Bug(
        "first page of records only",
        "schedules/scheduler.py",
        "            after = jobs[-1].id\n            for job",
        "            after = 2**62\n            for job",
        "test_schedules.py::test_a_start_finds_the_records_of_more_schedules_than_one_page_has",
    ),
    Bug(
        "stranger ends at once",
        "schedules/scheduler.py",
        "        if now_ms - self._strangers.setdefault(lease.id, now_ms) < LOOK_MS:\n"
        "            self._broker.release(lease, delay=AGAIN_S)\n"
        "            return\n",
        "        self._strangers.setdefault(lease.id, now_ms)\n",
        "test_schedules.py::test_a_changed_schedule_replaces_its_record_and_a_removed_one_ends",
    ),
    Bug(
        "key outlives its record",
        "schedules/scheduler.py",
        "        self._broker.configure_queue(SCHEDULES, idempotency_ttl=0)\n",
        "",
        "test_schedules.py::test_a_schedule_that_was_given_up_and_comes_back_before_its_tick_has_its_record",
    ),
    Bug(
        "key not found during a checkpoint",
        "machine/keys.py",
        "key = self.changed.get(name) or self.frozen.get(name)",
        "key = self.changed.get(name)",
        "test_machine.py::test_keys_are_found_while_a_checkpoint_writes_them_and_change_beside_it",
    ),
    Bug(
        "failed checkpoint brings old keys back",
        "machine/keys.py",
        "        changed = {**self.frozen, **self.changed}\n        ends",
        "        changed = {**self.changed, **self.frozen}\n        ends",
        "test_machine.py::test_keys_that_a_failed_checkpoint_took_are_still_to_be_written_and_still_end",
    ),
    Bug(
        "living key swept",
        "machine/keys.py",
        "if key is not None and key.expires_ms and key.expires_ms <= now_ms:",
        "if key is not None and key.expires_ms <= now_ms:",
        "test_machine.py::test_a_key_of_a_living_job_or_of_another_one_by_now_is_not_swept",
    ),
    Bug(
        "lease of a paused queue",
        "machine/decide.py",
        "if queue is None or queue.config.paused or not queue.counts[READY]:",
        "if queue is None or not queue.counts[READY]:",
        "test_decide.py::test_a_queue_that_is_unknown_empty_or_paused_gives_nothing",
    ),
    Bug(
        "token of a bucket not expected",
        "machine/advance.py",
        "        if at_ms < queue.token_at_ms:\n",
        "        if at_ms > queue.token_at_ms:\n",
        "test_decide.py::test_the_first_of_several_buckets_is_waited_for",
    ),
    Bug(
        "visibility of the job ignored",
        "machine/decide.py",
        "default_ms if own is None else now_ms + own for own",
        "default_ms for own",
        "test_decide.py::test_deliveries_have_tokens_attempts_and_deadlines",
    ),
    Bug(
        "path moves with an option",
        "cli/working.py",
        'found.use(settings.path if "path" in given else None, **options)',
        "found.use(settings.path, **options)",
        "test_cli.py::test_what_nobody_set_is_as_the_app_has_it[given1]",
    ),
    Bug(
        "changing ends leases",
        "cli/changing.py",
        "    settings = settings_of(release_on_open=False)\n    tools.check",
        "    settings = settings_of()\n    tools.check",
        "test_cli.py::test_changing_keeps_the_leases_of_a_process_that_died",
    ),
    Bug(
        "purge without a yes",
        "cli/changing.py",
        '        if not sure:\n            raise UsageError("nothing was removed; answer y, or give --yes")\n',
        "",
        "test_cli.py::test_purge_asks_what_to_remove_and_removes_nothing_without_a_yes",
    ),
    Bug(
        "salvage says done",
        "tools/commands.py",
        "says, Status.WHOLE if found.is_whole else Status.DAMAGED)",
        "says, Status.WHOLE)",
        "test_cli.py::test_salvage_of_a_log_with_a_hole_is_status_1",
    ),
    Bug(
        "redrive without its limit",
        "cli/changing.py",
        "job_ids=job_ids or None, limit=limit)",
        "job_ids=job_ids or None)",
        "test_cli.py::test_redrive_brings_back_as_many_as_it_is_told_and_those_it_is_told",
    ),
    Bug(
        "zero means not given",
        "settings.py",
        'None if value is None or value == "" else parser(value)',
        "None if not value else parser(value)",
        "test_settings.py::test_a_zero_in_a_file_is_a_value",
    ),
    Bug(
        "worker without visibility",
        "settings.py",
        "            visibility_timeout=self.visibility_timeout,\n",
        "",
        "test_settings.py::test_every_setting_of_a_broker_and_a_worker_gets_there",
    ),
    Bug(
        "weight of a name with =",
        "settings.py",
        'part.rpartition("=") for part',
        'part.partition("=") for part',
        "test_settings.py::test_texts_of_the_environment_become_values",
    ),
    Bug(
        "failing schedule without a pause",
        "schedules/scheduler.py",
        "                self._broker.release(lease, delay=AGAIN_S)\n\n    def _fire",
        "                self._broker.release(lease)\n\n    def _fire",
        "test_schedules.py::test_a_schedule_that_cannot_be_fired_waits_a_second_and_holds_up_no_other",
    ),
    Bug(
        "status of a failed worker",
        "cli/working.py",
        "        return made.run()\n    finally",
        "        return made.run() and 0\n    finally",
        "test_cli.py::test_a_worker_whose_broker_failed_is_status_1_and_leaves_no_server[with metrics]",
    ),
    Bug(
        "record waits past a clock set forward",
        "schedules/scheduler.py",
        "delay=max(0, min(tick_ms - now_ms, LOOK_MS)) / 1000",
        "delay=max(0, tick_ms - now_ms) / 1000",
        "test_schedules.py::test_a_wall_clock_that_is_set_forward_makes_a_tick_five_minutes_late_at_most",
    ),
    Bug(
        "changed expression with the same tick",
        "schedules/scheduler.py",
        'idempotency_key=key(f"{schedule.name}@{schedule.spec.text}", tick)',
        "idempotency_key=key(schedule.name, tick)",
        "test_schedules.py::test_a_changed_schedule_with_the_same_next_tick_has_a_record_of_its_own",
    ),
    Bug(
        "grace without its end",
        "schedules/when.py",
        ".total_seconds() > self.grace:",
        ".total_seconds() >= self.grace:",
        "test_schedules.py::test_a_tick_is_in_time_up_to_the_very_end_of_its_grace",
    ),
    Bug(
        "call renames its task",
        "tasks/app.py",
        "{**(opts.headers or {}), TASK_HEADER: task.name}",
        "{TASK_HEADER: task.name, **(opts.headers or {})}",
        "test_tasks.py::test_no_header_of_a_call_renames_its_task",
    ),
    Bug(
        "task known before its classes",
        "tasks/app.py",
        "                    if isinstance(self.codec, TypedJson):\n"
        "                        self.codec.register_annotations(hints(task.function))\n"
        "                    self._unhinted.remove(task)  # another may have come behind it\n",
        "                    self._unhinted.remove(task)\n"
        "                    if isinstance(self.codec, TypedJson):\n"
        "                        self.codec.register_annotations(hints(task.function))\n",
        "test_tasks.py::test_a_thread_that_comes_while_another_registers_classes_waits_for_them",
    ),
    Bug(
        "last reason wins",
        "tasks/current.py",
        "        if not self._is_cancelled:\n            self.reason = reason\n            self._is_cancelled = True\n",
        "        self.reason = reason\n        self._is_cancelled = True\n",
        "test_tasks.py::test_the_first_reason_for_a_cancellation_stays",
    ),
    Bug(
        "cancellation wakes nobody",
        "tasks/current.py",
        "        if (event := self._cancelled) is not None:\n            event.set()\n",
        "",
        "test_tasks.py::test_who_waits_for_a_cancellation_is_woken_and_who_comes_later_does_not_wait",
    ),
    Bug(
        "handler is over and still current",
        "tasks/current.py",
        "    finally:\n        _current.reset(token)\n",
        "    finally:\n        pass\n",
        "test_tasks.py::test_behind_a_handler_there_is_no_current_job_and_behind_one_in_another_that_one",
    ),
    Bug(
        "awaited call leaves its transaction",
        "tasks/app.py",
        "if self._remote is not None or self._runner is not None or task.opts.transaction is not None:",
        "if self._remote is not None or self._runner is not None:",
        "test_tasks.py::test_a_call_that_is_awaited_in_a_transaction_exists_when_its_block_ends",
    ),
    Bug(
        "closed broker awaited",
        "tasks/app.py",
        "self._broker = self._async = None",
        "self._broker = None",
        "test_tasks.py::test_an_app_that_opens_again_awaits_its_new_broker",
    ),
    Bug(
        "leasing ahead never shrinks",
        "worker/order.py",
        "0.9 * known + 0.1 * seconds",
        "min(known, seconds)",
        "test_turns.py::test_less_is_leased_in_advance_when_handlers_take_longer",
    ),
    Bug(
        "bytes leased ahead without bound",
        "worker/order.py",
        " or self.bytes >= PREFETCH_BYTES or",
        " or",
        "test_turns.py::test_nothing_is_leased_in_advance_beyond_so_many_bytes_or_for_careful_queues",
    ),
    Bug(
        "share not refunded",
        "worker/order.py",
        "            self._got[name] -= got\n",
        "            pass\n",
        "test_turns.py::test_a_queue_gets_back_what_it_paid_for_jobs_that_did_not_begin",
    ),
    Bug(
        "idle queue saves its share up",
        "worker/order.py",
        "return max(got, self._now) if is_idle else",
        "return got if is_idle else",
        "test_turns.py::test_what_a_queue_did_not_use_is_neither_saved_up_nor_owed",
    ),
    Bug(
        "last attempt leased ahead",
        "worker/fetcher.py",
        "(not is_last and (is_known or len(kept) < places))",
        "((is_known or len(kept) < places))",
        "test_worker_leasing.py::test_a_last_attempt_in_the_first_batch_waits_in_its_queue_too",
    ),
    Bug(
        "given back counts against max_jobs",
        "worker/settler.py",
        "self.jobs += len(told)",
        "self.jobs += len(endings) + len(lost)",
        "test_worker_leasing.py::test_jobs_that_were_given_back_do_not_count_against_max_jobs",
    ),
    Bug(
        "cancel overtakes the fetcher",
        "worker/held.py",
        "                self.wait_for_fetcher()  # it may be leased and not be in `deliveries` yet\n",
        "",
        "test_worker_leasing.py::test_a_job_that_is_cancelled_while_it_is_being_leased_does_not_begin",
    ),
    Bug(
        "each lease renewed by itself",
        "worker/renewer.py",
        "self._extend(deliveries + soon.get(seconds, []), seconds)",
        "self._extend(deliveries, seconds)",
        "test_worker_leasing.py::test_leases_that_will_soon_be_due_are_renewed_with_those_that_are",
    ),
    Bug(
        "handlers not told of the end",
        "worker/worker.py",
        "        for delivery in list(held.deliveries.values()):\n            delivery.job.stopping = True\n",
        "",
        "test_worker.py::test_stop_lets_run_what_runs_and_gives_back_the_rest",
    ),
    Bug(
        "second signal ignored",
        "worker/worker.py",
        "                grace = most if self._signals < 2 else 0.0\n",
        "                grace = most\n",
        "test_worker_closing.py::test_a_second_signal_ends_the_grace_time",
    ),
    Bug(
        "payload not looked for in its new place",
        "engines/durable.py",
        "                if payload is not None:\n                    return payload\n                with self._lock:",
        "                return payload\n                with self._lock:",
        "test_local.py::test_a_payload_whose_segment_goes_while_it_is_read_is_read_from_its_new_place",
    ),
    Bug(
        "changed run put away",
        "engines/checkpoint.py",
        "if run.left and run.number and run not in changes.runs:",
        "if run.left and run.number:",
        "test_local.py::test_a_run_that_has_changed_stays_in_memory_until_it_is_in_the_index",
    ),
    Bug(
        "ended keys stay in the index",
        "engines/checkpoint.py",
        "                machine.keys.sweep(part, machine.now_ms)\n",
        "                pass\n",
        "test_local.py::test_keys_whose_window_is_over_leave_the_index",
    ),
    Bug(
        "used-up run written again",
        "engines/checkpoint.py",
        "                (changes.runs.add if run.left else changes.runs.discard)(run)\n",
        "                changes.runs.add(run)\n",
        "test_local.py::test_a_run_that_is_used_up_while_a_checkpoint_fails_is_gone_with_the_next",
    ),
    Bug(
        "run written as it is by then",
        "engines/checkpoint.py",
        "slice(start, stop)  # others may append to it meanwhile",
        "slice(start, None)",
        "test_local.py::test_jobs_that_come_while_a_checkpoint_writes_their_run_are_in_it_once",
    ),
    Bug(
        "clean end not noted",
        "engines/local.py",
        "                self._record([IdsReserved(machine.next_id)], machine.now_ms)\n",
        "                pass\n",
        "test_local.py::test_a_clean_end_in_a_relaxed_mode_skips_no_ids[never]",
    ),
    Bug(
        "notifier ends without a last look",
        "engines/notifier.py",
        "            if not stopping:\n                self._poked.wait()\n            return not stopping",
        "            stopping = self._stopping\n"
        "            if not stopping:\n"
        "                self._poked.wait()\n"
        "            return not stopping",
        "test_notifier.py::test_what_comes_just_before_the_end_is_still_told",
    ),
    Bug(
        "earliest record waited for",
        "engines/notifier.py",
        "self._wait(max(lsn for lsn, _ in batch))",
        "self._wait(min(lsn for lsn, _ in batch))",
        "test_notifier.py::test_one_wait_is_for_all_and_none_is_told_before_its_record_is_durable",
    ),
    Bug(
        "notifier dies in silence",
        "engines/notifier.py",
        "            self._stopping = True\n"
        "            for _, tell in self._batch:  # each is told why; some of these for the second time\n"
        "                _guarded(tell, error)\n"
        "            while self._turn():\n"
        "                pass\n",
        "",
        "test_notifier.py::test_a_thread_that_cannot_go_on_says_so_and_tells_all_why",
    ),
    Bug(
        "a callback ends the notifier",
        "engines/notifier.py",
        "    try:\n"
        "        do(*arguments)\n"
        "    except BaseException:\n"
        '        logger.exception("a callback raised; the others are told all the same")\n'
        "        return False\n",
        "    do(*arguments)\n",
        "test_notifier.py::test_a_callback_that_raises_disturbs_no_other",
    ),
    Bug(
        "swallowed error is an ack",
        "tasks/running.py",
        "    if failures:\n        raise failures[0]\n    return value\n\n\n_copies = 0",
        "    return value\n\n\n_copies = 0",
        "test_pools.py::test_a_hook_that_swallows_what_the_handler_raised_makes_no_ack[error-sync]",
    ),
    Bug(
        "cancelled job begins",
        "worker/pools.py",
        "    if delivery.job.cancelled:  # before it began, so it does not begin\n"
        "        delivery.ending = stopped(delivery)\n"
        "        return False\n",
        "",
        "test_worker.py::test_a_job_leased_in_advance_that_is_cancelled_does_not_begin[sync]",
    ),
    Bug(
        "a closed loop keeps the second answer",
        "aio.py",
        "                self._is_woken = False  # the next answer tries it again\n",
        "",
        "test_aio.py::test_each_answer_for_a_loop_that_was_closed_is_given_back",
    ),
    Bug(
        "header with clocks of two moments",
        "engines/durable.py",
        "now_ms - self._offset_ms  # at that moment, not now",
        "self.clock.boot_ms()",
        "test_local.py::test_the_time_line_shows_the_wall_clock_however_long_openings_take",
    ),
    Bug(
        "a finished job is lost",
        "worker/settler.py",
        "                if _was_finished(delivery):",
        "                if False:",
        "test_worker.py::test_a_job_that_its_handler_finished_before_it_was_given_back_is_told_as_done[False]",
    ),
    Bug(
        "a finish under way is lost",
        "worker/settler.py",
        "    is_over.wait()\n",
        "",
        "test_worker.py::test_a_job_that_its_handler_finished_before_it_was_given_back_is_told_as_done[True]",
    ),
    Bug(
        "paused job begins",
        "worker/pools.py",
        "if not broker.is_paused(lease.queue):",
        "if True:",
        "test_worker_leasing.py::test_when_pause_has_returned_no_job_of_the_queue_begins[sync]",
    ),
    Bug(
        "copy answers too",
        "tasks/running.py",
        "    _copies += 1\n",
        "    _copies += 0\n",
        "test_pools.py::test_a_copy_that_a_handler_forked_ends_with_the_handler[returns-0-sync-True]",
    ),
    Bug(
        "loop forgets who waits",
        "worker/pools.py",
        "        self._done(delivery)\n        if self._waiting:\n            self._begin()",
        "        self._done(delivery)",
        "test_worker.py::test_async_handlers_that_wait_for_a_place_get_it_one_after_the_other",
    ),
    Bug(
        "delay of a retry lost",
        "tasks/running.py",
        'None if error.delay is None else seconds_of(error.delay, "delay"))\n        case Snooze',
        "None)\n        case Snooze",
        "test_worker.py::test_the_end_of_a_handler_decides_what_becomes_of_its_job[Retry with a delay-raised-sync]",
    ),
    Bug(
        "dying child gets a job",
        "worker/children.py",
        "return not self._is_killed and self._process.is_alive()",
        "return self._process.is_alive()",
        "test_pools.py::test_a_child_that_was_killed_gets_no_other_job_while_it_dies",
    ),
    Bug(
        "dead child gets a job",
        "worker/children.py",
        "        if not child.is_alive():\n            return None\n        with",
        "        with",
        "test_pools.py::test_a_job_is_sent_to_a_living_child",
    ),
    Bug(
        "answer of another job",
        "worker/children.py",
        "if token != delivery.lease.token or not isinstance(ending, Ending):",
        "if not isinstance(ending, Ending):",
        "test_worker.py::test_a_child_that_answers_for_another_job_is_replaced_and_its_own_job_failed",
    ),
    Bug(
        "spent child goes on",
        "worker/children.py",
        "            or (max_jobs is not None and self._jobs >= max_jobs)\n",
        "",
        "test_worker.py::test_a_child_is_replaced_when_it_is_spent[limits0]",
    ),
    Bug(
        "thread outlives its handler",
        "worker/children.py",
        "            if not self.is_asked:\n"
        '                raise UsageError("enqueue: no job runs in this child process any more")\n',
        "",
        "test_worker.py::test_a_thread_that_outlives_its_handler_in_a_child_asks_for_nothing",
    ),
    Bug(
        "child takes its time before the answer",
        "worker/children.py",
        "            self._done(delivery)  # first: a child may take its time to end\n"
        "            if child is not None and child.is_spent(self._max_jobs, self._max_memory):\n"
        "                child.end()\n"
        "                child = None\n",
        "            if child is not None and child.is_spent(self._max_jobs, self._max_memory):\n"
        "                child.end()\n"
        "                child = None\n"
        "            self._done(delivery)\n",
        "test_worker.py::test_a_child_that_takes_its_time_to_end_holds_up_no_answer",
    ),
    Bug(
        "cancelled before its child",
        "worker/children.py",
        "            if delivery.job.cancelled:  # told before it could be killed\n                child.kill()\n",
        "",
        "test_worker.py::test_a_job_that_is_cancelled_while_its_child_is_made_is_killed_in_it",
    ),
    Bug(
        "cancel kills the next",
        "worker/children.py",
        "        with self._lock:\n"
        "            child = self._running.get(delivery)\n"
        "            if child is not None:\n"
        "                child.kill()\n",
        "        child = self._running.get(delivery)\n        if child is not None:\n            child.kill()\n",
        "test_pools.py::test_a_cancellation_that_comes_as_the_job_ends_leaves_the_next_one_alone",
    ),
    Bug(
        "filter of the parent fails the job",
        "worker/children.py",
        "                    with suppress(Exception):  # a filter of the program's, say: not the job's fault\n"
        "                        logs.take(content)\n",
        "                    logs.take(content)\n",
        "test_worker.py::test_a_filter_of_the_parent_that_raises_fails_no_job_of_a_child",
    ),
    Bug(
        "a hook outside makes an ack",
        "tasks/running.py",
        "    if failures:\n        raise failures[0]\n    return value\n\n\n_copies",
        "    return value\n\n\n_copies",
        "test_pools.py::test_a_hook_that_swallows_what_another_hook_raised_makes_no_ack",
    ),
    Bug(
        "a copy comes back",
        "tasks/running.py",
        "            if _copies != own:\n"
        "                _end_copy(delivery, None)\n"
        "        delivery.ending = ACK if value is None else _returned(value)\n"
        "    except BaseException as error:\n"
        "        if _copies != own:\n"
        "            _end_copy(delivery, error)\n"
        "        delivery.error = error\n"
        "        delivery.ending = ending_of(error)\n"
        "        _log_failure(delivery, error)",
        "        delivery.ending = ACK if value is None else _returned(value)\n"
        "    except BaseException as error:\n"
        "        delivery.error = error\n"
        "        delivery.ending = ending_of(error)\n"
        "        _log_failure(delivery, error)",
        "test_pools.py::test_a_copy_that_a_handler_forked_ends_with_the_handler",
    ),
    Bug(
        "threads that Python shuts",
        "worker/pools.py",
        "        self._loop.set_default_executor(self._threads)\n",
        "",
        "test_pools.py::test_a_worker_that_is_stopped_by_atexit_gives_handlers_their_grace_time",
    ),
    Bug(
        "jobs begin while Python ends",
        "worker/pools.py",
        "    return not main.is_alive() and",
        "    return False and",
        "test_pools.py::test_a_worker_that_is_stopped_by_atexit_gives_handlers_their_grace_time",
    ),
    Bug(
        "a program that serves has ended",
        "worker/pools.py",
        " and all(each.daemon or each is main for each in threading.enumerate())",
        "",
        "test_pools.py::test_a_worker_goes_on_while_another_thread_serves",
    ),
    Bug(
        "no thread but new ones",
        "worker/pools.py",
        "                    if not self._begun:\n                        raise",
        "                    raise",
        "test_pools.py::test_a_loop_that_can_start_no_other_thread_gets_along_with_the_first",
    ),
    Bug(
        "async generators left open",
        "worker/pools.py",
        "        self._loop.run_until_complete(self._loop.shutdown_asyncgens())\n",
        "",
        "test_pools.py::test_an_async_generator_that_a_handler_left_open_is_closed_when_the_worker_stops",
    ),
    Bug(
        "a job for a dead child",
        "worker/children.py",
        "        if not child.is_alive():\n            return None\n        with self._lock:",
        "        with self._lock:",
        "test_pools.py::test_a_job_is_sent_to_a_living_child",
    ),
    Bug(
        "a job in the pipe pays",
        "worker/children.py",
        "isinstance(trouble, BrokenPipeError | ConnectionResetError)",
        "isinstance(trouble, BrokenPipeError)",
        "test_pools.py::test_a_job_that_meets_a_child_that_just_died_begins_in_another",
    ),
    Bug(
        "a job that began does not pay",
        "worker/children.py",
        "                is_taken = is_sent\n",
        "",
        "test_pools.py::test_a_job_that_began_in_a_child_that_dies_with_an_answer_in_its_pipe_failed",
    ),
    Bug(
        "a cancellation takes its time",
        "worker/children.py",
        "        with self._lock:\n"
        "            child = self._running.get(delivery)\n"
        "            if child is not None:\n"
        "                child.kill()",
        "        child = self._running.get(delivery)\n        if child is not None:\n            child.kill()",
        "test_pools.py::test_a_cancellation_that_comes_as_the_job_ends_leaves_the_next_one_alone",
    ),
    Bug(
        "a child outlives its parent",
        "worker/children.py",
        '    threading.Thread(target=_end_with_parent, name="rivetq-parent", daemon=True).start()\n',
        "",
        "test_pools.py::test_a_child_ends_with_its_parent_in_the_middle_of_a_job",
    ),
    Bug(
        "a copy kills children",
        "worker/children.py",
        "        if child.parent == os.getpid():  # and not a copy of it that was forked\n            child.kill()",
        "        child.kill()",
        "test_pools.py::test_a_copy_of_the_program_that_ends_kills_no_children",
    ),
    Bug(
        "answered twice",
        "worker/settler.py",
        "if not delivery.is_answered]",
        "]",
        "test_worker_closing.py::test_a_handler_left_behind_that_ends_before_its_settler_is_told_of_once",
    ),
    Bug(
        "answered while it commits",
        "worker/settler.py",
        "if delivery.job.finishing]",
        "if 0]",
        "test_pools.py::test_a_job_is_answered_for_when_a_commit_that_is_under_way_in_a_thread_is_over",
    ),
    Bug(
        "half a start goes on",
        "worker/worker.py",
        "                self._end_all(time.monotonic(), 0.0)\n                raise",
        "                self._leave()\n                raise",
        "test_worker_closing.py::test_a_start_that_raises_leaves_nothing_behind",
    ),
    Bug(
        "stopped within its start",
        "worker/worker.py",
        "            if self._ended.is_set():  # a signal handler stopped it: also what began behind that\n"
        "                self._end_all(time.monotonic(), 0.0)\n",
        "",
        "test_worker_closing.py::test_a_stop_in_the_middle_of_a_start_by_the_same_thread_does_not_hang_and_leaves_no_thread",
    ),
    Bug(
        "a second signal is one",
        "worker/worker.py",
        "grace = most if self._signals < 2 else 0.0",
        "grace = most",
        "test_worker_closing.py::test_a_second_signal_ends_the_grace_time",
    ),
    Bug(
        "signal handlers kept",
        "worker/worker.py",
        "            for number, handler in before.items():\n                signal.signal(number, handler)",
        "            pass",
        "test_worker_closing.py::test_run_gives_back_the_signal_handlers_that_it_found",
    ),
    Bug(
        "a closed app opens",
        "tasks/app.py",
        "            self._is_closed = True\n",
        "",
        "test_tasks.py::test_an_app_that_was_closed_does_not_open_again_by_itself",
    ),
    Bug(
        "two threads finish",
        "tasks/current.py",
        "                with _finishes:  # another thread of the handler's may do the same\n"
        "                    self._check_unfinished()",
        "                with _finishes:  # another",
        "test_pools.py::test_of_two_threads_of_a_handler_one_finishes_its_job",
    ),
    Bug(
        "cancelled lessee keeps its wake-up",
        "engines/leasing.py",
        "            engine._wake_lessees(self._request.queues)"
        "  # it may have been woken for a job that another can have\n        return True",
        "        return True",
        "test_aio.py::test_who_ends_just_as_it_was_woken_leaves_the_job_to_the_next_in_line[cancelled]",
    ),
    Bug(
        "failed lessee stays in the line",
        "engines/leasing.py",
        "            self.over = True\n            engine._lessees.remove(self, self._request.queues)\n"
        "            if engine._ended",
        "            self.over = True\n            if engine._ended",
        "test_aio.py::test_who_ends_just_as_it_was_woken_leaves_the_job_to_the_next_in_line[failed]",
    ),
    Bug(
        "duplicate answered before its record",
        "engines/live.py",
        "lsn = self._record(events, now_ms, enqueues) if events else self._last_lsn()",
        "lsn = self._record(events, now_ms, enqueues) if events else 0",
        "test_aio.py::test_the_answer_to_a_duplicate_waits_for_the_record_of_the_first[called]",
    ),
    Bug(
        "lease of what is not on disk",
        "engines/leasing.py",
        "        self._settle_enqueues(max([entry.lsn for entry in entries], default=0))\n        now_ms",
        "        now_ms",
        "test_aio.py::test_a_lease_waits_for_the_records_of_its_jobs",
    ),
    Bug(
        "awaited enqueue uses the reserve",
        "engines/live.py",
        "self._record(events, now_ms, Enqueue in map(type, request.operations))",
        "self._record(events, now_ms)",
        "test_aio.py::test_an_enqueue_leaves_the_reserve_of_space_to_answers[awaited]",
    ),
    Bug(
        "nobody waits for a token",
        "engines/leasing.py",
        "                        self._expect_tokens(limited, now_ms)\n",
        "",
        "test_aio.py::test_who_waits_for_a_token_is_woken_when_there_is_one_whatever_came_first[jobs]",
    ),
    Bug(
        "next token wakes nobody",
        "engines/lessees.py",
        "            if not count:  # else those who are woken take the tokens first, and this is asked again\n"
        "                without_token.append(queue)\n",
        "",
        "test_aio.py::test_who_waits_for_a_token_is_woken_when_there_is_one_whatever_came_first[jobs]",
    ),
    Bug(
        "lead taken along",
        "storage/group_commit.py",
        "            if self.failure is None and self._leader in (waiter, None):\n"
        "                self._pass_on()\n"
        "            elif",
        "            if",
        "test_group.py::test_an_interrupt_that_leaves_the_log_whole_hits_its_caller_alone",
    ),
    Bug(
        "two lead",
        "storage/group_commit.py",
        "if waiter in self._waiters and self._leader is None:",
        "if waiter in self._waiters:",
        "test_group.py::test_whose_patience_ends_as_the_last_one_leads_waits_for_that_sync",
    ),
    Bug(
        "covered one not woken",
        "storage/group_commit.py",
        "            if waiter.lsn <= durable_lsn:\n",
        "            if waiter.lsn < durable_lsn:\n",
        "test_group.py::test_callers_that_come_while_the_disk_is_busy_share_the_next_sync",
    ),
    Bug(
        "empty directory is the default",
        "cli/command.py",
        "directory if directory is not None else",
        "directory or",
        "test_cli.py::test_an_empty_value_is_not_the_default[behind--d]",
    ),
    Bug(
        "a series for each queue",
        "metrics.py",
        "self._labels.of(settled.queue)",
        "settled.queue",
        "test_metrics.py::test_durations_of_queues_beyond_the_limit_are_counted_together",
    ),
    Bug(
        "class of the same name",
        "typedjson.py",
        "if self._classes.get(name) is not kind:",
        "if name not in self._classes:",
        "test_typedjson.py::test_a_class_of_the_same_name_is_another_class",
    ),
    Bug(
        "table hides other settings",
        "settings.py",
        'content.keys() == {"rivetq"}',
        '"rivetq" in content',
        "test_settings.py::test_a_table_of_its_own_beside_other_settings_hides_none_of_them",
    ),
    Bug(
        "queue not copied",
        "engines/compaction.py",
        "        self._copy_queues(upto)\n",
        "",
        "test_housekeeping.py::test_what_happened_in_a_queue_before_its_copy_is_replayed",
    ),
    Bug(
        "queue stays in the index",
        "machine/machine.py",
        "        self.woken.discard(queue.name)\n        if self.changes is not None:",
        "        self.woken.discard(queue.name)\n        if False and self.changes is not None:",
        "test_housekeeping.py::test_a_queue_that_was_removed_leaves_the_index",
    ),
    Bug(
        "changed queues lost with a checkpoint",
        "engines/checkpoint.py",
        "            changes.queues |= taken.queues\n",
        "",
        "test_housekeeping.py::test_what_changed_in_a_queue_while_a_checkpoint_failed_is_in_the_next",
    ),
    Bug(
        "answers lost with their segment",
        "machine/saving.py",
        "for each in machine.sessions.values()]",
        "for each in list(machine.sessions.values())[1:]]",
        "test_sessions.py::test_an_answer_is_remembered_across_the_end_of_the_process[compacted and rebuilt-enqueue]",
    ),
    Bug(
        "request done twice",
        "engines/clockwork.py",
        "        if before is not None:\n            return [], before.answer\n",
        "",
        "test_sessions.py::test_a_numbered_request_that_is_made_again_gets_its_first_answer[local-enqueue]",
    ),
    Bug(
        "lease taken twice",
        "engines/leasing.py",
        "            if once is not None and (before := told(machine, once, now_ms)) is not None:",
        "            if False and once is not None and (before := told(machine, once, now_ms)) is not None:",
        "test_sessions.py::test_a_lease_that_is_asked_for_again_is_the_same_without_a_second_attempt[local]",
    ),
    Bug(
        "unknown flag passed over",
        "storage/codec.py",
        "    if flags & ~KEYS:\n",
        "    if flags & ~KEYS & 0xFF:\n",
        "test_codec.py::test_a_flag_of_a_newer_format_is_named[9]",
    ),
    Bug(
        "end of a key decided again",
        "machine/apply.py",
        "            machine.remove(event.ids, event.keys_until_ms)\n",
        "            machine.remove(event.ids, now_ms + machine.numbers[event.queue].ttl_ms)\n",
        "test_housekeeping.py::test_what_happened_in_a_queue_before_its_copy_is_replayed",
    ),
    Bug(
        "configuration of a lost record not asked for",
        "tools/salvage.py",
        "                    queue.configure(saved.config, machine.now_ms)\n",
        "                    pass\n",
        "test_tools.py::test_salvage_asks_the_index_for_names_and_configurations_that_the_log_lost",
    ),
    Bug(
        "job found in its hole",
        "machine/run.py",
        "        if i < len(ids) and ids[i] == job_id and i == self.job(i):\n            return i\n",
        "        if i < len(ids) and ids[i] == job_id:\n            return i\n",
        "test_run.py::test_a_job_that_left_is_not_found[10]",
    ),
    Bug(
        "job appended below a hole",
        "machine/run.py",
        "self.gone is None or bool(first_key > self.key(-1))",
        "True or bool(first_key > self.key(-1))",
        "test_run.py::test_a_job_with_an_id_below_a_hole_at_the_end_is_not_appended",
    ),
    Bug(
        "hole written as a job",
        "engines/checkpoint.py",
        "    if gone:\n",
        "    if False and gone:\n",
        "test_housekeeping.py::test_a_job_that_left_from_the_middle_of_a_run_is_not_in_the_index",
    ),
    Bug(
        "walk over holes",
        "machine/window.py",
        "            end = run.hole(cell, end)\n",
        "",
        "test_window.py::test_holes_are_passed_over_in_a_walk",
    ),
    Bug(
        "extras of a hole",
        "machine/columns.py",
        "        if self.extras is not None:\n            self._forget_extras((job_id,))\n",
        "",
        "test_run.py::test_a_job_that_comes_again_behind_its_hole_is_as_it_came",
    ),
    Bug(
        "runs by due listed once",
        "machine/window.py",
        "        self._delist(run)\n        run.grown()\n        self._enlist(run)\n",
        "        run.grown()\n",
        "test_window.py::test_a_run_by_due_that_got_a_lower_id_is_found_by_it",
    ),
    Bug(
        "job that left its run is not written",
        "machine/machine.py",
        "                    self.changes.packed.discard(entry.id)\n",
        "",
        "test_housekeeping.py::test_a_job_that_leaves_its_run_just_before_a_checkpoint_takes_it_is_in_the_index",
    ),
    Bug(
        "key that is over is copied",
        "engines/compaction.py",
        "> self._machine.now_ms",
        "> 0",
        "test_housekeeping.py::test_keys_that_are_over_are_not_copied",
    ),
    Bug(
        "key of a removed queue needs it",
        "storage/recovery.py",
        "        case KeyCopied():\n            return ()\n",
        "",
        "test_housekeeping.py::test_a_key_whose_queue_is_gone_is_replayed_without_it",
    ),
    Bug(
        "answer shared with the caller",
        "machine/sessions.py",
        "once.done_below, _copied(answer))",
        "once.done_below, answer)",
        "test_sessions.py::test_an_answer_that_its_caller_changes_is_kept_as_it_was[local]",
    ),
    Bug(
        "headers are garbage",
        "engines/compaction.py",
        " + headers + slack",
        " + slack",
        "test_housekeeping.py::test_long_answers_in_the_headers_do_not_call_for_compactions",
    ),
    Bug(
        "wake-up kept by a lease that is made again",
        "engines/leasing.py",
        "            lessee.over = True\n            if self._lessees.lines:\n",
        "            lessee.over = True\n            if False:\n",
        "test_sessions.py::test_a_lease_that_is_answered_again_hands_its_wake_up_on[local]",
    ),
    Bug(
        "note of a telling that was not made",
        "engines/leasing.py",
        "            self._done(grants, error)  # once more: it may have come before the caller was told\n",
        "",
        "test_threads.py::test_a_callback_for_which_memory_runs_out_is_called_once_more",
    ),
)

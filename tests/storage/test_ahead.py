"""Jobs that are leased in advance: what never began pays no attempt, whatever becomes of the process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from inside import inside

from rivetq import Broker, BrokerClosedError, ForkedBrokerError, Lease, UsageError
from rivetq.storage.ahead import SLOTS, Ahead, read_ahead
from rivetq.testing import ManualClock


def killed(tmp_path: Path, body: str) -> Path:
    """Run a program with a broker `b` in which five jobs of one attempt wait; kill it when it says "now"."""
    path = tmp_path / "data"
    script = textwrap.dedent(
        f"""
        import sys, time, rivetq
        b = rivetq.Broker({str(path)!r}, fsync="never")
        b.enqueue_many("q", [b"%d" % n for n in range(5)], max_attempts=1)
        """
    ) + textwrap.dedent(body)
    script += "\nprint('now', flush=True); time.sleep(60)\n"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return path


def payloads(broker: Broker, state: str) -> list[bytes]:
    return [job.payload for job in broker.jobs("q", state=state)]


def test_after_a_kill_what_had_begun_is_dead_and_what_had_not_is_ready_with_its_attempt_refunded(
    tmp_path: Path,
) -> None:
    path = killed(
        tmp_path,
        """
        leases = b.lease_many("q", 4, begun=False)
        b.begin(leases[1]); b.begin(leases[2])
        """,
    )
    with Broker(path) as broker:
        assert payloads(broker, "dead") == [b"1", b"2"]
        assert payloads(broker, "ready") == [b"0", b"3", b"4"]
        assert [(job.attempts, job.last_error) for job in broker.jobs("q", state="ready")] == [(0, None)] * 3
        assert broker.deliveries("q").expired == 2
        inside(broker).audit()


def test_a_lease_that_is_begun_from_the_start_counts_as_ever(tmp_path: Path) -> None:
    path = killed(tmp_path, 'b.lease_many("q", 2); b.lease_many("q", 2, begun=False)')
    with Broker(path) as broker:
        assert payloads(broker, "dead") == [b"0", b"1"]
        assert payloads(broker, "ready") == [b"2", b"3", b"4"]


def test_a_lease_that_waits_without_a_thread_can_be_taken_in_advance(tmp_path: Path) -> None:
    path = killed(
        tmp_path,
        """
        got = []
        b.lease_soon("q", 2, lambda leases, error: got.extend(leases), begun=False)
        while len(got) < 2: time.sleep(0.001)
        b.begin(got[0])
        """,
    )
    with Broker(path) as broker:
        assert payloads(broker, "dead") == [b"0"]


def test_a_close_without_answers_is_told_apart_as_well(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue_many("q", [b"0", b"1"], max_attempts=1)
        broker.begin(broker.lease_many("q", 2, begun=False)[0])
    with Broker(tmp_path / "data") as broker:
        assert (payloads(broker, "dead"), payloads(broker, "ready")) == ([b"0"], [b"1"])


def test_leases_that_keep_their_deadlines_stay_unbegun_for_the_opening_after_the_next(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue_many("q", [b"0", b"1", b"2"], max_attempts=1)
        broker.lease_many("q", 2, begun=False)
    with Broker(tmp_path / "data", release_on_open=False) as broker:
        assert broker.stats("q").leased == 2
        broker.lease_many("q", 1, begun=False)  # which makes the file anew
    with Broker(tmp_path / "data") as broker:
        assert payloads(broker, "ready") == [b"0", b"1", b"2"]


def test_whoever_never_leases_in_advance_has_no_such_file(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"")
        lease = broker.lease("q")
        assert lease is not None
        broker.begin(lease)
        lease.ack()
        assert not (tmp_path / "data" / "ahead").exists()
        broker.lease_many("q", 1, begun=False)
        assert stat.S_IMODE((tmp_path / "data" / "ahead").stat().st_mode) == 0o600


def test_a_link_in_place_of_the_file_is_not_followed_and_costs_attempts_only(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ahead").symlink_to(victim)
    (tmp_path / "data" / "ahead.new").symlink_to(victim)
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"")
        assert len(broker.lease_many("q", 1, begun=False)) == 1
    assert victim.read_bytes() == b"precious"


def test_a_disk_without_room_for_the_page_costs_attempts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"x", max_attempts=1)
        monkeypatch.setattr("rivetq.storage.ahead.os.write", full)
        (lease,) = broker.lease_many("q", 1, begun=False)
        assert lease.payload == b"x"
        broker.begin(lease)
        assert "will count as begun" in caplog.text
    with Broker(tmp_path / "data") as broker:
        assert payloads(broker, "dead") == [b"x"]


def test_slots_of_leases_that_ended_unbegun_are_used_again(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", fsync="never", clock=ManualClock()) as broker:
        broker.enqueue_many("q", [b""] * 1000)
        for _ in range(SLOTS // 1000 + 2):
            leases = broker.lease_many("q", 1000, begun=False)
            with broker.transaction() as tx:
                for lease in leases:
                    tx.release(lease)
        held = broker.lease_many("q", 1000, begun=False)
        assert {lease.token for lease in held} <= read_ahead(str(tmp_path / "data" / "ahead"))
        for lease in held:
            broker.begin(lease)
        assert not {lease.token for lease in held} & read_ahead(str(tmp_path / "data" / "ahead"))


def test_more_than_there_are_slots_count_as_begun(tmp_path: Path) -> None:
    table = Ahead(str(tmp_path / "ahead"))
    table.make()
    table.note(((token, token) for token in range(1, SLOTS + 10)), lambda token, job_id: True)
    assert read_ahead(str(tmp_path / "ahead")) == set(range(1, SLOTS + 1))
    table.begin(7)
    table.note([(SLOTS + 20, 1)], lambda token, job_id: True)
    assert read_ahead(str(tmp_path / "ahead")) == {*range(1, SLOTS + 1), SLOTS + 20} - {7}
    table.close()
    table.begin(8)  # nothing to do any more
    assert 8 in read_ahead(str(tmp_path / "ahead"))


@pytest.mark.parametrize("damage", [b"", b"\x01\x02\x03", os.urandom(200)], ids=["empty", "short", "noise"])
def test_a_damaged_page_is_no_error(tmp_path: Path, damage: bytes) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"")
        broker.lease_many("q", 1, begun=False)
    (tmp_path / "data" / "ahead").write_bytes(damage)
    with Broker(tmp_path / "data") as broker:
        assert broker.stats("q").leased == 0
        inside(broker).audit()


def test_a_forked_child_does_not_touch_the_page_of_its_parent(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"")
        (lease,) = broker.lease_many("q", 1, begun=False)
        child = os.fork()
        if not child:
            try:
                broker.begin(lease)
            except ForkedBrokerError:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert read_ahead(str(tmp_path / "data" / "ahead")) == {lease.token}


def test_to_begin_needs_no_lock(tmp_path: Path) -> None:
    with Broker(tmp_path / "data", fsync="never") as broker:
        broker.enqueue_many("q", [b""] * 10)
        leases = broker.lease_many("q", 10, begun=False)
        with inside(broker)._lock:  # another call is in the middle of its work
            for lease in leases:
                broker.begin(lease)
        assert not read_ahead(str(tmp_path / "data" / "ahead"))


def test_begun_is_true_or_false(tmp_path: Path) -> None:
    with Broker(":memory:") as broker:
        broker.enqueue("q", b"")
        with pytest.raises(UsageError):
            broker.lease_many("q", 1, begun=0)  # type: ignore[arg-type]  # wrong, as a caller may be
        (lease,) = broker.lease_many("q", 1, begun=False)
        assert isinstance(lease, Lease)
        broker.begin(lease)
        lease.ack()


def test_a_lease_that_never_began_pays_nothing_however_long_the_process_is_away(tmp_path: Path) -> None:
    clock = ManualClock()
    for release_on_open in (True, False):
        path = tmp_path / str(release_on_open)
        with Broker(path, clock=clock) as broker:
            broker.enqueue_many("q", [b"0", b"1"], max_attempts=1)
            broker.begin(broker.lease_many("q", 2, begun=False, visibility_timeout=1)[0])
        clock.advance(5)
        with Broker(path, clock=clock, release_on_open=release_on_open) as broker:
            clock.advance(0)
            assert (payloads(broker, "dead"), payloads(broker, "ready")) == ([b"0"], [b"1"])
            assert broker.jobs("q", state="ready")[0].attempts == 0
            inside(broker).audit()


def test_a_kept_lease_that_the_next_process_begins_has_begun(tmp_path: Path) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"0", max_attempts=1)
        (lease,) = broker.lease_many("q", 1, begun=False)
    with Broker(tmp_path / "data", release_on_open=False) as broker:
        broker.begin(lease)
    with Broker(tmp_path / "data") as broker:
        assert payloads(broker, "dead") == [b"0"]


def test_an_interrupt_while_it_is_noted_does_not_end_the_leasing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"0", max_attempts=1)
        engine = inside(broker)
        note = engine._note_unbegun

        def interrupted(event: object) -> None:
            note(event)  # type: ignore[arg-type]  # what it stands in for
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, "_note_unbegun", interrupted)
        with pytest.raises(KeyboardInterrupt):
            broker.lease_many("q", 1, begun=False)
        monkeypatch.setattr(engine, "_note_unbegun", note)
        assert not read_ahead(str(tmp_path / "data" / "ahead"))
        assert len(broker.lease_many("q", 1, begun=False)) == 1


def test_begin_of_a_closed_broker_or_of_no_lease_raises(tmp_path: Path) -> None:
    for path in (":memory:", tmp_path / "data"):
        with Broker(path) as broker:
            broker.enqueue("q", b"")
            (lease,) = broker.lease_many("q", 1, begun=False)
            for wrong in (None, 5, "x"):
                with pytest.raises(UsageError):
                    broker.begin(wrong)  # type: ignore[arg-type]  # wrong, as a caller may be
        with pytest.raises(BrokerClosedError):
            broker.begin(lease)


def test_what_breaks_into_a_lease_that_is_taken_in_advance_comes_through_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Broker(tmp_path / "data") as broker:
        broker.enqueue("q", b"")
        engine = inside(broker)

        def interrupted(body: bytes) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(engine._log, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):  # and not the BrokerFailedError of the calls that come later
            broker.lease_many("q", 1, begun=False)
        assert not read_ahead(str(tmp_path / "data" / "ahead"))

"""Two bars: the log cut after every byte, and one bit flipped in every byte of log and index of a small directory."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rot_child import opened

from rivetq import Broker, CorruptLogError, LeaseRef, RateLimit, RetryPolicy
from rivetq.testing import ManualClock

CHILD = Path(__file__).with_name("rot_child.py")
ZERO_SAMPLE = 200
"""Flips in the preallocated zeros behind the last record: there are many and all alike."""


class Recording:
    """A busy broker and every state that it has had."""

    def __init__(self, directory: Path, clock: ManualClock) -> None:
        self.broker = Broker(directory, clock=clock, fsync="never", segment_bytes=65_536)
        self.states: list[str] = []
        self.note()

    def note(self) -> None:
        self.states.append(repr(self.broker._engine.dump()))  # type: ignore[attr-defined]

    def __call__(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        answer = getattr(self.broker, verb)(*args, **kwargs)
        self.note()
        return answer


def make_busy(directory: Path) -> Recording:
    """Every kind of event, in a few kilobytes."""
    clock = ManualClock()
    do = Recording(directory, clock)
    do("configure_queue", "a", retry=RetryPolicy(max_attempts=2, base=5, jitter="none"), idempotency_ttl=60)
    do("enqueue", "a", b"first", idempotency_key="k1", headers={"trace": "7"})
    do("enqueue_many", "a", [b"x", b"yy", b"zzz"], idempotency_keys=["k2", None, "k3"])
    do("enqueue", "a", b"later", delay=30)
    do("enqueue", "b", b"urgent", priority=9, max_attempts=1)
    lease = do("lease", "a")
    do("ack", lease)
    first, second = do("lease_many", "a", 2)
    do("extend", first, 100)
    do("nack", first, error="boom")
    do("release", second)
    do("nack", do("lease", "b"), error="fatal")
    do("redrive", "b")
    do("reject", do("lease", "b"), error="no")
    do("cancel", do("enqueue", "b", b"changed my mind"))
    clock.advance(6)
    do.note()
    lease = do("lease", "a")
    clock.advance(31)  # the lease ends, the delay falls due
    do.note()
    with do.broker.transaction() as tx:
        tx.enqueue("c", b"next")
        do.note()  # ids were reserved
        tx.enqueue("a", b"audit", idempotency_key="k4")
        tx.ack(lease_of(do.broker, "a"))
        do.note()  # a lease was written
    do.note()
    do("pause", "c")
    do("configure_queue", "c", rate_limit=RateLimit(5, 2), max_jobs=10)
    do("purge", "b")
    do("lease", "a")
    return do


def lease_of(broker: Broker, queue: str) -> LeaseRef:
    lease = broker.lease(queue)
    assert lease is not None
    return LeaseRef(lease.id, lease.token)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory as a killed process leaves it, and the states that it has had, oldest first."""
    root = tmp_path_factory.mktemp("busy")
    do = make_busy(root / "live")
    shutil.copytree(root / "live", root / "dead")
    do.broker.close()
    return root / "dead", do.states


def used_bytes(path: Path) -> int:
    return len(path.read_bytes().rstrip(b"\0"))


def test_the_log_cut_after_every_byte_opens_to_a_state_that_the_broker_once_had(
    busy: tuple[Path, list[str]], tmp_path: Path
) -> None:
    origin, states = busy
    cut = tmp_path / "cut"
    shutil.copytree(origin, cut)
    shutil.rmtree(cut / "index", ignore_errors=True)
    (cut / "log" / "mark").unlink()  # it is never synced: after a power cut it may be as old as this
    [segment] = (cut / "log").glob("*.log")
    whole = segment.read_bytes()[: used_bytes(segment) + 8]  # the last record may end in zeros
    header = int.from_bytes(whole[12:16], "little")
    latest = 0
    for size in range(len(whole) + 1):
        segment.write_bytes(whole[:size])
        if size < header:
            with pytest.raises(CorruptLogError) as caught:
                opened(cut)  # the header was on disk before the segment had its name
            assert caught.value.file == str(segment)
            continue
        state = opened(cut)
        assert state in states, f"cut after {size} bytes: a state that never was"
        position = states.index(state)
        assert position >= latest, f"cut after {size} bytes: older than with a byte less"
        latest = position
    assert states[latest] == states[-1], "the whole log gives the last state"


def test_a_synced_log_cut_after_every_byte_is_refused(busy: tuple[Path, list[str]], tmp_path: Path) -> None:
    origin, _ = busy
    with Broker(origin, clock=ManualClock(), release_on_open=False, segment_bytes=65_536):
        pass  # closed: all of it is synced, and the mark says so
    cut = tmp_path / "cut"
    shutil.copytree(origin, cut)
    shutil.rmtree(cut / "index")
    segment = sorted((cut / "log").glob("*.log"))[-1]
    whole = segment.read_bytes()
    last_frame = used_bytes(segment)
    for size in range(last_frame):
        segment.write_bytes(whole[:size])
        with pytest.raises(CorruptLogError) as caught:
            opened(cut)
        assert caught.value.file == str(segment)
        assert caught.value.offset <= size


def flips(directory: Path) -> list[dict[str, Any]]:
    """One flip in every byte of every file of log and index; of trailing zeros a sample."""
    rng = random.Random(20)
    found: list[dict[str, Any]] = []
    for path in sorted(
        [*(directory / "log").glob("*.log"), directory / "log" / "mark", *(directory / "index").iterdir()]
    ):
        data = path.read_bytes()
        used = len(data.rstrip(b"\0"))
        offsets = [*range(used), *sorted(rng.sample(range(used, len(data)), min(ZERO_SAMPLE, len(data) - used)))]
        name = str(path.relative_to(directory))
        if path.name == "data.mdb":
            offsets = [o for o in offsets if data[o] or rng.random() < 0.02]  # pages are mostly zeros
        found += [{"file": name, "offset": o, "bit": rng.randrange(8)} for o in offsets]
    return found


def test_one_flipped_bit_in_any_byte_gives_an_equal_state_or_a_typed_error(
    tmp_path: Path, busy: tuple[Path, list[str]]
) -> None:
    origin, _ = busy
    directory = tmp_path / "rotten"
    shutil.copytree(origin, directory)
    with Broker(directory, clock=ManualClock(), release_on_open=False, segment_bytes=65_536) as broker:
        broker.checkpoint()
        broker.enqueue("a", b"behind the checkpoint")
        shutil.copytree(directory, tmp_path / "live")  # with a tail to replay, preallocated zeros and an older index
        broker.sync()
        (tmp_path / "live" / "log" / "mark").write_bytes((directory / "log" / "mark").read_bytes())
    sound = opened(tmp_path / "live")
    mutations = flips(tmp_path / "live")
    assert len(mutations) > 4000, "hardly anything to flip"
    child = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path / "live")],
        input="".join(json.dumps(m) + "\n" for m in mutations),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"died at {mutations[len(answers)]}: {child.stderr[-2000:]}"
    assert len(answers) == len(mutations)
    refused = 0
    for mutation, answer in zip(mutations, answers, strict=True):
        if "error" in answer:
            assert not mutation["file"].startswith("index"), f"{mutation}: damage to the index refused the opening"
            assert answer.get("file", mutation["file"]) == mutation["file"], f"{mutation}: {answer}"
            assert answer.get("offset", 0) <= mutation["offset"], f"{mutation}: {answer}"
            refused += 1
        else:
            assert answer["dump"] == sound, f"{mutation}: another state, silently"
    assert refused > 1000, "flips in the log went unnoticed"

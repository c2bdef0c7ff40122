"""Sweeps: every place at which something can go wrong, one after the other.

    python tests/sweeps.py crash        a power cut before every disk operation, and each kind of what is left
    python tests/sweeps.py recovery     the same for every disk operation of an opening after a crash
    python tests/sweeps.py errors       a failing or short call at every disk operation, once and for good
    python tests/sweeps.py exceptions   KeyboardInterrupt and MemoryError before every line of log, machine and engine
    python tests/sweeps.py asyncio      the same before every line of awaited calls, while others wait for jobs
    python tests/sweeps.py closing      a close before every line of threads that wait, of loops and of workers
    python tests/sweeps.py sequences    all sequences of up to three calls, a power cut at every disk operation

All of them go over seeded lives (see simulation.py), and after each fault the directory is opened again, lives on and
meets a power cut. `--trials` ends a sweep early, `--seed` chooses another life, `--stride` takes one place in so many.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import faulthandler
import itertools
import linecache
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import attrs
from closing import closing
from simulation import (
    SEGMENT_BYTES,
    Hunt,
    Life,
    ViolationError,
    agree,
    by_the_seed_alone,
    check,
    compare,
    fast_directory,
    same_moment,
)

import rivetq
from rivetq import Broker, BrokerFailedError, DiskFullError, LeaseLostError, RivetQError, StorageError
from rivetq.aio import AsyncBroker
from rivetq.testing import ManualClock
from rivetq.testing.disk import SimulatedDisk

HANG_S = 60.0
"""A trial takes some hundredths of a second. One that hangs ends its process and says where."""
STEPS_BEFORE, STEPS, STEPS_AFTER = 30, 18, 3
PACKAGE = os.path.dirname(rivetq.__file__)
TRACED = {
    os.path.join(PACKAGE, f"{name}.py")
    for name in (
        "machine/advance", "machine/apply", "machine/apply_enqueued", "machine/cache", "machine/columns",
        "machine/commit", "machine/decide", "machine/keys",
        "machine/look", "machine/machine", "machine/run", "machine/saving", "machine/sessions",
        "machine/snapshot", "machine/window",
        "storage/group_commit", "storage/index", "storage/log", "storage/segment", "storage/space",
        "engines/lessees", "engines/clockwork", "engines/looking", "engines/leasing", "engines/live",
        "engines/durable", "engines/checkpoint", "engines/compaction", "engines/local",
    )
}  # fmt: skip
AWAITED = {
    os.path.join(PACKAGE, f"{name}.py")
    for name in (
        "aio", "engines/lessees", "engines/clockwork", "engines/looking", "engines/leasing", "engines/live",
        "engines/notifier", "storage/ahead", "storage/group_commit",
    )
}  # fmt: skip
TROUBLES = (*itertools.product(("EIO", "ENOSPC", "short"), (1, 1_000_000)), ("full", 1))
"""What a call meets, once or for good; or from there on there is little space, which comes back at the end."""


@attrs.define
class Share:
    """Which of a sweep's trials this process makes: one in `of`, from `first`; and how many of all are made at most."""

    first: int = 0
    of: int = 1
    trials: int | None = None
    stride: int = 1
    seen: int = 0
    made: int = 0

    def takes(self) -> bool:
        """Asked before each trial."""
        number, self.seen = self.seen, self.seen + 1
        if number % self.stride or (number // self.stride) % self.of != self.first:
            return False
        self.made += 1
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        return True

    @property
    def is_over(self) -> bool:
        return self.trials is not None and self.seen >= self.trials * self.stride


class Sweep:
    """A place for trials, and a directory that each of them begins with."""

    def __init__(self, directory: Path, seed: int, share: Share) -> None:
        self.directory = directory
        self._number = 0
        self.seed = seed
        self.share = share
        self.latest: Life | None = None

    def place(self) -> Path:
        self._number += 1
        return self.directory / str(self._number)

    def dead(self, fsync: str) -> Life:
        """A life that has ended: its process died, and what it wrote is there, synced or not."""
        directory = self.place()
        directory.mkdir()
        life = Life(directory, ManualClock(), fsync)
        life.begin()
        life.live(random.Random(f"{self.seed} before"), STEPS_BEFORE)
        life.end()
        return life

    def again(self, base: Life) -> Life:
        """A copy of a life that has ended, to be opened."""
        life = Life(shutil.copytree(base.directory, self.place()), same_moment(base.clock), base.fsync)
        life.bodies, life.told_lsn, life.told_id = dict(base.bodies), base.told_lsn, base.told_id
        life.leases = list(base.leases)
        self.latest = life
        return life

    def aftermath(self, life: Life, what: str, *, reopen: bool = True) -> None:
        """The life has ended. Open what a power cut leaves; then what is there, live on, cut the power and open."""
        life.disk.mend()
        self._cut(life, f"{what}; a power cut", ("none", "all", "each"))
        if not reopen:
            return
        again = Life(life.directory, life.clock, life.fsync, life.disk)
        try:
            check(life, again, f"{what}; opened again")
            again.live(random.Random(what), STEPS_AFTER)
        finally:
            again.end()
        again.disk.mend()
        self._cut(again, f"{what}; opened again; a power cut", ("none", "each"))

    def _cut(self, life: Life, what: str, ways: tuple[str, ...]) -> None:
        for way in ways:
            directory = self.place()
            directory.mkdir()
            life.disk.crash(directory, what, way)
            again = Life(directory, same_moment(life.clock), life.fsync)
            try:
                check(life, again, f"{what} ({way})")
            finally:
                again.end()
                shutil.rmtree(directory)


# A power cut before every disk operation


def crash(sweep: Sweep) -> int:
    """Whole lives, one after the other; a trial is a state."""
    share, found, seed = sweep.share, Hunt(sweep.directory), sweep.seed + sweep.share.first
    while found.states * share.of < (share.trials or 5000):
        faulthandler.dump_traceback_later(HANG_S * 10, exit=True)
        found.hunt(seed, everywhere=True)
        seed += share.of
    return found.states


def recovery(sweep: Sweep) -> int:
    """Processes die, leaving much that is not synced; before every disk operation of the next opening the power is cut.

    A trial is such an opening.
    """
    for number in itertools.count():
        for fsync in ("always", "never"):
            if (sweep.share.trials is None and number == 10) or sweep.share.is_over:
                return sweep.share.made
            if sweep.share.takes():
                _reopening(sweep, number, fsync)
    raise AssertionError("it goes on until its share is over")


def _reopening(sweep: Sweep, number: int, fsync: str) -> None:
    what = f"seed {sweep.seed}, dead process {number}, fsync {fsync}"
    directory = sweep.place()
    directory.mkdir()
    life = Life(directory, ManualClock(), fsync)
    rng = random.Random(f"{sweep.seed} {number}")
    life.begin()
    life.live(rng, rng.randint(5, 40))
    life.end()
    life.disk.mend()
    again = Life(directory, same_moment(life.clock), fsync, life.disk)

    def cut(operation: int) -> None:
        for lsn, body in again.bodies.items():  # what the opening's sweep has written by now
            life.bodies.setdefault(lsn, body)
        sweep._cut(life, f"{what}, power cut before operation {operation}", ("none", "all", "each"))

    life.disk.before = cut
    try:
        again.open()
        life.disk.before = None
        compare(life, again, what)
    finally:
        life.disk.before = None
        again.end()
    shutil.rmtree(directory)


# Errors


def errors(sweep: Sweep) -> int:
    """Every disk operation of an opening and some calls fails, or every one from there on."""
    for fsync in ("always", "never"):
        base = sweep.dead(fsync)
        places = []
        for close in (False, True):
            calls = [call[0] for call in _troubled(sweep, base, None, 1, 0, close=close).trace]
            for (trouble, times), (at, call) in itertools.product(TROUBLES, enumerate(calls, 1)):
                if trouble != "short" or call == "pwrite":
                    places.append((trouble, times, at, close))
        random.Random(sweep.seed).shuffle(places)  # so that a part of them is a part of each
        for trouble, times, at, close in places:
            if sweep.share.is_over:
                return sweep.share.made
            if sweep.share.takes():
                _troubled(sweep, base, trouble, times, at, close=close)
        shutil.rmtree(base.directory)
    return sweep.share.made


def _troubled(sweep: Sweep, base: Life, trouble: str | None, times: int, at: int, *, close: bool) -> SimulatedDisk:
    """One trial; its disk."""
    what = f"seed {sweep.seed}, fsync {base.fsync}, {trouble} x {times} at {at}, closed {close}"
    life = sweep.again(base)
    if trouble == "short":
        life.disk.shorten(at, times=times)
    elif trouble == "full":

        def use_up(number: int) -> None:
            if number == at:
                life.disk.space = at * 997 % 40_000

        life.disk.before = use_up
    elif trouble is not None:
        life.disk.fail(at, getattr(errno, trouble), times=times)
    for _ in _suffer(base, life, sweep.seed, what):
        if at and life.disk.operations >= at:  # it has met it, and goes on: what does the disk hold now?
            sweep._cut(life, f"{what}; a power cut soon after", ("none",))
            at = 0
    life.disk.before = life.disk.space = None
    if trouble == "full":
        _goes_on(life, what)
    if close and life.broker is not None:
        life.broker.close()
    life.end()
    sweep.aftermath(life, what)
    shutil.rmtree(life.directory)
    return life.disk


def _goes_on(life: Life, what: str) -> None:
    """There is space again: a broker that lives takes jobs without being opened again."""
    if life.broker is None or life.engine._ended is not None:
        return
    try:
        life._told(life.broker.enqueue("mail", b"space again"))
    except BaseException as error:
        raise ViolationError(f"{what}: there is space again, and an enqueue ends with {error!r}") from error
    if life.fsync == "always":
        life.told_lsn = max(life.told_lsn, life.last_lsn())


def _suffer(base: Life, life: Life, seed: int, what: str) -> Iterator[None]:
    """Open, make some calls while the disk fails; after each that leaves a live broker its caller may look."""
    rng = random.Random(f"{seed} steps")
    try:
        life.open()
    except (StorageError, DiskFullError):
        return  # refused: what is there must be as good as before
    except BaseException as error:
        raise ViolationError(f"{what}: an opening ends with {error!r}") from error
    compare(base, life, what)
    for step, call in enumerate(_calls(life, rng)):
        try:
            call()
        except LeaseLostError:
            pass
        except BrokerFailedError:
            _takes_no_call(life, what)
            return
        except DiskFullError:
            agree(life, f"{what}, after a full disk in step {step}")
        except BaseException as error:
            raise ViolationError(f"{what}: step {step} ends with {error!r}") from error
        if life.engine._ended == "failed":  # the keeper met it
            _takes_no_call(life, what)
            return
        yield
    agree(life, what)


def _calls(life: Life, rng: random.Random) -> Iterator[Callable[[], object]]:
    """Some by the seed, and in between all that the keeper does."""
    broker = life.broker
    assert broker is not None
    for number in range(STEPS):
        yield partial(life.step, rng)
        if number == STEPS // 3:
            yield broker.rotate
        elif number == STEPS // 2:
            yield broker.checkpoint
        elif number == STEPS - 2:
            yield broker.compact


def _takes_no_call(life: Life, what: str) -> None:
    assert life.broker is not None
    broker = life.broker
    calls: dict[str, Callable[[], object]] = {
        "enqueue": lambda: broker.enqueue("mail", b""),
        "lease": lambda: broker.lease("mail"),
        "stats": lambda: broker.stats(),
        "sync": lambda: broker.sync(),
        "checkpoint": lambda: broker.checkpoint(),
        "compact": lambda: broker.compact(),
    }
    for name, call in calls.items():
        try:
            call()
        except BrokerFailedError:
            continue
        except BaseException as error:
            raise ViolationError(f"{what}: {name} of a failed broker ends with {error!r}") from error
        raise ViolationError(f"{what}: {name} says ok after a failure")


# Exceptions


class Place(NamedTuple):
    """A line, and which of its visits."""

    file: str
    line: int
    visit: int


class Tracer:
    """Counts the lines of the traced files, and raises before one of them."""

    def __init__(
        self, target: Place | None = None, error: type[BaseException] | None = None, files: set[str] | None = None
    ) -> None:
        self._files = TRACED if files is None else files
        self.visits: Counter[tuple[str, int]] = Counter()
        self.hit = False
        self._target = target
        self._error = error

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        file = frame.f_code.co_filename
        names = {each.f_code.co_name for each in (frame, frame.f_back) if each is not None}
        if file not in self._files or "__del__" in names:
            return None  # what is raised in a finalizer Python itself ignores
        # Leaving a `with` is a line of its own to a trace, and so is `try:`; nothing can break in there in earnest. And
        # a callback's call is the callback's.
        if event == "line" and not linecache.getline(file, frame.f_lineno).lstrip().startswith(
            ("with ", "try:", "do(*")
        ):
            place = file, frame.f_lineno
            self.visits[place] += 1
            if not self.hit and self._target == (*place, self.visits[place]):
                self.hit = True
                assert self._error is not None
                raise self._error
        return self


def exceptions(sweep: Sweep) -> int:
    """An exception before every line that an opening, some calls and a closing run: at its first visit and a later."""
    for fsync in ("always", "never"):
        base = sweep.dead(fsync)
        seen = Tracer()
        _interrupted(sweep, base, seen, "nothing went wrong")
        rng = random.Random(sweep.seed)
        places = [
            Place(file, line, visit)
            for (file, line), visits in sorted(seen.visits.items())
            for visit in sorted({1, rng.randint(1, visits)})
        ]
        rng.shuffle(places)  # so that a part of them is a part of each file
        for place, error in itertools.product(places, (KeyboardInterrupt, MemoryError)):
            if sweep.share.is_over:
                return sweep.share.made
            if sweep.share.takes():
                name = f"{os.path.basename(place.file)}:{place.line}"
                what = f"seed {sweep.seed}, fsync {fsync}, {error.__name__} before {name}, visit {place.visit}"
                tracer = Tracer(place, error)
                _interrupted(sweep, base, tracer, what)
                if not tracer.hit:
                    raise ViolationError(f"{what}: the line was not reached the second time")
        shutil.rmtree(base.directory)
    return sweep.share.made


def _interrupted(sweep: Sweep, base: Life, tracer: Tracer, what: str) -> None:
    life = sweep.again(base)
    with by_the_seed_alone():  # from the beginning, each time
        _interrupted_life(base, life, random.Random(f"{sweep.seed} steps"), tracer, what)
    life.end()
    sweep.aftermath(life, what, reopen=tracer.hit)
    shutil.rmtree(life.directory)


def _interrupted_life(base: Life, life: Life, rng: random.Random, tracer: Tracer, what: str) -> None:
    """Open, make some calls, close."""
    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        try:
            life.open()
        finally:
            sys.settrace(before)
    except (KeyboardInterrupt, MemoryError, StorageError) as error:
        if not tracer.hit:
            raise ViolationError(f"{what}: {error!r}") from error
        return
    compare(base, life, what)
    for step, call in enumerate(_calls(life, rng)):
        if not _step(life, call, tracer, f"{what}, step {step}"):
            break
    _close(life, tracer)


def _close(life: Life, tracer: Tracer) -> None:
    """What breaks into close() may come through; the next one goes on from there, and then all is let go."""
    assert life.broker is not None
    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        life.broker.close()
    except (KeyboardInterrupt, MemoryError):
        sys.settrace(before)
        life.broker.close()
    finally:
        sys.settrace(before)


def _step(life: Life, call: Callable[[], object], tracer: Tracer, what: str) -> bool:
    """One call; whether the broker goes on. Raises ViolationError."""
    before, hit = sys.gettrace(), tracer.hit
    try:
        sys.settrace(tracer)
        try:
            call()
        finally:
            sys.settrace(before)
    except LeaseLostError:
        pass
    except (KeyboardInterrupt, MemoryError, RivetQError) as error:
        if not tracer.hit or hit:
            raise ViolationError(f"{what}: {error!r}, though nothing broke in") from error
    except BaseException as error:
        raise ViolationError(f"{what}: {error!r}") from error
    engine = life.engine
    for name in ("_lock", "_keeper_lock"):
        if getattr(engine, name).locked():
            raise ViolationError(f"{what}: {name} is held for ever")
    if engine._ended == "failed":
        _takes_no_call(life, what)
        return False
    if tracer.hit and not hit:
        agree(life, what)
    return True


# Exceptions in awaited calls


def awaited(sweep: Sweep) -> int:
    """An exception before every line of calls that are awaited, in the loop's thread and in the notifier's.

    Meanwhile a thread and another event loop wait for jobs. They get theirs afterwards, or are told that the broker
    failed: only the call that was broken into may not end as it should.
    """
    for fsync in ("always", "never"):
        for in_notifier in (False, True):
            seen = Tracer(files=AWAITED)
            _broken_into(sweep, fsync, seen, "nothing went wrong", in_notifier=in_notifier)
            rng = random.Random(sweep.seed)
            places = [
                Place(file, line, visit)
                for (file, line), visits in sorted(seen.visits.items())
                # The last: in the notifier's thread the others are told behind the calls.
                for visit in sorted({1, rng.randint(1, visits), visits})
            ]
            rng.shuffle(places)
            for place, error in itertools.product(
                places, (MemoryError,) if in_notifier else (KeyboardInterrupt, MemoryError)
            ):
                if sweep.share.is_over:
                    return sweep.share.made
                if sweep.share.takes():
                    name = f"{os.path.basename(place.file)}:{place.line}"
                    what = f"seed {sweep.seed}, fsync {fsync}, {error.__name__} before {name}, visit {place.visit}"
                    tracer = Tracer(place, error, AWAITED)
                    _broken_into(sweep, fsync, tracer, what, in_notifier=in_notifier)
    return sweep.share.made


async def _awaited_calls(broker: Broker) -> None:
    """Each kind of awaited call, one waiting lease that gets its job, and one that is given up."""
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # what was broken into is told anyway
    awaited = AsyncBroker(broker)
    await awaited.enqueue("mail", b"one")
    await awaited.enqueue_many("mail", [b"two", b"three"], idempotency_keys=["k", None])
    (lease,) = await awaited.lease_many("mail", 1, begun=False)
    await awaited.begin(lease)
    await lease.extend(60)
    waiting = asyncio.create_task(awaited.lease("later", wait=None))
    unwanted = asyncio.create_task(awaited.lease("never", wait=None))
    await asyncio.sleep(0)
    await lease.ack()
    async with awaited.transaction() as tx:
        await tx.enqueue("later", b"four")
    later = await waiting
    assert later is not None
    await later.nack(error="no")
    unwanted.cancel()
    await asyncio.gather(unwanted, return_exceptions=True)
    assert await awaited.lease("never", wait=0.001) is None


def _broken_into(sweep: Sweep, fsync: str, tracer: Tracer, what: str, *, in_notifier: bool) -> None:
    """One trial."""
    directory = sweep.place()
    broker = Broker(directory, fsync=cast(Any, fsync))
    told: list[object] = []
    others = [
        threading.Thread(target=wait, args=(broker, told), daemon=True) for wait in (_wait_in_thread, _wait_in_loop)
    ]
    engine: Any = broker._engine
    try:
        for other in others:
            other.start()
        while len(engine._lessees.lines.get("other", ())) < len(others):
            time.sleep(0.0005)
        _break_into(broker, tracer, what, in_notifier=in_notifier)
        try:
            for _ in others:
                broker.enqueue("other", b"")
        except BrokerFailedError:
            pass
        except (KeyboardInterrupt, MemoryError) as error:
            raise ViolationError(f"{what}: a later call is broken into, too") from error
        for other in others:
            other.join(HANG_S / 4)
            if other.is_alive():
                raise ViolationError(f"{what}: another caller waits for ever")
        if broker.health().state == "open":
            _goes_on_as_before(broker, told, what, in_notifier=in_notifier)
    finally:
        broker.close()
        shutil.rmtree(directory)


def _break_into(broker: Broker, tracer: Tracer, what: str, *, in_notifier: bool) -> None:
    """The calls, one of which is broken into: that one may end in any way."""
    before = sys.gettrace()
    if in_notifier:
        _trace_notifier(broker, tracer)
    else:
        sys.settrace(tracer)
    try:
        asyncio.run(asyncio.wait_for(_awaited_calls(broker), HANG_S / 10))
    except (KeyboardInterrupt, MemoryError, RivetQError, asyncio.CancelledError, TimeoutError) as error:
        # A time-out: what was broken into was a callback of the loop, or the telling itself.
        if not tracer.hit:
            raise ViolationError(f"{what}: {error!r}, though nothing broke in") from error
    finally:
        sys.settrace(before)


def _goes_on_as_before(broker: Broker, told: list[object], what: str, *, in_notifier: bool) -> None:
    engine: Any = broker._engine
    # In the notifier's thread the call that is broken into may be that of one who waits: then that one is told.
    fine = [one for one in told if one is True or (in_notifier and isinstance(one, MemoryError))]
    if len(fine) != 2:
        raise ViolationError(f"{what}: those who waited were told {told}")
    engine.audit()
    if all(one is True for one in told) and broker.lease_many("other", 1, begun=False):
        raise ViolationError(f"{what}: there is one job more than there were")
    broker.enqueue("other", b"")
    if len(broker.lease_many("other", 1, begun=False)) != 1:
        raise ViolationError(f"{what}: nothing can be leased in advance any more")


def _trace_notifier(broker: Broker, tracer: Tracer) -> None:
    """Its thread runs already: another takes its place, whose own lines are traced."""
    engine: Any = broker._engine
    notifier = engine._notifier
    turn = notifier._turn

    def traced() -> bool:
        if sys.gettrace() is None:
            sys.settrace(tracer)
        return bool(turn())

    notifier._turn = traced


def _wait_in_thread(broker: Broker, told: list[object]) -> None:
    try:
        told.append(broker.lease("other", wait=None) is not None)
    except (RivetQError, MemoryError) as error:
        told.append(error)


def _wait_in_loop(broker: Broker, told: list[object]) -> None:
    try:
        told.append(asyncio.run(AsyncBroker(broker).lease("other", wait=None)) is not None)
    except (RivetQError, MemoryError) as error:
        told.append(error)


# Sequences


def _all_calls() -> dict[str, Callable[[Life], bool]]:
    """Small calls by name; each says whether all that was written is promised to be on disk."""

    def enqueue(life: Life, **options: Any) -> bool:
        assert life.broker is not None
        life._told(life.broker.enqueue("mail", b"payload", **options))
        return True

    def batch(life: Life) -> bool:
        assert life.broker is not None
        life._told(*life.broker.enqueue_many("mail", [b"x" * 9000] * 3))
        return True

    def lease(life: Life) -> bool:
        assert life.broker is not None
        life.leases += life.broker.lease_many("mail", 2, visibility_timeout=2)
        return False

    def answer(verb: str) -> Callable[[Life], bool]:
        def call(life: Life) -> bool:
            if life.leases:
                getattr(life.broker, verb)(life.leases.pop(0))
            return bool(life.leases)

        return call

    def ask(verb: str, *args: Any, promises: bool = True) -> Callable[[Life], bool]:
        def call(life: Life) -> bool:
            getattr(life.broker, verb)(*args)
            return promises

        return call

    def advance(life: Life) -> bool:
        life.clock.advance(3)
        return False

    return {
        "enqueue": enqueue,
        "delayed with key": lambda life: enqueue(life, delay=2, idempotency_key="k"),
        "batch": batch,
        "lease": lease,
        "ack": answer("ack"),
        "nack": answer("nack"),
        "reject": answer("reject"),
        "redrive": ask("redrive", "mail"),
        "purge": ask("purge", "mail"),
        "checkpoint": ask("checkpoint", promises=False),
        "compact": ask("compact", promises=False),
        "rotate": ask("rotate", promises=False),
        "time passes": advance,
    }


def sequences(sweep: Sweep) -> int:
    """Every sequence of one to three calls on a directory in which there is something of everything."""
    calls = _all_calls()
    for fsync in ("always", "never"):
        base = _something_of_everything(sweep, fsync)
        for length in (1, 2, 3):
            for names in itertools.product(calls, repeat=length):
                if sweep.share.is_over:
                    return sweep.share.made
                if sweep.share.takes():
                    _sequence(sweep, base, names, calls)
        shutil.rmtree(base.directory)
    return sweep.share.made


def _something_of_everything(sweep: Sweep, fsync: str) -> Life:
    directory = sweep.place()
    directory.mkdir()
    life = Life(directory, ManualClock(), fsync)
    life.begin()
    broker = life.broker
    assert broker is not None
    life._told(*broker.enqueue_many("mail", [b"x" * (SEGMENT_BYTES // 20)] * 8))
    life._told(broker.enqueue("mail", b"later", delay=2))
    for lease in broker.lease_many("mail", 3):
        broker.reject(lease)
    broker.checkpoint()
    broker.rotate()
    life.leases = broker.lease_many("mail", 2, visibility_timeout=2)
    broker.sync()
    life.told_lsn = life.last_lsn()
    life.end()
    return life


def _sequence(sweep: Sweep, base: Life, names: tuple[str, ...], calls: dict[str, Callable[[Life], bool]]) -> None:
    """The calls; a power cut before every disk operation of the last one and behind it. (Of the others: shorter.)"""
    life = sweep.again(base)
    what = f"fsync {base.fsync}, {', '.join(names)}"
    moments: list[int] = []

    def cut(operation: int) -> None:
        moments.append(operation)
        sweep._cut(life, f"{what}, power cut before operation {operation}", ("none", "each", "each"))

    try:
        life.open()
        compare(base, life, what)
        for i, name in enumerate(names):
            life.disk.before = cut if i == len(names) - 1 else None
            try:
                promised = calls[name](life)
            except LeaseLostError:
                promised = False
            if promised and life.fsync == "always":
                life.told_lsn = max(life.told_lsn, life.last_lsn())
        life.disk.before = None
        agree(life, what)
    except ViolationError:
        raise
    except BaseException as error:
        raise ViolationError(f"{what}: {error!r}") from error
    finally:
        life.disk.before = None
        life.end()
    sweep.aftermath(life, what)
    shutil.rmtree(life.directory)


SWEEPS: dict[str, Callable[[Sweep], int]] = {
    "crash": crash,
    "recovery": recovery,
    "errors": errors,
    "exceptions": exceptions,
    "asyncio": awaited,
    "closing": closing,
    "sequences": sequences,
}


def run(name: str, seed: int, share: Share) -> int:
    """How many trials were made. Raises ViolationError."""
    logging.disable()  # it tells of every trouble
    alone = nullcontext() if name in ("asyncio", "closing") else by_the_seed_alone()  # there are threads in it
    with tempfile.TemporaryDirectory(prefix="rivetq-sweep-", dir=fast_directory()) as directory, alone:
        sweep = Sweep(Path(directory), seed, share)
        try:
            return SWEEPS[name](sweep)
        finally:
            if sweep.latest is not None:
                sweep.latest.end()
            faulthandler.cancel_dump_traceback_later()
            logging.disable(logging.NOTSET)


def _part(arguments: tuple[str, int, Share]) -> int:
    return run(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description="Let something go wrong at every place.")
    parser.add_argument("sweeps", nargs="*", choices=[*SWEEPS, []], help="which; without: all")
    parser.add_argument("--trials", type=int, help="no more than so many of each; without: all there are")
    parser.add_argument("--stride", type=int, default=1, help="one trial in so many")
    parser.add_argument("--seed", type=int, default=0, help="the life that they go over")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    n = given.processes
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
        for name in given.sweeps or SWEEPS:
            started = time.monotonic()
            shares = [(name, given.seed, Share(i, n, given.trials, given.stride)) for i in range(n)]
            made = sum(pool.map(_part, shares))
            print(f"{name}: {made:,} trials (seed {given.seed}): 0 violations, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

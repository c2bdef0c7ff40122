"""Power cuts on a simulated disk: one seed gives one life of a broker, and any number of moments to end it.

    python tests/simulation.py --states 20000 --seed 0

A life is a seeded sequence of calls on a broker whose disk is simulated and whose background work is done when the
sequence says so. Before disk operations chosen by the seed the power is cut: what the disk may hold then is written
into a directory of its own and opened. What is there must be what the records up to one point say, a point that is not
before what was promised (I1 to I5); counters and keys included (I16, I18). Then that broker lives on for some calls,
and the power is cut again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast
from unittest import mock

import rivetq.engines.compaction
import rivetq.engines.local
from rivetq import Broker, DiskFullError, Lease, LeaseLostError, RateLimit, RetryPolicy
from rivetq.engines.live import LiveEngine
from rivetq.engines.local import LocalEngine
from rivetq.machine.advance import advance
from rivetq.machine.check import dump
from rivetq.machine.machine import Machine
from rivetq.machine.snapshot import Place
from rivetq.storage.index import Index
from rivetq.storage.log import Log
from rivetq.storage.recovery import replay
from rivetq.testing import ManualClock
from rivetq.testing.disk import WAYS, PowerCut, SimulatedDisk

SEGMENT_BYTES = 65_536
QUEUES = ("mail", "work")
MANY_SEGMENTS = 2  # so that some openings sweep small segments up: a life is short
STEPS = 40  # calls in a life
STEPS_AFTER = 4  # calls of the broker that came back, before the power is cut again
CUTS = 25  # power cuts in a life, about
ANY_WAY = (None, None, None)  # what is looked at for each of them: states by the seed,
EVERY_WAY = (*WAYS, "each", "each")  # or each kind


class ViolationError(BaseException):
    """A promise was broken; the message says which, and how to see it again. Nothing in the engine swallows it."""


class IndexAheadError(ViolationError):
    """A checkpoint wrote what is not on disk yet (I20)."""


class Life:
    """A broker on a simulated disk, what it was told to keep, and what it wrote down."""

    def __init__(self, directory: Path, clock: ManualClock, fsync: str, disk: SimulatedDisk | None = None) -> None:
        self.directory = directory
        self.clock = clock
        self.fsync = fsync
        self.disk = disk or SimulatedDisk(directory, opaque=("index", "LOCK"))
        self.bodies: dict[int, bytes] = {}  # by lsn
        self.told_lsn = 0  # promised to be on disk
        self.told_id = 0  # the highest id that somebody knows
        self.leases: list[Lease] = []
        self.broker: Broker | None = None
        self.log: Log | None = None  # an opening that sweeps checkpoints before there is a broker
        self.found_lsn = 0  # the last record that its opening found: behind it are those of the sweep

    def open(self) -> Broker:
        """The broker of this life. Its log writes down in `bodies` what it appends; its index is never ahead."""
        life = self

        class NotingLog(Log):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                life.log = self

            def append(self, body: bytes) -> Place:
                life.bodies[self.next_lsn] = body
                return super().append(body)

        class NotingIndex(Index):
            def write(self, log_id: bytes, applied_lsn: int, *args: Any, **items: Any) -> None:
                assert life.log is not None
                if applied_lsn > life.log.durable_lsn:
                    raise IndexAheadError(f"the index goes up to {applied_lsn}, the disk not yet")
                life.disk.elsewhere(self._data)  # LMDB writes it
                super().write(log_id, applied_lsn, *args, **items)

        sweep = LocalEngine._sweep

        def noting_sweep(engine: LocalEngine) -> None:
            life.found_lsn = engine._log.next_lsn - 1
            sweep(engine)

        with (
            mock.patch.object(rivetq.engines.local, "SystemDisk", return_value=self.disk),
            mock.patch.object(rivetq.engines.local, "Log", NotingLog),
            mock.patch.object(rivetq.engines.local, "Index", NotingIndex),
            mock.patch.object(rivetq.engines.compaction, "MANY_SEGMENTS", MANY_SEGMENTS),
            mock.patch.object(LocalEngine, "_sweep", noting_sweep),
        ):
            self.broker = Broker(
                self.directory, segment_bytes=SEGMENT_BYTES, fsync=cast(Any, self.fsync), clock=self.clock,
                release_on_open=False, cache_bytes=20_000, window_jobs=1024,
            )  # fmt: skip
        return self.broker

    def begin(self) -> None:
        """Open a new directory. No chance but the seed's: retries without jitter."""
        broker = self.open()
        for queue in QUEUES:
            broker.configure_queue(queue, retry=RetryPolicy(jitter="none"))

    @property
    def engine(self) -> LocalEngine:
        assert self.broker is not None
        return cast(LocalEngine, self.broker._engine)

    def last_lsn(self) -> int:
        return self.engine._log.next_lsn - 1

    def expected(self, lsn: int) -> dict[str, Any]:
        """The state after the records up to this one, as of now."""
        machine = Machine()
        for number in range(1, lsn + 1):
            replay(machine, self.bodies[number], Place(lsn=number))
        advance(machine, max(machine.now_ms, self.engine._machine.now_ms))
        return dump(machine)

    def live(self, rng: random.Random, steps: int) -> None:
        """Some calls, chosen by the seed."""
        for _ in range(steps):
            with contextlib.suppress(LeaseLostError):  # a refused answer promises nothing
                self.step(rng)

    def step(self, rng: random.Random) -> None:
        """One call, chosen by the seed."""
        assert self.broker is not None
        if self._step(rng, self.broker) and self.fsync == "always":
            self.told_lsn = max(self.told_lsn, self.last_lsn())

    def _step(self, rng: random.Random, broker: Broker) -> bool:
        """One call; whether all that was written up to now is promised to be on disk."""
        queue = rng.choice(QUEUES)
        size = rng.choice((0, 10, 300, 300, 15_000))
        options: dict[str, Any] = {"priority": rng.choice((5, 5, 9)), "delay": rng.choice((0, 0, 0, 3))}
        match rng.choices(range(len(_WEIGHTS)), _WEIGHTS)[0]:
            case 0:
                key = rng.choice((None, f"k{rng.randrange(12)}"))
                self._told(broker.enqueue(queue, rng.randbytes(size), idempotency_key=key, **options))
            case 1:
                payloads = [rng.randbytes(size // 10) for _ in range(rng.randint(1, 100))]
                self._told(*broker.enqueue_many(queue, payloads, **options))
            case 2:
                self.leases += broker.lease_many(queue, rng.choice((1, 3, 30)), visibility_timeout=rng.choice((2, 60)))
                return False
            case 3:
                count = rng.randint(1, 20)
                leases, self.leases = self.leases[:count], self.leases[count:]
                broker.ack_many(leases)
            case 4 if self.leases:
                lease = self.leases.pop(rng.randrange(len(self.leases)))
                rng.choice((broker.nack, broker.release, broker.reject, broker.ack))(lease)
            case 5 if self.leases:
                broker.extend(self.leases[0], 100)
            case 6:
                broker.redrive(queue)
            case 7:
                ready = broker.jobs(queue, limit=3)
                return bool(ready) and broker.cancel(rng.choice(ready).id)
            case 8:
                broker.purge(queue, state=rng.choice(("dead", "scheduled")))
            case 9:
                retry = RetryPolicy(base=rng.choice((0, 2)), jitter="none", max_attempts=rng.choice((2, 5)))
                limit = rng.choice((None, RateLimit(1000, 100_000)))
                broker.configure_queue(queue, retry=retry, rate_limit=limit, idempotency_ttl=rng.choice((0, 5, 100)))
            case 10:
                with broker.transaction() as transaction:
                    for name in QUEUES:
                        self._told(transaction.enqueue(name, rng.randbytes(size), **options))
            case 11:
                broker.checkpoint()
                self.told_lsn = max(self.told_lsn, self.engine._log.durable_lsn)
                return False
            case 12:
                broker.compact()
                return False
            case 13:
                broker.rotate()
                return False
            case 14:
                broker.sync()
                self.told_lsn = self.last_lsn()
            case 15:
                self.keep(overdue=rng.random() < 0.3)
                return False
            case _:
                self.clock.advance(rng.choice((1, 3, 90)))
                return False
        return True

    def keep(self, *, overdue: bool) -> None:
        """One turn of the keeper's thread; whatever goes wrong in it fails the broker, but for a full disk."""
        try:
            self.engine._keep(overdue=overdue)
        except DiskFullError:
            raise
        except Exception as error:
            self.engine._fail(error)

    def _told(self, *ids: int) -> None:
        self.told_id = max(self.told_id, *ids)

    def end(self) -> None:
        """Let go, without a word to the disk."""
        if self.broker is not None:
            self.disk.cut_power(0)
            self.engine._fail(PowerCut())
            self.broker.close()
            self.broker = None
        self.disk.abandon()


_WEIGHTS = (8, 5, 8, 6, 5, 1, 1, 2, 1, 1, 2, 2, 2, 2, 1, 4, 4)


def no_thread(self: LiveEngine, name: str, target: Any) -> None:
    """In place of the engine's threads: what they do is a step of the life."""


@contextlib.contextmanager
def by_the_seed_alone() -> Iterator[None]:
    """No threads, no pauses, and no chance but the seed's; a fifth of a millisecond passes from look to look."""
    looks = itertools.count()

    def monotonic() -> float:
        return next(looks) / 5000

    with (
        mock.patch.object(LiveEngine, "_start_thread", no_thread),
        mock.patch.object(time, "sleep"),
        mock.patch.object(time, "monotonic", monotonic),
        mock.patch.object(secrets, "randbits", return_value=0x5EED),
        mock.patch.object(secrets, "token_bytes", return_value=b"simulated log id"),
    ):
        yield


def check(life: Life, again: Life, what: str) -> None:
    """Open what is left of `life`, as `again`, which must succeed. Raises ViolationError."""
    try:
        again.open()
    except BaseException as error:
        raise ViolationError(f"{what}: it cannot be opened: {error!r}") from error
    compare(life, again, what)
    assert again.broker is not None
    try:
        for queue in QUEUES:  # their checksums are those of the records, and are compared with what is read
            again.broker.jobs(queue, limit=20)
    except BaseException as error:
        raise ViolationError(f"{what}: a payload cannot be read: {error!r}") from error
    fresh = again.broker.enqueue("new", b"")
    if fresh <= life.told_id:
        raise ViolationError(f"{what}: id {fresh} was told before, up to {life.told_id}")
    again.told_id = fresh
    if again.fsync == "always":
        again.told_lsn = again.last_lsn()


def compare(life: Life, again: Life, what: str) -> None:
    """What was just opened holds the records of `life` up to one point, and all that was promised. Goes on from there.

    Raises ViolationError.
    """
    before, last_lsn = dict(life.bodies), max(life.bodies, default=0)
    lsn = again.found_lsn
    if not life.told_lsn <= lsn <= last_lsn:
        raise ViolationError(f"{what}: records up to {lsn} are there, {life.told_lsn} to {last_lsn} may be")
    swept = {n: body for n, body in again.bodies.items() if n > lsn}
    changed = [n for n, body in again.bodies.items() if n <= lsn and before[n] != body]
    if changed:
        raise ViolationError(f"{what}: records {changed} came back as others")
    again.bodies = {n: body for n, body in before.items() if n <= lsn} | swept
    again.told_lsn, again.told_id, again.leases = lsn, life.told_id, list(life.leases)
    agree(again, what)


def agree(life: Life, what: str) -> None:
    """The state is what the records say, and its structures agree. Raises ViolationError."""
    found, expected = life.engine.dump(), life.expected(life.last_lsn())
    if found != expected:
        parts = [name for name in found if found[name] != expected[name]]
        raise ViolationError(f"{what}: {parts} differ from what the records up to {life.last_lsn()} say")
    try:
        life.engine.audit()
    except AssertionError as error:
        raise ViolationError(f"{what}: the structures do not agree: {error}") from error


def same_moment(clock: ManualClock) -> ManualClock:
    """A clock of the same boot that stands where this one does, and moves on by itself."""
    other = ManualClock()
    other.boot_id = clock.boot_id
    other._elapsed_ms, other._wall_offset_ms = clock._elapsed_ms, clock._wall_offset_ms
    return other


class Hunt:
    """The lives of a range of seeds, and the power cuts in each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number = 0
        self.states = 0

    def place(self) -> Path:
        self._number += 1
        place = self._directory / str(self._number)
        place.mkdir()
        return place

    def hunt(self, seed: int, *, everywhere: bool = False) -> None:
        """One life and its power cuts: CUTS of them, or one before every disk operation. Raises ViolationError."""
        rng = random.Random(seed)
        fsync = rng.choice(("always", "always", "never"))
        operations = self._live(seed, fsync, frozenset())
        cuts = range(1, operations + 1) if everywhere else [rng.randint(1, operations) for _ in range(CUTS)]
        again = self._live(seed, fsync, frozenset(cuts), EVERY_WAY if everywhere else ANY_WAY)
        if again != operations:
            raise ViolationError(f"seed {seed}: {again} disk operations, {operations} the first time")

    def _live(self, seed: int, fsync: str, cuts: frozenset[int], ways: Sequence[str | None] = ANY_WAY) -> int:
        """The life of a seed, with power cuts before these operations; how many disk operations it has."""
        rng = random.Random(f"life {seed}")
        life = Life(self.place(), ManualClock(), fsync)

        def cut(operation: int) -> None:
            if operation in cuts:
                for number, way in enumerate(ways):
                    self._cut(life, seed, operation, number, way)

        life.disk.before = cut
        try:
            with by_the_seed_alone():
                life.begin()
                life.live(rng, STEPS)
        except IndexAheadError as error:
            raise ViolationError(f"seed {seed}: {error}") from error
        except ViolationError:
            raise
        except BaseException as error:
            raise ViolationError(f"seed {seed}: the life itself failed: {error!r}") from error
        finally:
            life.end()
            shutil.rmtree(life.directory)
        return life.disk.operations

    def _cut(self, life: Life, seed: int, operation: int, number: int, way: str | None) -> None:
        """The power is cut before this operation; and once more, some calls later."""
        what = f"seed {seed}, power cut before operation {operation}, aftermath {number}"
        clock = same_moment(life.clock)
        generation = [life]
        try:
            for turn in range(2):
                origin = generation[-1]
                directory = self.place()
                origin.disk.crash(directory, f"{what} {turn}", way)
                again = Life(directory, clock, life.fsync)
                generation.append(again)
                check(origin, again, f"{what}, turn {turn + 1}")
                self.states += 1
                again.live(random.Random(f"{what} {turn}"), STEPS_AFTER)
        except ViolationError:
            raise
        except BaseException as error:
            raise ViolationError(f"{what}: a call failed afterwards: {error!r}") from error
        finally:
            for each in generation[1:]:
                each.end()
                shutil.rmtree(each.directory, ignore_errors=True)


def fast_directory() -> str | None:
    """Where files are quickest: the index is real, and LMDB syncs it."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def hunt(seeds: Iterable[int], states: int) -> tuple[int, int]:
    """Lives from these seeds until so many states were looked at; states and lives."""
    lives = 0
    with tempfile.TemporaryDirectory(prefix="rivetq-hunt-", dir=fast_directory()) as name:
        found = Hunt(Path(name))
        for seed in seeds:
            if found.states >= states:
                break
            found.hunt(seed)
            lives += 1
    return found.states, lives


def _part(arguments: tuple[int, int, int]) -> tuple[int, int]:
    first, step, states = arguments
    return hunt(range(first, sys.maxsize, step), states)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the power of a simulated disk, very often.")
    parser.add_argument("--states", type=int, default=20_000, help="states after a power cut to look at")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    started, n = time.monotonic(), given.processes
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(_part, [(given.seed + i, n, -(-given.states // n)) for i in range(n)]))
    states, lives = (sum(column) for column in zip(*parts, strict=True))
    print(
        f"{states:,} states after power cuts in {lives:,} lives (seeds from {given.seed}, {n} processes): "
        f"0 violations, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()

"""A fork at every line of a call, while other threads hold the locks.

    python tests/forks.py --forks 5000 --seed 0

Each call runs once more with a trace that forks before its lines. Just before a fork another thread takes all locks
that it can get, or one of them, so that in the child their holder does not exist. In the child every verb must raise
ForkedBrokerError at once, what was under way must end without touching a file of the parent's, and the process must
end by itself. The parent goes on, closes, and what it leaves must be whole.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from unittest import mock

import attrs
from simulation import ViolationError, fast_directory

import rivetq
from rivetq import Broker, BrokerClosedError, ForkedBrokerError, Lease, QueueStats
from rivetq.aio import AsyncBroker
from rivetq.engines.live import LiveEngine
from rivetq.engines.local import LocalEngine
from rivetq.tools import verify

PACKAGE = os.path.dirname(rivetq.__file__)
TRACED = {
    os.path.join(PACKAGE, f"{name}.py")
    for name in (
        "aio", "broker/broker", "broker/requests", "broker/transaction",
        "engines/lessees", "engines/clockwork", "engines/looking", "engines/leasing", "engines/live",
        "engines/durable", "engines/checkpoint", "engines/compaction", "engines/local",
        "engines/memory", "engines/notifier", "engines/view",
        "storage/ahead", "storage/codec", "storage/disk", "storage/group_commit", "storage/index",
        "storage/index_values", "storage/lock", "storage/log", "storage/segment", "storage/space",
        "machine/advance", "machine/apply", "machine/apply_enqueued", "machine/cache", "machine/columns",
        "machine/commit", "machine/decide", "machine/keys",
        "machine/look", "machine/machine", "machine/ratelimit", "machine/run", "machine/saving", "machine/sessions",
        "machine/snapshot",
        "machine/window",
    )
}  # fmt: skip
VISITS = 2
"""Of a line, in one run of a call: a loop over many jobs does the same each time."""
HANG_S = 30
"""A child needs some hundredths of a second. One that hangs is ended by its alarm."""
PATIENCE_S = 3600.0
LOCK_S = 0.02
"""For a lock that a thread of the engine's holds just now; one that the forking thread holds stays its own."""
REAL_EXITS = 8
"""One child in so many leaves through the end of its interpreter; the others do by hand what it would do."""
QUEUES = ("mail", "work")
NACKED = 1
"""Jobs in a life that come again after a second or so."""


class Stage:
    """A broker in which there is something of everything, and threads that wait; the keeper's work is a call here."""

    def __init__(self, path: Path | str, fsync: str, rng: random.Random) -> None:
        self.path = path
        self.rng = rng
        self.broker = broker = Broker(path, fsync=fsync, segment_bytes=65_536, window_jobs=1024, cache_bytes=20_000)  # type: ignore[arg-type]  # one of its names
        self.aio = AsyncBroker(broker)
        self.loop = asyncio.new_event_loop()
        for queue in QUEUES:
            broker.enqueue_many(queue, [rng.randbytes(rng.choice((10, 300, 3000))) for _ in range(30)])
        broker.configure_queue("slow", rate_limit=rivetq.RateLimit(0.001, 2))
        broker.enqueue_many("slow", [b"x"] * 4)
        broker.enqueue("work", b"later", delay=3600, idempotency_key="later")
        self.lease = broker.lease("work", visibility_timeout=3600)
        assert self.lease is not None
        broker.ack_many(broker.lease_many("slow", 2))
        for lease in broker.lease_many("work", 2):
            broker.reject(lease)
        self.transaction = broker.transaction()
        self.transaction.__enter__()
        self.transaction.ack(self.lease)
        self.waiting = broker.lease_soon("nothing", 1, _ignore)
        self.loop.run_until_complete(self.aio.stats())  # its threads are there
        self.waiter = threading.Thread(target=self._wait, daemon=True)
        self.waiter.start()
        _await(lambda: len(_engine(broker)._lessees.lines.get("nothing", ())) == 2)

    def _wait(self) -> None:
        with contextlib.suppress(BrokerClosedError):
            self.broker.lease("nothing", wait=None)

    def take(self) -> Lease:
        """A lease to answer."""
        found = self.broker.lease("mail", visibility_timeout=3600)
        if found is None:
            self.broker.enqueue_many("mail", [b"more"] * 20)
            return self.take()
        return found

    def taken(self) -> Lease:
        """One of several, taken before the trace begins."""
        return self._stock.pop()

    def stock(self) -> None:
        self._stock = [self.take() for _ in range(4)]

    def fingerprint(self) -> dict[str, tuple[int, int]]:
        """What is in the directory; without the mark, which the end of a sync writes without a lock."""
        if not isinstance(self.path, Path):
            return {}
        found: dict[str, tuple[int, int]] = {}
        for each in sorted(self.path.rglob("*")):
            if each.is_file() and each.name != "mark":
                data = each.read_bytes()
                found[str(each.relative_to(self.path))] = len(data), zlib.crc32(data)
        return found

    def is_writing(self) -> bool:
        """This thread itself writes the log: no other does."""
        engine = _engine(self.broker)
        return isinstance(engine, LocalEngine) and engine._log._writing == threading.get_ident()

    def close(self) -> None:
        self.broker.close()
        self.loop.run_until_complete(self.aio.close())
        self.loop.close()
        self.waiter.join(HANG_S)
        if self.waiter.is_alive():
            raise ViolationError("a waiting lease was not ended by close()")


def calls(stage: Stage) -> dict[str, Callable[[], object]]:
    """What the parent does, and what forks."""
    broker, aio, run = stage.broker, stage.aio, stage.loop.run_until_complete

    def soon() -> None:
        told = threading.Event()
        pid = os.getpid()
        broker.lease_soon("mail", 1, lambda leases, error: told.set())
        if os.getpid() == pid and not told.wait(HANG_S):
            raise ViolationError("a lease_soon was not told")

    def transaction() -> None:
        with broker.transaction() as tx:
            tx.ack(stage.taken())
            tx.enqueue_many("mail", [b"a", b"b"], idempotency_keys=["one", None])
            tx.enqueue("work", b"c")

    async def transaction_async() -> None:
        async with aio.transaction() as tx:
            await tx.ack(stage.taken())
            await tx.enqueue("mail", b"x")

    def ahead() -> None:
        for lease in broker.lease_many("mail", 3, begun=False):
            broker.begin(lease)

    def housekeeping() -> None:
        engine = _engine(broker)
        if isinstance(engine, LocalEngine):
            engine._keep(overdue=True)

    def context() -> None:
        with stage.taken() as lease:
            lease.json() if lease.payload[:1] == b"{" else None

    found: dict[str, Callable[[], object]] = {
        "enqueue": lambda: broker.enqueue("mail", b"payload"),
        "enqueue with key": lambda: broker.enqueue("mail", b"p", idempotency_key=f"k{stage.rng.random()}", delay=3600),
        "enqueue_many": lambda: broker.enqueue_many("work", [b"x" * 2000] * 8),
        "a large enqueue": lambda: broker.enqueue_many("work", [b"x" * 8000] * 7),  # begins a segment
        "lease": lambda: broker.lease(["work", "mail"]),
        "lease of nothing": lambda: broker.lease("empty", wait=0.005),
        "lease of a limited queue": lambda: broker.lease("slow", wait=0.005),
        "lease_many": lambda: broker.lease_many("mail", 4, wait=1),
        "lease ahead": ahead,
        "lease_soon": soon,
        "lease_soon and cancel": lambda: broker.lease_soon("empty", 1, _ignore).cancel(),
        "ack": lambda: broker.ack(stage.taken()),
        "ack_many": lambda: broker.ack_many([stage.taken(), stage.taken()]),
        "nack": lambda: broker.nack(stage.taken(), error="no"),
        "release": lambda: stage.taken().release(),
        "reject": lambda: stage.taken().reject(error="never"),
        "extend": lambda: broker.extend(stage.taken(), 60),
        "with lease": context,
        "transaction": transaction,
        "redrive": lambda: broker.redrive("work"),
        "purge": lambda: broker.purge("work", state="dead"),
        "cancel": lambda: broker.cancel(
            max((job.id for job in broker.jobs("mail", state="ready", limit=2)), default=1)
        ),
        "configure_queue": lambda: broker.configure_queue("work", max_jobs=stage.rng.randrange(10_000, 20_000)),
        "pause and resume": lambda: (broker.pause("other"), broker.resume("other")),
        "get": lambda: broker.get(1),
        "jobs": lambda: broker.jobs("work", limit=20),
        "stats": lambda: broker.stats(),
        "find": lambda: broker.find("work", "later"),
        "metrics": lambda: broker.metrics(),
        "sync": lambda: broker.sync(),
        "checkpoint": lambda: broker.checkpoint(),
        "rotate": lambda: broker.rotate(),
        "compact": lambda: broker.compact(),
        "housekeeping": housekeeping,
        "async enqueue": lambda: run(aio.enqueue("mail", b"x")),
        "async lease": lambda: run(aio.lease("mail", wait=1)),
        "async lease of nothing": lambda: run(aio.lease("empty", wait=0.005)),
        "async ack": lambda: run(aio.ack(stage.taken())),
        "async stats": lambda: run(aio.stats()),
        "async transaction": lambda: run(transaction_async()),
    }
    return found


def probes(stage: Stage) -> dict[str, Callable[[], object]]:
    """What a child tries. Each must raise ForkedBrokerError."""
    broker, lease, tx, aio = stage.broker, stage.lease, stage.transaction, stage.aio
    assert lease is not None
    found: dict[str, Callable[[], object]] = {
        "enqueue": lambda: broker.enqueue("mail", b""),
        "enqueue_many": lambda: broker.enqueue_many("mail", [b"", b""]),
        "enqueue_many of none": lambda: broker.enqueue_many("mail", []),
        "lease": lambda: broker.lease("mail"),
        "lease, waiting": lambda: broker.lease("nothing", wait=5),
        "lease, waiting for ever": lambda: broker.lease("nothing", wait=None),
        "lease_many": lambda: broker.lease_many(["mail", "work"], 3, wait=5, begun=False),
        "lease_soon": lambda: broker.lease_soon("mail", 1, _ignore),
        "cancel of a wait": lambda: stage.waiting.cancel(),
        "begin": lambda: broker.begin(lease),
        "ack": lambda: broker.ack(lease),
        "ack_many": lambda: broker.ack_many([lease]),
        "nack": lambda: broker.nack(lease),
        "release": lambda: broker.release(lease),
        "reject": lambda: broker.reject(lease),
        "extend": lambda: broker.extend(lease, 1),
        "extend_many": lambda: broker.extend_many([lease], 1),
        "lease.ack": lambda: lease.ack(),
        "lease.nack": lambda: lease.nack(),
        "lease.release": lambda: lease.release(),
        "lease.reject": lambda: lease.reject(),
        "lease.extend": lambda: lease.extend(1),
        "with lease": lambda: lease.__exit__(None, None, None),
        "tx.enqueue": lambda: tx.enqueue("mail", b""),
        "tx.enqueue with key": lambda: tx.enqueue("mail", b"", idempotency_key="k"),
        "tx.nack": lambda: tx.nack(lease),
        "end of a transaction": lambda: stage.transaction.__exit__(None, None, None),
        "configure_queue": lambda: broker.configure_queue("mail", max_jobs=1),
        "configure_queue, looking": lambda: broker.configure_queue("mail"),
        "pause": lambda: broker.pause("mail"),
        "resume": lambda: broker.resume("mail"),
        "purge": lambda: broker.purge("mail"),
        "cancel": lambda: broker.cancel(1),
        "redrive": lambda: broker.redrive("mail"),
        "remove_queue": lambda: broker.remove_queue("mail"),
        "find": lambda: broker.find("mail", "k"),
        "get": lambda: broker.get(1),
        "jobs": lambda: broker.jobs("mail"),
        "dead_letters": lambda: broker.dead_letters("mail"),
        "queues": lambda: broker.queues(),
        "stats": lambda: broker.stats(),
        "deliveries": lambda: broker.deliveries(),
        "sync": lambda: broker.sync(),
        "checkpoint": lambda: broker.checkpoint(),
        "compact": lambda: broker.compact(),
        "rotate": lambda: broker.rotate(),
        "metrics": lambda: broker.metrics(),
        "histograms": lambda: broker.histograms(),
        "backup": lambda: broker.backup("/dev/null/nowhere"),
        "with broker": lambda: broker.__enter__(),
    }
    for name, verb in {
        "enqueue": lambda: aio.enqueue("mail", b""),
        "lease": lambda: aio.lease("nothing", wait=None),
        "ack": lambda: aio.ack(lease),
        "extend": lambda: aio.extend(lease, 1),
        "stats": lambda: aio.stats(),
        "checkpoint": lambda: aio.checkpoint(),
    }.items():
        found[f"async {name}"] = lambda verb=verb: asyncio.run(verb())  # type: ignore[misc]  # bound now
    return found


class Holder:
    """Another thread, which holds what it is told to hold."""

    def __init__(self) -> None:
        self._wanted: list[tuple[str, Any]] = []
        self._go, self._done, self._let_go = threading.Event(), threading.Event(), threading.Event()
        self.held: list[str] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._go.wait()
            self._go.clear()
            got = []
            for name, lock in self._wanted:
                if lock.acquire(blocking=False) or lock.acquire(timeout=LOCK_S):
                    got.append(lock)
                    self.held.append(name)
            self._done.set()
            self._let_go.wait()
            self._let_go.clear()
            for lock in got:
                lock.release()
            self._done.set()

    @contextlib.contextmanager
    def holding(self, locks: list[tuple[str, Any]]) -> Iterator[list[str]]:
        self._wanted, self.held = locks, []
        self._step(self._go)
        pid = os.getpid()
        try:
            yield self.held
        finally:
            if os.getpid() == pid:  # in a child there is no such thread
                self._step(self._let_go)

    def _step(self, event: threading.Event) -> None:
        self._done.clear()
        event.set()
        if not self._done.wait(HANG_S):
            raise ViolationError("the holder of the locks does not answer")


def locks(engine: LiveEngine) -> list[tuple[str, Any]]:
    """All that a thread may hold when another one forks, in the order in which they are taken."""
    found: list[tuple[str, Any]] = [("close", engine._close_lock)]
    if isinstance(engine, LocalEngine):
        found.append(("keeper", engine._keeper_lock))
    found += [("engine", engine._lock), ("soon", engine._soon_lock)]
    if (soon := engine._soon) is not None:
        found += [("notifier", soon._lock), ("notifier's event", _of_event(soon._poked))]
    found += [("timer's event", _of_event(engine._timer_poked)), ("end's event", _of_event(engine._stopping))]
    if isinstance(engine, LocalEngine):
        found += [
            ("group", engine._group._lock), ("log, spares", engine._log.space._lock),
            ("log, writing", engine._log._write_lock), ("log, files", engine._log._files._lock),
            ("ahead", engine._ahead._lock), ("keeper's event", _of_event(engine._keeper_poked)),
            ("sync's event", _of_event(engine._sync_poked)),
        ]  # fmt: skip
    return found


def _of_event(event: threading.Event) -> Any:
    return event._cond._lock  # type: ignore[attr-defined]  # an Event has it


class Forks:
    """Traces a call and forks before its lines."""

    def __init__(self, seed: int, limit: int, first: int, of: int) -> None:
        self.made = 0
        self.limit = limit
        self.held: Counter[str] = Counter()
        self.lines: set[tuple[str, int]] = set()
        self.child = ""  # what was under way, in a child
        self._holder = Holder()
        self._rng = random.Random(f"{seed} {first} forks")
        self._number = itertools.count()
        self._first, self._of = first, of
        self._visits: Counter[tuple[str, int]] = Counter()
        self._what = ""
        self._stage: Stage | None = None
        self._busy = threading.Lock()
        self._main = threading.get_ident()

    @property
    def is_over(self) -> bool:
        return self.made >= self.limit

    def trace(self, stage: Stage, what: str, call: Callable[[], object]) -> None:
        """Make the call, in this thread and traced. In a child this never returns."""
        self._stage, self._what = stage, what
        self._visits.clear()
        try:
            sys.settrace(self)
            try:
                call()
            finally:
                sys.settrace(None)
        except BaseException as error:
            if self.child and isinstance(error, SystemExit):  # it leaves by the end of its interpreter
                raise
            if self.child:
                self._end(error)
            raise ViolationError(f"{what}: the parent was disturbed: {error!r}") from error
        if self.child:
            self._leave("")

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        file = frame.f_code.co_filename
        if file not in TRACED:
            return None
        if event == "line" and self._stage is not None and not self.child and not self.is_over:
            place = file, frame.f_lineno
            self._visits[place] += 1
            if self._visits[place] <= VISITS and next(self._number) % self._of == self._first:
                self._fork(f"{self._what}, {os.path.basename(file)}:{frame.f_lineno}, visit {self._visits[place]}")
                self.lines.add(place)
        return self

    def _fork(self, what: str) -> None:
        """One child, to its end; there this returns into the call that was under way."""
        sys.settrace(None)
        if self._busy.acquire(blocking=False):  # the other thread may be at it
            try:
                self._fork_once(what)
            finally:
                self._busy.release()
        if not self.child:
            sys.settrace(self)

    def _fork_once(self, what: str) -> None:
        stage = self._stage
        assert stage is not None
        self.made += 1
        all_locks = locks(_engine(stage.broker))
        wanted = all_locks if self._rng.random() < 0.7 else [self._rng.choice(all_locks)]
        with self._holder.holding(wanted) as held:
            before = stage.fingerprint() if "log, writing" in held or stage.is_writing() else None
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(read)
                self._in_child(stage, what, write)
                return  # what was under way goes on
            os.close(write)
            with os.fdopen(read) as told:
                said = told.read()
            _, status = os.waitpid(pid, 0)
            if status:
                how = "hung" if status == signal.SIGALRM else f"ended with status {status}"
                raise ViolationError(f"{what}, while {held} were held: the child {how}: {said or 'no word'}")
            if before is not None and before != (after := stage.fingerprint()):
                changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
                raise ViolationError(f"{what}: the child changed {changed}")
        self.held.update(held)

    # In the child

    def _in_child(self, stage: Stage, what: str, write: int) -> None:
        self.child, self._write = what, write
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(HANG_S)
        for name, probe in probes(stage).items():
            self._say(name)
            try:
                value = probe()
            except ForkedBrokerError:
                continue
            except BaseException as error:
                self._leave(f"{name} raises {error!r}")
            self._leave(f"{name} answers {value!r}")
        self._say("health")
        if stage.broker.health().state != "forked":
            self._leave(f"its health is {stage.broker.health()}")
        self._say("close")
        stage.broker.close()
        asyncio.run(stage.aio.close())
        if self._what.startswith("async"):
            self._leave("")  # an event loop cannot go on in a child
        self._say("the call that was under way")

    def _say(self, word: str) -> None:
        os.write(self._write, f"{word}; ".encode())

    def _end(self, error: BaseException) -> NoReturn:
        """What was under way raised."""
        self._leave("" if isinstance(error, ForkedBrokerError | ValueError) else f"it raised {error!r}")

    def _leave(self, trouble: str) -> NoReturn:
        if trouble:
            os.write(self._write, f"BUG: {trouble}".encode())
            os._exit(1)
        self._say("the end")
        if self.made % REAL_EXITS == 0 and threading.get_ident() == self._main:
            sys.exit(0)
        gc.collect()
        os._exit(0)


@contextlib.contextmanager
def _with_threads_of(forks: Forks) -> Iterator[None]:
    """No keeper, whose work is a call here; and the notifier's lines are traced, too."""
    start = LiveEngine._start_thread

    def begin(engine: LiveEngine, name: str, target: Callable[[], None]) -> None:
        def traced() -> None:
            sys.settrace(forks)
            target()
            sys.settrace(None)
            if forks.child:
                forks._leave("")

        if name != "rivetq-keeper":
            start(engine, name, traced if name == "rivetq-notifier" else target)

    with mock.patch.object(LiveEngine, "_start_thread", begin):
        yield


def _engine(broker: Broker) -> LiveEngine:
    assert isinstance(broker._engine, LiveEngine)
    return broker._engine


def _ignore(leases: object, error: object) -> None:
    """Nobody asks."""


def _await(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_S
    while not condition():
        if time.monotonic() > end:
            raise ViolationError("the stage was not set in time")
        time.sleep(0.001)


def sweep(forks: Forks, directory: Path, seed: int, only: Sequence[str]) -> int:
    """Lives until there are enough forks; how many lives. Raises ViolationError."""
    for number in itertools.count():
        for fsync in ("always", "never", "interval", "memory"):
            rng = random.Random(f"{seed} {number} {fsync}")
            where = ":memory:" if fsync == "memory" else directory / f"{number} {fsync}"
            with _with_threads_of(forks):
                stage = Stage(where, "always" if fsync == "memory" else fsync, rng)
                names = list(calls(stage))
                rng.shuffle(names)
                for name in only or names:
                    stage.stock()
                    forks.trace(stage, f"{name} (seed {seed}, life {number} {fsync})", calls(stage)[name])
                stats = stage.broker.stats()
                stage.close()
            if isinstance(where, Path):
                _is_whole(where, stats, f"seed {seed}, life {number} {fsync}")
            if forks.is_over:
                return number * 4
    raise AssertionError("it goes on until there are enough")


def _is_whole(path: Path, stats: QueueStats, what: str) -> None:
    found = verify(path)
    if found.log or found.index or found.mark:
        raise ViolationError(f"{what}: {found}")
    with Broker(path, release_on_open=False) as broker:
        again = broker.stats()
        came = again.ready - stats.ready  # what was delayed by a nack may be due by now
        expected = attrs.evolve(
            stats, oldest_age=again.oldest_age, ready=stats.ready + came, scheduled=stats.scheduled - came
        )
        if not 0 <= came <= NACKED or again != expected:
            raise ViolationError(f"{what}: opened again there is {again}, it was {stats}")


def part(forks: int, seed: int, first: int, of: int, directory: Path, only: Sequence[str]) -> None:
    """One process's share; prints what it did. Its directory is made and removed by another, since children exit."""
    logging.disable()
    found = Forks(seed, forks, first, of)
    try:
        sweep(found, directory, seed, only)
    except ViolationError as error:
        print(f"VIOLATION: {error}", flush=True)
        os._exit(1)
    lines = [f"{os.path.basename(file)}:{line}" for file, line in found.lines]
    print(json.dumps({"forks": found.made, "held": found.held, "lines": lines}), flush=True)


def run(
    forks: int, seed: int, processes: int, *, only: Sequence[str] = (), plant: str = ""
) -> tuple[Counter[str], set[str], int]:
    """Make so many forks; how often each lock was held, the lines, how many it were. Raises ViolationError.

    Args:
        only: these calls alone.
        plant: code that each process runs first.
    """
    with tempfile.TemporaryDirectory(prefix="rivetq-forks-", dir=fast_directory()) as directory:
        started = []
        for number in range(processes):
            place = Path(directory, str(number))
            place.mkdir()
            share = forks // processes + (number < forks % processes)
            begin = (
                f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); {plant}\nimport forks; forks.main()"
            )
            command = [sys.executable, "-c", begin, *only, "--forks", str(share), "--seed", str(seed)]
            command += ["--part", f"{number}/{processes}", "--directory", str(place)]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        held, lines, made = Counter[str](), set[str](), 0
        troubles = []
        for process in started:
            out, err = process.communicate(timeout=PATIENCE_S)
            if process.returncode or err:
                troubles.append(f"{out}{err}".strip() or f"a part ended with {process.returncode}")
                continue
            found = json.loads(out.splitlines()[-1])
            held.update(found["held"])
            lines.update(found["lines"])
            made += found["forks"]
    if troubles:
        raise ViolationError("; ".join(troubles))
    return held, lines, made


def main() -> None:
    parser = argparse.ArgumentParser(description="Fork at every line of a call, while others hold the locks.")
    parser.add_argument("calls", nargs="*", help="these calls alone, by their names in this file; without: all")
    parser.add_argument("--forks", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        part(given.forks, given.seed, *map(int, given.part.split("/")), given.directory, given.calls)
        return
    started = time.monotonic()
    try:
        held, lines, made = run(given.forks, given.seed, given.processes, only=given.calls)
    except ViolationError as error:
        sys.exit(str(error))
    for name, count in sorted(held.items()):
        print(f"  {name}: held by another thread in {count:,}")
    print(
        f"forks: {made:,} at {len(lines):,} lines (seed {given.seed}): 0 violations, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()

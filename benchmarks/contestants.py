"""What the benchmark asks of a queue system, and RivetQ's answer to it.

A contestant is one system in one mode (durable or relaxed). It gives queues, each of them empty and by itself; the
workloads know nothing else of it. What a system cannot do, its abilities say, and the workloads that need it are not
run on it: nothing is emulated at a price that the system's user would not pay.
"""

from __future__ import annotations

import importlib
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

QUEUE = "bench"
BUSY_POLL_S = 0.001  # between two looks of a consumer at full speed, where a system cannot wake it
CALL_PATIENCE_S = 15.0  # the longest that a call to a server may take before it counts as failed

Resource = TypeVar("Resource")


class SkippedError(Exception):
    """The contestant cannot take part here; the message says why."""


class Leases(StrEnum):
    """What happens to a job whose consumer dies."""

    TIMEOUT = "timeout"  # it is delivered again when its lease has run out
    ACK = "ack"  # it is kept until its ack, but somebody has to ask for its redelivery
    NONE = "none"  # it is gone: taking a job removes it


@dataclass(frozen=True)
class Abilities:
    """`poll_s`: the interval at which a waiting consumer looks; None where the system wakes it."""

    leases: Leases
    enqueue_batches: bool = True
    lease_batches: bool = True
    durable: bool = True
    poll_s: float | None = None


class Queue(ABC):
    """One queue of a contestant. Thread-safe; a job is acked by the thread that leased it."""

    @abstractmethod
    def enqueue(self, payload: bytes) -> None: ...

    @abstractmethod
    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        """All in one commit; where the system has no batches, one by one (to fill a queue, not to be measured)."""

    @abstractmethod
    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        """Up to `max_jobs` deliveries; waits that long for a first one."""

    @abstractmethod
    def ack(self, deliveries: Sequence[Any]) -> None: ...

    @abstractmethod
    def payload(self, delivery: Any) -> bytes: ...

    def tidy(self) -> None:  # noqa: B027 - most have nothing to tidy
        """What the system's manual tells its user to do now and then. Runs between rounds, and is not measured."""

    def counters(self) -> tuple[int, int]:
        """Records and syncs of the log so far; (0, 0) where nobody counts them."""
        return 0, 0

    @abstractmethod
    def close(self) -> None: ...


class Contestant(ABC):
    """A queue system in one mode, with its files in `directory`. Opening it may raise SkippedError."""

    name: ClassVar[str]
    title: ClassVar[str]
    abilities: ClassVar[Abilities]
    settings: ClassVar[str]  # how it is set up, for the reader of the table

    def __init__(self, directory: Path, *, durable: bool) -> None:
        self.directory = directory
        self.durable = durable
        self._queues = 0

    @abstractmethod
    def open(self, *, waiting: bool = False) -> Queue:
        """A new queue. `waiting`: its consumers will mostly wait (so wake them, or poll as the manual says)."""

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Names and versions of what is measured; raises SkippedError where something is missing."""

    def close(self) -> None:  # noqa: B027 - most have no server
        """Stop what serves the queues."""

    def place(self) -> Path:
        """A directory of its own for the next queue."""
        self._queues += 1
        place = self.directory / f"{self.name}-{self._queues}"
        place.mkdir()
        return place


class PerThread(Generic[Resource]):
    """A connection for each thread that asks: most clients serve one thread at a time."""

    def __init__(self, make: Callable[[], Resource]) -> None:
        self._make = make
        self._local = threading.local()
        self._lock = threading.Lock()  # guards _all
        self._all: list[Resource] = []

    def get(self) -> Resource:
        try:
            mine: Resource = self._local.mine
        except AttributeError:
            mine = self._local.mine = self._make()
            with self._lock:
                self._all.append(mine)
        return mine

    def take_all(self) -> list[Resource]:
        """All that were made, to close them."""
        with self._lock:
            taken, self._all = self._all, []
        return taken


def polled(look: Callable[[], Sequence[Any]], wait_s: float, poll_s: float) -> Sequence[Any]:
    """Look until there is something or the wait is over: how a consumer waits where nothing wakes it."""
    until = time.perf_counter() + wait_s
    while not (found := look()) and time.perf_counter() + poll_s < until:
        time.sleep(poll_s)
    return found


# -- what is installed ------------------------------------------------------------------------------------------------


def needed(module: str, *, package: str) -> ModuleType:
    """A module of a peer's package. Imported late, since a missing peer is skipped and not an error."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SkippedError(f"Python package {package} is not installed ({error})") from error


def program(name: str, *, package: str, places: Sequence[str] = ()) -> str:
    """The path of a server's program, on PATH or in one of the places where systems hide it."""
    found = shutil.which(name) or next((place for place in places if Path(place).is_file()), None)
    if found is None:
        raise SkippedError(f"no {name} on this machine (Debian package: {package})")
    return found


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from a source tree"


# -- RivetQ -----------------------------------------------------------------------------------------------------------


class RivetQueue(Queue):
    def __init__(self, path: Path, *, durable: bool) -> None:
        self.broker = needed("rivetq", package="rivetq").Broker(path, fsync="always" if durable else "never")

    def enqueue(self, payload: bytes) -> None:
        self.broker.enqueue(QUEUE, payload)

    def enqueue_many(self, payloads: Sequence[bytes]) -> None:
        self.broker.enqueue_many(QUEUE, payloads)

    def lease(self, max_jobs: int, wait_s: float = 0) -> Sequence[Any]:
        if max_jobs > 1:
            leases: Sequence[Any] = self.broker.lease_many(QUEUE, max_jobs, wait=wait_s)
            return leases
        lease = self.broker.lease(QUEUE, wait=wait_s)
        return [] if lease is None else [lease]

    def ack(self, deliveries: Sequence[Any]) -> None:
        if len(deliveries) > 1:
            self.broker.ack_many(deliveries)
        else:
            self.broker.ack(deliveries[0])

    def payload(self, delivery: Any) -> bytes:
        payload: bytes = delivery.payload
        return payload

    def counters(self) -> tuple[int, int]:
        counters = self.broker.metrics()
        return counters.get("records", 0), counters.get("fsyncs", 0)

    def close(self) -> None:
        self.broker.close()


class RivetQ(Contestant):
    name = "rivetq"
    title = "RivetQ"
    abilities = Abilities(Leases.TIMEOUT)
    settings = 'fsync="always" / "never", everything else by default'

    def open(self, *, waiting: bool = False) -> RivetQueue:
        return RivetQueue(self.place(), durable=self.durable)

    @classmethod
    def version(cls) -> str:
        module = needed("rivetq", package="rivetq")
        return f"rivetq {module.__version__}, lmdb {installed('lmdb')}, crc32c {installed('crc32c')}"

"""Metrics for Prometheus: what a broker counts, read when it is scraped, and how long the jobs of workers take.

>>> from rivetq import Broker
>>> with Broker(":memory:") as broker:
...     registry = prometheus_client.CollectorRegistry()
...     registry.register(BrokerCollector(broker))
...     _ = broker.enqueue("mail", {"to": "ada@example.org"})
...     registry.get_sample_value("rivetq_jobs", {"queue": "mail", "state": "ready"})
1

Needs the extra: ``pip install rivetq[metrics]``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import attrs

try:
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("rivetq.metrics needs prometheus_client: pip install rivetq[metrics]") from error

from rivetq import Broker, Deliveries, Health, Histogram, JobState, QueueStats, RivetQError, UsageError

from .tasks.app import App
from .texts import quoted
from .worker.options import Settled
from .worker.worker import Worker

OTHER = "other"
"""The label of all queues that have none of their own."""
MAX_QUEUES = 100
DURATION_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
"""Upper bounds in seconds."""

_COUNTERS = {
    "enqueued": "Jobs enqueued, over the whole life of the directory.",
    "acked": "Jobs done, over the whole life of the directory.",
    "cancelled": "Jobs cancelled, over the whole life of the directory.",
    "purged": "Jobs purged, over the whole life of the directory.",
    "leased": "Deliveries begun since the opening.",
    "nacked": "Deliveries answered as failed (nack, reject) since the opening.",
    "released": "Deliveries given back since the opening.",
    "expired": "Deliveries that ended at their deadline, or with their owner, since the opening.",
    "dead": "Jobs made a dead letter since the opening.",
    "rate_limited": "Calls that a rate limit refused a job since the opening.",
}
"""Each is an attribute of `QueueStats` or of `Deliveries`."""
_HISTOGRAMS = {
    "fsync_seconds": "Time of one sync of the log.",
    "jobs_per_fsync": "Jobs that one sync made durable.",
}


class _Counts(NamedTuple):
    """What was seen of one queue, or of several together."""

    stats: QueueStats
    deliveries: Deliveries

    def counter(self, name: str) -> int:
        value: int = getattr(self.deliveries if hasattr(self.deliveries, name) else self.stats, name)
        return value


class _Labels:
    """Which queues have a label of their own: the named ones, or the first so many that came."""

    def __init__(self, queues: Iterable[str] | None, max_queues: int) -> None:
        if isinstance(queues, str):
            raise UsageError(f"queues: several names expected, got the str {queues!r}")
        if not isinstance(max_queues, int) or isinstance(max_queues, bool) or max_queues < 0:
            raise UsageError(f"max_queues: an int of at least 0 expected, got {quoted(max_queues)}")
        self._lock = threading.Lock()  # guards the next: a server scrapes in many threads
        self._own = dict.fromkeys(queues or ())  # an ordered set; nothing is ever taken out
        self._own.pop(OTHER, None)
        self._most = len(self._own) if queues is not None else max_queues

    def of(self, queue: str) -> str:
        """The label of a queue; one that has none yet gets it, if there is room."""
        if queue in self._own:
            return queue
        with self._lock:
            if len(self._own) < self._most and queue != OTHER:
                self._own[queue] = None
            return queue if queue in self._own else OTHER

    def own(self) -> list[str]:
        """Those that have one."""
        with self._lock:
            return list(self._own)


class BrokerCollector(Collector):
    """A broker's counters, gauges and histograms, looked up at each scrape. It costs nothing in between.

    Each queue is a label value, and so a set of time series that Prometheus keeps. To bound them, queues have a label
    of their own as long as there are no more than `max_queues`, and keep it as long as the collector lives; those that
    come later are summed under ``queue="other"``, and so is a queue of that very name. So the sum over all queues is
    always the whole. A scrape looks at each queue once, also at those that are summed.

    A broker that is closed or failed, or was opened by the parent process, gives ``rivetq_up 0`` and nothing else. A
    broker in memory has no log, and so none of its metrics.

    A registry takes one of these: a second one would use the same names. For two brokers take two registries.

    Args:
        broker: stays yours to close.
        workers: whose running jobs are counted, as ``rivetq_worker_jobs``.
        queues: those with a label of their own, there or not yet; all others are summed. None: all, up to `max_queues`.
        max_queues: at least 0; of no meaning with `queues`.

    Raises:
        UsageError: an argument is wrong.
    """

    def __init__(
        self,
        broker: Broker,
        workers: Iterable[Worker] = (),
        *,
        queues: Iterable[str] | None = None,
        max_queues: int = MAX_QUEUES,
    ) -> None:
        if not isinstance(broker, Broker):
            raise UsageError(f"broker: a Broker expected, got {type(broker).__name__}")
        self._broker = broker
        self._workers = list(workers)
        self._labels = _Labels(queues, max_queues)

    def describe(self) -> Iterable[Metric]:
        """The metrics without values: a registry knows by it which names are taken."""
        return _families().values()

    def collect(self) -> Iterator[Metric]:
        """What a scrape gets. Raises nothing of the broker's."""
        families = _families()
        try:
            health = self._broker.health()
            if health.state == "open":
                self._fill(families, health)
        except RivetQError:  # closed or failed between two looks
            families = _families()
        if not families["rivetq_up"].samples:
            _gauge(families, "rivetq_up", 0)
        yield from (family for family in families.values() if family.samples)

    def _fill(self, families: Mapping[str, Any], health: Health) -> None:
        for queue, counts in self._by_label().items():
            for name in _COUNTERS:
                families[f"rivetq_jobs_{name}"].add_metric([queue], counts.counter(name))
            for state in JobState:
                families["rivetq_jobs"].add_metric([queue, state.value], getattr(counts.stats, state.value))
            _gauge(families, "rivetq_oldest_ready_age_seconds", counts.stats.oldest_age or 0, [queue])
        numbers = self._broker.metrics()
        if "log_bytes" in numbers:
            _gauge(families, "rivetq_log_segments", numbers["log_segments"])
            _gauge(families, "rivetq_log_bytes", numbers["log_bytes"])
            _gauge(families, "rivetq_checkpoint_lag_bytes", health.checkpoint_lag_bytes)
        if health.disk_free_bytes is not None:
            _gauge(families, "rivetq_disk_free_bytes", health.disk_free_bytes)
        for name, histogram in self._broker.histograms().items():
            if name in _HISTOGRAMS:
                families[f"rivetq_{name}"].add_metric([], _buckets(histogram), histogram.sum)
        if self._workers:
            _gauge(families, "rivetq_worker_jobs", sum(worker.running for worker in self._workers))
        _gauge(families, "rivetq_up", 1)

    def _by_label(self) -> dict[str, _Counts]:
        names = self._broker.queues()
        for name in names:
            self._labels.of(name)
        found = {name: self._look(name) for name in self._labels.own()}
        # Not the total less those above: two looks are two moments, and the difference could go down.
        rest = [self._look(name) for name in names if name not in found]
        if rest:
            found[OTHER] = _sum(rest)
        return found

    def _look(self, queue: str) -> _Counts:
        return _Counts(self._broker.stats(queue), self._broker.deliveries(queue))


class JobDurations:
    """How long handlers run: the histogram ``rivetq_job_duration_seconds`` by queue, task and ending.

    For `Worker.on_settled`, of one worker or of several: ``worker.on_settled.append(JobDurations())``. The endings are
    those of `Settled`. Its labels are the tasks of the workers' apps, which the program bounds, and queues, which
    those who enqueue may choose: the first `max_queues` that a job ran of have a label of their own, as long as it
    lives; the jobs of all others, and of a queue of that very name, are counted under ``queue="other"``.

    Args:
        registry: that exposes it; None: none, register `histogram` yourself.
        buckets: upper bounds in seconds.
        queues: those with a label of their own. None: the first `max_queues`.
        max_queues: at least 0; of no meaning with `queues`.

    Raises:
        ValueError: the registry has one already, or the buckets are not in order.
        UsageError: an argument is wrong.
    """

    def __init__(
        self,
        registry: prometheus_client.CollectorRegistry | None = prometheus_client.REGISTRY,
        *,
        buckets: Sequence[float] = DURATION_BUCKETS,
        queues: Iterable[str] | None = None,
        max_queues: int = MAX_QUEUES,
    ) -> None:
        self._labels = _Labels(queues, max_queues)
        self.histogram = prometheus_client.Histogram(
            "rivetq_job_duration_seconds",
            "Time that handlers ran.",
            ["queue", "task", "ending"],
            registry=registry,
            buckets=buckets,
        )

    def __call__(self, settled: Settled) -> None:
        """Count one job."""
        self.histogram.labels(self._labels.of(settled.queue), settled.task, settled.ending).observe(settled.seconds)


class MetricsServer:
    """What `serve` gives: an HTTP server in a thread. Also a context manager that closes it."""

    def __init__(
        self, address: str, port: int, registry: prometheus_client.CollectorRegistry, undo: list[Callable[[], object]]
    ) -> None:
        self._server, self._thread = prometheus_client.start_http_server(port, address, registry)
        self._undo = undo
        self.address = address
        self.port: int = self._server.server_port
        """The one that was asked for; for 0, the one that the system gave."""

    def close(self) -> None:
        """End the server, free its port, and take back what `serve` added elsewhere. May be repeated."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        _run_all(self._undo)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def serve(
    source: App | Broker,
    port: int,
    *,
    workers: Sequence[Worker] = (),
    address: str = "127.0.0.1",
    registry: prometheus_client.CollectorRegistry | None = None,
    queues: Iterable[str] | None = None,
    max_queues: int = MAX_QUEUES,
) -> MetricsServer:
    """Serve the metrics of a broker and of workers over HTTP, for Prometheus to scrape, from a thread.

    Anybody who reaches the port can read them: queue and task names and counts, no payloads.

    Args:
        source: a broker, or an app, whose broker is opened for it.
        port: 0: any that is free, see `MetricsServer.port`.
        workers: whose jobs are timed (`JobDurations`) and counted.
        address: to listen on. The default is reached from this machine only; "0.0.0.0" from everywhere.
        registry: to which the metrics are added and which is served, `prometheus_client.REGISTRY` say, with what else
            the program exposes. None: one of its own, with memory, processor time and open files of the process.
        queues, max_queues: see `BrokerCollector` and `JobDurations`.

    Raises:
        OSError: the port is taken, or the address is none of this machine.
        UsageError, ValueError: an argument is wrong, or the registry has such metrics already.
    """
    broker = source.broker if isinstance(source, App) else source
    queues = queues if queues is None or isinstance(queues, str) else list(queues)  # it is read twice
    collector = BrokerCollector(broker, workers, queues=queues, max_queues=max_queues)
    if registry is None:
        registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
    undo: list[Callable[[], object]] = []
    try:
        registry.register(collector)
        undo.append(partial(registry.unregister, collector))
        if workers:
            durations = JobDurations(registry, queues=queues, max_queues=max_queues)
            undo.append(partial(registry.unregister, durations.histogram))
            for worker in workers:
                worker.on_settled.append(durations)
                undo.append(partial(_remove, worker, durations))
        return MetricsServer(address, port, registry, undo)
    except BaseException:
        _run_all(undo)
        raise


def _run_all(undo: list[Callable[[], object]]) -> None:
    while undo:
        undo.pop()()


def _remove(worker: Worker, durations: JobDurations) -> None:
    with suppress(ValueError):  # it was removed elsewhere
        worker.on_settled.remove(durations)


def _families() -> dict[str, Any]:
    """Every metric of a broker, without values, by name (a counter without its "_total")."""
    found: list[Metric] = [
        GaugeMetricFamily("rivetq_up", "1 if the broker serves, 0 if it is closed or failed."),
        GaugeMetricFamily("rivetq_jobs", "Jobs there are, by state.", labels=["queue", "state"]),
        GaugeMetricFamily(
            "rivetq_oldest_ready_age_seconds",
            "Time since the oldest ready job was enqueued; 0 if none is ready.",
            labels=["queue"],
        ),
    ]
    found += [CounterMetricFamily(f"rivetq_jobs_{name}", text, labels=["queue"]) for name, text in _COUNTERS.items()]
    found += [
        GaugeMetricFamily("rivetq_log_segments", "Files of the log."),
        GaugeMetricFamily("rivetq_log_bytes", "Size of the log."),
        GaugeMetricFamily("rivetq_checkpoint_lag_bytes", "Log that an opening after a crash would replay."),
        GaugeMetricFamily("rivetq_disk_free_bytes", "Space that is left where the directory is."),
        GaugeMetricFamily("rivetq_worker_jobs", "Jobs that the workers of this process hold: leased, not answered."),
    ]
    found += [HistogramMetricFamily(f"rivetq_{name}", text, labels=[]) for name, text in _HISTOGRAMS.items()]
    return {family.name: family for family in found}


def _gauge(families: Mapping[str, Any], name: str, value: float, labels: Sequence[str] = ()) -> None:
    families[name].add_metric(labels, value)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    found = [(str(float(bound)), n) for bound, n in zip(histogram.bounds, histogram.counts, strict=True)]
    return [*found, ("+Inf", histogram.count)]


def _sum(counts: Sequence[_Counts]) -> _Counts:
    """Of all fields; of the oldest ages the greatest."""
    ages = [each.stats.oldest_age for each in counts if each.stats.oldest_age is not None]
    names = [field.name for field in attrs.fields(QueueStats) if field.name != "oldest_age"]
    stats = {name: sum(getattr(each.stats, name) for each in counts) for name in names}
    deliveries = zip(*(attrs.astuple(each.deliveries) for each in counts), strict=True)
    return _Counts(QueueStats(oldest_age=max(ages, default=None), **stats), Deliveries(*map(sum, deliveries)))

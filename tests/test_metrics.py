"""Metrics: what a scrape shows of a broker and of workers, and a dashboard that asks for nothing else."""

from __future__ import annotations

import importlib
import json
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import inside

from rivetq import Broker, BrokerFailedError, RateLimit, RateLimitedError, RetryPolicy, UsageError
from rivetq.tasks import App
from rivetq.testing import ManualClock
from rivetq.worker import Settled, Worker

pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from rivetq.metrics import DURATION_BUCKETS, BrokerCollector, JobDurations, serve

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana.json"
PATIENCE_S = 30.0


class Scrape:
    """What Prometheus sees: samples by name and labels, read back from the text."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }
        self.names = {name for name, _ in self.samples}

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))

    def labels(self, name: str, label: str) -> list[str]:
        return [dict(labels)[label] for found, labels in self.samples if found == name]


def scraped(collector: Any) -> Scrape:
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    return Scrape(prometheus_client.generate_latest(registry).decode())


def fetched(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return Scrape(answer.read().decode())


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def broker(clock: ManualClock) -> Iterator[Broker]:
    with Broker(":memory:", clock=clock) as broker:
        yield broker


# -- Queues


def test_jobs_are_counted_by_queue_and_state(broker: Broker, clock: ManualClock) -> None:
    broker.enqueue_many("mail", [1, 2, 3])
    broker.enqueue("mail", 4, delay=60)
    broker.enqueue("shop", 5)
    broker.lease("mail")
    lease = broker.lease("shop")
    assert lease is not None
    lease.reject(error="never")
    clock.advance(7)
    found = scraped(BrokerCollector(broker))
    assert [found("rivetq_jobs", queue="mail", state=s) for s in ("ready", "scheduled", "leased", "dead")] == [
        2, 1, 1, 0,
    ]  # fmt: skip
    assert [found("rivetq_jobs", queue="shop", state=s) for s in ("ready", "dead")] == [0, 1]
    assert found("rivetq_oldest_ready_age_seconds", queue="mail") == 7
    assert found("rivetq_oldest_ready_age_seconds", queue="shop") == 0


def test_every_ending_of_a_delivery_has_its_counter(broker: Broker, clock: ManualClock) -> None:
    broker.configure_queue("mail", retry=RetryPolicy(base=0), rate_limit=RateLimit(1e-9, 7, on="enqueue"))
    ids = broker.enqueue_many("mail", range(7))
    leases = broker.lease_many("mail", 5, visibility_timeout=10)
    broker.ack(leases[0])
    broker.nack(leases[1])
    broker.release(leases[2])
    broker.reject(leases[3])
    clock.advance(11)  # the fifth expires
    with pytest.raises(RateLimitedError):
        broker.enqueue("mail", 8)
    broker.cancel(ids[6])
    broker.purge("mail", state="dead")
    found = scraped(BrokerCollector(broker))
    counters = {
        "enqueued": 7, "acked": 1, "cancelled": 1, "purged": 1, "leased": 5, "nacked": 2, "released": 1, "expired": 1,
        "dead": 1, "rate_limited": 1,
    }  # fmt: skip
    assert {name: found(f"rivetq_jobs_{name}_total", queue="mail") for name in counters} == counters


def test_enqueued_and_acked_survive_an_opening_and_deliveries_begin_anew(tmp_path: Path) -> None:
    for opening in (1, 2):
        with Broker(tmp_path) as broker:
            broker.enqueue("mail", b"")
            lease = broker.lease("mail")
            assert lease is not None
            lease.ack()
            found = scraped(BrokerCollector(broker))
            assert found("rivetq_jobs_enqueued_total", queue="mail") == opening
            assert found("rivetq_jobs_acked_total", queue="mail") == opening
            assert found("rivetq_jobs_leased_total", queue="mail") == 1


def test_a_queue_may_have_any_name(broker: Broker) -> None:
    name = 'ü "\\" \n{}'
    broker.enqueue(name, 1)
    assert scraped(BrokerCollector(broker))("rivetq_jobs", queue=name, state="ready") == 1


# -- How many queues


def test_queues_beyond_the_limit_are_summed_and_the_sum_is_always_the_whole(broker: Broker, clock: ManualClock) -> None:
    for number in range(5):
        broker.enqueue_many(f"q{number}", range(number + 1))
        clock.advance(1)
    broker.lease("q4")
    found = scraped(BrokerCollector(broker, max_queues=2))
    assert found.labels("rivetq_jobs_enqueued_total", "queue") == ["q0", "q1", "other"]
    assert found("rivetq_jobs", queue="other", state="ready") == 3 + 4 + 5 - 1
    assert found("rivetq_jobs_leased_total", queue="other") == 1
    assert found("rivetq_oldest_ready_age_seconds", queue="other") == 3
    assert sum(v for (name, _), v in found.samples.items() if name == "rivetq_jobs_enqueued_total") == 15


def test_a_queue_keeps_its_label_and_no_counter_goes_down_when_queues_come(broker: Broker) -> None:
    collector = BrokerCollector(broker, max_queues=2)
    broker.enqueue("m", 1)
    before: dict[Any, float] = {}
    for name in ("z", "a", "b", "n"):
        broker.enqueue_many(name, [1, 2])
        found = scraped(collector)
        counters = {key: value for key, value in found.samples.items() if key[0].endswith("_total")}
        assert all(counters[key] >= value for key, value in before.items())
        before = counters
    assert found.labels("rivetq_jobs_enqueued_total", "queue") == ["m", "z", "other"]


def test_named_queues_have_labels_before_they_exist_and_all_others_are_summed(broker: Broker) -> None:
    broker.enqueue("mail", 1)
    broker.enqueue("tenant-17", 1)
    found = scraped(BrokerCollector(broker, queues=["shop", "mail"]))
    assert found.labels("rivetq_jobs_enqueued_total", "queue") == ["shop", "mail", "other"]
    assert found("rivetq_jobs_enqueued_total", queue="shop") == 0
    assert found("rivetq_jobs_enqueued_total", queue="other") == 1
    assert "shop" not in broker.queues()


def test_a_queue_named_other_is_one_of_the_others(broker: Broker) -> None:
    for name in ("mail", "other", "shop"):
        broker.enqueue(name, 1)
    found = scraped(BrokerCollector(broker))
    assert found.labels("rivetq_jobs_enqueued_total", "queue") == ["mail", "shop", "other"]
    found = scraped(BrokerCollector(broker, queues=["other", "mail"]))
    assert found("rivetq_jobs_enqueued_total", queue="other") == 2


@pytest.mark.parametrize(
    "arguments", [{"broker": "data"}, {"queues": "mail"}, {"max_queues": -1}, {"max_queues": True}], ids=str
)
def test_wrong_arguments_are_refused(broker: Broker, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        BrokerCollector(**{"broker": broker, **arguments})


# -- The log


def test_a_directory_shows_its_log_and_its_syncs(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker:
        broker.enqueue_many("mail", range(100))
        broker.rotate()
        broker.enqueue("mail", 1)
        broker.sync()
        found = scraped(BrokerCollector(broker))
        numbers, histograms = broker.metrics(), broker.histograms()
        assert found("rivetq_log_segments") == numbers["log_segments"] == 2
        assert found("rivetq_log_bytes") == numbers["log_bytes"] > 0
        assert found("rivetq_checkpoint_lag_bytes") == numbers["checkpoint_lag_bytes"] > 0
        assert (found("rivetq_disk_free_bytes") or 0) > 0
    for name in ("fsync_seconds", "jobs_per_fsync"):
        histogram, name = histograms[name], f"rivetq_{name}"
        assert found.families[name].type == "histogram"
        assert found(f"{name}_count") == found(f"{name}_bucket", le="+Inf") == histogram.count > 0
        assert found(f"{name}_sum") == pytest.approx(histogram.sum)
        buckets = {float(le): found(f"{name}_bucket", le=le) for le in found.labels(f"{name}_bucket", "le")}
        assert {le: n for le, n in buckets.items() if le in histogram.bounds} == dict(
            zip(histogram.bounds, histogram.counts, strict=True)
        )


def test_a_sync_counts_the_jobs_that_it_made_durable(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker:
        broker.enqueue("mail", 1)
        before = scraped(BrokerCollector(broker))("rivetq_jobs_per_fsync_sum") or 0
        broker.enqueue_many("mail", range(100))
        assert scraped(BrokerCollector(broker))("rivetq_jobs_per_fsync_sum") == before + 100


def test_a_broker_in_memory_has_no_log(broker: Broker) -> None:
    broker.enqueue("mail", 1)
    found = scraped(BrokerCollector(broker))
    assert found("rivetq_up") == 1
    assert not [name for name in found.names if re.search("log|fsync|disk|checkpoint", name)]


# -- A broker that does not serve


def test_a_closed_broker_is_down_and_the_scrape_goes_on(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    broker.enqueue("mail", 1)
    collector = BrokerCollector(broker)
    assert scraped(collector)("rivetq_up") == 1
    broker.close()
    assert scraped(collector).samples == {("rivetq_up", frozenset()): 0}


def test_a_failed_broker_is_down_and_the_scrape_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int) -> None:
        raise OSError("no disk")

    with Broker(tmp_path) as broker:
        monkeypatch.setattr(inside(broker)._disk, "fdatasync", fails, raising=False)
        with pytest.raises(BrokerFailedError):
            broker.enqueue("mail", 1)
        assert scraped(BrokerCollector(broker)).samples == {("rivetq_up", frozenset()): 0}


def test_a_broker_that_is_closed_during_a_scrape_is_down(broker: Broker) -> None:
    class Closing(Broker):
        """Closed by another thread, between two looks of the collector."""

        def metrics(self) -> dict[str, int]:
            self.close()
            return super().metrics()

    closing = Closing(":memory:")
    closing.enqueue("mail", 1)
    assert scraped(BrokerCollector(closing)).samples == {("rivetq_up", frozenset()): 0}


def test_a_registry_takes_one_broker(broker: Broker) -> None:
    registry = prometheus_client.CollectorRegistry()
    registry.register(BrokerCollector(broker))
    with pytest.raises(ValueError, match="rivetq_up"):
        registry.register(BrokerCollector(broker))


def test_many_scrapes_at_a_time_while_queues_come_and_the_broker_closes() -> None:
    broker = Broker(":memory:")
    collector, errors = BrokerCollector(broker, max_queues=50), []

    def scrape() -> None:
        try:
            for _ in range(20):
                scraped(collector)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(100):
        broker.enqueue(f"q{number}", 1)
    broker.close()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert errors == []


# -- Workers


def test_durations_are_counted_by_queue_task_and_ending() -> None:
    registry = prometheus_client.CollectorRegistry()
    durations = JobDurations(registry, buckets=(1, 2))
    for seconds in (0.5, 1.5, 9):
        durations(Settled("mail", "send", "ack", seconds))
    durations(Settled("mail", "send", "nack", 0.25))
    labels = {"queue": "mail", "task": "send", "ending": "ack"}
    value, name = registry.get_sample_value, "rivetq_job_duration_seconds"
    assert [value(f"{name}_bucket", {**labels, "le": le}) for le in ("1.0", "2.0", "+Inf")] == [1, 2, 3]
    assert value(f"{name}_sum", labels) == 11
    assert value(f"{name}_count", {**labels, "ending": "nack"}) == 1


def settled_once(worker: Worker) -> threading.Event:
    """Set when the worker has told all listeners so far of a job."""
    told = threading.Event()
    worker.on_settled.append(lambda settled: told.set())
    return told


@pytest.mark.parametrize("most", [0, 3])
def test_durations_of_queues_beyond_the_limit_are_counted_together(most: int) -> None:
    registry = prometheus_client.CollectorRegistry()
    durations = JobDurations(registry, max_queues=most)
    series = []
    for turn in range(2):
        for n in range(1000):
            durations(Settled(f"tenant-{n}", "send", "ack", 1.0))
        durations(Settled("other", "send", "ack", 1.0))
        series.append(sum(len(family.samples) for family in registry.collect()))
        for n in range(most):
            assert durations_of(registry, f"tenant-{n}") == turn + 1
        assert durations_of(registry, "other") == (turn + 1) * (1001 - most)
    assert series[0] == series[1] == (most + 1) * (len(DURATION_BUCKETS) + 4)


def test_named_queues_have_durations_of_their_own_and_all_others_together() -> None:
    registry = prometheus_client.CollectorRegistry()
    durations = JobDurations(registry, queues=["b", "other"], max_queues=5)
    for queue in ("a", "b", "c", "other"):
        durations(Settled(queue, "send", "ack", 1.0))
    assert (durations_of(registry, "b"), durations_of(registry, "other")) == (1, 3)
    with pytest.raises(UsageError, match="max_queues"):
        JobDurations(None, max_queues=-1)
    with pytest.raises(UsageError, match="several names"):
        JobDurations(None, queues="mail")


def durations_of(registry: prometheus_client.CollectorRegistry, queue: str) -> float | None:
    labels = {"queue": queue, "task": "send", "ending": "ack"}
    return registry.get_sample_value("rivetq_job_duration_seconds_count", labels)


def test_a_server_bounds_the_queues_of_both(broker: Broker) -> None:
    app = App(broker)

    @app.task(queue="b", name="send")
    def send() -> None: ...

    worker, registry = Worker(app), prometheus_client.CollectorRegistry()
    with serve(broker, 0, workers=[worker], registry=registry, queues=iter(["b"])):
        [durations] = worker.on_settled
        for queue in ("a", "b"):
            durations(Settled(queue, "send", "ack", 1.0))
            broker.enqueue(queue, b"")
        assert (durations_of(registry, "a"), durations_of(registry, "b"), durations_of(registry, "other")) == (
            None,
            1,
            1,
        )
        assert registry.get_sample_value("rivetq_jobs_enqueued_total", {"queue": "other"}) == 1
        assert registry.get_sample_value("rivetq_jobs_enqueued_total", {"queue": "b"}) == 1


def test_a_served_worker_shows_its_jobs_and_the_server_takes_back_all_that_it_added() -> None:
    with App(":memory:") as app:

        @app.task(queue="mail")
        def send() -> None: ...

        worker = Worker(app, concurrency=1)
        registry = prometheus_client.CollectorRegistry()
        with serve(app, 0, workers=[worker], registry=registry) as server, worker:
            told = settled_once(worker)
            send.enqueue()
            assert told.wait(PATIENCE_S)
            found = fetched(f"http://127.0.0.1:{server.port}/metrics")
            assert found("rivetq_job_duration_seconds_count", queue="mail", task="send", ending="ack") == 1
            assert found("rivetq_jobs_acked_total", queue="mail") == 1
            assert found("rivetq_worker_jobs") == 0
        server.close()  # may be repeated
        assert len(worker.on_settled) == 1
        assert list(registry.collect()) == []


# -- The server


def test_a_server_listens_on_the_loopback_interface_until_it_is_closed(broker: Broker) -> None:
    with serve(broker, 0) as server:
        assert server.address == "127.0.0.1"
        assert server._server.server_address[0] == "127.0.0.1"
        found = fetched(f"http://127.0.0.1:{server.port}/metrics")
        assert found("rivetq_up") == 1
        assert "process_resident_memory_bytes" in found.names or not sys.platform.startswith("linux")
        broker.close()
        assert fetched(f"http://127.0.0.1:{server.port}/metrics")("rivetq_up") == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), 1)


def test_a_port_that_is_taken_is_an_error_and_nothing_stays_behind(broker: Broker) -> None:
    registry, worker = prometheus_client.CollectorRegistry(), Worker(App(":memory:"))
    with serve(broker, 0) as server, pytest.raises(OSError, match="in use"):
        serve(broker, server.port, workers=[worker], registry=registry)
    assert list(registry.collect()) == []
    assert worker.on_settled == []


# -- The dashboard


def everything(tmp_path: Path) -> Scrape:
    """A scrape in which each metric has a sample."""
    with App(tmp_path) as app:

        @app.task
        def send() -> None: ...

        worker = Worker(app)
        with serve(app, 0, workers=[worker]) as server, worker:
            told = settled_once(worker)
            send.enqueue()
            assert told.wait(PATIENCE_S)
            return fetched(f"http://127.0.0.1:{server.port}/metrics")


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return found + [variable.get("definition", "") for variable in dashboard["templating"]["list"]]


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it(tmp_path: Path) -> None:
    scrape = everything(tmp_path)
    asked = {name for query in queries() for name in re.findall(r"rivetq_\w+", query)}
    assert asked - scrape.names == set()
    families = {name: family for name, family in scrape.families.items() if name.startswith("rivetq_")}
    shown = {name for name, family in families.items() if {sample.name for sample in family.samples} & asked}
    created = {name for name in families if name.endswith("_created")}
    assert set(families) - created == shown


def test_the_dashboard_asks_by_labels_that_there_are(tmp_path: Path) -> None:
    scrape = everything(tmp_path)
    of_prometheus = {"instance"}
    for query in queries():
        for name, selector in re.findall(r"(rivetq_\w+)\{([^}]*)\}", query):
            known = {label for found, labels in scrape.samples if found == name for label in dict(labels)}
            assert set(re.findall(r"(\w+)=~?\"", selector)) <= known | of_prometheus, query
        for labels in re.findall(r"by \(([^)]*)\)", query):
            assert set(labels.split(", ")) <= {"instance", "queue", "task", "ending", "state", "le"}, query
        assert all(query.count(a) == query.count(b) for a, b in ("()", "{}", "[]")), query


def test_the_dashboard_leaves_the_data_source_and_the_queues_to_the_reader() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["schemaVersion"] >= 39
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "instance", "queue"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert all(panel["description"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) == 23


def test_without_prometheus_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "rivetq.metrics")
    with pytest.raises(ImportError, match=r"pip install rivetq\[metrics\]"):
        importlib.import_module("rivetq.metrics")

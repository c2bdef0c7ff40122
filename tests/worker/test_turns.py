"""Whose turn it is among queues, and how many jobs are leased in advance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rivetq import Broker
from rivetq.tasks import App
from rivetq.tasks.running import GIVEN_BACK, Delivery
from rivetq.worker.order import (
    LONGEST_WAIT_S,
    OWED_JOBS,
    PREFETCH_BYTES,
    PREFETCH_JOBS,
    PREFETCH_S,
    TURN_JOBS,
    Order,
    Room,
)

# -- Shares


class Queue:
    """Jobs without end, or `rate` new ones for each 1000 that are leased, or none while it rests."""

    def __init__(self, weight: float, rate: int | None, rests: bool, pools: frozenset[str]) -> None:
        self.weight = weight
        self.rate = rate
        self.rests = rests
        self.pools = pools
        self.left = 0.0
        self.got = 0

    def take(self, most: int) -> int:
        count = most if self.rate is None else min(most, int(self.left))
        if self.rests:
            count = 0
        self.left -= count
        self.got += count
        return count


class Desk:
    """Leases for queues in their order, as a worker does with a broker."""

    def __init__(self, queues: dict[str, Queue], rng: random.Random) -> None:
        self.queues = queues
        self.order = Order({name: queue.weight for name, queue in queues.items()})
        self.rng = rng

    def turn(self, pool: str, room: int, names: Sequence[str] | None = None) -> int:
        """One call for what has room in a pool; how many jobs it gave. Now and then some are given back."""
        mine = [name for name, queue in self.queues.items() if pool in queue.pools and (names is None or name in names)]
        turn = self.order.turns(pool, mine)
        most = self.order.most(turn, room)
        given: Counter[str] = Counter()
        for name in turn:
            if (left := most - given.total()) and (count := self.queues[name].take(left)):
                given[name] = count
        self.order.gave(turn, given, most, lambda name: self.queues[name].pools)
        if self.rng.random() < 0.1:
            for name in list(given):
                back = self.rng.randint(0, given[name])
                self.order.took_back(name, back, self.queues[name].pools)
                self.queues[name].got -= back
                self.queues[name].left += back
                given[name] -= back
        total = given.total()
        for queue in self.queues.values():
            if queue.rate is not None:
                queue.left += queue.rate * total / 1000
        return total


def fair(queues: Sequence[Queue], total: int) -> list[float]:
    """What each should get of so many: its share by weight, or all it has if that is less; the rest is shared again."""
    wants = [
        0.0 if queue.rests else float("inf") if queue.rate is None else queue.rate * total / 1000 for queue in queues
    ]
    got = [0.0] * len(queues)
    open_ = set(range(len(queues)))
    while open_:
        level = (total - sum(got)) / sum(queues[i].weight for i in open_)
        if not (short := {i for i in open_ if wants[i] <= level * queues[i].weight}):
            for i in open_:
                got[i] = level * queues[i].weight
            break
        for i in short:
            got[i] = wants[i]
        open_ -= short
    return got


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    weights=st.lists(st.sampled_from([0.5, 1, 1, 2, 3, 5, 10]), min_size=2, max_size=8),
    rates=st.lists(st.sampled_from([None, None, 1, 20, 200]), min_size=8, max_size=8),
    resting=st.sets(st.integers(0, 7), max_size=6),
    seed=st.integers(0, 2**32),
    most=st.sampled_from([1, 2, 8, 100, 520]),
)
def test_shares_are_by_weight_whatever_queues_are_idle_limited_or_paused(
    weights: list[float], rates: list[int | None], resting: set[int], seed: int, most: int
) -> None:
    rng = random.Random(seed)
    queues = {
        f"q{i}": Queue(weight, None if i == 0 else rates[i], i > 0 and i in resting, frozenset({"thread"}))
        for i, weight in enumerate(weights)
    }
    desk, total = Desk(queues, rng), 0
    while total < 20_000:
        total += desk.turn("thread", rng.randint(1, most))
    for queue, share in zip(queues.values(), fair(list(queues.values()), total), strict=True):
        assert abs(queue.got - share) <= 0.05 * share + TURN_JOBS, (queue.weight, queue.got, share)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), weight=st.sampled_from([0.1, 1, 10]))
def test_what_a_queue_did_not_use_is_neither_saved_up_nor_owed(seed: int, weight: float) -> None:
    rng = random.Random(seed)
    queues = {name: Queue(weight, None, False, frozenset({"thread"})) for name in ("a", "b", "c")}
    desk = Desk(queues, rng)
    desk.rng.random = lambda: 1.0  # type: ignore[method-assign]  # nothing is given back
    for _ in range(3):
        queues["b"].rests = True
        for _ in range(200):
            desk.turn("thread", rng.randint(1, 64))
        queues["b"].rests = False
        before = {name: queue.got for name, queue in queues.items()}
        total = 0
        while total < 1500:
            total += desk.turn("thread", rng.randint(1, 64))
        for name, queue in queues.items():
            assert abs(queue.got - before[name] - total / 3) <= 2 * TURN_JOBS, name


def test_a_queue_whose_pool_was_full_for_long_starves_no_other_when_it_is_free() -> None:
    queues = {
        "mixed": Queue(1, None, False, frozenset({"thread", "loop"})),
        "loop": Queue(1, None, False, frozenset({"loop"})),
    }
    desk = Desk(queues, random.Random(0))
    desk.rng.random = lambda: 1.0  # type: ignore[method-assign]  # no chance in it
    for _ in range(4):
        desk.turn("loop", 10)
    for _ in range(1000):
        desk.turn("loop", 100, ["loop"])  # threads are full
    before = queues["mixed"].got
    while queues["mixed"].got - before < OWED_JOBS + TURN_JOBS:
        desk.turn("loop", 10)
    got = queues["loop"].got
    for _ in range(20):
        desk.turn("loop", 10)
    assert queues["loop"].got > got


def test_a_turn_is_short_while_another_queue_waits_for_its_own() -> None:
    order = Order({"a": 10, "b": 1, "c": 1})
    assert order.most(["a", "b", "c"], 520) == TURN_JOBS
    assert order.most(["b", "a", "c"], 520) == TURN_JOBS // 10
    assert order.most(["a", "b", "c"], 5) == 5
    order.gave(["b", "c"], {"b": 3}, 520, lambda name: ["thread"])  # they have no more
    assert order.idle == {"b", "c"}
    assert order.most(["b", "c", "a"], 520) == 520
    order.took_back("b", 1, ["thread"])  # and now it has
    assert order.most(["b", "a", "c"], 520) == TURN_JOBS // 10


def test_a_queue_gets_back_what_it_paid_for_jobs_that_did_not_begin() -> None:
    order = Order({"a": 1, "b": 1})
    order.gave(["a", "b"], {"a": 100}, 100, lambda name: ["thread"])
    order.took_back("a", 100, ["thread"])
    order.gave(["b", "a"], {"b": 10}, 10, lambda name: ["thread"])
    assert order.turns("thread", ["b", "a"]) == ["a", "b"]


def test_without_weights_the_order_is_that_of_preference() -> None:
    order = Order(["b", "a"])
    for _ in range(3):
        assert order.turns("thread", ["b", "a"]) == ["b", "a"]
        assert order.most(["b", "a"], 100) == 100
        order.gave(["b", "a"], {"b": 100}, 100, lambda name: ["thread"])


# -- How much is leased in advance


class FakePool:
    slots = 4


def deliveries(count: int, size: int = 10) -> list[Delivery]:
    with Broker(":memory:") as broker:
        app = App(broker)
        task = app.task(name="task")(lambda text: None)
        task.enqueue_many([("x" * size,)] * count)
        return [Delivery(lease, task, [], {}) for lease in broker.lease_many("default", count)]


class Bench:
    """A room on a clock of its own."""

    def __init__(self, prefetch: int = PREFETCH_JOBS) -> None:
        self.now = 1000.0
        pool: Any = FakePool()
        self.room = Room(pool, prefetch, lambda: self.now)

    def ran(self, seconds: float, times: int = 1) -> None:
        [delivery] = deliveries(1)
        delivery.seconds = seconds
        for _ in range(times):
            self.room.took([delivery])
            self.room.ran(delivery)

    def wait(self, count: int, seconds: float) -> None:
        """So many jobs are handed over; the last begins after so long, and all end."""
        batch = deliveries(count)
        self.room.took(batch)
        self.now += seconds
        for delivery in batch:
            delivery.started_at = self.now
            self.room.ran(delivery)
        assert self.room.waits_since() is None


def test_nothing_is_leased_in_advance_before_it_is_known_how_long_handlers_take() -> None:
    bench = Bench()
    assert (bench.room.ahead(), bench.room.free()) == (0, 4)
    bench.ran(0.0001)
    assert bench.room.ahead() > 0
    assert Bench(prefetch=0).room.ahead() == 0


def test_less_is_leased_in_advance_when_handlers_take_longer() -> None:
    bench = Bench()
    bench.ran(0.0001, 50)
    many = bench.room.ahead()
    assert many >= 60
    bench.ran(0.05, 50)
    assert bench.room.ahead() <= 1
    bench.ran(0.0001, 100)
    assert bench.room.ahead() == many


def test_as_much_is_leased_in_advance_as_begins_in_time() -> None:
    bench = Bench()
    bench.ran(0.0001, 50)
    first = bench.room.ahead()
    for _ in range(10):
        bench.wait(4 + bench.room.ahead(), 0.002)
    assert bench.room.ahead() > first
    for _ in range(10):
        bench.wait(4 + bench.room.ahead(), 0.0003 * bench.room.ahead())  # a thread that others keep from its turns
    assert 0.0003 * bench.room.ahead() < 0.75 * PREFETCH_S
    assert bench.room.ahead() > 5


def test_nothing_is_leased_in_advance_beyond_so_many_bytes_or_for_careful_queues() -> None:
    bench = Bench()
    bench.ran(0.0001, 50)
    assert bench.room.ahead()
    assert bench.room.free_bytes() == PREFETCH_BYTES
    large = deliveries(2, PREFETCH_BYTES // 2)
    bench.room.took(large)
    assert bench.room.ahead() == 0
    for delivery in large:
        bench.room.left(delivery)
    assert (bench.room.jobs, bench.room.bytes, bench.room.ahead() > 0) == (0, 0, True)
    bench.room.careful.add("once")
    assert bench.room.ahead() == 0


def test_after_jobs_were_given_back_none_is_leased_in_advance_for_a_while() -> None:
    bench = Bench()
    bench.ran(0.0001, 50)
    quiet = []
    for _ in range(10):
        batch = deliveries(8)
        bench.room.took(batch)
        assert bench.room.waits_since() == bench.now
        for delivery in batch:
            bench.room.left(delivery)
            delivery.ending = GIVEN_BACK
        bench.room.took_back()
        assert bench.room.waits_since() is None
        bench.ran(0.0001, 100)
        began = bench.now
        while not bench.room.ahead():
            bench.now += 0.005
        quiet.append(bench.now - began)
    assert quiet[0] < 0.05
    assert 0.9 < quiet[-1] < 1.1
    bench.now += 60
    bench.room.took_back()
    bench.now += 0.05
    bench.ran(0.0001, 100)
    assert bench.room.ahead()


def test_jobs_are_late_when_none_before_them_begins_any_more() -> None:
    bench = Bench()
    batch = deliveries(20)
    bench.room.took(batch)
    since = bench.now
    for delivery in batch[:4]:
        delivery.started_at = bench.now
    assert bench.room.waits_since() == since
    bench.now += PREFETCH_S * 1.1
    assert not bench.room.is_late(since, starved=False)  # some have begun since it was asked last
    assert bench.room.is_late(since, starved=False)
    assert not bench.room.is_late(since, starved=True)
    bench.now = since + LONGEST_WAIT_S * 1.1
    batch[4].started_at = bench.now
    assert bench.room.waits_since() == since
    assert bench.room.is_late(since, starved=True)


def test_a_job_that_is_cancelled_before_it_began_does_not_count_as_waiting() -> None:
    bench = Bench()
    batch = deliveries(6)
    bench.room.took(batch)
    for delivery in batch[:5]:
        delivery.started_at = bench.now
    assert bench.room.waits_since() == bench.now
    batch[-1].ending = GIVEN_BACK
    assert bench.room.waits_since() is None


@pytest.mark.parametrize("jobs", [0, 3])
def test_a_room_that_gets_no_more_jobs_has_none_that_wait(jobs: int) -> None:
    bench = Bench()
    bench.room.took(deliveries(4))
    bench.room.took(deliveries(jobs) if jobs else [])
    assert (bench.room.waits_since() is not None) == bool(jobs)

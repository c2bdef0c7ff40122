"""Jobs in columns, and runs of them: what they say is what a plain list of jobs would say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import QUEUE, SPECS, Shelf, columns_of, job, keys_of, run_of

import rivetq.machine.run
from rivetq.machine.columns import PAYLOAD_BYTES, Columns
from rivetq.machine.entry import Entry
from rivetq.machine.queue import DEAD, LEASED, READY, SCHEDULED
from rivetq.machine.run import Run

FIELDS = tuple(name for name in Entry.__slots__ if name != "indexed")


def fields(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in FIELDS}


def away(run: Run) -> Shelf:
    """Put the run away; the shelf that has it."""
    shelf = Shelf()
    shelf.save(run, 7)
    run.put_away(shelf)
    return shelf


# Columns

numbers = st.integers(0, 2**31)
texts = st.one_of(st.none(), st.text(max_size=3))


@st.composite
def entries(draw: st.DrawFn, job_id: int = 1, due_ms: int | None = None) -> Entry:
    values = {name: draw(numbers) for name in ("segment", "offset", "length", "crc", "lsn")}
    return job(
        job_id,
        draw(numbers) if due_ms is None else due_ms,
        **values,
        size=values["length"] + draw(st.integers(0, 1000)),
        enqueued_at_ms=draw(numbers),
        spec=draw(st.sampled_from(SPECS)),
        key=draw(texts),
        payload=draw(st.one_of(st.none(), st.binary(max_size=3))),
        attempts=draw(st.sampled_from([0, 0, 3])),
        token=draw(st.sampled_from([0, 0, 4])),
        died_at_ms=draw(st.sampled_from([0, 0, 5])),
        last_error=draw(texts),
        state=draw(st.sampled_from([READY, SCHEDULED, DEAD])),
    )


@given(st.lists(st.integers(1, 50), unique=True, max_size=8).flatmap(lambda ids: st.tuples(*map(entries, ids))))
def test_a_job_comes_back_from_its_cell_as_it_went_in(jobs: tuple[Entry, ...]) -> None:
    columns = columns_of(jobs)
    assert len(columns) == len(jobs)
    for i, entry in enumerate(jobs):
        again = columns.entry(i, QUEUE, entry.state)
        assert fields(again) == fields(entry)
        assert again is not entry
        assert not again.indexed
        assert again.deadline_ms == 0
    live: dict[int, int] = {}
    for entry in jobs:
        live[entry.segment] = live.get(entry.segment, 0) + entry.size
    assert columns.live() == live
    assert columns.payload_bytes() == sum(len(e.payload) + PAYLOAD_BYTES for e in jobs if e.payload is not None)


@st.composite
def batches(draw: st.DrawFn) -> list[dict[str, Any]]:
    found, first_id = [], 1
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(1, 4))
        found.append(
            {
                "first_id": first_id,
                "lengths": draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)),
                "crcs": draw(st.sampled_from([[], list(range(50, 50 + n))])),
                "spec": draw(st.sampled_from(SPECS)),
                "now_ms": draw(numbers),
                "due_ms": draw(numbers),
                "place": (draw(st.integers(1, 2)), draw(numbers), draw(numbers)),
                "overhead": draw(st.integers(0, 200)),
                "keys": draw(st.one_of(st.none(), st.lists(texts, min_size=n, max_size=n))),
                "payloads": draw(st.one_of(st.none(), st.lists(st.binary(max_size=2), min_size=n, max_size=n))),
            }
        )
        first_id += n
    return found


@given(batches())
def test_a_batch_in_columns_is_the_same_as_its_jobs_one_by_one(found: list[dict[str, Any]]) -> None:
    together, single, expected = Columns(), Columns(), list[Entry]()
    for batch in found:
        together.add_batch(**batch)
        segment, offset, lsn = batch["place"]
        for i, length in enumerate(batch["lengths"]):
            key, payload = batch["keys"] and batch["keys"][i], batch["payloads"] and batch["payloads"][i]
            crc = batch["crcs"][i] if batch["crcs"] else 0
            one = {
                "first_id": batch["first_id"] + i,
                "lengths": [length],
                "crcs": [crc],
                "place": (segment, offset, lsn),
            }
            lists = {"keys": [key], "payloads": None if payload is None else [payload]}
            single.add_batch(**{**batch, **one, **lists})
            entry = job(
                batch["first_id"] + i, batch["due_ms"], state=READY, spec=batch["spec"], enqueued_at_ms=batch["now_ms"],
                segment=segment, offset=offset, lsn=lsn, length=length, size=length + batch["overhead"], crc=crc,
                key=key, payload=payload,
            )  # fmt: skip
            expected.append(entry)
            offset += length
    for columns in (together, single):
        assert [fields(columns.entry(i, QUEUE, READY)) for i in range(len(columns))] == [*map(fields, expected)]
        assert columns.extras is None


def test_columns_that_no_job_needs_are_not_there() -> None:
    columns = columns_of([job(1), job(2)])
    assert (columns.keys, columns.payloads, columns.extras) == (None, None, None)
    columns.add_batch(3, [1, 1], [], SPECS[0], 0, 0, (1, 0, 0), 0, [None, None], None)
    assert columns.keys is None


def test_a_copy_of_some_cells_has_them_in_the_order_asked_for_and_leaves_the_others_alone() -> None:
    jobs = [
        job(i, key=f"k{i}", payload=b"x" * i, attempts=i % 2, last_error=f"e{i}" if i % 2 else None)
        for i in range(1, 7)
    ]
    columns = columns_of(jobs)
    part = columns.picked([4, 0, 2])
    assert [fields(part.entry(i, QUEUE, READY)) for i in range(3)] == [fields(jobs[i]) for i in (4, 0, 2)]
    assert part.extras is not None
    assert part.extras.keys() == {5, 1, 3}
    rest = columns.picked(slice(1, 4))
    assert [fields(rest.entry(i, QUEUE, READY)) for i in range(3)] == [fields(each) for each in jobs[1:4]]
    assert columns.picked([1]).extras is None
    part.add(job(9))
    assert len(columns) == 6


# Runs


def test_a_run_knows_its_ends() -> None:
    run = run_of(3, 5, 9)
    assert (run.head, run.last, run.low, run.high, run.left, run.by_due) == (3, 9, 3, 9, 3, False)
    run = run_of((10, 5), (10, 6), (20, 1))
    assert (run.head, run.last, run.low, run.high, run.left, run.by_due) == ((10, 5), (20, 1), 1, 6, 3, True)


def test_a_run_takes_higher_keys_until_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rivetq.machine.run.RUN_JOBS", 4)
    run = run_of(3, 5)
    assert [run.takes(key) for key in (4, 5, 6)] == [False, False, True]
    run.load().add(job(7))
    run.grown()
    run.check()
    assert (run.last, run.high, run.left, run.is_full) == (7, 7, 3, False)
    run.skip(1)
    run.load().add(job(8))
    run.grown()
    run.check()
    assert (run.left, run.is_full, run.takes(9)) == (3, True, False)


def test_a_run_that_is_away_takes_nothing() -> None:
    run = run_of(3, 5)
    away(run)
    assert run.is_full
    assert not run.takes(9)


def test_a_scheduled_run_that_grows_by_several_at_once_knows_its_lowest_and_highest_id() -> None:
    run = run_of((10, 5), (10, 9))
    columns = run.load()
    columns.add_batch(1, [1, 1, 1], [], SPECS[0], 0, 20, (1, 0, 0), 0, None, None)
    run.grown()
    run.check()
    assert (run.low, run.high, run.last) == (1, 9, (20, 3))
    columns.add_batch(30, [1, 1], [], SPECS[0], 0, 20, (1, 0, 0), 0, None, None)
    run.grown()
    run.check()
    assert (run.low, run.high, run.last) == (1, 31, (20, 31))


def test_a_job_that_leaves_from_the_middle_copies_no_cells() -> None:
    run = run_of(*range(1, 1001))
    columns = run.load()
    for job_id in range(999, 501, -1):
        run.pluck(run.find(job_id))
    assert run.load() is columns
    assert (run.left, run.holes, run.last) == (502, 498, 1000)
    run.check()


def test_a_run_of_many_holes_is_copied_without_them() -> None:
    run = run_of(*range(1, 1001))
    for job_id in range(2, 601):
        run.pluck(run.find(job_id))
    assert len(run.load()) < 600
    assert keys_of(run) == [1, *range(601, 1001)]
    run.check()


def test_holes_before_the_head_are_passed_over_and_forgotten() -> None:
    run = run_of(*range(1, 9))
    for job_id in (2, 3, 5):
        run.pluck(run.find(job_id))
    run.pop(1, LEASED)
    assert (run.head, run.at, run.holes) == (4, 3, 1)
    run.pop(1, LEASED)
    assert (run.head, run.at, run.holes, run.gone) == (6, 5, 0, None)
    with pytest.raises(AssertionError, match="a hole is passed over"):
        run.pluck(6)
        run.pop(2, LEASED)


def test_a_job_with_an_id_below_a_hole_at_the_end_is_not_appended() -> None:
    run = run_of(1, 5, 9)
    run.pluck(2)
    assert (run.last, run.high) == (5, 5)
    assert not run.takes(7)
    assert run.takes(10)
    run.load().add(job(10))
    run.grown()
    run.check()
    assert keys_of(run) == [1, 5, 10]


def test_a_job_that_comes_again_behind_its_hole_is_as_it_came() -> None:
    run = Run(QUEUE, 5, columns_of([job(1, 10), job(2, 10, attempts=4, last_error="no"), job(3, 10)]), SCHEDULED)
    before = run.load()
    extras = before.extras
    run.pluck(1)
    before.append(2, 0, 20, 1, 0, 1, 0, 1, 1, SPECS[0], None, None)
    run.grown()
    run.check()
    (again,) = before.entries(3, 4, QUEUE, SCHEDULED)
    assert (again.id, again.attempts, again.last_error) == (2, 0, None)
    assert extras is not None
    assert extras[2][0] == 4, "a checkpoint that reads them is not disturbed"


@pytest.mark.parametrize("due_ms", [0, 10])
def test_a_job_that_left_is_not_found(due_ms: int) -> None:
    run = Run(QUEUE, 5, columns_of([job(i, due_ms) for i in range(1, 6)]), SCHEDULED if due_ms else READY)
    for job_id in (3, 5):
        run.pluck(run.find(job_id))
    assert [run.find(job_id) for job_id in range(7)] == [-1, 0, 1, -1, 3, -1, -1]
    assert list(run.between(1, 5)) == [1, 2, 4]


def test_what_was_taken_of_a_run_stays_as_it_was() -> None:
    run = run_of(*range(1, 9))
    columns, at, stop = run.load(), run.at, len(run.load())
    before = [fields(columns.entry(i, QUEUE, READY)) for i in range(stop)]
    run.pop(2, LEASED)
    run.pluck(4)
    run.load().add(job(20))
    run.grown()
    run.close_holes()
    run.split(2)
    run.check()
    assert [fields(columns.entry(i, QUEUE, READY)) for i in range(at, stop)] == before


def test_payloads_go_with_the_jobs_that_are_popped() -> None:
    jobs = [job(i, payload=bytes([i])) for i in (1, 2, 3)]
    run = Run(QUEUE, 5, columns_of(jobs), READY)
    assert [entry.payload for entry in run.pop(2, LEASED)] == [b"\1", b"\2"]
    assert run.load().payloads == [None, None, b"\3"]


def test_a_run_of_one_moment_is_in_order_of_ids_already_and_may_be_away() -> None:
    run = run_of((10, 2), (10, 5), (10, 6))
    shelf = away(run)
    assert run.order_by_id() is False
    assert (run.columns, shelf.reads) == (None, 0)
    assert (run.head, run.last, run.low, run.high, run.state, run.by_due) == (2, 6, 2, 6, READY, False)
    run.check()


def test_a_run_of_several_moments_is_put_in_order_of_ids() -> None:
    run = run_of((10, 5), (11, 2), (12, 6), (13, 1))
    run.skip(1)
    columns = run.load()
    assert run.order_by_id() is True
    run.check()
    assert (keys_of(run), run.state) == ([1, 2, 6], READY)
    assert list(columns.ids) == [5, 2, 6, 1]


def test_a_run_that_is_away_is_read_when_it_is_needed_and_once() -> None:
    run = run_of(1, 2, 4, 5)
    run.skip(1)
    shelf = away(run)
    assert (run.columns, run.at, run.left, run.head, run.last) == (None, 0, 3, 2, 5)
    run.check()
    assert (run.columns, shelf.reads) == (None, 1), "to look at it brings nothing into memory"
    assert (run.find(9), shelf.reads) == (-1, 1)
    assert run.find(4) == 1
    assert (run.find(5), run.find(3), run.below(4, 0), run.after(4)) == (2, -1, 1, 2)
    assert shelf.reads == 2
    run.put_away(shelf)
    assert [entry.id for entry in run.pop(2, LEASED)] == [2, 4]
    run.check()


def test_a_run_that_was_never_saved_cannot_be_put_away() -> None:
    with pytest.raises(AssertionError, match="a run that was never saved is put away"):
        run_of(1).put_away(Shelf())


def test_a_run_without_columns_and_shelf_says_so() -> None:
    run = run_of(1)
    away(run)
    run.shelf = None
    for question in (run.load, run.peek):
        with pytest.raises(AssertionError, match="run 7 has neither columns nor a shelf"):
            question()


def test_a_shelf_with_another_number_of_jobs_is_found_out() -> None:
    run = run_of(1, 2, 3)
    shelf = away(run)
    shelf.saved[7] = columns_of([job(1)])
    with pytest.raises(AssertionError, match="run 7: 1 jobs on the shelf, 3 known"):
        run.load()


def test_a_run_can_be_made_of_what_is_known_of_it() -> None:
    shelf = Shelf()
    shelf.saved[3] = columns_of([job(5, 10), job(2, 20)])
    run = Run.shelved(QUEUE, 5, SCHEDULED, 3, 2, (10, 5), (20, 2), 2, 5, shelf)
    run.check()
    assert shelf.reads == 1
    assert (keys_of(run), run.priority, run.by_due) == ([(10, 5), (20, 2)], 5, True)
    run = Run.shelved(QUEUE, 5, DEAD, 3, 2, 5, 2, 2, 5, shelf)
    assert not run.by_due


steps = st.one_of(
    st.tuples(st.just("pop"), st.integers(1, 4)),
    st.tuples(st.just("pluck"), st.integers(0, 30)),
    st.tuples(st.just("keep"), st.sets(st.integers(0, 15))),
    st.tuples(st.just("split"), st.integers(1, 4)),
    st.tuples(st.just("add"), st.integers(1, 5)),
    st.tuples(st.just("away"), st.none()),
    st.tuples(st.just("peek"), st.none()),
)


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=12, unique_by=lambda key: key[1]),
    st.lists(steps, max_size=12),
    st.booleans(),
    st.sampled_from([-3, 0, 32]),
)
def test_a_run_is_a_sorted_list_of_jobs(
    by_due: bool, keys: list[tuple[int, int]], actions: list[tuple[str, Any]], ordered: bool, few_holes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivetq.machine.run, "FEW_HOLES", few_holes)
        as_a_sorted_list(by_due, keys, actions, ordered)


def as_a_sorted_list(by_due: bool, keys: list[tuple[int, int]], actions: list[tuple[str, Any]], ordered: bool) -> None:
    model: list[Any] = sorted(keys) if by_due else sorted(key[1] for key in keys)
    run = run_of(*model)
    for name, value in actions:
        if not model:
            assert run.left == 0
            return
        if name == "pop":
            count = run.hole(run.at, run.at + min(value, len(model))) - run.at
            popped = run.pop(count, LEASED)
            assert [entry.id for entry in popped] == [key[1] if by_due else key for key in model[:count]]
            assert all(entry.state == LEASED for entry in popped)
            del model[:count]
        elif name == "pluck":
            key = model.pop(value % len(model))
            entry = run.pluck(run.find(key[1] if by_due else key))
            assert ((entry.due_ms, entry.id) if by_due else entry.id) == key
            assert entry.state == run.state
        elif name == "keep":
            model = [key for i, key in enumerate(model) if i in value]
            run.keep([cell for i, cell in enumerate(run.cells()) if i in value])
        elif name == "split" and len(model) > 1:
            count = min(value, len(model) - 1)
            run.close_holes()
            part = run.split(count)
            part.check()
            assert (keys_of(part), part.number, part.queue, part.priority) == (model[:count], 0, QUEUE, 5)
            del model[:count]
        elif name == "add":
            for i in range(value):
                fresh: Any = (model[-1][0] + i % 2, 100 - len(model)) if by_due else model[-1] + 1 + i
                if run.load() and run.takes(fresh) and (not by_due or all(fresh[1] != key[1] for key in model)):
                    run.load().add(job(fresh[1], fresh[0]) if by_due else job(fresh))
                    run.grown()
                    model.append(fresh)
        elif name == "away":
            away(run)
        elif name == "peek":
            columns, at = run.peek()
            found = [columns.ids[i] for i in range(at, len(columns))]
            assert found == [key[1] if by_due else key for key in model]
        if not model:
            assert run.left == 0
            return
        run.check()
        assert keys_of(run) == model
    ids = [key[1] if by_due else key for key in model]
    for i in range(45):
        cell = run.find(i)
        assert (cell >= 0) == (i in ids)
        assert cell < 0 or run.load().ids[cell] == i
        assert sorted(run.between(i, i + 5)) == sorted(job_id for job_id in ids if i <= job_id <= i + 5)
        limit = (i // 10, i) if by_due else i
        jobs = run.cells()
        below = run.below(limit, run.at)
        assert len([cell for cell in jobs if cell < below]) == len([key for key in model if key < limit])
        if not by_due:
            after = run.after(i)
            assert len([cell for cell in jobs if cell < after]) == len([key for key in model if key <= i])
            assert after in jobs or after >= jobs[-1]
    if by_due and ordered:
        run.order_by_id()
        run.check()
        assert keys_of(run) == sorted(ids)


def lose_a_job(run: Run) -> None:
    run.left -= 1


def swap(run: Run) -> None:
    ids = run.load().ids
    ids[1], ids[2] = ids[2], ids[1]


def forget_the_head(run: Run) -> None:
    run.head = 2


def forget_the_end(run: Run) -> None:
    run.last = 9


def raise_the_lowest(run: Run) -> None:
    run.low = 4


def lower_the_highest(run: Run) -> None:
    run.high = 5


def shorten(run: Run) -> None:
    run.load().specs.pop()


@pytest.mark.parametrize(
    "damage",
    [lose_a_job, swap, forget_the_head, forget_the_end, raise_the_lowest, lower_the_highest, shorten],
    ids=lambda f: f.__name__,
)
def test_check_finds(damage: Any) -> None:
    run = run_of(3, 5, 6)
    damage(run)
    with pytest.raises(AssertionError):
        run.check()


@pytest.mark.parametrize("state", [READY, SCHEDULED])
def test_the_ids_in_a_range_are_those_that_are_left_in_it(state: int) -> None:
    columns = Columns()
    for job_id in (2, 5, 6, 9, 12):
        columns.add(Entry(job_id, QUEUE, SPECS[0], 1, 0 if state == READY else 100 - job_id % 2, None))
    if state == SCHEDULED:
        columns = columns.picked(sorted(range(5), key=lambda i: (columns.dues[i], columns.ids[i])))
    run = Run(QUEUE, 5, columns, state)
    run.skip(1)
    left = sorted(columns.ids[1:])
    for first in range(14):
        for last in range(first, 14):
            assert sorted(run.between(first, last)) == [i for i in left if first <= i <= last]

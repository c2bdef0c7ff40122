"""Loose keys and runs that are read as one: what a window says is what a sorted list would say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import Shelf, job, keys_of, run_of

from rivetq.machine.run import Run
from rivetq.machine.window import OPEN_RUNS, Window


def window(*keys: Any, runs: tuple[tuple[Any, ...], ...] = ()) -> Window:
    """Loose keys, and runs of others."""
    made = Window(by_due=any(isinstance(key, tuple) for key in (*keys, *(key for each in runs for key in each))))
    for key in keys:
        made.add(key)
    for each in runs:
        made.insert(run_of(*each))
    made.check()
    return made


def walked(w: Window, after: int | None = None) -> list[Any]:
    """The keys in the order in which they are read."""
    found: list[Any] = []
    for run, start, stop in w.walk(after):
        assert start < stop
        if run is None:
            found += w.loose[start:stop]
        else:
            run.load()
            found += [run.key(i) for i in range(start, stop)]
    return found


def test_an_empty_window_has_no_first_and_nothing_to_walk() -> None:
    empty = Window()
    empty.check()
    assert len(empty) == 0
    assert not empty
    assert empty.first() is None
    assert walked(empty) == walked(empty, 0) == []
    assert empty.find(1) is None
    assert empty.around(1, 9) == []
    assert empty.open_for(1) is None


def test_keys_come_back_in_order_however_they_went_in() -> None:
    w = window(5, 1, 4)
    w.add(2)
    assert walked(w) == [1, 2, 4, 5]
    assert w.first() == 1
    assert len(w) == 4


def test_loose_keys_and_overlapping_runs_are_read_as_one() -> None:
    w = window(4, 10, 99, runs=((1, 5, 9, 20), (2, 3, 6), (7, 8), (30, 31)))
    assert walked(w) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30, 31, 99]
    assert (w.first(), len(w)) == (1, 14)


def test_what_lies_apart_is_read_in_whole_stretches() -> None:
    w = window(50, 51, runs=((1, 2, 3), (60, 61)))
    first, last = w.runs
    assert list(w.walk()) == [(first, 0, 3), (None, 0, 2), (last, 0, 2)]


def test_after_is_exclusive_and_need_not_name_a_key() -> None:
    w = window(10, 25, 30, runs=((5, 15, 20), (22, 40)))
    every = [5, 10, 15, 20, 22, 25, 30, 40]
    for after in (0, 5, 7, 10, 15, 19, 20, 21, 22, 30, 39, 40, 99):
        assert walked(w, after) == [key for key in every if key > after]


def test_the_first_key_may_be_in_a_run_or_loose() -> None:
    assert window(5, runs=((3, 9),)).first() == 3
    assert window(2, runs=((3, 9),)).first() == 2
    assert window(runs=((3, 9),)).first() == 3
    assert window((4, 1), runs=(((3, 9), (5, 2)),)).first() == (3, 9)


def test_a_key_that_is_not_there_can_be_discarded() -> None:
    w = window(1)
    w.discard(2)
    w.discard(1)
    w.discard(1)
    w.check()
    assert len(w) == 0


def test_keys_of_several_parts_are_ordered_part_by_part() -> None:
    w = window((2, 1), (1, 9), runs=(((1, 2), (1, 10), (3, 3)),))
    assert w.first() == (1, 2)
    assert walked(w) == [(1, 2), (1, 9), (1, 10), (2, 1), (3, 3)]


def test_a_run_is_read_back_no_sooner_than_its_turn_comes() -> None:
    w = window(runs=((1, 2), (3, 4)))
    shelf = Shelf()
    for number, run in enumerate(w.runs, 1):
        shelf.save(run, number)
        run.put_away(shelf)
    stretches = w.walk()
    assert next(stretches) == (w.runs[0], 0, 2)
    assert shelf.reads == 1
    assert walked(w) == [1, 2, 3, 4]


# Runs that grow


def test_new_jobs_go_into_the_open_run_that_ends_below_them() -> None:
    w = Window()
    for ids in ((1, 2), (10, 11), (20, 21)):
        w.insert(run_of(*ids), is_open=True)
    low, middle, high = w.runs
    assert w.opens == [high, middle], f"only {OPEN_RUNS} are open, those with the highest ends"
    assert [w.open_for(key) for key in (25, 15, 5)] == [high, middle, None]
    middle.load().add(job(30))
    w.grown(middle, 1)
    w.check()
    assert w.opens == [middle, high]
    assert (len(w), w.span, low.left) == (7, 20, 2)


def test_an_open_run_that_is_used_up_or_taken_out_is_not_open_any_more() -> None:
    w = Window()
    for ids in ((1, 2), (10, 11)):
        w.insert(run_of(*ids), is_open=True)
    one, two = w.runs
    one.skip(2)
    w.popped(one, 2)
    w.check()
    assert (w.runs, w.opens) == ([two], [two])
    w.remove(two)
    w.check()
    assert (w.runs, w.opens, len(w)) == ([], [], 0)


def test_a_run_that_lost_its_head_finds_its_new_place() -> None:
    w = window(runs=((1, 2, 9), (3, 4), (8, 10)))
    run = w.runs[0]
    run.pop(1, 2)
    w.popped(run, 1)
    w.check()
    assert w.runs[0] is run
    run.pop(1, 2)
    w.popped(run, 1)
    w.check()
    assert [each.head for each in w.runs] == [3, 8, 9]
    single = window(runs=((1, 5),))
    single.runs[0].skip(1)
    single.popped(single.runs[0], 1)
    single.check()
    assert single.first() == 5


# Finding


def test_a_job_is_found_in_the_run_that_has_it() -> None:
    w = window(4, runs=((1, 5, 9), (2, 3, 6), (30, 31)))
    assert {i: found[0].load().ids[found[1]] for i in range(40) if (found := w.find(i))} == {
        i: i for i in (1, 5, 9, 2, 3, 6, 30, 31)
    }
    scheduled = window(runs=(((1, 9), (2, 4)), ((1, 30), (3, 2))))
    assert [i for i in range(40) if scheduled.find(i)] == [2, 4, 9, 30]


def test_only_the_runs_that_may_have_a_range_of_ids_are_looked_at() -> None:
    w = window(runs=tuple((10 * i, 10 * i + 5) for i in range(1, 100)))
    assert [run.head for run in w.around(33, 41)] == [30, 40]
    assert [run.head for run in w.around(36, 39)] == []
    assert [run.head for run in w.around(0, 10)] == [10]
    assert len(w.around(0, 10_000)) == 99


def test_holes_are_passed_over_in_a_walk() -> None:
    w = Window()
    run = run_of(1, 2, 3, 4, 5, 6)
    w.insert(run)
    for job_id in (3, 4):
        head = run.head
        run.pluck(run.find(job_id))
        w.plucked(run, head)
    w.check()
    assert walked(w) == [1, 2, 5, 6]
    assert [walked(w, after) for after in (2, 3, 4, 5)] == [[5, 6], [5, 6], [5, 6], [6]]


def test_a_run_by_due_that_got_a_lower_id_is_found_by_it() -> None:
    w = Window(by_due=True)
    run = run_of((10, 50))
    w.insert(run, is_open=True)
    run.load().add(job(20, 30))
    w.grown(run, 1)
    w.check()
    found = w.find(20)
    assert found is not None
    assert found[0] is run


ids = st.integers(1, 60)


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 5), ids, st.integers(0, 5)), max_size=40, unique_by=lambda each: each[1]),
    st.lists(st.one_of(st.integers(1, 60), st.integers(-4, -1)), max_size=12),
)
def test_a_window_is_a_sorted_set(by_due: bool, jobs: list[tuple[int, int, int]], actions: list[int]) -> None:
    """Each job says which run it is in; those that say 0 are loose. What is taken: a job by its id, or some heads."""
    w = Window(by_due=by_due)
    parts: dict[int, list[Any]] = {}
    for due, job_id, part in jobs:
        parts.setdefault(part, []).append((due, job_id) if by_due else job_id)
    for part, keys in parts.items():
        if part:
            w.insert(run_of(*sorted(keys)), is_open=part % 2 == 1)
        else:
            for key in keys:
                w.add(key)
    model = sorted(key for keys in parts.values() for key in keys)

    def same() -> None:
        w.check()
        assert (len(w), w.first(), walked(w)) == (len(model), model[0] if model else None, model)

    same()
    for action in actions:
        if action < 0 and w.runs:
            run = w.runs[0]
            count = run.hole(run.at, run.at + min(-action, run.left)) - run.at
            for key in keys_of(run)[:count]:
                model.remove(key)
            run.pop(count, 2)
            w.popped(run, count)
        elif (found := w.find(action)) is not None:
            run, i = found
            model.remove(run.key(i))
            head = run.head
            run.pluck(i)
            w.plucked(run, head)
        elif action > 0:
            for key in [key for key in w.loose if (key[1] if by_due else key) == action]:
                w.discard(key)
                model.remove(key)
        same()
    present = {key[1] if by_due else key for run in w.runs for key in keys_of(run)}
    for i in range(0, 62, 3):
        if not by_due:
            assert walked(w, i) == [key for key in model if key > i]
        assert (w.find(i) is not None) == (i in present)
        around = w.around(i, i + 5)
        for run in w.runs:
            here = {key[1] if by_due else key for key in keys_of(run)}
            assert run in around or not here.intersection(range(i, i + 6))


# What check finds


def put_a_key_twice(w: Window) -> None:
    w.loose.add(50)
    w.count += 1


def mix_up_the_loose_keys(w: Window) -> None:
    w.loose._lists[0].reverse()


def lose_a_key(w: Window) -> None:
    w.count -= 1


def mix_up_the_runs(w: Window) -> None:
    w.runs.reverse()


def open_a_run_of_nobody(w: Window) -> None:
    w.opens.append(run_of(100))


def understate_the_span(w: Window) -> None:
    w.span = 1


def add_a_run_in_another_order(w: Window) -> None:
    run = run_of((1, 100), (2, 101))
    run.head, run.last = 100, 101
    w.runs.append(run)
    w.count += 2


def damage_a_run(w: Window) -> None:
    run: Run = w.runs[0]
    run.high = 1


@pytest.mark.parametrize(
    "damage",
    [
        put_a_key_twice, mix_up_the_loose_keys, lose_a_key, mix_up_the_runs, open_a_run_of_nobody, understate_the_span,
        add_a_run_in_another_order, damage_a_run,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_check_finds(damage: Any) -> None:
    w = window(50, 51, runs=((1, 5, 9), (2, 7)))
    damage(w)
    with pytest.raises(AssertionError):
        w.check()

"""The ordered set: what it says is what a sorted list would say."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sortedcontainers import SortedList

from rivetq.window import Window


def window(*keys: object) -> Window:
    made = Window()
    made.update(keys)
    made.check()
    return made


def test_an_empty_window_has_no_first_no_head_and_nothing_after() -> None:
    empty = Window()
    empty.check()
    assert len(empty) == 0
    assert not empty
    assert empty.first() is None
    assert empty.head(3) == []
    assert list(empty.after(0)) == []


def test_keys_come_back_in_order_however_they_went_in() -> None:
    w = window(5, 1, 4)
    w.add(2)
    assert list(w.after(0)) == [1, 2, 4, 5]
    assert w.first() == 1
    assert len(w) == 4


def test_the_head_is_the_least_keys_and_fewer_if_there_are_fewer() -> None:
    w = window(3, 1, 2)
    assert [w.head(n) for n in range(5)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3]]
    assert len(w) == 3


def test_after_is_exclusive_and_need_not_name_a_key() -> None:
    w = window(10, 20, 30)
    assert [list(w.after(n)) for n in (0, 10, 15, 30, 99)] == [[10, 20, 30], [20, 30], [20, 30], [], []]


def test_the_keys_after_one_are_read_one_by_one() -> None:
    keys = window(*range(10_000)).after(4_999)
    assert [next(keys), next(keys)] == [5_000, 5_001]


def test_a_key_that_is_not_there_can_be_discarded() -> None:
    w = window(1)
    w.discard(2)
    w.discard(1)
    w.discard(1)
    w.check()
    assert len(w) == 0


def test_keys_of_several_parts_are_ordered_part_by_part() -> None:
    w = window((2, 1), (1, 9), (1, 2))
    assert w.first() == (1, 2)
    assert list(w.after((1, 2))) == [(1, 9), (2, 1)]


@given(st.lists(st.one_of(st.integers(0, 20), st.lists(st.integers(21, 60), unique=True)), max_size=40))
def test_a_window_is_a_sorted_set(steps: list[int | list[int]]) -> None:
    w, model = Window(), set[int]()
    for step in steps:
        if isinstance(step, list):
            fresh = [key for key in step if key not in model]
            w.update(fresh)
            model.update(fresh)
        elif step in model:
            w.discard(step)
            model.discard(step)
        else:
            w.add(step)
            model.add(step)
        w.check()
        expected = sorted(model)
        assert (len(w), w.first()) == (len(expected), expected[0] if expected else None)
        assert w.head(3) == expected[:3]
        assert list(w.after(10)) == [key for key in expected if key > 10]


@pytest.mark.parametrize("keys", [(1, 1), (2, 1)], ids=["twice", "out of order"])
def test_check_finds_a_window_that_is_not_in_order(keys: Iterable[int]) -> None:
    w = Window()
    forced = SortedList()
    forced._lists.append(list(keys))
    forced._maxes.append(max(keys))
    forced._len = 2
    w._keys = forced
    with pytest.raises(AssertionError):
        w.check()

"""Arguments as bytes and back: plain JSON stays plain, tagged types come back as they were, nothing else passes."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Generic, NewType, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rivetq import UsageError
from rivetq.typedjson import TypedJson, hints

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Address:
    town: str
    since: date | None = None
    full: str = dataclasses.field(init=False, default="?")


@attrs.define
class Person:
    name: str
    _secret: bytes
    homes: list[Address] = attrs.Factory(list)
    colour: Colour | None = None


class Plain:
    pass


@dataclasses.dataclass
class Price:
    cents: int
    scale: dataclasses.InitVar[int] = 1

    def __post_init__(self, scale: int) -> None:
        self.cents *= scale


@attrs.frozen
class Doubled:
    n: int = attrs.field(converter=lambda value: value * 2, validator=attrs.validators.lt(100))


def _short(instance: object, attribute: object, value: str) -> None:
    if len(value) > 10:
        raise ValueError(f"too long: {value}")


@attrs.define
class Short:
    text: str = attrs.field(validator=_short)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Box(Generic[T]):
    content: T


@dataclasses.dataclass
class Money:
    cents: int
    parts: tuple[int, ...] = ()
    LIMIT = 1000

    def __post_init__(self) -> None:
        self.euros = self.cents / 100

    @functools.cached_property
    def lock(self) -> object:
        return object()


class Pair(enum.Enum):
    ONE = (1, 2)


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Undecorated(Address):
    def __init__(self) -> None:
        super().__init__("Rome")
        object.__setattr__(self, "more", 1)


Wrapped = NewType("Wrapped", Price)


def test_a_tuple_and_what_a_constructor_computed_come_back() -> None:
    codec = TypedJson()
    codec.register(Money)
    money = Money(150, (1, 2))
    assert money.lock is not None  # computed, kept by the instance, and nothing that JSON could say
    found = codec.loads(codec.dumps([money, (), {"$tuple": [1]}, {"$tuple": (1,)}]))
    assert found == [Money(150, (1, 2)), (), {"$tuple": [1]}, {"$tuple": (1,)}]
    assert found[0].euros == 1.5
    money.other = object()  # type: ignore[attr-defined]  # not a field, on purpose
    with pytest.raises(UsageError, match=r"builtins\.object"):
        codec.dumps(money)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["$bytes", "$object", "$class"]), inner)
    ),
)
tagged = (
    st.binary()
    | st.datetimes(timezones=st.just(UTC) | st.none())
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.decimals(allow_nan=False)
)


@given(plain)
def test_what_json_knows_comes_back_even_if_it_looks_like_a_tag(value: object) -> None:
    codec = TypedJson()
    assert codec.loads(codec.dumps(value)) == value


@given(st.lists(tagged) | st.dictionaries(st.text(), tagged))
def test_tagged_types_come_back_as_they_were(value: Any) -> None:
    codec = TypedJson()
    again = codec.loads(codec.dumps(value))
    assert again == value
    if isinstance(value, list):
        assert [type(item) for item in again] == [type(item) for item in value]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("written", ['{"$tuple":[1]}', r'{"\u0024tuple":[1]}', ' \n{"$tuple" : [1]}\t'])
def test_a_tag_is_seen_however_another_program_wrote_it(written: str, encoding: str) -> None:
    assert TypedJson().loads(written.encode(encoding)) == (1,)


@pytest.mark.parametrize("written", ["{} {}", '{"a":1}]', '{"a":NaN}', "", '{"$later":1}'])
def test_what_is_not_one_value_is_refused(written: str) -> None:
    with pytest.raises(UsageError):
        TypedJson().loads(written.encode())


def test_plain_values_are_plain_json() -> None:
    value = {"a": [1, 2.5, "é", None, True], "b": {"c": {}}}
    assert json.loads(TypedJson().dumps(value)) == value


def test_the_words_of_the_format() -> None:
    """A change here cannot read the jobs that wait in the directories of users."""
    codec = TypedJson()
    codec.register(Person)
    person = Person("Ada", b"\x00", [Address("Paris", date(2026, 1, 2))], Colour.RED)
    assert codec.dumps(person).decode() == (
        '{"$class":["test_typedjson:Person",{"name":"Ada","_secret":{"$bytes":"AA=="},"homes":'
        '[{"$class":["test_typedjson:Address",{"town":"Paris","since":{"$date":"2026-01-02"},"full":"?"}]}],'
        '"colour":{"$class":["test_typedjson:Colour","RED"]}}]}'
    ).replace("test_typedjson", __name__)
    values = [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), '{"$datetime":"2026-01-02T03:04:05+00:00"}'),
        (time(3, 4), '{"$time":"03:04:00"}'),
        (timedelta(days=-1, microseconds=5), '{"$timedelta":[-86400,5]}'),
        (UUID(int=1), '{"$uuid":"00000000-0000-0000-0000-000000000001"}'),
        (Decimal("1.20"), '{"$decimal":"1.20"}'),
        ({"$uuid": "x"}, '{"$object":{"$uuid":"x"}}'),
    ]
    for value, text in values:
        assert codec.dumps(value).decode() == text
        assert codec.loads(text.encode()) == value


def test_registered_classes_come_back_with_what_their_fields_are_annotated_with() -> None:
    codec = TypedJson()
    codec.register(Person)
    person = Person("Ada", b"\x00", [Address("Paris", date(2026, 1, 2)), Address("Rome")], Colour.RED)
    object.__setattr__(person.homes[0], "full", "set later")
    assert codec.loads(codec.dumps([person])) == [person]


@attrs.define
class Failure(ValueError):
    code: int


@dataclasses.dataclass
class Table(dict[str, int]):
    name: str = ""


def test_a_class_that_keeps_more_than_its_fields_is_refused_at_once() -> None:
    codec = TypedJson()
    codec.register(Failure, Table)
    for value in (Failure(3), Table("t")):
        with pytest.raises(UsageError, match=type(value).__name__):
            codec.dumps(value)


PARIS = ZoneInfo("Europe/Paris")


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        (datetime(2026, 1, 1, 9, tzinfo=PARIS), ["2026-01-01T09:00:00+01:00", "Europe/Paris", 0]),
        (datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=PARIS), ["2026-10-25T02:30:00+01:00", "Europe/Paris", 1]),
        (datetime(2026, 10, 25, 2, 30, fold=1), ["2026-10-25T02:30:00", None, 1]),
        (datetime(2026, 10, 25, 2, 30), "2026-10-25T02:30:00"),
        (datetime(2026, 3, 29, 2, 30, tzinfo=PARIS), ["2026-03-29T02:30:00+01:00", "Europe/Paris", 0]),  # it never was
        (datetime.max.replace(tzinfo=ZoneInfo("America/New_York")),
         ["9999-12-31T23:59:59.999999-05:00", "America/New_York", 0]),
        (time(9, 30, tzinfo=PARIS), ["09:30:00", "Europe/Paris", 0]),
        (time(9, 30, fold=1), ["09:30:00", None, 1]),
        (time(9, 30, tzinfo=UTC), "09:30:00+00:00"),
    ],
)  # fmt: skip
def test_a_moment_keeps_its_time_zone_and_which_of_two_it_is(moment: datetime | time, words: Any) -> None:
    codec = TypedJson()
    tag = "$datetime" if isinstance(moment, datetime) else "$time"
    assert json.loads(codec.dumps(moment)) == {tag: words}
    found = codec.loads(codec.dumps(moment))
    assert (found, found.tzinfo, found.fold) == (moment, moment.tzinfo, moment.fold)
    with pytest.raises(UsageError, match="Nowhere"):
        codec.loads(b'{"$datetime": ["2026-01-01T00:00:00+00:00", "Nowhere", 0]}')


@attrs.define(frozen=True, cache_hash=True)
class Hashed:
    n: int


@attrs.define(frozen=True, cache_hash=True, slots=False)
class HashedToo:
    n: int


@dataclasses.dataclass
class Open(Generic[T]):
    content: T


@pytest.mark.parametrize("value", [Hashed(3), HashedToo(3), Open[int](3)])
def test_what_python_and_attrs_keep_for_themselves_is_left_out(value: Any) -> None:
    codec = TypedJson()
    codec.register(type(value))
    if not isinstance(value, Open):
        hash(value)
    found = codec.loads(codec.dumps(value))
    assert found == value
    if not isinstance(value, Open):
        assert hash(found) == hash(value)


@pytest.mark.parametrize("name", ["cents", "__dict__", "lock", "__post_init__", "LIMIT"])
def test_a_payload_cannot_put_into_an_object_what_its_constructor_never_does(name: str) -> None:
    codec = TypedJson()
    codec.register(Money)
    words = json.loads(codec.dumps(Money(1)))
    words["$class"][2] = {name: 5}
    with pytest.raises(UsageError, match=name):
        codec.loads(json.dumps(words).encode())


def test_an_instance_that_shadows_a_constant_of_its_class_is_refused_at_the_enqueue() -> None:
    codec = TypedJson()
    codec.register(Money)
    money = Money(1)
    money.LIMIT = 10**9
    with pytest.raises(UsageError, match=r"Money\.LIMIT belongs to the class and is no field"):
        codec.dumps(money)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_does_not_know_is_refused(word: str) -> None:
    for data in (word, f"[{word}]", f'{{"$timedelta": [{word}, 0]}}'):
        with pytest.raises(UsageError, match=f"{word} is no JSON"):
            TypedJson().loads(data.encode())


@pytest.mark.parametrize("hostile", ["\n2026-01-01 ERROR shop: forged \x1b[2J", "\x07" * 2**20])
@pytest.mark.parametrize(
    "words",
    [
        lambda text: {"$class": [text, {}]},
        lambda text: {"$class": [f"{__name__}:Address", {text: 1}]},
        lambda text: {"$class": [f"{__name__}:Address", {f"{n}{text[:9000]}": 1 for n in range(100)}]},
        lambda text: {"$class": [f"{__name__}:Money", {"cents": 1}, {f"__{text}": 1}]},
        lambda text: {"$class": [f"{text}:Script", {"more": 1}]},
        lambda text: {"$class": [f"{__name__}:Colour", text]},
        lambda text: {"$class": [f"{__name__}:Short", {"text": text}]},
        lambda text: {f"${text}": 1},
        lambda text: {"$decimal": text},
        lambda text: {"$date": text},
    ],
)
def test_an_error_holds_no_control_characters_of_a_payload_and_not_all_of_it(
    words: Callable[[str], Any], hostile: str
) -> None:
    script = dataclasses.make_dataclass("Script", [("number", int, 0)])
    script.__module__ = "__main__"
    codec = TypedJson()
    codec.register(Address, Money, Colour, Short, script)
    with pytest.raises(UsageError) as caught:
        codec.loads(json.dumps(words(hostile)).encode())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("here", ["__main__", "shop"])
def test_a_class_is_known_whether_its_program_is_run_or_imported(here: str) -> None:
    def shop(module: str) -> tuple[TypedJson, Any]:
        kind = dataclasses.make_dataclass("Order", [("number", int)])
        kind.__module__ = module
        codec = TypedJson()
        codec.register(kind)
        return codec, kind

    there = "shop" if here == "__main__" else "__main__"
    (writer, written), (reader, read) = shop(there), shop(here)
    assert reader.loads(writer.dumps(written(3))) == read(3)
    other, _ = shop("elsewhere")
    if there == "shop":
        with pytest.raises(UsageError, match="shop:Order"):
            other.loads(writer.dumps(written(3)))  # of another module, it is another class


def test_of_two_classes_that_a_script_could_mean_none_is_taken() -> None:
    codec = TypedJson()
    for module in ("shop", "billing"):
        kind = dataclasses.make_dataclass("Order", [("number", int)])
        kind.__module__ = module
        codec.register(kind)
    assert codec.loads(b'{"$class": ["shop:Order", {"number": 1}]}').number == 1
    with pytest.raises(UsageError, match="__main__:Order"):
        codec.loads(b'{"$class": ["__main__:Order", {"number": 1}]}')


def test_a_class_of_the_same_name_is_another_class() -> None:
    first, second = (dataclasses.make_dataclass("Order", [(name, int)]) for name in ("a", "b"))
    codec = TypedJson()
    codec.register(first)
    assert codec.loads(codec.dumps(first(1))) == first(1)
    with pytest.raises(UsageError, match="Order is not known here"):
        codec.dumps(second(1))


def test_a_time_in_a_zone_without_a_name_is_refused() -> None:
    class Odd(tzinfo):
        def utcoffset(self, moment: datetime | None) -> timedelta | None:
            return None

    with pytest.raises(UsageError, match="time zone"):
        TypedJson().dumps(time(9, tzinfo=Odd()))


def test_a_field_that_was_never_set_is_refused_at_the_enqueue() -> None:
    @dataclasses.dataclass
    class Unset:
        later: int = dataclasses.field(init=False)

    codec = TypedJson()
    codec.register(Unset)
    with pytest.raises(UsageError, match="later"):
        codec.dumps(Unset())


def test_an_annotation_for_type_checkers_alone_hides_no_other() -> None:
    codec = TypedJson()

    def only(price: Price, later: Later | None = None) -> None: ...  # type: ignore[name-defined]  # noqa: F821  # as under TYPE_CHECKING

    codec.register_annotations(hints(only))
    assert codec.loads(codec.dumps(Price(5))) == Price(5)


def test_annotations_register_the_classes_that_they_mention_at_any_depth() -> None:
    codec = TypedJson()
    codec.register_annotations([dict[str, list[Address | None]], int, "a name"])
    assert codec.loads(codec.dumps(Address("Rome"))) == Address("Rome")


@pytest.mark.parametrize(
    "value", [Plain(), Undecorated(), Address("Rome"), Colour.RED, {1: 2}, float("nan"), {"a", "b"}, "\ud800"]
)
def test_what_it_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="arguments: "):
        TypedJson().dumps(value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff", b'{"$later": 1}', b'{"$uuid": "x"}', b'{"$uuid": 7}', b'{"$decimal": "x"}',
        b'{"$class": ["os:system", {"command": "x"}]}', b'{"$class": 7}', b'{"$object": 7}', b'{"$bytes": "%"}',
        b'{"$class": ["test_typedjson:Address", {"since": null}]}', b'{"$timedelta": [1]}',
        b'{"$class": ["test_typedjson:Address", {"town": "Rome", "x": 1}]}',
        b'{"$class": ["test_typedjson:Address", [1]]}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_bytes_that_it_did_not_write_are_refused(data: bytes) -> None:
    codec = TypedJson()
    codec.register(Address)
    with pytest.raises(UsageError, match="arguments: "):
        codec.loads(data.replace(b"test_typedjson", __name__.encode()))


@pytest.mark.parametrize(
    "value", [Price(5, 100), Doubled(3), Box(content=Price(1)), Pair.ONE, Rights.READ | Rights.WRITE, Rights.READ]
)
def test_what_its_constructor_computes_is_not_computed_again(value: Any) -> None:
    codec = TypedJson()
    codec.register_annotations([Wrapped, Box[int], Doubled, Pair, Rights])
    again = codec.loads(codec.dumps([value]))
    assert again == [value]
    assert type(again[0]) is type(value)


def test_what_a_validator_refuses_is_refused() -> None:
    codec = TypedJson()
    codec.register(Doubled)
    data = codec.dumps(Doubled(3)).replace(b"6", b"600")
    with pytest.raises(UsageError, match="arguments: "):
        codec.loads(data)


def test_a_field_that_came_later_than_the_job_has_its_default() -> None:
    codec = TypedJson()
    codec.register(Address)
    data = b'{"$class": ["test_typedjson:Address", {"town": "Rome"}]}'.replace(b"test_typedjson", __name__.encode())
    assert codec.loads(data) == Address("Rome")


@pytest.mark.parametrize("kind", [int, Plain, Undecorated, "Address"])
def test_only_dataclasses_attrs_classes_and_enums_are_registered(kind: Any) -> None:
    with pytest.raises(UsageError, match="register"):
        TypedJson().register(kind)

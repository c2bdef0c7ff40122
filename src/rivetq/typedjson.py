"""Arguments of tasks as bytes, and back: JSON, with a tag where JSON has no word for a type.

Plain values look like plain JSON, so that any other program can read and write a job. What JSON cannot say becomes an
object with one key that begins with a dollar, as in ``{"$datetime": "2026-01-01T00:00:00+00:00"}``. Nothing of a
payload is ever executed: a dataclass or attrs class comes back only if the application named it, as an annotation of a
task's argument or by `register`. (With pickle a process that can write into the queue can run code in the worker.)
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs

from rivetq import UsageError

from .texts import quoted, shown

_ESCAPE = "$object"
_TUPLE = "$tuple"
_CLASS = "$class"
"""The name and fields of a class; and further attributes of an instance, if it has any."""
_NAMES = 10
"""How many names an error lists at most."""
_ATTRS_HASH = "_attrs_cached_hash"
"""Where a class with attrs.define(cache_hash=True) keeps its hash, which holds in its own process only."""


class Codec(Protocol):
    """Turns the arguments of a call into bytes and back."""

    def dumps(self, value: Any) -> bytes:
        """Bytes of a value. Raises UsageError if it cannot say it."""
        ...

    def loads(self, data: bytes) -> Any:
        """The value again. Raises UsageError if the bytes are not what `dumps` makes."""
        ...


class TypedJson:
    """The codec in use unless an `App` is given another.

    It knows what JSON knows, and tuples, bytes, datetime, date, time, timedelta, UUID, Decimal, enums, dataclasses and
    attrs classes; the last three once they are registered. They come back as they were: no constructor runs again, what
    it computed is kept like a field, and what a validator of attrs refuses is refused. Keys of mappings must be str.
    """

    def __init__(self) -> None:
        self._classes: dict[str, type] = {}

    def register(self, *classes: type) -> None:
        """Let dataclasses, attrs classes and enums pass, and those that their fields are annotated with."""
        for each in classes:
            if not _is_record(each) and not _is_enum(each):
                raise UsageError(f"register: a dataclass, an attrs class or an enum expected, got {quoted(each)}")
            name = _name(each)
            if self._classes.get(name) is each:
                continue
            self._classes[name] = each
            if not _is_enum(each):
                self.register_annotations(hints(each))

    def register_annotations(self, annotations: Iterable[Any]) -> None:
        """Register all classes that these annotations mention, at any depth."""
        for annotation in annotations:
            for each in _mentioned(annotation):
                if _is_record(each) or _is_enum(each):
                    self.register(each)

    def dumps(self, value: Any) -> bytes:
        """See `Codec.dumps`."""
        try:
            return json.dumps(self._plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, AttributeError, RecursionError) as error:  # a field that was never set, say
            raise UsageError(f"arguments: JSON cannot say them ({error})") from error

    def loads(self, data: bytes) -> Any:
        """See `Codec.loads`."""
        try:
            text = data.decode("utf-8" if data[:2] == _AS_WRITTEN else json.detect_encoding(data), "surrogatepass")
            plain = _read(text)
            # Without one of these no name begins with "$": everything is what JSON says it is.
            return self._value(plain) if "$" in text or "\\u" in text else plain
        except UsageError:
            raise
        except Exception as error:  # the constructor of a user's class may raise anything
            raise UsageError(f"arguments: these {len(data)} bytes cannot be read ({shown(str(error))})") from error

    def _plain(self, value: Any) -> Any:
        kind = type(value)
        if kind in _AS_IT_IS or value is None:
            return value
        if kind is list:
            return [self._plain(item) for item in value]
        if kind is tuple:
            return {_TUPLE: [self._plain(item) for item in value]}
        if kind is dict:
            return self._plain_dict(value)
        if kind in _TAGS:
            tag, write = _TAGS[kind]
            return {tag: write(value)}
        return self._plain_instance(value)

    def _plain_dict(self, value: Mapping[Any, Any]) -> Any:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"keys must be str, got {quoted(key)}")
        plain = {key: self._plain(item) for key, item in value.items()}
        return {_ESCAPE: plain} if len(plain) == 1 and next(iter(plain)).startswith("$") else plain

    def _plain_instance(self, value: Any) -> Any:
        kind = type(value)
        if not _is_enum(kind) and not (_is_record(kind) and _is_made_of_its_fields(kind)):
            raise TypeError(f"no way to write a {kind.__module__}.{kind.__qualname__}")
        name = _name(kind)
        if self._classes.get(name) is not kind:
            raise TypeError(
                f"{name} is not known here: annotate the task's argument with it, or call app.codec.register(it)"
            )
        if _is_enum(kind):
            return {_CLASS: [name, value.value if isinstance(value, enum.Flag) else value.name]}
        fields = _fields(kind)
        content = [name, {field: self._plain(getattr(value, field)) for field in fields}]
        computed = _computed(value, fields)
        if shadows := [key for key in computed if hasattr(kind, key)]:
            raise TypeError(
                f"{name}.{shadows[0]} belongs to the class and is no field, and the instance has one of its own: "
                f"annotate it, so that it is a field"
            )
        if more := {key: self._plain(item) for key, item in computed.items()}:
            content.append(more)
        return {_CLASS: content}

    def _value(self, plain: Any) -> Any:
        kind = type(plain)
        if kind is list:
            return [self._value(item) for item in plain]
        if kind is not dict:
            return plain
        if len(plain) != 1:
            return {key: self._value(item) for key, item in plain.items()}
        ((tag, item),) = plain.items()
        if not tag.startswith("$"):
            return {tag: self._value(item)}
        if tag == _ESCAPE:
            return {key: self._value(each) for key, each in item.items()}
        if tag == _TUPLE:
            return tuple([self._value(each) for each in item])
        if tag == _CLASS:
            return self._instance(*item)
        if tag not in _READERS:
            raise UsageError(f"arguments: unknown type {quoted(tag)}; was this job written by a newer version?")
        return _READERS[tag](item)

    def _as_script(self, name: str) -> type | None:
        """A class of a program that was run as a script there and is imported here, or the other way round."""
        module, _, place = name.partition(":")
        near = [kind for known, kind in self._classes.items() if known.partition(":")[2] == place]
        main = [kind for kind in near if "__main__" in (module, _module(kind))]
        return main[0] if len(main) == 1 else None

    def _instance(self, name: str, content: Any, more: Mapping[str, Any] = MappingProxyType({})) -> Any:
        kind = self._classes.get(name) or self._as_script(name)
        if kind is None:
            raise UsageError(
                f"arguments: class {quoted(name)} is not known here: annotate the task's argument with it, or call "
                f"app.codec.register(it)"
            )
        if _is_enum(kind):
            members: Any = kind
            return members(content) if issubclass(kind, enum.Flag) else members[content]
        name, fields = _name(kind), _fields(kind)
        if unknown := set(content) - set(fields):
            names = ", ".join(map(quoted, sorted(unknown)[:_NAMES]))
            raise UsageError(f"arguments: {name} has no field {names}; it has {', '.join(fields)}")
        # Not by its constructor, which may compute: what was written are the fields as they were then.
        made: Any = object.__new__(kind)
        for field, default in fields.items():
            object.__setattr__(made, field, self._value(content[field]) if field in content else default(made))
        for key, item in more.items():
            # What the class has is a method, or a constant that the program relies on.
            if key in fields or key.startswith("__") or hasattr(kind, key):
                raise UsageError(f"arguments: {quoted(key)} is nothing that a constructor of {name} computed")
            object.__setattr__(made, key, self._value(item))
        if attrs.has(kind):
            if _ATTRS_HASH in getattr(getattr(kind.__hash__, "__code__", None), "co_names", ()):
                object.__setattr__(made, _ATTRS_HASH, None)
            attrs.validate(made)
        return made


def _no_json(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


_AS_WRITTEN = b'{"'
"""How a call begins in UTF-8, and in no other encoding of JSON."""

_JSON = json.JSONDecoder(parse_constant=_no_json)
"""Made once: `json.loads` makes one in each call that has an option, which takes longer than the reading."""


def _read(text: str) -> Any:
    """As `json.loads`. What `dumps` made has no white space around it, so that is looked for only if need be."""
    try:
        value, end = _JSON.raw_decode(text)
    except ValueError:
        end = -1
    return value if end == len(text) else _JSON.decode(text)


def _name(kind: type) -> str:
    return f"{_module(kind)}:{kind.__qualname__}"


def _module(kind: type) -> str:
    # In a spawned child the program's main module has another name.
    return "__main__" if kind.__module__ == "__mp_main__" else kind.__module__


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _is_record(kind: Any) -> bool:
    """A class that was itself decorated: what a plain subclass adds, its fields do not tell."""
    return isinstance(kind, type) and ("__dataclass_fields__" in vars(kind) or "__attrs_attrs__" in vars(kind))


def _is_made_of_its_fields(kind: type) -> bool:
    """Not an exception or a dict: these keep more than the fields, and cannot be made without their constructor."""
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _computed(value: Any, fields: Collection[str]) -> dict[str, Any]:
    """The attributes of an instance that are not fields: its constructor computed them. Cached properties excepted."""
    kind = type(value)
    return {
        key: item
        for key, item in getattr(value, "__dict__", {}).items()
        if key not in fields
        and key not in ("__orig_class__", _ATTRS_HASH)
        and not isinstance(getattr(kind, key, None), cached_property)
    }


def _fields(kind: type) -> dict[str, Callable[[Any], Any]]:
    """Names of the fields, each with what gives its default for an instance, since it may have come after the job."""
    if attrs.has(kind):
        return {field.name: partial(_attrs_default, field) for field in attrs.fields(kind)}
    assert dataclasses.is_dataclass(kind)
    return {field.name: partial(_dataclass_default, field) for field in dataclasses.fields(kind)}


def _attrs_default(field: attrs.Attribute[Any], made: Any) -> Any:
    default: Any = field.default
    if default is attrs.NOTHING:
        raise UsageError(f"arguments: the job has no field {field.name!r}, and it has no default")
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # typed as the function that makes one
        return default.factory(made) if default.takes_self else default.factory()
    return default


def _dataclass_default(field: dataclasses.Field[Any], made: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise UsageError(f"arguments: the job has no field {field.name!r}, and it has no default")


def hints(owner: Any) -> list[Any]:
    """The annotations of a function or class; those that cannot be resolved (yet) are left out."""
    try:
        found: Mapping[str, Any] = typing.get_type_hints(owner)
    except Exception:  # a name that exists for type checkers only, say: it cannot be told from an error of the class
        found = {name: _hint(owner, text) for name, text in getattr(owner, "__annotations__", {}).items()}
    return [annotation for annotation in found.values() if not isinstance(annotation, str)]


def _hint(owner: Any, annotation: Any) -> Any:
    """One annotation by itself; as it is if it cannot be resolved."""
    alone = type("Alone", (), {"__annotations__": {"it": annotation}, "__module__": owner.__module__})
    try:
        return typing.get_type_hints(alone)["it"]
    except Exception:
        return annotation


def _mentioned(annotation: Any) -> list[type]:
    """The classes in an annotation, such as those of ``list[Mail] | None`` or ``Box[Mail]``."""
    if isinstance(annotation, typing.NewType):
        return _mentioned(annotation.__supertype__)
    found = [each for each in (annotation, typing.get_origin(annotation)) if isinstance(each, type)]
    return found + [each for part in typing.get_args(annotation) for each in _mentioned(part)]


Clock = TypeVar("Clock", datetime, time)


def _clock_text(value: datetime | time) -> Any:
    """Its ISO text; with a named time zone or in the second of two equal hours a list: text, name of the zone, fold."""
    text = value.isoformat()
    zone = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else None
    if zone is None and value.tzinfo is not None and value.utcoffset() is None:
        raise TypeError(f"no way to write the time zone of {value!r}")
    return [text, zone, value.fold] if zone is not None or value.fold else text


def _read_clock(kind: type[Clock], value: Any) -> Clock:
    if isinstance(value, str):
        return kind.fromisoformat(value)
    text, zone, fold = value
    found = kind.fromisoformat(text)
    # What the clock showed, and not the moment: between 02:00 and 03:00 of a night in spring there is none.
    return found.replace(fold=fold, tzinfo=found.tzinfo if zone is None else ZoneInfo(zone))


def _seconds(value: Any) -> timedelta:
    return timedelta(seconds=value[0], microseconds=value[1])


_AS_IT_IS = {str, int, float, bool, type(None)}
_TAGS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("$bytes", lambda value: base64.b64encode(value).decode()),
    datetime: ("$datetime", _clock_text),
    date: ("$date", date.isoformat),
    time: ("$time", _clock_text),
    timedelta: ("$timedelta", lambda value: [value.days * 86_400 + value.seconds, value.microseconds]),
    UUID: ("$uuid", str),
    Decimal: ("$decimal", str),
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "$bytes": lambda value: base64.b64decode(value, validate=True),
    "$datetime": partial(_read_clock, datetime),
    "$date": date.fromisoformat,
    "$time": partial(_read_clock, time),
    "$timedelta": _seconds,
    "$uuid": UUID,
    "$decimal": Decimal,
}

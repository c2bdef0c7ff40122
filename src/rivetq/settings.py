"""Settings of a program: one class, filled from defaults of the program, a file, the environment, and arguments.

Each source overrides those before it: the program's own defaults (`defaults=`), a TOML or YAML file, the environment
(``RIVETQ_FSYNC=never``), and what is given explicitly, on a command line say. Where each value came from is kept.

>>> settings = load(defaults={"path": "jobs"}, environ={"RIVETQ_THREADS": "4"}, fsync="never")
>>> settings.path, settings.threads, settings.fsync
('jobs', 4, 'never')
>>> settings.origins["threads"]
'environment: RIVETQ_THREADS'
"""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import attrs

from rivetq import Broker, UsageError

from .tasks.app import App
from .texts import quoted
from .units import seconds_of
from .worker.options import Concurrency
from .worker.worker import Worker

PREFIX = "RIVETQ_"
FILE_VARIABLE = "RIVETQ_CONFIG"
"""Names the file, if no argument does."""

Parser = Callable[[Any], Any]
"""Brings a value from a file or the environment (a str) into the form of the setting. Raises ValueError."""
MOST = 2**50
"""Of anything that is counted. This and the other bounds are those of `Broker` and `Worker`: a wrong value is told
here, where its file is known."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text expected")
    return value


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    """A number of a text; what is none stays as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return kind(value.replace("_", ""))
    return value


def _range(low: int, high: int) -> str:
    return f"of at least {low}" if high == MOST else f"from {low} to {high}"


def _whole(low: int, high: int = MOST) -> Parser:
    def parse(value: Any) -> int:
        number = _number(value, int)
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise ValueError(f"a whole number {_range(low, high)} expected")
        return number

    return parse


def _bytes(low: int, high: int = MOST) -> Parser:
    """Also with a unit: 64MiB, 1 GiB."""
    units = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "k": 2**10, "m": 2**20, "g": 2**30}

    def parse(value: Any) -> int:
        if isinstance(value, str):
            digits = value.rstrip("bBkKmMgGiI ")
            unit = value[len(digits) :].strip().lower()
            number = _number(digits, int)
            value = number * units[unit] if unit in units and isinstance(number, int) else None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a number of bytes {_range(low, high)} expected, such as 1048576 or 64MiB")
        return value

    return parse


def _seconds(value: Any) -> float:
    try:
        return seconds_of(value if isinstance(value, timedelta) else _number(value, float), "")
    except UsageError as error:
        raise ValueError("seconds, a number from 0 to 3.1e9, expected") from error


def _some_seconds(value: Any) -> float:
    seconds = _seconds(value)
    if seconds < 0.001:
        raise ValueError("seconds, a number from 0.001 on, expected")
    return seconds


def _flag(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    found = words.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise TypeError("true or false expected")
    return found


def _one_of(*words: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"one of {', '.join(words)} expected")
        return str(value)

    return parse


def _level(value: Any) -> str:
    return str(_one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")(value.upper() if isinstance(value, str) else 0))


def _optional(parser: Parser) -> Parser:
    return lambda value: None if value is None or value == "" else parser(value)


def _queues(value: Any) -> dict[str, float] | list[str] | None:
    """Names in order of preference, or names with weights; in the environment "mail,web" or "mail=3,web=1"."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not any("=" in part for part in parts):
            value = parts
        elif not all("=" in part for part in parts):
            raise ValueError("a weight for each name, or for none, expected")
        else:
            value = {name.strip(): weight for name, _, weight in (part.rpartition("=") for part in parts)}
    if not value:
        return None
    if isinstance(value, Mapping):
        return {_text(name): _weight(weight) for name, weight in value.items()}
    if isinstance(value, list | tuple):
        return [_text(name) for name in value]
    raise ValueError("names, or names with weights, expected")


def _weight(value: Any) -> float:
    number = _number(value, float)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ValueError("weights above 0 expected")
    return float(number)


def _setting(default: Any, parser: Parser, about: str) -> Any:
    return attrs.field(default=default, metadata={"parser": parser, "about": about})


@attrs.frozen(kw_only=True)
class Settings:
    """All settings, with the defaults of RivetQ. Durations in seconds, sizes in bytes."""

    path: str = _setting("data", _text, "directory of the broker")
    fsync: str = _setting("always", _one_of("always", "interval", "never"), "when calls wait for the disk")
    fsync_interval: float = _setting(0.1, _some_seconds, "seconds between syncs, for fsync = interval")
    segment_bytes: int = _setting(64 * 2**20, _bytes(64 * 1024, 2**40), "size of a log file")
    max_payload_bytes: int = _setting(16 * 2**20, _bytes(1, 2**29), "the largest payload")
    cache_bytes: int = _setting(64 * 2**20, _bytes(0), "memory for payloads of waiting jobs")
    window_jobs: int = _setting(200_000, _whole(1024), "changed jobs in memory before a checkpoint")
    release_on_open: bool = _setting(True, _flag, "end the leases of the former owner at the opening")

    app: str | None = _setting(None, _optional(_text), "module:attribute of the App that a worker runs")
    queues: dict[str, float] | list[str] | None = _setting(  # noqa: RUF009  # it makes an attrs.field
        None, _queues, "queues of a worker, with weights if given"
    )
    threads: int = _setting(8, _whole(1), "handlers in threads")
    processes: int = _setting(os.cpu_count() or 1, _whole(1), "handlers in child processes")
    tasks: int = _setting(100, _whole(1), "async handlers")
    grace: float = _setting(30.0, _seconds, "seconds that running jobs get to end")
    prefetch: int = _setting(512, _whole(0), "jobs leased in advance at most")
    visibility_timeout: float | None = _setting(None, _optional(_some_seconds), "seconds that a worker's leases last")
    max_jobs: int | None = _setting(None, _optional(_whole(1)), "jobs after which a worker stops")
    max_memory: int | None = _setting(None, _optional(_bytes(1)), "bytes of memory at which a worker stops")
    child_max_jobs: int | None = _setting(None, _optional(_whole(1)), "jobs after which a child is replaced")
    child_max_memory: int | None = _setting(None, _optional(_bytes(1)), "bytes of memory at which it is replaced")

    log_level: str = _setting("INFO", _level, "DEBUG, INFO, WARNING, ERROR or CRITICAL")
    log_json: bool = _setting(False, _flag, "log lines as JSON")
    metrics_port: int | None = _setting(None, _optional(_whole(0, 65_535)), "port of the metrics of a worker, 0: any")

    origins: Mapping[str, str] = attrs.field(factory=dict, eq=False, repr=False, metadata={"internal": True})
    """Where each value came from, by name."""

    def __attrs_post_init__(self) -> None:
        for name, field in FIELDS.items():
            object.__setattr__(self, name, _checked(field, getattr(self, name), name))

    def broker_options(self) -> dict[str, Any]:
        """Options for `Broker` and `App`."""
        names = (
            "fsync", "fsync_interval", "segment_bytes", "max_payload_bytes", "cache_bytes", "window_jobs",
            "release_on_open",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def open_broker(self) -> Broker:
        """The broker that these settings describe; raises what `Broker` raises."""
        return Broker(self.path, **self.broker_options())

    def worker(self, app: App) -> Worker:
        """A worker for an app, by these settings."""
        return Worker(
            app,
            self.queues,
            Concurrency(threads=self.threads, processes=self.processes, tasks=self.tasks),
            grace=self.grace,
            prefetch=self.prefetch,
            visibility_timeout=self.visibility_timeout,
            max_jobs=self.max_jobs,
            max_memory=self.max_memory,
            child_max_jobs=self.child_max_jobs,
            child_max_memory=self.child_max_memory,
        )


FIELDS: dict[str, attrs.Attribute[Any]] = {
    field.name: field for field in attrs.fields(Settings) if "parser" in field.metadata
}
"""The settings by name."""


def load(
    file: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **explicit: Any,
) -> Settings:
    """Settings from all sources.

    Args:
        file: TOML, or YAML by its name (``pip install rivetq[yaml]``); of a pyproject.toml the table tool.rivetq. None:
            the one that RIVETQ_CONFIG names, if it does.
        environ: where variables are looked up; None: the environment of the process.
        defaults: of the program, below all others.
        explicit: above all others. None means: not given.

    Raises:
        UsageError: a key is unknown or a value is wrong; it names both, and the file or variable.
    """
    variables = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins = dict.fromkeys(FIELDS, "default")

    def take(source: Mapping[str, Any], origin: Callable[[str], str]) -> None:
        for name, value in source.items():
            values[name] = _parsed(name, value, origin(name))
            origins[name] = origin(name)

    take(defaults or {}, lambda name: "the program's default")
    path = file if file is not None else variables.get(FILE_VARIABLE)
    if path is not None:
        where = os.fspath(path)
        take(_read(where), lambda name: f"file: {where}")
    found = {name.removeprefix(PREFIX).lower(): text for name, text in variables.items() if name.startswith(PREFIX)}
    found.pop(FILE_VARIABLE.removeprefix(PREFIX).lower(), None)
    take(found, lambda name: f"environment: {PREFIX}{name.upper()}")
    take({name: value for name, value in explicit.items() if value is not None}, lambda name: "argument")
    return Settings(**values, origins=origins)


def _parsed(name: object, value: Any, origin: str) -> Any:
    if not isinstance(name, str):
        raise UsageError(f"{origin}: unknown setting {name!r}: a name expected")
    field = FIELDS.get(name)
    if field is None:
        near = difflib.get_close_matches(name, FIELDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(FIELDS)}"
        raise UsageError(f"{origin}: unknown setting {name!r}{hint}")
    return _checked(field, value, f"{origin}: {name}")


def _checked(field: attrs.Attribute[Any], value: Any, name: str) -> Any:
    try:
        return field.metadata["parser"](value)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{name}: {error}, got {quoted(value)}") from error


def _read(path: str) -> Mapping[str, Any]:
    """The table of a file."""
    if not path:  # "$UNSET" on a command line: the defaults are not what was asked for
        raise UsageError(f"file: the name of a file expected, got ''; to have none, leave {FILE_VARIABLE} unset")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UsageError(f"file: {path}: cannot be read: {error}") from error
    try:
        content = _yaml(data) if path.endswith((".yaml", ".yml")) else tomllib.loads(data.decode())
    except ValueError as error:  # tomllib's and UnicodeDecodeError are ValueErrors
        raise UsageError(f"file: {path}: {error}") from error
    if os.path.basename(path) == "pyproject.toml":
        tools = content.get("tool", {})
        content = tools.get("rivetq", {}) if isinstance(tools, Mapping) else tools
    elif isinstance(content, Mapping) and content.keys() == {"rivetq"}:
        content = content["rivetq"]
    if not isinstance(content, Mapping):
        raise UsageError(f"file: {path}: names with values expected, got {type(content).__name__}")
    return content


def _yaml(data: bytes) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError("YAML needs PyYAML: pip install rivetq[yaml]") from None

    class Loader(yaml.SafeLoader):
        """One that takes no key twice: the second would silently win."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise ValueError(f"{twice[0]!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(data, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error

"""Settings: which source wins, where a value came from, and errors that name key and source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from rivetq import UsageError
from rivetq.settings import FIELDS, Settings, load
from rivetq.tasks import App
from rivetq.worker import Concurrency


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_without_any_source_the_defaults_are_those_of_the_broker_and_the_worker() -> None:
    settings = load(environ={})
    assert settings == Settings()
    assert set(settings.origins.values()) == {"default"}
    with App(":memory:") as app:
        settings.worker(app)  # takes them all


def test_the_environment_wins_over_the_file_the_file_over_defaults_and_an_argument_over_all(tmp_path: Path) -> None:
    file = write(tmp_path / "rivetq.toml", 'path = "file"\nthreads = 2\ngrace = 2.5\nfsync = "never"\n')
    environ = {"RIVETQ_THREADS": "3", "RIVETQ_GRACE": "3.5", "HOME": "/"}
    settings = load(file, environ=environ, defaults={"path": "program", "tasks": 7, "threads": 1}, grace=4.5)
    assert (settings.path, settings.tasks, settings.threads, settings.grace) == ("file", 7, 3, 4.5)
    assert settings.fsync == "never"
    assert {name: settings.origins[name] for name in ("path", "tasks", "threads", "grace", "fsync", "queues")} == {
        "path": f"file: {file}",
        "tasks": "the program's default",
        "threads": "environment: RIVETQ_THREADS",
        "grace": "argument",
        "fsync": f"file: {file}",
        "queues": "default",
    }


def test_the_environment_may_name_the_file_and_an_argument_another(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.toml", "threads = 2"), write(tmp_path / "b.toml", "threads = 3")
    environ = {"RIVETQ_CONFIG": str(one)}
    assert load(environ=environ).threads == 2
    assert load(other, environ=environ).threads == 3


def test_none_means_not_given() -> None:
    assert load(environ={"RIVETQ_THREADS": "3"}, threads=None).threads == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rivetq.toml", "threads = 4\n[queues]\nmail = 3\nweb = 1\n"),
        ("other.toml", "[rivetq]\nthreads = 4\n[rivetq.queues]\nmail = 3\nweb = 1\n"),
        ("pyproject.toml", "[project]\nname = 'x'\n[tool.rivetq]\nthreads = 4\nqueues = {mail = 3, web = 1}\n"),
        ("rivetq.yaml", "threads: 4\nqueues:\n  mail: 3\n  web: 1\n"),
        ("rivetq.yml", "rivetq:\n  threads: 4\n  queues: {mail: 3, web: 1}\n"),
    ],
)
def test_a_file_is_toml_or_yaml_with_or_without_a_table_of_its_own(tmp_path: Path, name: str, text: str) -> None:
    settings = load(write(tmp_path / name, text), environ={})
    assert (settings.threads, settings.queues) == (4, {"mail": 3.0, "web": 1.0})


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("PATH", "jobs", "jobs"),
        ("SEGMENT_BYTES", "1_048_576", 2**20),
        ("SEGMENT_BYTES", "64MiB", 64 * 2**20),
        ("MAX_MEMORY", "1 GiB", 2**30),
        ("MAX_MEMORY", "", None),
        ("METRICS_PORT", "0", 0),
        ("RELEASE_ON_OPEN", "no", False),
        ("LOG_JSON", "True", True),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("GRACE", "1.5", 1.5),
        ("QUEUES", "mail, web", ["mail", "web"]),
        ("QUEUES", "mail=3, a=b=1", {"mail": 3.0, "a=b": 1.0}),
        ("QUEUES", "", None),
    ],
)
def test_texts_of_the_environment_become_values(variable: str, text: str, value: Any) -> None:
    settings = load(environ={f"RIVETQ_{variable}": text})
    assert getattr(settings, variable.lower()) == value


BAD = [
    ("fsync", "sometimes"), ("segment_bytes", "1KiB"), ("segment_bytes", "5 bananas"), ("threads", "0"),
    ("threads", "many"), ("grace", "-1"), ("grace", "nan"), ("release_on_open", "perhaps"), ("log_level", "LOUD"),
    ("queues", "mail=0"), ("queues", "mail=x"), ("queues", "mail=inf"),
    ("metrics_port", "-1"), ("metrics_port", "65536"), ("path", ""),
    ("visibility_timeout", "0"), ("fsync_interval", "0"), ("grace", "5e9"), ("max_payload_bytes", "900GiB"),
    ("window_jobs", "1_000_000_000_000_000_000"), ("segment_bytes", "2048GiB"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_value_is_an_error_that_names_key_and_source(tmp_path: Path, name: str, text: str) -> None:
    variable = f"RIVETQ_{name.upper()}"
    with pytest.raises(UsageError, match=rf"environment: {variable}: {name}: .*expected") as caught:
        load(environ={variable: text})
    assert repr(text) in str(caught.value)
    file = write(tmp_path / "x.toml", f'{name} = "{text}"')
    with pytest.raises(UsageError, match=f"file: {file}: {name}: "):
        load(file, environ={})
    with pytest.raises(UsageError, match=f"argument: {name}: "):
        load(environ={}, **{name: text})


def test_a_zero_in_a_file_is_a_value(tmp_path: Path) -> None:
    assert load(write(tmp_path / "x.toml", "metrics_port = 0"), environ={}).metrics_port == 0
    with pytest.raises(UsageError, match="max_jobs: a whole number"):
        load(write(tmp_path / "x.toml", "max_jobs = 0"), environ={})


def test_a_table_of_its_own_beside_other_settings_hides_none_of_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown setting 'rivetq'"):
        load(write(tmp_path / "x.toml", "threads = 4\n[rivetq]\nthreads = 5\n"), environ={})


@pytest.mark.parametrize("value", ["true", "[1]", "1.5", "{a = 1}"])
def test_a_value_of_the_wrong_type_in_a_file_is_an_error(tmp_path: Path, value: str) -> None:
    file = write(tmp_path / "x.toml", f"threads = {value}")
    with pytest.raises(UsageError, match=f"{file}: threads: "):
        load(file, environ={})


def test_an_unknown_key_is_an_error_that_names_it_the_source_and_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "x.toml", "thread = 3")
    with pytest.raises(UsageError, match=f"file: {file}: unknown setting 'thread'; did you mean 'threads'"):
        load(file, environ={})
    with pytest.raises(UsageError, match="environment: RIVETQ_COLOUR: unknown setting 'colour'"):
        load(environ={"RIVETQ_COLOUR": "red"})
    with pytest.raises(UsageError, match="argument: unknown setting 'origins'"):
        load(environ={}, origins={})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.toml", "threads ="), ("x.yaml", "a: [1"), ("x.yaml", "- 1"), ("x.toml", None), ("x.yaml", "1: x"),
        ("x.yaml", "on: true"), ("x.yaml", "null: 3"), ("x.yaml", "threads: 1\nthreads: 2"),
        ("pyproject.toml", "tool = 5"),
        ("pyproject.toml", "[tool]\nrivetq = 5"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, name: str, text: str | None) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=f"file: {file}"):
        load(file, environ={})


def test_what_settings_accept_brokers_and_workers_accept(tmp_path: Path) -> None:
    extremes = {
        "fsync_interval": (0.001, 3.1e9), "segment_bytes": (2**16, 2**40), "max_payload_bytes": (1, 2**29),
        "cache_bytes": (0, 2**50), "window_jobs": (1024, 2**50), "grace": (0, 3.1e9),
        "visibility_timeout": (0.001, 3.1e9), "prefetch": (0, 2**50), "max_jobs": (1, 2**50),
    }  # fmt: skip
    for name, values in extremes.items():
        for value in values:
            settings = load(environ={}, path=":memory:", **{name: value})
            with settings.open_broker() as broker, App(broker) as app:
                settings.worker(app)


def test_yaml_may_merge_what_it_names(tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", "rivetq:\n  queues: &q {mail: 2}\n")
    assert load(file, environ={}).queues == {"mail": 2.0}
    file.write_text("rivetq:\n  queues:\n    <<: {mail: 2}\n    web: 1\n")
    assert load(file, environ={}).queues == {"mail": 2.0, "web": 1.0}


def test_settings_open_a_broker_and_make_a_worker(tmp_path: Path) -> None:
    settings = load(environ={}, path=str(tmp_path / "data"), fsync="never", queues=["mail"], threads=2, grace=1)
    with settings.open_broker() as broker, App(broker) as app:
        assert broker.path == str(tmp_path / "data")
        worker = settings.worker(app)
        assert worker.grace == 1


def test_every_setting_of_a_broker_and_a_worker_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    broker: dict[str, Any] = {
        "fsync": "never", "fsync_interval": 0.7, "segment_bytes": 2**20, "max_payload_bytes": 1000, "cache_bytes": 77,
        "window_jobs": 2000, "release_on_open": False,
    }  # fmt: skip
    worker: dict[str, Any] = {
        "grace": 1.5, "prefetch": 7, "visibility_timeout": 77.0, "max_jobs": 5, "max_memory": 2**30,
        "child_max_jobs": 6, "child_max_memory": 2**29,
    }  # fmt: skip
    settings = Settings(path="jobs", queues=["mail"], threads=2, processes=3, tasks=4, **broker, **worker)
    made: list[Any] = []
    monkeypatch.setattr("rivetq.settings.Broker", lambda *given, **options: made.append((given, options)))
    monkeypatch.setattr("rivetq.settings.Worker", lambda *given, **options: made.append((given, options)))
    app = App(":memory:")
    settings.open_broker()
    settings.worker(app)
    assert made == [
        (("jobs",), broker),
        ((app, ["mail"], Concurrency(threads=2, processes=3, tasks=4)), worker),
    ]


def test_every_setting_says_what_it_is_about() -> None:
    assert [name for name, field in FIELDS.items() if not field.metadata["about"]] == []
    assert {field.name for field in attrs.fields(Settings)} == {*FIELDS, "origins"}


def test_settings_that_are_made_by_hand_are_checked_too() -> None:
    with pytest.raises(UsageError, match="threads: a whole number"):
        Settings(threads=-1)
    assert Settings(segment_bytes="1MiB").segment_bytes == 2**20  # type: ignore[arg-type]  # as from a file


def test_names_with_and_without_weights_do_not_mix() -> None:
    with pytest.raises(UsageError, match="RIVETQ_QUEUES: queues: a weight for each name, or for none"):
        load(environ={"RIVETQ_QUEUES": "mail=3,web"})

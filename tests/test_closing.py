"""The scenes of the sweep of closings (closing.py; test_sweeps.py makes a slice of it), and that it sees bugs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import closing
import pytest
from simulation import ViolationError

from rivetq import pools
from rivetq.live import LiveEngine, SoonLease
from rivetq.tasks import App
from rivetq.worker import Worker


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    resource_tracker.ensure_running()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", closing.SCENES)
def test_a_close_when_all_wait_is_told_to_all(tmp_path: Path, name: str) -> None:
    kind = closing.SCENES[name]
    tracer = closing.play(kind, tmp_path / "data", None, name)
    assert {Path(file).stem for file, line in tracer.visits} >= set(kind.files) - {"ahead", "children"}


def _forgets_waits(self: LiveEngine) -> None:
    self._lessees.clear()
    close(self)


def _tells_nothing(self: SoonLease, *given: object) -> None:
    pass


def _opens_again(self: App) -> None:
    close_app(self)
    self._is_closed = False


close, close_app = LiveEngine.close, App.close
PLANTS = [
    ("broker", LiveEngine, "close", _forgets_waits, "waits for ever|not told"),
    ("broker", LiveEngine, "_check", lambda self: None, "hangs|is closed"),
    ("app, thread and loop", App, "close", _opens_again, "opened again"),
    ("worker, thread and loop", pools.ThreadPool, "stop", lambda self, seconds: None, "go on"),
    ("worker, process", Worker, "_leave", lambda self: None, "still has"),
]


@pytest.mark.parametrize(("name", "owner", "verb", "plant", "what"), PLANTS)
def test_the_sweep_of_closings_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: type, verb: str, plant: object, what: str
) -> None:
    monkeypatch.setattr(closing, "PATIENCE_S", 1.0)
    monkeypatch.setattr(owner, verb, plant)
    with pytest.raises(ViolationError, match=what):
        closing.play(closing.SCENES[name], tmp_path / "data", None, name)

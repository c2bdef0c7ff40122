"""The scenes of the sweep of closings (closing.py; test_sweeps.py makes a slice of it), and that it sees bugs."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import closing
import pytest


@pytest.fixture
def quiet() -> Iterator[None]:
    resource_tracker.ensure_running()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", closing.SCENES)
def test_a_close_when_all_wait_is_told_to_all(tmp_path: Path, name: str) -> None:
    kind = closing.SCENES[name]
    tracer = closing.play(kind, tmp_path / "data", None, name)
    seen = {str(Path(file).relative_to(closing.PACKAGE).with_suffix("")) for file, line in tracer.visits}
    assert seen >= set(kind.files) - {"storage/ahead", "worker/children"}


PLANTS = {
    "waits are forgotten": (
        "broker",
        "close = LiveEngine.close\nLiveEngine.close = lambda self: (self._lessees.lines.clear(), close(self))",
        "waits for ever|not told",
    ),
    "a closed broker answers": ("broker", "LiveEngine._check = lambda self: None", "hangs|is closed|for ever"),
    "an app opens again": (
        "app, thread and loop",
        "close = App.close\nApp.close = lambda self: (close(self), setattr(self, '_is_closed', False))",
        "opened again",
    ),
    "threads stay": ("worker, thread and loop", "ThreadPool.stop = lambda self, seconds: None", "go on"),
    "the app keeps its worker": ("worker, process", "Worker._leave = lambda self: None", "still has"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_the_sweep_of_closings_sees(tmp_path: Path, name: str) -> None:
    """In a process of its own: what such a bug leaves behind would disturb other tests."""
    scene, plant, what = PLANTS[name]
    program = tmp_path / "planted.py"
    program.write_text(f"""
import logging, os, sys
from multiprocessing import resource_tracker
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import closing
from rivetq.engines.live import LiveEngine
from rivetq.worker.pools import ThreadPool
from rivetq.tasks import App
from rivetq.worker import Worker
{plant}
if __name__ == "__main__":
    resource_tracker.ensure_running()
    logging.disable()
    closing.PATIENCE_S = 5.0
    try:
        closing.play(closing.SCENES[{scene!r}], Path({str(tmp_path / "data")!r}), None, "planted")
    except closing.ViolationError as error:
        print(error, flush=True)
    os._exit(0)  # with all that the bug left
""")
    found = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=True)
    assert re.search(what, found.stdout), found

"""A slice of the hunt: power cuts on a simulated disk (see simulation.py; `make crash` runs any number)."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulation
from simulation import Hunt, ViolationError, hunt

from rivetq.engines.local import LocalEngine
from rivetq.testing import ManualClock


def test_no_power_cut_takes_what_was_promised() -> None:
    states, lives = hunt(range(1_000_000), 900)
    assert states >= 900
    assert lives > 3


def test_one_seed_gives_one_life(tmp_path: Path) -> None:
    """Same seed, same trace: every disk operation, its place and its length."""
    traces = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        life = simulation.Life(tmp_path / name, ManualClock(), "always")
        with simulation.by_the_seed_alone():
            life.begin()
            life.live(simulation.random.Random(5), 60)
        life.end()
        traces.append(life.disk.trace)
    assert traces[0] == traces[1]
    assert len(traces[0]) > 100


def violations(seeds: range) -> list[str]:
    """What the hunt says of the lives of these seeds."""
    found = []
    for seed in seeds:
        try:
            hunt([seed], 1)
        except ViolationError as error:
            found.append(str(error))
    return found


def no_sync(self: LocalEngine, lsn: int, *, sync: bool = True) -> None:
    """In place of `_settle`: the answer before the sync."""
    self._log.write(lsn)


def test_the_hunt_sees_an_answer_before_its_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "_settle", no_sync)
    found = violations(range(10))
    assert len(found) > 5
    assert any("records up to" in each for each in found), "what was promised is missing"


def test_the_hunt_sees_a_name_that_was_not_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation.SimulatedDisk, "sync_directory", lambda self, path: None)
    with pytest.raises(ViolationError, match=r"records up to|opened"):
        hunt(range(20), 3000)


def test_the_hunt_sees_an_index_that_is_ahead_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "_wait_durable", lambda self, lsn: None)
    with pytest.raises(ViolationError, match=r"seed \d+: the index goes up to"):
        hunt(range(20), 3000)


def test_the_hunt_names_the_seed_and_the_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalEngine, "_settle", no_sync)
    found = []
    for _ in range(2):
        with pytest.raises(ViolationError) as caught:
            Hunt(tmp_path).hunt(0)
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert found[0].startswith("seed 0, power cut before operation ")

"""Who owns a directory, what a fork does to that, and which files and modes an owner leaves behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rivetq import Broker, BrokerLockedError, CorruptLogError, StorageError
from rivetq.storage.space import FIRST_BYTES

OPEN_AND_WAIT = """
import sys
from rivetq import Broker
broker = Broker(sys.argv[1])
broker.enqueue("q", b"of the other process")
print("open", flush=True)
sys.stdin.read()
broker.close()
"""


def python(script: str, *args: object) -> str:
    """What a script prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def opened_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the directory open until its stdin ends."""
    command = [sys.executable, "-c", OPEN_AND_WAIT, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process
        finally:
            process.kill()


def tree(directory: Path) -> dict[str, tuple[int, bytes | str | None]]:
    """Mode and content of all that is in a directory, and of itself."""
    found: dict[str, tuple[int, bytes | str | None]] = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        mode = path.lstat().st_mode
        content: bytes | str | None = None
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = (mode, content)
    return found


def assert_free(path: Path) -> None:
    with Broker(path) as broker:
        broker.enqueue("q", b"free")


# -- One live broker per directory


def test_a_second_broker_in_the_process_is_refused_with_who_has_it_and_since_when(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    with Broker(tmp_path / "q") as broker:
        with pytest.raises(BrokerLockedError) as caught:
            Broker(tmp_path / "q")
        error = caught.value
        assert (error.path, error.pid, error.outcome) == (str(tmp_path / "q"), os.getpid(), "not_done")
        assert error.since is not None
        assert before <= error.since <= datetime.now(UTC)
        assert str(os.getpid()) in str(error)
        broker.enqueue("q", b"the first one is not disturbed")
        assert broker.stats("q").ready == 1
        with pytest.raises(BrokerLockedError):  # and the refused one has not taken the lock away
            Broker(tmp_path / "q")


def test_a_second_broker_in_another_process_is_refused(tmp_path: Path) -> None:
    with opened_elsewhere(tmp_path / "q") as owner:
        with pytest.raises(BrokerLockedError) as caught:
            Broker(tmp_path / "q")
        assert caught.value.pid == owner.pid
        owner.communicate()
        with Broker(tmp_path / "q") as broker:
            assert broker.stats("q").ready == 1


@pytest.mark.parametrize("of", ["the directory", "its parent"])
def test_a_second_broker_through_a_symlink_is_refused(tmp_path: Path, of: str) -> None:
    target, link = tmp_path / "real" / "q", tmp_path / "link"
    with Broker(target):
        link.symlink_to(target if of == "the directory" else target.parent)
        path = link if of == "the directory" else link / "q"
        with pytest.raises(BrokerLockedError) as caught:
            Broker(path)
        assert Path(caught.value.path).resolve() == target.resolve()
    assert_free(path)


def test_of_many_threads_that_open_at_once_one_gets_it(tmp_path: Path) -> None:
    opened: list[Broker] = []
    refused: list[BrokerLockedError] = []
    start = threading.Barrier(8)

    def open_one() -> None:
        start.wait()
        try:
            opened.append(Broker(tmp_path / "q"))
        except BrokerLockedError as error:
            refused.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(refused)) == (1, 7)
    opened[0].enqueue("q", b"x")
    opened[0].close()
    assert_free(tmp_path / "q")


def test_an_owner_whose_note_cannot_be_read_is_an_owner_all_the_same(tmp_path: Path) -> None:
    with Broker(tmp_path / "q"):
        for note in (b"", b"{", b'{"pid": null, "since_ms": 1}', b'{"pid": 1}', b"[1, 2]", b"\xff\xfe"):
            (tmp_path / "q" / "LOCK").write_bytes(note)
            with pytest.raises(BrokerLockedError) as caught:
                Broker(tmp_path / "q")
            assert (caught.value.pid, caught.value.since) == (None, None)


def test_a_lock_file_that_a_refused_opening_removed_meanwhile_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "q"
    real, calls = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        calls.append(fd)
        if len(calls) == 1:  # the other one, refused, takes its file along
            (path / "LOCK").unlink()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Broker(path) as broker:
        assert len(calls) == 2
        assert (path / "LOCK").exists()
        with pytest.raises(BrokerLockedError):
            Broker(path)
        broker.enqueue("q", b"x")


# -- How the lock is freed


def test_close_frees_the_lock(tmp_path: Path) -> None:
    Broker(tmp_path / "q").close()
    python(OPEN_AND_WAIT.replace("sys.stdin.read()", ""), tmp_path / "q")
    assert_free(tmp_path / "q")


def test_a_killed_owner_frees_the_lock(tmp_path: Path) -> None:
    with opened_elsewhere(tmp_path / "q") as owner:
        owner.kill()
        owner.wait()
        with Broker(tmp_path / "q") as broker:
            assert broker.stats("q").ready == 1


@pytest.mark.parametrize("lock_file", ["stays", "was not there"])
def test_a_refused_opening_changes_nothing_and_frees_the_lock(tmp_path: Path, lock_file: str) -> None:
    path = tmp_path / "q"
    with Broker(path) as broker:
        broker.enqueue_many("q", [b"x" * 100] * 10)
        broker.rotate()
        broker.enqueue("q", b"y")
    if lock_file != "stays":
        (path / "LOCK").unlink()
    first = min((path / "log").glob("*.log"))
    whole = first.read_bytes()
    first.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    before = tree(path)
    for _ in range(2):
        with pytest.raises(CorruptLogError) as caught:
            Broker(path)
        assert caught.value.file == str(first)
        assert tree(path) == before
    first.write_bytes(whole)
    with Broker(path) as broker:
        assert broker.stats("q").ready == 11


# -- Fork

FORKED = """
import os, sys, threading
from datetime import timedelta
from rivetq import Broker, BrokerLockedError, ForkedBrokerError, LeaseRef

how, path = sys.argv[1:]
broker = Broker(path, segment_bytes=65536)
broker.enqueue_many("q", [b"x" * 100] * 10)
broker.checkpoint()  # the index is open
lease, other = broker.lease_many("q", 2)
tx = broker.transaction()
tx.__enter__()
tx.enqueue("q", b"of the parent")
waiting = threading.Thread(target=lambda: broker.lease("empty", wait=None).ack(), daemon=True)
waiting.start()
entered = lease.__enter__()

VERBS = {
    "enqueue": lambda: broker.enqueue("q", b"x"),
    "enqueue_many": lambda: broker.enqueue_many("q", [b"x"]),
    "lease": lambda: broker.lease("q"),
    "lease, waiting": lambda: broker.lease("empty", wait=None),
    "lease_many": lambda: broker.lease_many("q", 3),
    "ack": lambda: broker.ack(lease),
    "ack_many": lambda: broker.ack_many([lease]),
    "nack": lambda: broker.nack(lease),
    "release": lambda: broker.release(lease),
    "reject": lambda: broker.reject(lease),
    "extend": lambda: broker.extend(lease, 1),
    "extend by reference": lambda: broker.extend(LeaseRef(lease.id, lease.token), 1),
    "configure_queue": lambda: broker.configure_queue("q", max_jobs=3),
    "configure_queue, looking": lambda: broker.configure_queue("q"),
    "pause": lambda: broker.pause("q"),
    "resume": lambda: broker.resume("q"),
    "purge": lambda: broker.purge("q"),
    "find": lambda: broker.find("q", "key"),
    "cancel": lambda: broker.cancel(3),
    "get": lambda: broker.get(3),
    "jobs": lambda: broker.jobs("q"),
    "dead_letters": lambda: broker.dead_letters("q"),
    "redrive": lambda: broker.redrive("q"),
    "queues": lambda: broker.queues(),
    "stats": lambda: broker.stats(),
    "sync": lambda: broker.sync(),
    "checkpoint": lambda: broker.checkpoint(),
    "compact": lambda: broker.compact(),
    "rotate": lambda: broker.rotate(),
    "metrics": lambda: broker.metrics(),
    "backup": lambda: broker.backup("nowhere"),
    "lease.ack": lambda: lease.ack(),
    "lease.nack": lambda: lease.nack(),
    "lease.release": lambda: lease.release(),
    "lease.reject": lambda: lease.reject(),
    "lease.extend": lambda: lease.extend(1),
    "with lease": lambda: lease.__exit__(None, None, None),
    "tx.enqueue": lambda: tx.enqueue("q", b"x"),
    "tx.enqueue_many": lambda: tx.enqueue_many("q", [b"x"]),
    "tx.ack": lambda: tx.ack(other),
    "tx.nack": lambda: tx.nack(other),
    "end of a transaction": lambda: tx.__exit__(None, None, None),
    "another transaction": lambda: begin().enqueue("q", b"x"),
}

def begin():
    return broker.transaction().__enter__()

pid = os.fork()
if not pid:
    for name, verb in VERBS.items():
        try:
            verb()
        except ForkedBrokerError as error:
            assert error.outcome == "not_done", name
        except BaseException as error:
            print(f"{name}: {error!r}")
        else:
            print(f"{name}: no error")
    broker.close()
    broker.close()
    try:
        broker.stats()
        print("close() in the child: usable")
    except ForkedBrokerError:
        pass
    try:
        Broker(path)
        print("the child opened the parent's directory")
    except BrokerLockedError as error:
        assert error.pid == os.getppid()
    sys.stdout.flush()
    if how == "_exit":
        os._exit(0)
    sys.exit(0)

_, status = os.waitpid(pid, 0)
assert status == 0, status
lease.__exit__(None, None, None)
tx.ack(other)
tx.__exit__(None, None, None)
broker.enqueue("empty", b"wakes the waiting thread")
waiting.join(5)
assert not waiting.is_alive()
stats = broker.stats("q")
assert (stats.acked, stats.ready, stats.leased) == (2, 9, 0), stats
for verb in (broker.sync, broker.checkpoint, broker.rotate, broker.compact):
    verb()
try:
    Broker(path)
    print("the child's close freed the lock")
except BrokerLockedError:
    pass
dump = broker._engine.dump()
broker.close()
with Broker(path) as broker:
    assert broker._engine.dump() == dump
"""


@pytest.mark.parametrize("how", ["_exit", "exit"])
def test_in_a_forked_child_every_call_but_close_is_refused_and_the_parent_goes_on(tmp_path: Path, how: str) -> None:
    assert python(FORKED, how, tmp_path / "q") == ""


OUTLIVED = """
import os, sys
from rivetq import Broker
broker = Broker(sys.argv[1])
broker.enqueue("q", b"x")
broker.checkpoint()
if not os.fork():
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
"""

FORKED_WHILE_OPENING = """
import os, sys
import rivetq.engines.local
from rivetq import Broker

def recover(*args):
    if not os.fork():  # as another thread may do at any moment
        print("forked", flush=True)
        sys.stdin.read()
        os._exit(0)
    return real(*args)

real, rivetq.engines.local.recover = rivetq.engines.local.recover, recover
broker = Broker(sys.argv[1])
broker.enqueue("q", b"x")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("script", [OUTLIVED, FORKED_WHILE_OPENING], ids=["when open", "while opening"])
def test_a_child_that_outlives_the_parent_does_not_keep_the_directory(tmp_path: Path, script: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "q")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"forked\n"
        assert process.wait() == -signal.SIGKILL
        with Broker(tmp_path / "q") as broker:  # the child waits for its stdin to end
            assert broker.stats("q").ready == 1


def test_a_program_that_is_started_does_not_keep_the_directory(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "q")
    broker.enqueue("q", b"x")
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False) as process:
        broker.close()
        assert_free(tmp_path / "q")
        process.communicate()


# -- Modes

WORK = """
import os, sys
from rivetq import Broker
os.umask(int(sys.argv[2], 8))
with Broker(sys.argv[1], segment_bytes=65536) as broker:
    for _ in range(3):
        broker.enqueue_many("q", [b"x" * 1000] * 40)
        broker.ack_many(broker.lease_many("q", 30))
        broker.checkpoint()
        broker.compact()
    broker.rotate()
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), 9)
"""


def assert_private(path: Path) -> None:
    modes = {str(p.relative_to(path)): stat.S_IMODE(p.stat().st_mode) for p in [path, *path.rglob("*")]}
    wrong = {n: oct(m) for n, m in modes.items() if m != (0o700 if (path / n).is_dir() else 0o600)}
    assert not wrong
    assert {"LOCK", "log", "index", "index/data.mdb", "log/mark", "index/manifest"} <= modes.keys()


@pytest.mark.parametrize("end", ["closed", "killed"])
@pytest.mark.parametrize("umask", ["000", "022", "777"])
def test_what_is_created_is_0700_and_0600_whatever_the_umask(tmp_path: Path, umask: str, end: str) -> None:
    done = subprocess.run([sys.executable, "-c", WORK, str(tmp_path / "q"), umask, end], check=False, timeout=60)
    assert done.returncode == (0 if end == "closed" else -signal.SIGKILL)
    assert_private(tmp_path / "q")
    assert_free(tmp_path / "q")


@pytest.mark.parametrize(("umask", "mode"), [("000", 0o777), ("022", 0o755), ("027", 0o750)])
def test_missing_parents_follow_the_umask(tmp_path: Path, umask: str, mode: int) -> None:
    python(WORK, tmp_path / "a" / "b" / "q", umask, "closed")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == mode
    assert_private(tmp_path / "a" / "b" / "q")


def test_an_existing_directory_keeps_its_mode_and_foreign_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "q"
    (path / "mine").mkdir(parents=True)
    (path / "mine").chmod(0o751)
    (path / "notes.txt").write_text("mine")
    (path / "notes.txt").chmod(0o664)
    path.chmod(0o755)
    before = tree(path)
    for _ in range(2):
        python(WORK, path, "077", "closed")
        (path / "log" / "README").write_text("mine too")
    after = tree(path)
    assert {name: after[name] for name in before} == before
    assert (path / "log" / "README").read_text() == "mine too"


def test_modes_that_were_changed_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "q"
    with Broker(path) as broker:
        broker.enqueue("q", b"x")
    for each in [path, *path.rglob("*")]:
        each.chmod(0o750 if each.is_dir() else 0o640)  # say, for a backup by the group
    written_anew = {"index/manifest"}
    before = {name: mode for name, (mode, _) in tree(path).items() if "spare" not in name and name not in written_anew}
    with Broker(path) as broker:
        broker.enqueue("q", b"y")
        broker.checkpoint()
    after = {name: mode for name, (mode, _) in tree(path).items()}
    changed = {name: (oct(mode), oct(after[name])) for name, mode in before.items() if after[name] != mode}
    assert not changed


# -- Links in a directory, and whoever may write there


@pytest.mark.parametrize("name", ["LOCK", "log", "index", "log/mark", "log/spare-9", "log/0000000000000001.log"])
@pytest.mark.parametrize("target", ["there", "not there"])
def test_a_link_in_the_place_of_a_file_is_refused_and_nothing_is_touched(
    tmp_path: Path, name: str, target: str
) -> None:
    path, foreign = tmp_path / "q", tmp_path / "foreign"
    with Broker(path) as broker:
        broker.enqueue("q", b"x")
    place = path / name
    if target == "there":
        if place.is_dir():
            shutil.copytree(place, foreign)
        else:
            # A spare of the right size would be taken into use, and so become a part of the log.
            foreign.write_bytes(place.read_bytes() if place.exists() else bytes(FIRST_BYTES))
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.symlink_to(foreign)
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="symbolic link") as caught:
        Broker(path)
    assert str(place) in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["data.mdb", "manifest", "manifest.tmp"])
def test_a_link_in_the_index_is_no_way_to_another_file(tmp_path: Path, name: str) -> None:
    path, foreign = tmp_path / "q", tmp_path / "foreign"
    with Broker(path) as broker:
        broker.enqueue("q", b"x")
    foreign.write_bytes(b"precious" * 1024)
    (path / "index" / name).unlink(missing_ok=True)
    (path / "index" / name).symlink_to(foreign)
    with Broker(path) as broker:
        assert broker.stats("q").ready == 1
        broker.checkpoint()
    assert foreign.read_bytes() == b"precious" * 1024
    assert not (path / "index" / name).is_symlink()


@pytest.mark.parametrize(("mode", "warned"), [(0o777, True), (0o1777, True), (0o775, False), (0o700, False)])
def test_a_directory_that_everybody_may_write_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = tmp_path / "q"
    path.mkdir()
    path.chmod(mode)
    Broker(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert (f"{path}: every user of this machine may replace its files" in caplog.text) == warned


# -- Paths that cannot be used


@pytest.mark.parametrize(
    "path", ["file", "file/q", "file/a/q", "nowhere", "loop", "loop/q", "n" * 300, "q/LOCK", "log is a file"]
)
def test_a_path_that_cannot_be_used_is_a_storage_error_and_nothing_is_touched(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not there")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "LOCK").write_text("")
    (tmp_path / "log is a file").mkdir()
    (tmp_path / "log is a file" / "log").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(StorageError) as caught:
        Broker(tmp_path / path)
    assert type(caught.value) is StorageError
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.outcome == "not_done"
    assert tree(tmp_path) == before


AS_NOBODY = """
import os, sys
import rivetq.engines.local  # an engine is loaded when it is opened, and nobody may not read this interpreter's files
from rivetq import Broker, StorageError
path, verb = sys.argv[1:]
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    if verb == "umask 777":
        os.umask(0o777)
    with Broker(path) as broker:
        broker.enqueue("q", b"x")
        broker.checkpoint()
        broker.rotate()
except StorageError as error:
    assert isinstance(error.__cause__, OSError), error.__cause__
    print(type(error).__name__, type(error.__cause__).__name__)
else:
    print("opened")
"""


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A directory that a user without rights may use: as root, for whom no mode is a hindrance, it is nobody's."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        if os.getuid() == 0:
            os.chown(path, 65534, 65534)
        yield path


def give_away(path: Path) -> None:
    if os.getuid() == 0:
        for each in [path, *path.rglob("*")]:
            os.chown(each, 65534, 65534)


@pytest.mark.parametrize("what", ["parent", "directory", "log", "lock"])
def test_an_unwritable_path_is_a_storage_error_and_nothing_is_touched(nobodys: Path, what: str) -> None:
    path = nobodys / "parent" / "q"
    path.parent.mkdir()
    if what != "parent":
        with Broker(path) as broker:
            broker.enqueue("q", b"x")
    give_away(nobodys)
    unwritable = {"parent": path.parent, "directory": path, "log": path / "log", "lock": path / "LOCK"}[what]
    if what == "directory":
        (path / "LOCK").unlink()
    unwritable.chmod(0o400 if what == "lock" else 0o500)
    before = tree(nobodys)
    assert python(AS_NOBODY, path, "open") == "StorageError PermissionError\n"
    after = tree(nobodys)
    assert after.keys() == before.keys()
    assert not {name for name in before if after[name] != before[name] and "spare-" not in name}
    unwritable.chmod(0o600 if what == "lock" else 0o700)
    assert python(AS_NOBODY, path, "open") == "opened\n"


def test_a_umask_that_takes_everything_does_not_lock_out_a_user_without_rights(nobodys: Path) -> None:
    for _ in range(2):
        assert python(AS_NOBODY, nobodys / "q", "umask 777") == "opened\n"
    assert_private(nobodys / "q")

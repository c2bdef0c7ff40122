"""The command line, run as a user runs it: output, JSON, exit status; beside a process that has the directory open."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from rivetq import Broker, RateLimit, UsageError
from rivetq.tasks import App

pytest.importorskip("click", reason="the extra cli is not installed")

from click.testing import CliRunner
from rich.console import Console

from rivetq import cli, tools
from rivetq.cli import looking, showing, working
from rivetq.engines import view
from rivetq.settings import Settings


class Run:
    """Runs commands on one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: str, status: int = 0, stdin: str | bytes | None = None) -> str:
        result = CliRunner().invoke(cli.main, ["-d", str(self.directory), *arguments], input=stdin)
        assert result.exit_code == status, result.output
        self.errors = result.stderr
        return result.stdout

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", status=status))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in [name for name in os.environ if name.startswith("RIVETQ_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path / "data")


@pytest.fixture
def filled(run: Run) -> Run:
    with Broker(run.directory) as broker:
        broker.configure_queue("mail", rate_limit=RateLimit(5, 10), max_jobs=100)
        broker.enqueue("mail", {"to": "ada"}, headers={"rivetq-task": "send"})
        broker.enqueue("mail", b"\xff", delay=1000)
        broker.enqueue("dead", {})
        lease = broker.lease("dead")
        assert lease is not None
        lease.reject(error="broken")
    return run


# -- Looking


def test_stats_counts_all_queues(filled: Run) -> None:
    found = filled.json("stats")
    assert found["all"]["enqueued"] == 3
    assert (found["queues"]["mail"]["ready"], found["queues"]["mail"]["scheduled"]) == (1, 1)
    assert (found["queues"]["dead"]["dead"], "as_of" in found, found["record"] > 0) == (1, True, True)
    text = filled("stats")
    assert re.search(r"^mail +1 +1 +0 +0 +2 ", text, re.MULTILINE)
    assert re.search(r"^\(all\) +1 +1 +0 +1 +3 ", text, re.MULTILINE)
    assert "as of 20" in text


def test_stats_counts_the_age_of_the_oldest_job_from_now_though_nothing_is_written(filled: Run) -> None:
    ages = []
    for _ in range(2):
        time.sleep(0.2)
        ages.append(filled.json("stats")["queues"]["mail"]["oldest_age"])
    assert ages[0] >= 0.2
    assert ages[1] >= ages[0] + 0.2
    assert "oldest_age" in filled.json("stats")["queues"]["dead"]


def test_a_job_that_was_ready_in_the_moment_of_the_last_record_has_grown_older(filled: Run) -> None:
    with tools.look(filled.directory) as found:
        stats = attrs.evolve(found.stats("mail"), oldest_age=0.0)
        found.stats = lambda queue=None: stats  # type: ignore[method-assign]  # a fixed answer
        found.as_of = datetime.now(UTC) - timedelta(seconds=5)
        assert 5 <= (looking._now(found, "mail").oldest_age or 0) < 60


def test_a_reader_that_goes_away_ends_a_command_without_a_word(filled: Run) -> None:
    with Broker(filled.directory) as broker:
        broker.enqueue("q", b"x" * 2**20)  # more than a pipe holds
    command = [sys.executable, "-m", "rivetq.cli", "-d", str(filled.directory), "dump", "--payloads"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_stats_goes_on_into_a_pipe(filled: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rivetq.cli", "-d", str(filled.directory), "stats", "--watch", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = 0
        while seen < 3:
            seen += "as of" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130


def test_queues_shows_configurations(filled: Run) -> None:
    filled("pause", "mail")
    found = filled.json("queues")["queues"]["mail"]
    assert (found["paused"], found["max_jobs"], found["rate_limit"]["per_second"]) == (True, 100, 5.0)
    assert re.search(r"^mail +yes +1 +30 +100 +5/s, 10 at once, on lease +5", filled("queues"), re.MULTILINE)


def test_jobs_lists_a_page_of_a_queue(filled: Run) -> None:
    jobs = filled.json("jobs", "mail")["jobs"]
    assert [(job["id"], job["state"]) for job in jobs] == [(1, "ready"), (2, "scheduled")]
    assert (jobs[0]["payload"], jobs[1]["payload_base64"]) == ({"to": "ada"}, "/w==")
    assert [job["id"] for job in filled.json("jobs", "mail", "--after", "1")["jobs"]] == [2]
    assert [job["id"] for job in filled.json("jobs", "mail", "--state", "scheduled")["jobs"]] == [2]
    assert filled.json("jobs", "unknown")["jobs"] == []
    assert re.search(r"^ 3 +dead +5 +1 +\S+ +broken", filled("jobs", "dead"), re.MULTILINE)


def test_show_shows_a_job_or_says_that_there_is_none(filled: Run) -> None:
    assert filled.json("show", "1")["job"]["headers"] == {"rivetq-task": "send"}
    assert 'payload        {"to": "ada"}' in filled("show", "1")
    assert filled("show", "99", status=4) == ""
    assert "no job 99" in filled.errors


def test_dump_prints_the_records_of_the_log(filled: Run) -> None:
    records = [json.loads(line) for line in filled("dump", "--payloads").splitlines()]
    assert [record["lsn"] for record in records] == list(range(1, len(records) + 1))
    assert any("payloads" in event for record in records for event in record["events"])


MARKUP = "ValueError: list[int] expected, got [/x] [bold]b[/bold] :smile:"
HOSTILE = "\x1b[2J\x9b31mred\x7f\r\nforged line\u202e\ud800"
ESCAPED = r"\x1b[2J\x9b31mred\x7f\r\nforged line\u202e\ud800"


@pytest.fixture
def foreign(run: Run) -> Run:
    """A directory in which job writers chose the texts; ids 1 to 3 are dead, 4 has them in its payload."""
    with Broker(run.directory) as broker:
        for queue, error in (("q", MARKUP), ("q", HOSTILE.replace("\ud800", "")), ("jobs of [/team]", "x")):
            broker.enqueue(queue, 1, headers={"rivetq-task": error})
            lease = broker.lease(queue)
            assert lease is not None
            lease.reject(error=error)
        broker.enqueue("\x1b[31m\nred", json.dumps(HOSTILE).encode())
        broker.enqueue("[bold]x[/bold]", 1)
    return run


def printable(output: str) -> bool:
    return all(line.isprintable() for line in output.split("\n"))


def test_what_job_writers_wrote_is_no_markup_and_no_control_character(foreign: Run) -> None:
    escaped = ESCAPED.replace(r"\ud800", "")
    for command in (["stats"], ["queues"]):
        text = foreign(*command)
        for name in ("jobs of [/team]", "[bold]x[/bold]", r"\x1b[31m\nred"):
            assert re.search(rf"^{re.escape(name)} ", text, re.MULTILINE), text
        assert printable(text)
    text = foreign("jobs", "q")
    assert text.count(MARKUP) == text.count(escaped) == 2  # as task and as error
    assert printable(text)
    assert "[/team]" in foreign("show", "3")
    for job_id, words in (("1", MARKUP), ("2", escaped), ("4", ESCAPED), ("4", r"\x1b[31m\nred")):
        text = foreign("show", job_id)
        assert words in text
        assert printable(text)
    assert foreign("pause", "\x1b[31m\nred") == r"\x1b[31m\nred is paused" + "\n"


def test_json_has_the_texts_as_they_are_and_no_control_characters(foreign: Run) -> None:
    for command in (["stats"], ["queues"], ["jobs", "q"], ["show", "2"], ["show", "4"]):
        assert printable(foreign(*command, "--json")), command
    assert foreign.json("show", "4")["job"]["payload"] == HOSTILE
    assert [job["last_error"] for job in foreign.json("jobs", "q")["jobs"]] == [MARKUP, HOSTILE.replace("\ud800", "")]
    assert "\x1b[31m\nred" in foreign.json("stats")["queues"]
    foreign("enqueue", "q", '"ünï \U0001f600 \U000e0001"')
    text = foreign("show", "6", "--json")
    assert "ünï \U0001f600 \\udb40\\udc01" in text  # a letter stays, a tag that nobody sees does not
    assert json.loads(text)["job"]["payload"] == "ünï \U0001f600 \U000e0001"


def test_an_error_is_one_line_or_more_that_are_indented_and_printable(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m.yaml").write_text("a: [\n")
    run("--config", str(tmp_path / "a\x1b[31m.yaml"), "config", status=2)
    first, *others = run.errors.rstrip("\n").split("\n")
    assert first.startswith("rivetq: ")
    assert r"a\x1b[31m.yaml" in first
    assert all(line.startswith("  ") for line in others)
    assert printable(run.errors)


def test_a_long_text_is_cut_in_a_table_and_whole_elsewhere(run: Run) -> None:
    with Broker(run.directory) as broker:
        broker.enqueue("q", 1, headers={"rivetq-task": "x" * 5000})
    assert 1000 <= run("jobs", "q").count("x") < 1100
    assert run("show", "1").count("x") > 5000
    assert len(run.json("jobs", "q")["jobs"][0]["headers"]["rivetq-task"]) == 5000


def test_jobs_reads_no_payload_for_a_table_and_one_at_a_time_for_json(
    filled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Any:
        return lambda *args: (calls.append(name), call(*args))[1]

    monkeypatch.setattr(view, "read_payload", noted("read", view.read_payload))
    monkeypatch.setattr(looking, "_listed_json", noted("listed", looking._listed_json))
    filled("jobs", "mail")
    assert calls == []
    filled.json("jobs", "mail")
    assert calls == ["listed", "read"] * 2


def test_a_job_that_ends_while_it_is_listed_has_no_payload(filled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.Look, "get", lambda self, job_id: None)
    [first, _] = filled.json("jobs", "mail")["jobs"]
    assert (first["id"], first["headers"], first["state"]) == (1, {"rivetq-task": "send"}, "ready")
    assert not first.keys() & {"payload", "payload_base64"}


# -- Changing


def test_enqueue_takes_json_a_text_or_the_standard_input(run: Run) -> None:
    assert run("enqueue", "q", '{"a": [1]}') == "job 1\n"
    assert run.json("enqueue", "q", "no json", "--priority", "7", "--header", "a=b=c", "--key", "k") == {"id": 2}
    assert run.json("enqueue", "q", "another", "--key", "k") == {"id": 2}
    assert run("enqueue", "q", "-", stdin=b"\x00\xff") == "job 3\n"
    assert run("enqueue", "q", '["ada"]', "--task", "send", "--delay", "60") == "job 4\n"
    assert run("enqueue", "q", '{"to": "ada"}', "--task", "send", "--max-attempts", "7") == "job 5\n"
    with Broker(run.directory) as broker:
        jobs = broker.jobs("q")
    assert [job.payload for job in jobs] == [
        b'{"a":[1]}', b'"no json"', b"\x00\xff", b'{"args":["ada"]}', b'{"kwargs":{"to":"ada"}}',
    ]  # fmt: skip
    assert (jobs[1].priority, dict(jobs[1].headers), jobs[3].state) == (7, {"a": "b=c"}, "scheduled")
    assert jobs[3].headers["rivetq-task"] == "send"
    assert [job.max_attempts for job in jobs] == [5, 5, 5, 5, 7]


def test_pause_resume_redrive_cancel_and_purge_change_what_they_say(filled: Run) -> None:
    assert filled.json("pause", "mail") == {"queue": "mail", "paused": True}
    assert filled.json("resume", "mail") == {"queue": "mail", "paused": False}
    assert filled.json("redrive", "dead") == {"queue": "dead", "redriven": 1}
    assert filled("redrive", "dead") == "0 jobs are ready again\n"
    filled("redrive", "dead", "99", status=2)
    assert "99" in filled.errors
    assert filled.json("cancel", "3") == {"id": 3, "cancelled": True}
    assert filled.json("cancel", "3", status=4) == {"id": 3, "cancelled": False}
    filled("purge", "mail", status=2, stdin="n\n")
    assert filled.json("stats")["queues"]["mail"]["purged"] == 0
    assert filled.json("purge", "mail", "--state", "scheduled", "--yes") == {"queue": "mail", "purged": 1}
    assert filled("purge", "mail", "--yes") == "1 job is removed\n"


def test_redrive_brings_back_as_many_as_it_is_told_and_those_it_is_told(run: Run) -> None:
    with Broker(run.directory) as broker:
        broker.enqueue_many("q", [b""] * 4)
        for lease in broker.lease_many("q", 4):
            lease.reject()
    assert run.json("redrive", "q", "--limit", "2") == {"queue": "q", "redriven": 2}
    assert run.json("redrive", "q", "4") == {"queue": "q", "redriven": 1}
    states = {job["id"]: job["state"] for job in run.json("jobs", "q")["jobs"]}
    assert states == {1: "ready", 2: "ready", 3: "dead", 4: "ready"}


def test_purge_asks_what_to_remove_and_removes_nothing_without_a_yes(filled: Run) -> None:
    for answer in ("n\n", ""):
        filled("purge", "mail", "--state", "ready", stdin=answer, status=2)
        assert "Remove all ready jobs of queue 'mail' for good?" in filled.errors
        assert "nothing was removed" in filled.errors
    assert filled("purge", "mail", stdin="y\n") == "2 jobs are removed\n"
    assert filled("redrive", "dead") == "1 job is ready again\n"


def test_cancel_of_what_is_not_there_is_an_error_in_words(filled: Run) -> None:
    assert filled("cancel", "99", status=4) == ""
    assert "job 99 is leased or gone" in filled.errors
    assert filled.json("cancel", "99", status=4) == {"id": 99, "cancelled": False}


def test_ctrl_c_ends_a_question_and_a_measurement_with_130(run: Run) -> None:
    run("enqueue", "mail", "1")
    for command in (["purge", "mail"], ["bench", "--seconds", "30"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "rivetq.cli", "-d", str(run.directory), *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            if command[0] == "purge":
                assert process.stderr.read(6) == "Remove"
            else:
                wait_for(lambda: bool(list(run.directory.parent.glob("rivetq-bench-*/data/log/*.log"))))
                time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert errors.endswith("rivetq: interrupted\n")


def test_changing_keeps_the_leases_of_a_process_that_died(filled: Run) -> None:
    with Broker(filled.directory) as broker:
        assert broker.lease("mail", visibility_timeout=1000) is not None
    filled("pause", "other")
    assert filled.json("stats")["queues"]["mail"]["leased"] == 1


# -- Tools


def test_verify_backup_salvage_and_rebuild_index(filled: Run, tmp_path: Path) -> None:
    assert filled.json("verify")["jobs"] == 3
    assert filled("verify").startswith("whole\n")
    assert filled.json("rebuild-index")["jobs"] == 3
    assert filled.json("backup", str(tmp_path / "copy"))["jobs"] == 3
    assert filled.json("salvage", str(tmp_path / "saved"))["jobs"]["mail"] == {"ready": 1, "scheduled": 1}
    filled("backup", str(tmp_path / "copy"), status=2)
    (filled.directory / "index" / "data.mdb").write_bytes(b"rot")
    filled("verify", status=3)
    segment = sorted((filled.directory / "log").glob("*.log"))[0]
    data = bytearray(segment.read_bytes())
    data[5] ^= 1
    segment.write_bytes(data)
    assert filled("verify", status=1).startswith("damaged\n")
    filled("stats", status=1)
    assert str(segment) in filled.errors


def test_salvage_of_a_log_with_a_hole_is_status_1(filled: Run, tmp_path: Path) -> None:
    segment = min((filled.directory / "log").glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[data.index(b"ada")] ^= 1
    segment.write_bytes(data)
    assert filled("salvage", str(tmp_path / "saved"), status=1).startswith("something was missing")


def test_what_takes_long_shows_on_a_terminal_how_far_it_is(filled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(showing, "errors", Console(file=terminal, force_terminal=True, width=80))
    monkeypatch.setattr(showing, "PATIENCE_S", 0.01)
    verify = tools.verify

    def slow(path: str, progress: tools.Progress) -> tools.Verification:
        progress(30, 100)
        until = time.monotonic() + 10
        while "30%" not in terminal.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        return verify(path, progress=progress)

    monkeypatch.setattr("rivetq.tools.commands.verify", slow)
    assert filled("verify").startswith("whole")
    assert "30%" in terminal.getvalue()
    assert "reading every byte" in terminal.getvalue()


def test_bench_measures_in_a_directory_of_its_own_and_removes_it(run: Run) -> None:
    found = run.json("bench", "--seconds", "0.05", "--threads", "2")
    assert len(found["jobs_per_second"]) == 4
    assert all(rate > 0 for rate in found["jobs_per_second"].values())
    assert "enqueue, 2 threads" in run("bench", "--seconds", "0.05", "--threads", "2")
    assert list(run.directory.parent.iterdir()) == []


# -- Beside a process that has the directory open

OWNER = """
import sys
from rivetq import Broker
with Broker(sys.argv[1]) as broker:
    broker.enqueue_many("q", [{"n": n} for n in range(1000)])
    broker.checkpoint()
    broker.enqueue("q", {"n": 1000})
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(run: Run) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OWNER, str(run.directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield process
    process.communicate("", timeout=20)


def test_what_looks_works_on_an_open_directory_and_says_as_of_when(run: Run, owner: subprocess.Popen[str]) -> None:
    found = run.json("stats")
    assert found["all"]["ready"] == 1001
    assert run.json("show", "1001")["job"]["payload"] == {"n": 1000}
    assert len(run.json("jobs", "q", "--limit", "10000")["jobs"]) == 1001
    assert len(run("dump").splitlines()) >= 2
    assert run.json("queues")["record"] == found["record"]
    verified = run.json("verify")
    assert (verified["jobs"], verified["as_of"]) == (1001, found["as_of"])


@pytest.mark.parametrize(
    "command",
    [["enqueue", "q", "1"], ["pause", "q"], ["resume", "q"], ["redrive", "q"], ["purge", "q", "--yes"], ["cancel", "1"],
     ["rebuild-index"]],
)  # fmt: skip
def test_what_changes_something_says_who_holds_it(run: Run, owner: subprocess.Popen[str], command: list[str]) -> None:
    run(*command, status=5)
    assert f"pid {owner.pid}" in run.errors
    assert run.json("stats")["all"]["ready"] == 1001


def test_a_look_while_the_owner_works_and_compacts_sees_one_moment(run: Run) -> None:
    with Broker(run.directory, segment_bytes=65_536) as broker:
        for turn in range(30):
            broker.enqueue_many("q", [{"n": n, "fill": "x" * 500} for n in range(50)])
            for lease in broker.lease_many("q", 45):
                lease.ack()
            broker.compact() if turn % 3 else broker.checkpoint()
            found = run.json("stats")["all"]
            assert (found["enqueued"], found["acked"]) == (50 * (turn + 1), 45 * (turn + 1))
            assert found["ready"] == 5 * (turn + 1)
            assert len(run.json("jobs", "q", "--limit", "10000")["jobs"]) == 5 * (turn + 1)


# -- Errors


@pytest.mark.parametrize("command", ["stats", "queues", "verify", "dump", "rebuild-index"])
def test_a_directory_without_a_log_is_status_2_and_nothing_is_made(run: Run, command: str) -> None:
    run(command, status=2)
    assert "there is no log" in run.errors
    assert not run.directory.exists()


@pytest.mark.parametrize("command", [["pause", "q"], ["cancel", "1"], ["redrive", "q"], ["purge", "q", "--yes"]])
def test_a_change_makes_no_directory_by_mistake(run: Run, command: list[str]) -> None:
    run(*command, status=2)
    assert not run.directory.exists()


@pytest.mark.parametrize("option", ["-d", "--config"])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_an_empty_value_is_not_the_default(run: Run, option: str, place: str) -> None:
    with Broker("data") as broker:  # the default, which is the directory of `run`
        broker.enqueue("q", 1)
    empty, command = [option, ""], ["purge", "q", "--yes"]
    found = CliRunner().invoke(cli.main, empty + command if place == "before" else command + empty)
    assert found.exit_code == 2
    assert re.search("path: a text expected, got ''|file: the name of a file expected, got ''", found.stderr)
    assert run.json("stats")["all"]["ready"] == 1


@pytest.mark.parametrize("name", ["RIVETQ_PATH", "RIVETQ_CONFIG"])
def test_an_empty_variable_is_not_the_default(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with Broker("data") as broker:
        broker.enqueue("q", 1)
    monkeypatch.setenv(name, "")
    assert CliRunner().invoke(cli.main, ["purge", "q", "--yes"]).exit_code == 2
    monkeypatch.delenv(name)
    assert run.json("stats")["all"]["ready"] == 1


@pytest.mark.parametrize("arguments", [["nothing"], ["show"], ["show", "x"], ["jobs", "q", "--state", "odd"], ["jobs"]])
def test_wrong_usage_is_status_2(run: Run, arguments: list[str]) -> None:
    run(*arguments, status=2)


def test_a_bad_value_is_status_2(run: Run) -> None:
    run("enqueue", "q", "1", "--priority", "11", status=2)
    assert "priority" in run.errors
    run("enqueue", "q", "1", "--header", "x", status=2)
    assert "NAME=VALUE" in run.errors


def test_a_call_that_cannot_be_one_is_status_2(run: Run) -> None:
    run("enqueue", "mail", "ada@example.org", "--task", "send", status=2)
    assert "list or object" in run.errors
    run("enqueue", "mail", "--task", "send", stdin="no json", status=2)
    assert "list or object" in run.errors
    assert not run.directory.exists()
    run("enqueue", "q", "NaN")
    assert run.json("show", "1")["job"]["payload"] == "NaN"


@pytest.mark.parametrize(
    "arguments",
    [["stats", "--watch", "--interval", "-1"], ["bench", "--bytes", "-1"], ["bench", "--threads", "0"],
     ["bench", "--seconds", "-1"]],
)  # fmt: skip
def test_a_number_out_of_its_range_is_status_2(filled: Run, arguments: list[str]) -> None:
    filled(*arguments, status=2)


def test_a_file_of_settings_may_stand_behind_the_command(run: Run, tmp_path: Path) -> None:
    (tmp_path / "shop.toml").write_text("threads = 3")
    assert run.json("config", "--config", str(tmp_path / "shop.toml"))["threads"]["value"] == 3


def test_json_may_stand_before_the_command(filled: Run) -> None:
    assert json.loads(filled("--json", "stats"))["queues"].keys() == filled.json("stats")["queues"].keys()


def test_config_shows_values_and_their_origins(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my.toml"
    file.write_text("threads = 3\n")
    monkeypatch.setenv("RIVETQ_GRACE", "7")
    found = run.json("--config", str(file), "config")
    assert found["threads"] == {"value": 3, "origin": f"file: {file}"}
    assert found["grace"] == {"value": 7.0, "origin": "environment: RIVETQ_GRACE"}
    assert found["path"] == {"value": str(run.directory), "origin": "argument"}
    assert re.search(r"^grace +7.0 +environment: RIVETQ_GRACE", run("config"), re.MULTILINE)
    monkeypatch.setenv("RIVETQ_GRAZE", "7")
    run("config", status=2)
    assert "RIVETQ_GRAZE" in run.errors


# -- The worker, as a process

APP = """
import logging
from rivetq.tasks import App
app = App("unused")

@app.task(queue="mail")
def send(to):
    print("mail to", to, flush=True)

@app.task(queue="logs", pool="process")
def log():
    logging.getLogger("shop").info("in a child")
"""


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_a_worker_process_runs_tasks_until_sigterm(run: Run, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(APP)
    run("enqueue", "mail", '["ada"]', "--task", "send")
    command = [sys.executable, "-m", "rivetq.cli", "-d", str(run.directory), "worker", "shop:app", "--threads", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mail to ada\n"
        wait_for(lambda: bool(run.json("stats")["all"]["acked"]))
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("given", [{}, {"RIVETQ_FSYNC": "never"}, {"RIVETQ_PATH": "moved"}])
def test_what_nobody_set_is_as_the_app_has_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    used: list[tuple[str, str]] = []

    def worker(self: Settings, app: App) -> Any:
        used.append((os.path.basename(app.broker.path), app.broker._engine._fsync))  # type: ignore[attr-defined]  # of a directory
        app.close()
        raise UsageError("seen")

    monkeypatch.setattr(Settings, "worker", worker)
    monkeypatch.setattr(working, "configure", lambda **options: None)  # it would be that of all tests
    (tmp_path / "shop.py").write_text(APP.replace('App("unused")', 'App("jobs", fsync="interval")'))
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(cli.main, ["worker", "shop:app"]).exit_code == 2
    sys.modules.pop("shop")
    assert used == [(given.get("RIVETQ_PATH", "jobs"), given.get("RIVETQ_FSYNC", "interval"))]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("port", [[], ["--metrics-port", "0"]], ids=["plain", "with metrics"])
def test_a_worker_whose_broker_failed_is_status_1_and_leaves_no_server(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: list[str]
) -> None:
    closed: list[bool] = []

    class Server:
        address, port = "127.0.0.1", 9

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr("rivetq.worker.Worker.run", lambda self: 1)
    monkeypatch.setattr("rivetq.metrics.serve", lambda broker, port, workers: Server())
    monkeypatch.setattr(working, "configure", lambda **options: None)  # it would be that of all tests
    (tmp_path / "shop.py").write_text(APP.replace('"unused"', '":memory:"'))
    monkeypatch.syspath_prepend(tmp_path)
    assert CliRunner().invoke(cli.main, ["worker", "shop:app", *port]).exit_code == 1
    sys.modules.pop("shop").app.close()  # which `run` does, the real one
    assert closed == [True] * bool(port)


def test_a_number_of_handlers_is_for_each_kind_unless_one_is_given(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def worker(self: Settings, app: App) -> Any:
        found.append((self.threads, self.processes, self.tasks))
        raise UsageError("seen")

    monkeypatch.setattr(Settings, "worker", worker)
    monkeypatch.setattr(working, "configure", lambda **options: None)  # it would be that of all tests
    (tmp_path / "shop.py").write_text(APP)
    monkeypatch.syspath_prepend(tmp_path)
    run("worker", "shop:app", "-c", "3", "--tasks", "50", status=2)
    assert found == [(3, min(3, os.cpu_count() or 1), 50)]
    sys.modules.pop("shop")


@pytest.mark.parametrize("own", [False, True])
def test_a_worker_writes_all_lines_of_the_program_unless_that_has_set_up_logging(
    run: Run, tmp_path: Path, own: bool
) -> None:
    setup = "import sys; logging.basicConfig(stream=sys.stdout, level='INFO')\n" if own else ""
    (tmp_path / "shop.py").write_text(APP.replace("app = App", f"{setup}app = App"))
    run("enqueue", "logs", "[]", "--task", "log")
    command = [sys.executable, "-m", "rivetq.cli", "-d", str(run.directory), "worker", "shop:app", "--json"]
    done = subprocess.run(
        [*command, "--max-jobs", "1"], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    said = [line["message"] for line in lines]
    assert said[0].startswith("working in process ")
    assert said[-1] == "stopped after 1 jobs"
    assert [(line["logger"], line["task"]) for line in lines if line["message"] == "in a child"] == (
        [] if own else [("shop", "log")]
    )
    assert ("INFO:shop:in a child" in done.stdout) == own


@pytest.mark.parametrize(
    ("app", "why"),
    [("shop", "module:attribute"), ("nowhere:app", "cannot be imported"), ("shop:other", "has no 'other'"),
     ("shop:send", "an App is expected"), (None, "an app is needed"), ("broken:app", "ZeroDivisionError"),
     ("ends:app", "SystemExit: 0"), ("ends:other", "SystemExit: 0")],
)  # fmt: skip
def test_a_worker_without_an_app_is_status_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: str | None, why: str
) -> None:
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "ends.py").write_text(APP + "\nraise SystemExit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run("worker", *([app] if app else []), status=2)
    assert why in run.errors
    sys.modules.pop("shop", None)


def test_every_command_has_help_and_json(run: Run) -> None:
    for name, command in cli.main.commands.items():
        text = run(name, "--help")
        assert command.help, name
        assert "--json" in text
    text = re.sub(r"\s+", " ", run("--help"))
    for status, about in ((0, "done"), (1, "damaged"), (2, "not done"), (3, "index"), (4, "no such job"), (5, "open")):
        assert re.search(rf"\b{status} .*{about}", text)

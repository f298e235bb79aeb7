"""Wrong use, no store, and how the program ends: each in one clear line, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import raystore as rs
from raystore.cli import demo, finding
from raystore.cli.endings import NoStore, WrongUse
from raystore.cli.program import FAMILIES, program
from tests.cli.commands import ROOT, here, piped, process
from tests.terminals import Terminal

COMMANDS = [name for family in FAMILIES.values() for name, _, _ in family]


def ran(*arguments: Any) -> tuple[int, str]:
    """Exit code and output of a command that needs no store."""
    found = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["rolouts"], "no command 'rolouts'; did you mean 'rollouts'?"),
        (["rollouts", "--status", "suceeded"], "'suceeded' is no status; did you mean 'succeeded'?"),
        (["rollouts", "--status", "failed,runing"], "'runing' is no status; did you mean 'running'?"),
        (["rollouts", "--sort", "start-time"], "'start-time' is no field; did you mean 'start_time'?"),
        (["rollouts", "--stat", "x"], "--status"),
        (["rollouts", "--tag", "math"], "'math' is no tag; write NAME=VALUE"),
        (["export", "--to", "x.jsonl", "--tag", "math"], "'math' is no tag; write NAME=VALUE"),
        (["rollouts", "--limit", "-1"], "-1 is not in the range x>=1"),
        (["groups", "--status", "complet"], "did you mean 'complete'?"),
        (["workers", "--status", "bussy"], "did you mean 'busy'?"),
        (["resources", "p", "--diff", "1"], "'--diff' requires 2 arguments"),
        (["errors", "--since", "soon"], "'soon' is no length of time; write 90s, 10m or 2h"),
        (["watch"], "Missing option '--fail-on'"),
        (["watch", "--fail-on", "eror>1"], "'eror' is no figure; did you mean 'errors'?"),
        (["watch", "--fail-on", "errors=1"], "is no condition; write errors>0.2, idle>10m or reward<0.1@50"),
        (["watch", "--fail-on", "idle>10m@5"], "@N counts finished rollouts"),
        (["watch", "--fail-on", "idle>1x"], "'1x' in 'idle>1x' is no bound"),
        (["diff", "1"], "Missing argument 'AFTER'"),
        (["diff", "a", "b"], "'a' is neither a step nor a directory"),
        (["show"], "Missing argument 'ROLLOUT'"),
        (["curve", "--by", "versions"], "did you mean 'version'?"),
        (["start", "--resume", "may"], "'may' is no way to resume"),
        (["status", "--address", "ray://host:10001"], "is that of Ray Client, which no store can be used through"),
        (["status", "--address", "nonsense"], "'nonsense' is not of the form HOST:PORT"),
    ],
)  # fmt: skip
def test_wrong_use_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, command: list[str], said: str) -> None:
    """What was wrong and what to write; nothing is connected to find out. Exit code 2."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(finding, "_running_here", list)
    code, output = ran(*command)
    assert code == 2 and said in output, output
    assert output.startswith("error: ") and output.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["show", "math-0-9"], "no rollout 'math-0-9'"),
        (["show", "raises-9"], "no rollout 'raises-9', and the last changes name none; did you mean 'raises-2'?"),
        (["show", "retried", "--attempt", "3"], "rollout retried has no attempt 3; it has 2"),
        (["show", "a\x1bb"], r"error: rollout_id='a\x1bb'"),
        (["resources", "polcy"], "no resources 'polcy'; did you mean 'policy'?"),
        (["resources", "policy", "--version", "9"], "no version 9 of 'policy'; the newest is 3"),
        (["consumers", "trainr"], "no consumer 'trainr'; did you mean 'trainer'?"),
        (["consumers", "--rewind", "0"], "has a checkpoint at step 1"),
        (["diff", "1", "9"], "consumer 'trainer' has no step 9 in its ledger; it has steps 1 to 3"),
        (["diff", "1", "2", "--consumer", "x"], "no consumer 'x'"),
        (["resources", "--diff", "1", "2"], "whose version? Say the id"),
        (["rollouts", "--follow"], "nothing happens in a journal that is read"),
        (["watch", "--fail-on", "queue>9", "--webhook", "hook"], "'hook' is no URL"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_told_in_one_line(killed: Path, command: list[str], said: str) -> None:
    """With what there is instead. Exit code 2."""
    shown = here(*command, "--journal", killed)
    assert shown.code == 2 and shown.out == ""
    assert said in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_every_command_has_help_with_an_example() -> None:
    """And its purpose fits into the list of commands."""
    for family in FAMILIES.values():
        for name, _, purpose in family:
            code, output = ran(name, "--help")
            assert code == 0 and f"Example:\n    raystore {name}" in output, output
            assert purpose[0].isupper() and purpose.endswith(".") and len(purpose) < 80


def test_every_reading_command_gives_json() -> None:
    """Only those that change something, run the demo, or write files, do not."""
    without = [name for name in COMMANDS if "--json" not in ran(name, "--help")[1]]
    assert without == ["start", "stop", "demo", "export"]


def test_the_program_is_installed_with_the_package() -> None:
    """The entry point of pyproject.toml is there."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = found["raystore"].partition(":")
    assert callable(getattr(import_module(module), name))
    assert ran("--version") == (0, f"raystore {rs.__version__}\n")


def test_help_is_quick_and_light() -> None:
    """`raystore --help` takes less than 0.4 s, best of three, and needs neither Ray nor rich nor pydantic."""
    code = """
import sys
from raystore.cli.program import program
try:
    program.main(["--help"], "raystore")
except SystemExit:
    loaded = {"ray", "rich", "pydantic", "psutil", "numpy"} & set(sys.modules)
    assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        running = process("--help")
        out, _ = running.communicate(timeout=20)
        took.append(time.perf_counter() - begun)
        assert running.returncode == 0 and "Stores:" in out
    assert min(took) < 0.4


def test_reading_a_journal_needs_no_ray(killed: Path) -> None:
    """And says something within a second or so."""
    code = f"""
import sys
from raystore.cli.program import program
try:
    program.main(["status", "--journal", {str(killed)!r}], "raystore")
except SystemExit as ended:
    assert ended.code == 0 and "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("reading", ["missing", "empty", "damaged"])
def test_what_is_no_journal_is_told(tmp_path: Path, killed: Path, reading: str) -> None:
    """A path that does not exist, an empty directory, and one with bytes in it that nobody wrote. Exit code 3."""
    path = tmp_path / "journal"
    if reading != "missing":
        path.mkdir()
    if reading == "damaged":
        for file in killed.iterdir():
            if file.is_file():
                (path / file.name).write_bytes(b"x" * 100 + file.read_bytes()[100:])
    shown = here("status", "--journal", path)
    assert shown.code == 3 and shown.err.startswith("error: ") and str(path) in shown.err
    assert shown.err.count("\n") == 1


# -- stores on Ray -----------------------------------------------------------------------------------------------------


def test_no_store_of_this_name_says_what_there_is(live: rs.RayLightningStore) -> None:
    """And which one was meant. Exit code 3."""
    shown = here("status", "--name", "smal-run")
    assert shown.code == 3 and "did you mean 'small-run'?" in shown.err
    assert re.search("there are: .*small-run in namespace raystore", shown.err)  # and those of other tests
    elsewhere = here("status", "--namespace", "nowhere")
    assert elsewhere.code == 3 and re.search("no store in namespace 'nowhere'; there are: .*small-run", elsewhere.err)


def test_a_store_of_another_version_is_told(live: rs.RayLightningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused in one line, and the list says that it is left out. Exit code 3."""
    monkeypatch.setattr("raystore.remote.session.PROTOCOL", 99)
    shown = here("status", "--name", "small-run")
    assert shown.code == 3 and "install the same raystore on both sides" in shown.err
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    listed = here("list")
    assert listed.code == 0 and listed.err.startswith("warning: Left out of the list: ")


def test_one_of_several_stores_must_be_named(live: rs.RayLightningStore) -> None:
    """The error names them. Exit code 2, since there are stores."""
    with rs.start("another"):
        shown = here("rollouts")
        assert shown.code == 2 and "several stores run in namespace 'raystore': 'another', 'small-run'" in shown.err
        listed = here("list")
        assert listed.code == 0 and re.search(r"another +raystore .*\n(.*\n)*small-run +raystore ", listed.text)
        assert '"name": "another"' in piped("list", "--json").out
    assert here("status").code == 0  # the only one needs no name


def test_a_store_is_found_by_the_environment(live: rs.RayLightningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """RAYSTORE_NAME and RAYSTORE_NAMESPACE; an option comes first."""
    monkeypatch.setenv("RAYSTORE_NAME", "other")
    assert here("status").code == 3
    assert here("status", "--name", "small-run").code == 0
    monkeypatch.setenv("RAYSTORE_NAME", "small-run")
    assert here("status").code == 0


def test_a_store_is_stopped_by_name(cluster: None) -> None:
    """Whoever started it; one that does not exist is named."""
    rs.start("to-stop", detached=True)
    assert here("stop", "to-stop").text == "store to-stop has ended\n"
    shown = here("stop", "to-stop")
    assert shown.code == 3 and "no store 'to-stop'" in shown.err


def test_a_store_is_started_on_a_cluster_that_runs(cluster: None, tmp_path: Path) -> None:
    """It outlives the command, which says how to reach it."""
    shown = here("start", "started", "--address", address(), "--journal", tmp_path / "journal", columns=200)
    assert shown.code == 0 and f"raystore stop started --address {address()}" in shown.text
    assert here("status", "--name", "started").code == 0
    assert here("stop", "started").code == 0
    assert here("status", "--journal", tmp_path / "journal").code == 0


def address() -> str:
    """Of the cluster of this process."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def test_a_store_that_ends_meanwhile_is_told(cluster: None) -> None:
    """One line, exit code 3."""
    with rs.start("ending") as store:
        watching = process("watch", "--fail-on", "queue>5", "--name", "ending", "--address", address())
        connected(store)
        rs.stop("ending")
    _, err = watching.communicate(timeout=60)
    assert watching.returncode == 3 and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is connected to no cluster, on a machine on which none runs."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(finding, "_running_here", list)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("named", [None, "local", "auto"])
def test_reading_never_starts_ray(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    """Whatever RAY_ADDRESS says; the error says what to do. Exit code 3."""
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    for command in (["status"], ["list"], ["rollouts", "--follow"], ["stop", "x"], ["tail"], ["show", "x"]):
        shown = here(*command)
        assert shown.code == 3 and "no Ray cluster runs on this machine" in shown.err
        assert "raystore start" in shown.err and "--journal DIR" in shown.err


@pytest.mark.usefixtures("unconnected")
def test_a_dead_address_is_told_at_once() -> None:
    """Ray would try for a minute. Exit code 3."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        begun = time.monotonic()
        shown = here("status", "--address", f"127.0.0.1:{taken.getsockname()[1]}")
    assert shown.code == 3 and "no Ray cluster answers at 127.0.0.1" in shown.err
    assert time.monotonic() - begun < 4


def test_a_cluster_that_does_not_let_us_in_is_told() -> None:
    """Something listens, and it is no Ray, or one that is ending: Ray itself would try for ever. Exit code 3."""
    code = """
from raystore.cli import finding
from raystore.cli.program import program

finding.CONNECT_SECONDS = 3.0
program.main(["status", "--address", "127.0.0.1:PORT"], "raystore")
"""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        code = code.replace("PORT", str(silent.getsockname()[1]))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 3 and done.stderr.startswith("error: Ray at 127.0.0.1:"), done.stderr
    assert "did not let us in within 3 s" in done.stderr and done.stderr.count("\n") == 1


def test_a_token_is_sent_to_clusters_of_this_machine_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Ray does for a cluster that it finds itself; what the user says comes first."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr(finding, "_running_here", lambda: ["127.0.0.1:7"])
    monkeypatch.setattr(finding, "_knock", lambda address: None)
    monkeypatch.setattr(finding, "TOKEN", tmp_path / "token")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    said = []
    finding.join("127.0.0.1:7")
    said.append(os.environ.get("RAY_AUTH_MODE"))  # there is no token
    (tmp_path / "token").touch()
    finding.join("10.0.0.1:7")
    said.append(os.environ.get("RAY_AUTH_MODE"))  # it runs elsewhere
    finding.join("127.0.0.1:7")
    said.append(os.environ.get("RAY_AUTH_MODE"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    finding.join("127.0.0.1:7")
    said.append(os.environ.get("RAY_AUTH_MODE"))
    assert said == [None, None, "token", "disabled"]


def test_what_is_waited_for_is_said_on_a_terminal(killed: Path) -> None:
    """Before it is there; then it is taken away."""
    terminal = Terminal()
    command = [sys.executable, "-m", "raystore", "status", "--journal", str(killed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal.stream, timeout=30)
    terminal.close()
    assert done.returncode == 0 and b"Reading" not in done.stdout
    said, gone = f"Reading the journal {killed} ...", len(f"Reading the journal {killed} ...") * " "
    assert terminal.text == f"{said}\r{gone}\r"


def test_one_of_several_clusters_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless Ray has written down which was started last."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(finding, "_running_here", lambda: ["10.0.0.1:1", "10.0.0.2:2"])
    with pytest.raises(WrongUse, match=r"several Ray clusters run on this machine: 10\.0\.0\.1:1, 10\.0\.0\.2:2"):
        finding.cluster(None)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.2:2\n")
    assert finding.cluster(None) == "10.0.0.2:2"
    assert finding.cluster("10.0.0.9:9") == "10.0.0.9:9"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.3:3")
    assert finding.cluster(None) == "10.0.0.3:3"
    assert finding.cluster("local", may_start=True) is None


def test_the_cluster_of_this_machine_is_found(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command lines of its nodes, without Ray."""
    assert address() in finding._running_here()


# -- how the program ends ----------------------------------------------------------------------------------------------


def connected(store: rs.RayLightningStore) -> None:
    """Wait until another process has connected to a store."""
    deadline = time.monotonic() + 30
    while store.sync.statistics()["sessions"] < 2:
        assert time.monotonic() < deadline, "nobody came"
        time.sleep(0.05)


def test_tail_goes_on_until_ctrl_c(cluster: None) -> None:
    """In a process of its own, on a terminal: what happens is shown when it happens; then exit code 130."""
    terminal = Terminal()
    with rs.start("tailed") as store:
        store.sync.enqueue_rollout("old", rollout_id="came-before")
        running = process("tail", "--last", "1", "--name", "tailed", "--address", address(), stdout=terminal.stream)
        terminal.until("came-before")
        store.sync.enqueue_rollout("new", rollout_id="came-later")
        terminal.until("came-later")
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=20)
    terminal.close()
    assert running.returncode == 130 and "Traceback" not in err


def test_follow_gives_lines_of_json(cluster: None) -> None:
    """One for each rollout that matches, and again when it changes, also if it changes before changes are asked for."""
    with rs.start("followed") as store:
        store.sync.enqueue_rollout("old", rollout_id="was-there", queue="own")
        options = ["--queue", "own", "--name", "followed", "--address", address()]
        running = process("rollouts", "--follow", "--json", *options)
        connected(store)
        for number in range(20):
            store.sync.enqueue_rollout("new", rollout_id=f"new-{number}", queue=("own", "other")[number % 2])
            time.sleep(0.05)
        assert running.stdout is not None
        lines = [json.loads(running.stdout.readline()) for _ in range(3)]
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=20)
    assert lines[0]["rollout_id"] == "was-there" and lines[2]["rollout_id"].startswith("new-")
    assert {line["queue"] for line in lines} == {"own"} and running.returncode == 130


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_broken_pipe_is_quiet(killed: Path, options: list[str]) -> None:
    """As with `| head -1`: no word, exit code 0."""
    running = process("rollouts", "--limit", "35", *options, "--journal", killed)
    assert running.stdout is not None
    running.stdout.close()
    assert running.wait(20) == 0
    assert running.stderr is not None and running.stderr.read() == ""


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_no_color(killed: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """NO_COLOR, and a terminal that knows no escape codes, get none."""
    assert "\x1b[" in here("errors", "--journal", killed).out
    monkeypatch.setenv(variable, "dumb")
    assert "\x1b" not in here("errors", "--journal", killed).out


def test_start_without_a_cluster_stays_until_ctrl_c() -> None:
    """It starts Ray, and ends it."""
    terminal = Terminal(200)
    running = process("start", "alone", stdout=terminal.stream, RAY_ADDRESS="local")
    terminal.until("Ctrl+C ends both", within=60)
    found = re.search(r"raystore status --address (\S+) --name alone", terminal.text)
    assert found
    status = process("status", "--address", found[1])
    out, err = status.communicate(timeout=60)
    assert status.returncode == 0 and "store alone" in out, err
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    terminal.close()
    assert running.returncode == 0 and "Traceback" not in err, err
    with pytest.raises(NoStore):
        finding._knock(found[1])


def test_the_demo_runs_the_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the arguments that it got; its exit code is that of the example. Without the example it says so."""
    example = tmp_path / "example.py"
    example.write_text("import os, sys\nprint(sys.argv[1:], os.environ['RAY_ADDRESS'])\nraise SystemExit(7)\n")
    assert demo.EXAMPLE.exists()
    monkeypatch.setattr(demo, "EXAMPLE", example)
    assert here("demo", "--steps", "3").code == 7
    monkeypatch.setattr(demo, "EXAMPLE", tmp_path / "gone.py")
    shown = here("demo")
    assert shown.code == 2 and "installed without it" in shown.err and "make demo" in shown.err


def test_watch_posts_what_happened(killed: Path) -> None:
    """As JSON; a URL that does not answer is told, and does not change the exit code."""
    got: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        assert here("watch", "--fail-on", "errors>0.1@20", "--webhook", url, "--journal", killed).code == 1
    assert got[0]["holds"] == "errors>0.1@20" and got[0]["value"] > 0.1 and got[0]["rollout_id"] == "hostile"
    shown = here("watch", "--fail-on", "errors>0.1@20", "--webhook", url, "--journal", killed)
    assert shown.code == 1 and "did not take the news" in shown.err


def test_watch_waits_for_what_happens(cluster: None) -> None:
    """No sooner than it happens, and without polling."""
    with rs.start("watched") as store:
        watching = process("watch", "--fail-on", "errors>0.5@2", "--name", "watched", "--address", address())
        connected(store)
        for number in range(2):
            store.sync.enqueue_rollout(number, rollout_id=f"r{number}")
            claimed = store.sync.dequeue_rollout("w")
            assert claimed is not None and watching.poll() is None
            store.sync.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="failed")
        out, err = watching.communicate(timeout=30)
    assert watching.returncode == 1 and "errors is 1" in out and "raystore show r1" in out, err

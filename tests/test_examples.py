"""The examples do what they say, in a short form of each; and stop quietly.

One at a time, with patience: each must also do it on a machine whose cores are taken.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(1000)
PATIENCE = 900  #: seconds for one example; on a quiet machine none takes two minutes
ENVIRONMENT = os.environ | {"RAY_ADDRESS": "local"}


def example(name: Any, *arguments: Any, cwd: Path) -> Any:
    """Run an example on a local Ray of its own; its output, which must be quiet, and its metrics."""
    command: list[str | Path] = [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=ENVIRONMENT)
    (run,) = (cwd / "runs").iterdir()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return done, metrics, cwd


@pytest.fixture
def ran(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """What an example said and wrote, where, and in how many steps."""
    name, steps = request.param
    return *example(name, "--steps", steps, cwd=tmp_path), steps


def short_and_long(name: str, short: int, long: int) -> pytest.MarkDecorator:
    """A test of an example with so many steps; in `make test-long` also with more."""
    forms = [(name, short), pytest.param((name, long), marks=pytest.mark.long)]
    return pytest.mark.parametrize("ran", forms, indirect=True, ids=[f"{name}-{short}", f"{name}-{long}"])


def check(done: Any, metrics: Any, cwd: Any, *, steps: Any) -> None:
    """It succeeded, said nothing else (but that runners of a busy machine come late), and drew its picture."""
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("Still waiting for ")]
    assert "it learnt" in done.stdout and not said, done.stderr
    assert len(metrics) == steps
    (curve,) = (cwd / "runs").glob("*/*.svg")
    assert curve.read_text().startswith("<svg")


def test_prompt_bandit_learns_and_is_reproducible(tmp_path: Path) -> None:
    """Two runs with one seed, on different numbers of runners, write the same metrics but for times."""
    without_times = []
    for runners in (2, 3):
        folder = tmp_path / str(runners)
        folder.mkdir()
        arguments = ("--runners", runners, "--steps", 15, "--seed", 3)
        done, metrics, _ = example("01_prompt_bandit", *arguments, cwd=folder)
        check(done, metrics, folder, steps=15)
        assert len(done.stdout.splitlines()) <= 25
        without_times.append([{k: v for k, v in line.items() if k != "seconds"} for line in metrics])
    assert without_times[0] == without_times[1]


@pytest.mark.parametrize(("result", "status"), [(True, 0), (False, 1), (KeyboardInterrupt(), "stopped")])
def test_the_exit_status_says_whether_it_did_what_it_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    result: bool | KeyboardInterrupt,
    status: int | str,
) -> None:
    """An example that did not learn fails, and one that was interrupted says so."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    harness = importlib.import_module("harness")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness.ray, "init", lambda **options: None)
    monkeypatch.setattr(sys, "argv", ["example.py", "--steps", "7"])

    async def main(run: Any) -> bool:
        assert (run.steps, run.runners, run.seed) == (7, 4, 0)
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as ended:
        harness.run("example", main, "What it does.\n\nMore of it.")
    assert ended.value.code == status


@short_and_long("02_grpo_tools", 30, 60)
def test_grpo_learns_through_kills(ran: Any) -> None:
    """Undisturbed and with a runner killed at each step: both reach 0.9, and nothing is lost or trained on twice."""
    done, metrics, folder, steps = ran
    check(done, metrics, folder, steps=2 * steps)
    undisturbed, with_kills = (line for line in done.stdout.splitlines() if "enqueued" in line)
    assert f"trained {128 * steps} + dropped 0, doubled 0" in undisturbed and "0 runners killed, 0" in undisturbed
    assert f"enqueued {128 * steps} = trained" in with_kills and f"{steps} runners killed" in with_kills
    assert "the ledger is correct" in done.stdout
    assert {line["lag"] for line in metrics} == {0, 1}


@short_and_long("05_crash_and_resume", 17, 24)
def test_everything_dies_and_is_trained_exactly_once(ran: Any) -> None:
    """Store, runners and trainer are killed, the latter at each point between a step and its checkpoint."""
    done, metrics, folder, steps = ran
    check(done, metrics, folder, steps=2 * steps)
    assert done.stdout.count(f"asked {128 * steps}, trained {128 * steps}, lost 0, doubled 0") == 2
    for point in ("optimiser step", "ack", "saved", "checkpoint"):
        assert f"after: {point}\n" in done.stdout
    assert "4 x trainer" in done.stdout and "both ledgers are correct" in done.stdout


@short_and_long("06_async_lag", 10, 20)
def test_running_ahead_saves_time_and_dropping_what_is_late_drops_what_is_long(ran: Any) -> None:
    """Under "wait" no group is older than `max_lag`, and all are trained on; under "drop" those that are short."""
    done, metrics, folder, steps = ran
    ways = {(line["max_lag"], line["late"]) for line in metrics}
    batches = {way: sum((line["max_lag"], line["late"]) == way for line in metrics) for way in ways}
    check(done, metrics, folder, steps=sum(batches.values()))
    assert len(ways) == 7 and all(count == steps for (_, late), count in batches.items() if late != "drop")
    assert "each did what it says" in done.stdout and "WRONG" not in done.stdout


@short_and_long("07_long_rollouts", 4, 12)
def test_long_rollouts_go_on_where_they_were_saved(ran: Any) -> None:
    """Their runners are killed all the time; each turn is paid for about once, and without `ctx.save` none ends."""
    done, metrics, folder, steps = ran
    assert done.returncode == 0, done.stdout + done.stderr
    assert "it went on" in done.stdout and "WRONG" not in done.stdout
    assert f"{steps} of {steps} games" in done.stdout and "without ctx.save: 0 ended" in done.stdout
    assert len(metrics) == steps and {line["turns"] for line in metrics} == {30}
    (curve,) = (folder / "runs").glob("*/*.svg")
    assert curve.read_text().startswith("<svg")


@short_and_long("03_otel_agent", 6, 12)
def test_an_agent_of_opentelemetry_is_trained(ran: Any) -> None:
    """Its file does not know raystore; every span of it arrives."""
    assert "import raystore" not in (ROOT / "examples/calculator.py").read_text()
    done, metrics, folder, steps = ran
    check(done, metrics, folder, steps=steps)
    assert "every span is there" in done.stdout and "      chat stub" in done.stdout


@short_and_long("04_many_agents", 3, 6)
def test_many_agents_wait_at_once(ran: Any) -> None:
    """2,000 agents over four processes: a step takes hardly longer than the longest wait."""
    done, metrics, folder, steps = ran
    check(done, metrics, folder, steps=steps)
    assert "every rollout and span is there" in done.stdout
    assert all(line["calls_per_rollout"] < 1 for line in metrics)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process with all that it started: Ray's processes, runners, and theirs."""
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize(("name", "kills"), [("01_prompt_bandit", False), ("02_grpo_tools", True)])
@pytest.mark.long
def test_examples_stop_quietly(tmp_path: Path, name: str, kills: bool) -> None:
    """Ctrl+C in mid-run: back at the prompt within 5 s, no traceback, and no process is left."""
    steps = "6" if kills else "500"
    command: list[str | Path] = [sys.executable, "-u", ROOT / "examples" / f"{name}.py", "--steps", steps]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip
    try:
        begun = 0
        assert running.stdout is not None
        for line in running.stdout:  # until the first step, or that of the second run, in which runners are killed
            begun += line.startswith(("step   0 ", "step   1 "))
            if begun == 1 + kills:
                break
        started = family(psutil.Process(running.pid))
        assert len(started) > 5
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
        interrupted = time.monotonic()
        rest, _ = running.communicate(timeout=20)
        took = time.monotonic() - interrupted
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 1 and "Traceback" not in rest and rest.splitlines()[-1] == "stopped", rest
    _, left = psutil.wait_procs(started, timeout=max(5 - took, 0.1))
    assert not left and took <= 5, (took, left)

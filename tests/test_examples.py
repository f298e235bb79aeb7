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
        assert (run.steps, run.runners, run.seed, run.is_quick) == (7, 4, 0, False)
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as ended:
        harness.run("example", main, "What it does.\n\nMore of it.")
    assert ended.value.code == status


@pytest.mark.parametrize(
    ("arguments", "steps", "is_quick"),
    [([], 20, False), (["--quick"], 5, True), (["--quick", "--steps", "7"], 7, True)],
)
def test_an_example_may_have_a_short_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], steps: int, is_quick: bool
) -> None:
    """`--quick` has fewer steps, unless these are given."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    harness = importlib.import_module("harness")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness.ray, "init", lambda **options: None)
    monkeypatch.setattr(sys, "argv", ["example.py", *arguments])

    async def main(run: Any) -> bool:
        assert (run.steps, run.is_quick) == (steps, is_quick)
        return True

    with pytest.raises(SystemExit) as ended:
        harness.run("example", main, "What it does.", quick=5)
    assert ended.value.code == 0


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


# -- the example with torch, which `make example-transformer` runs: what of it needs none ------------------------------


def test_the_transformer_says_what_to_install(tmp_path: Path) -> None:
    """Without torch it ends at once, before Ray starts, with the command that mends it."""
    path = str(ROOT / "examples/08_transformer_grpo.py")
    without = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({path!r}, run_name='__main__')"
    command: list[str | Path] = [sys.executable, "-c", without]
    search = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, env=search)
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert "pip install 'raystore[torch]'" in done.stderr and "Traceback" not in done.stderr
    assert "make example-transformer" in done.stderr


def test_the_size_of_torch_is_said_before_it_is_downloaded() -> None:
    """`make example-transformer` installs once, after saying how much that is; `make examples` runs all but it."""

    def recipe(target: str) -> str:
        command = ["make", "--no-print-directory", "--dry-run", "--always-make", target]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True).stdout

    wanted = recipe("example-transformer")
    assert wanted.index("530 MB") < wanted.index("190 MB") < wanted.index("pip install")
    assert wanted.rstrip().endswith("examples/08_transformer_grpo.py")
    others = recipe("examples")
    assert "08_transformer" not in others and ".[torch]" not in others
    names = {path.name for path in ROOT.glob("examples/0*.py")}
    assert {name for name in names if name in others} == names - {"08_transformer_grpo.py"}


def test_numbers_backwards_are_judged_digit_by_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each right place counts, the end too; what is held out is never trained on."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    digits = importlib.import_module("digits")
    prompts = [digits.prompt_of([1, 2, 3]), digits.prompt_of([1, 2, 3, 4, 5])]
    assert prompts == [[digits.PAD, digits.PAD, 1, 2, 3, digits.ASK], [1, 2, 3, 4, 5, digits.ASK]]
    for answer, reward in {
        (3, 2, 1, digits.END): 1, (3, 2, 1, 0): 0.75, (3, 2, 1): 0.75, (1, 2, 3, digits.END): 0.5, (digits.END,): 0,
        (3, 2, 1, digits.END, 7): 1, (): 0,
    }.items():  # fmt: skip
        assert digits.reward_of([1, 2, 3], answer) == reward
    train, held_out = digits.numbers(3, 500, 32)
    assert (train, held_out) == digits.numbers(3, 500, 32) != digits.numbers(4, 500, 32)
    for name, length in digits.LENGTHS.items():
        known = {tuple(number) for number in train[name]}
        others = {tuple(number) for number in held_out[name]}
        assert (len(known), len(others)) == (500, 32) and not known & others
        assert {len(number) for number in known | others} == {length}
    with pytest.raises(ValueError, match="there are 1000 numbers of 3 digits, not 990 \\+ 32"):
        digits.numbers(0, 990, 32)


def test_a_wrong_ledger_of_the_transformer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained twice, not at all, in part or in another step is named; a ledger as it should be is not."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("08_transformer_grpo")
    right = [
        (step, f"digits/{step}-{group}", f"ro-{step}-{group}-{member}")
        for step in (1, 2, 3)
        for group in range(example.GROUPS)
        for member in range(example.SIZE)
    ]
    ledger = example.ledger_of(right)
    assert [len(groups) for groups in ledger.values()] == [example.GROUPS] * 3 and not example.differing(ledger, ledger)
    assert example.faults_of(ledger, right, 3) == []

    def found(consumed: list[tuple[int, str, str]]) -> str:
        return "; ".join(example.faults_of(example.ledger_of(consumed), consumed, 3))

    assert found(right[: -example.SIZE]) == f"{3 * example.GROUPS - 1} groups were trained on, not {3 * example.GROUPS}"
    assert found(right[:-1]) == f"groups have not {example.SIZE} rollouts: {right[-1][1]}"
    assert f"groups were trained on more than once: {right[0][1]}" in found([*right, (3, *right[0][1:])])
    assert "a rollout was trained on more than once" in found([*right, right[-1]])
    assert "the model has steps [1, 2], not 1 to 3" in found(right[: -example.SIZE * example.GROUPS])
    exchanged = {**ledger, 2: [ledger[3][0], *ledger[2][1:]], 3: [ledger[2][0], *ledger[3][1:]]}
    assert example.differing(ledger, exchanged) == [2, 3]
    assert example.differing(ledger, {**ledger, 1: ledger[1][::-1]}) == [1]


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

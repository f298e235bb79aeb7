"""What ships beside the package: examples, cluster.yaml, README, docs, and what is said in them."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import raystore as rs

ROOT = Path(__file__).parent.parent


def script(path: Path, *arguments: Any, cwd: Path) -> CompletedProcess[str]:
    """Run a program on a local Ray of its own."""
    command: list[str | Path] = [sys.executable, path, *map(str, arguments)]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=cwd, env=environment)


def readme_examples() -> list[Any]:
    """The Python blocks of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_example_runs(tmp_path: Path) -> None:
    """As it stands, in at most 25 lines of code."""
    code = readme_examples()[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    (tmp_path / "example.py").write_text(code)
    done = script(tmp_path / "example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[0.0, 0.5, 1.0]")


async def test_readme_driver_keeps_rollouts_in_flight() -> None:
    """Never more than n, and all of them in the end, also on a store with a past."""
    most, done = 0, []
    with rs.InMemoryLightningStore() as store:
        names: dict[str, Any] = {"asyncio": asyncio, "store": store, "n": 7}
        exec(readme_examples()[2], names)
        await store.update_rollout((await store.enqueue_rollout("earlier")).rollout_id, status="failed")
        requests = [rs.EnqueueRolloutRequest(input=i) for i in range(50)]
        async with rs.RunnerPool(store, lambda task, ctx: float(task), size=2):
            for finished in asyncio.as_completed(map(names["run"], requests)):
                done.append((await finished).input)
                counts = (await store.statistics())["rollouts_by_status"]
                most = max(most, sum(counts.values()) - counts.get("succeeded", 0) - 1)
    assert sorted(done) == list(range(50)) and 0 < most <= 7


def test_no_tracked_link_leaves_the_tree() -> None:
    """A link to a folder of one machine is a dead end on every other."""
    tracked = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    links = [ROOT / line.split("\t", 1)[1] for line in tracked.splitlines() if line.startswith("120000")]
    assert [link for link in links if not link.resolve().is_relative_to(ROOT)] == []


def test_state_diagrams_are_drawn_from_the_tables() -> None:
    """`python docs/draw_states.py` writes docs/states.md; it is up to date, and so are the README and docs/rl.md."""
    subprocess.run([sys.executable, ROOT / "docs/draw_states.py", "--check"], check=True)


def test_tables_and_dashboard_of_metrics_are_drawn_from_the_source() -> None:
    """`python docs/draw_metrics.py` writes them."""
    subprocess.run([sys.executable, ROOT / "docs/draw_metrics.py", "--check"], check=True)


def test_pictures_of_stragglers_show_what_the_core_does() -> None:
    """`python docs/draw_choices.py` runs the core and writes docs/rl/*.svg; docs/rl.md shows each."""
    subprocess.run([sys.executable, ROOT / "docs/draw_choices.py", "--check"], check=True)
    shown = set(re.findall(r"\]\((rl/\w+\.svg)\)", (ROOT / "docs/rl.md").read_text()))
    assert shown == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs/rl").glob("*")}


def test_conformance_names_tests_that_exist() -> None:
    """Every test that docs/conformance.md names is there."""
    text = (ROOT / "docs/conformance.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in named if f"def {name}(" not in source]
    assert len(named) > 100 and missing == []


@pytest.mark.long
@pytest.mark.timeout(300)
def test_example_as_a_client_and_as_a_submitted_job(tmp_path: Path) -> None:
    """On a cluster started with `ray start --head`: with RAY_ADDRESS, and with `ray job submit`."""
    ray = Path(sys.executable).with_name("ray")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["RAY_AUTH_MODE"] = "token"  # what newer Rays start clusters with; clients must say so
    port, dashboard, temporary = "6399", "8299", f"/tmp/raystore-{os.getpid()}"
    start: list[str | Path] = [
        ray, "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={temporary}",
        "--dashboard-agent-listen-port=52399", "--num-cpus=4",  # ports beside those of a Ray that may run here
    ]  # fmt: skip
    # `ray stop` would end every Ray of this machine; so the processes are ended by their session folder.
    started = subprocess.run(start, capture_output=True, text=True, timeout=100, env=environment)
    assert started.returncode == 0, started.stderr
    try:
        client: list[str | Path] = [sys.executable, ROOT / "examples/01_prompt_bandit.py", "--steps", "12"]
        done = subprocess.run(
            client, capture_output=True, text=True, timeout=100, cwd=tmp_path,
            env=environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        command: list[str | Path] = [
            ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", ROOT / "examples",
            "--", sys.executable, "01_prompt_bandit.py", "--steps", "12",
        ]  # fmt: skip
        for _ in range(20):  # the agent that takes jobs comes up after the cluster
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
            if "No available agent" not in done.stderr:
                break
            time.sleep(2)
        assert done.returncode == 0 and "it learnt" in done.stdout, done.stdout + done.stderr
    finally:
        subprocess.run(["pkill", "-9", "-f", temporary], check=False)


def glossary() -> list[tuple[str, str]]:
    """Terms of docs/glossary.md, with the files that own them."""
    text = (ROOT / "docs/glossary.md").read_text()
    return re.findall(r"^\| (\w[\w ]*) \| .* \| \[[\w/.]+\]\(\.\./(\S+)\) \|$", text, re.MULTILINE)


def test_glossary_names_files_that_use_its_terms() -> None:
    """Each term once, and in the file that owns it, as a whole or in the form of a name."""
    terms = glossary()
    assert len(terms) > 30 and len(dict(terms)) == len(terms)
    missing = []
    for term, file in terms:
        source = (ROOT / file).read_text().lower().replace("_", " ")
        stem = term.removesuffix("ing").removesuffix("ed").removesuffix("ion")
        if stem not in source:
            missing.append((term, file))
    assert missing == []

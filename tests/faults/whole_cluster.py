"""Clusters of which every process is killed, one after the other on one journal; a program of its own.

`python -m tests.faults.whole_cluster FOLDER`; the last line it says is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.channel import CODE, take_stdout

WORK = (
    CODE
    + """
import asyncio, sys, ray, raystore as rs
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
store = rs.start("whole", journal=sys.argv[1])
async def main():
    there = {r.rollout_id for r in await store.query_rollouts()}
    print("there", len(there), file=channel)
    for number in range(10**9):
        rollout = await store.enqueue_rollout(number)
        print("made", rollout.rollout_id, file=channel)
        claimed = await store.dequeue_rollout()
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")
        print("finished", claimed.rollout_id, file=channel)
asyncio.run(main())
"""
)


def run(folder: Path, lines: int) -> list[list[str]]:
    """Let a cluster work, then kill every process of it; what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(folder / "j")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    said = []
    for line in process.stdout or ():
        said.append(line.split())
        if len(said) == lines:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    for pid in (process.pid, *(child.pid for child in children)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    rest, _ = process.communicate(timeout=30)
    psutil.wait_procs(children, timeout=10)
    return said + [line.split() for line in rest.splitlines() if len(line.split()) == 2]


def main(folder: Path) -> dict[str, int]:
    from raystore.journal.opening import read_run

    said: list[list[str]] = []
    for _ in range(2):
        said += run(folder, 300)
    state = read_run(folder / "j").state
    lost = sum(what not in state.entries for kind, what in said if kind == "made")
    lost += sum(state.entries[what].rollout.status != "succeeded" for kind, what in said if kind == "finished")
    return {"lost": lost, "acknowledged": len(said)}


if __name__ == "__main__":
    channel = take_stdout()
    print(json.dumps(main(Path(sys.argv[1]))), file=channel)

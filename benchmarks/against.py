"""Row 25, and any other commit: CPU of an operation, here and there, in alternating rounds of new processes.

Run `python -m benchmarks.against COMMIT [--rounds 11] [--only spans,lifecycle-64]`. The commit is checked out into a
worktree below `runs/`, and each round measures every shape once here and once there (`benchmarks.one_round`), so that a
noisy minute hits both. CPU time counts, of the client's and the store's process; the wall clock does not.
How much of the store's CPU is Ray's, an empty actor tells that takes as many calls of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.one_round import SHAPES
from benchmarks.scope import Scope
from benchmarks.table import Line, at_most, compare

ROOT = Path(__file__).parent.parent
BASE = "f178722"  #: the commit that row 25 is held against

Round = dict[str, dict[str, float]]  #: shape -> figure -> microseconds for each operation, and calls


def worktree(commit: str) -> Path:
    """The files of a commit, checked out once. Raises `CalledProcessError` if this repository does not have it."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]  # a branch may move meanwhile
    commit = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    path = ROOT / "runs" / f"at-{commit[:12]}"
    if not path.exists():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        command = ["git", "worktree", "add", "--quiet", "--detach", str(path), commit]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return path


def measure(tree: Path, shapes: Sequence[str], scale: float) -> Round:
    """One round with the package as it is in a tree, in a new process."""
    program = Path(__file__).with_name("one_round.py")
    environment = os.environ | {"PYTHONPATH": str(tree), "RAY_ADDRESS": "local"}
    command = [sys.executable, "-P", str(program), str(scale), *shapes]  # -P: nothing of this folder is imported there
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"A round with {tree} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def rounds(commit: str, shapes: Sequence[str], number: int, scale: float = 1.0) -> tuple[list[Round], list[Round]]:
    """So many rounds there and here; who begins alternates."""
    there, here = worktree(commit), ROOT
    samples: dict[Path, list[Round]] = {there: [], here: []}
    for turn in range(number):
        for tree in (there, here) if turn % 2 == 0 else (here, there):
            samples[tree].append(measure(tree, shapes, scale))
    return samples[there], samples[here]


def ratios(there: list[Round], here: list[Round], shape: str, figure: str) -> list[float]:
    """Here against there, for each round."""
    return [mine[shape][figure] / theirs[shape][figure] for theirs, mine in zip(there, here, strict=True)]


async def cpu(scope: Scope) -> list[Line]:
    """Row 25."""
    number, scale = (1, 0.25) if scope.quick else (11, 1.0)
    sides: dict[str, list[Round]] = {}
    try:
        sides[BASE], sides["ours"] = rounds(BASE, ["spans"], number, scale)
    except subprocess.CalledProcessError:  # a clone without its history
        sides["ours"] = [measure(ROOT, ["spans"], scale) for _ in range(number)]
    did = "32 coroutines add spans of 1.6 KB, each awaited, so that 32 travel together"
    return [
        compare(
            25, name, {side: [one["spans"][figure] for one in found] for side, found in sides.items()}, BASE,
            at_most(0.5), unit="µs", did=did,
        )
        for name, figure in (
            ("CPU of the client for an operation", "client"),
            ("CPU of the store for an operation, beyond an empty actor", "store beyond empty"),
        )
    ]  # fmt: skip


ROWS = {25: cpu}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.against", description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--scale", type=float, default=1.0, help="of the work in a round")
    parser.add_argument("--only", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    options = parser.parse_args()
    shapes = options.only.split(",")
    if unknown := set(shapes) - SHAPES.keys():
        parser.error(f"--only names shapes {sorted(unknown)}; there are {', '.join(SHAPES)}")
    if options.rounds < 1 or options.scale <= 0:
        parser.error(f"--rounds {options.rounds} --scale {options.scale:g}: expected at least 1, and more than 0")
    try:
        worktree(options.commit)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or "no such commit; fetch it if this clone is shallow"
        parser.error(f"commit {options.commit!r} cannot be checked out here: {said}")
    there, here = rounds(options.commit, shapes, options.rounds, options.scale)
    print(f"CPU per operation in us, medians of {options.rounds} rounds; ratio: median of the rounds (spread)\n")
    print(f"| shape | figure | {options.commit} | here | ratio (spread) |\n|---|---|---|---|---|")
    for shape in shapes:
        for figure in here[0][shape]:
            sides: list[Any] = [median(one[shape][figure] for one in side) for side in (there, here)]
            found = ratios(there, here, shape, figure) if sides[0] else []
            shown = f"{median(found):.3f} ({min(found):.2f}-{max(found):.2f})" if found else "-"
            print(f"| {shape} | {figure} | {sides[0]:.3g} | {sides[1]:.3g} | {shown} |")


if __name__ == "__main__":
    main()

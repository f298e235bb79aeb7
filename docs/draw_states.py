"""Draws the state diagrams of docs/states.md from the tables in raystore/core/lifecycle.py.

Run `python docs/draw_states.py` to write it, the rollout's diagram into the README and the group's into docs/rl.md;
`--check` says whether all are up to date, and a test asks.
"""

import sys
from pathlib import Path

from raystore.core import lifecycle
from raystore.core.records import Config

STATES, LOOP = Path(__file__).with_name("states.md"), Path(__file__).with_name("rl.md")
README = Path(__file__).parent.parent / "README.md"

HEADER = """# States

Drawn by `python docs/draw_states.py` from the tables in `raystore/core/lifecycle.py`; do not edit.

`update_rollout` and `update_attempt` may set any status by hand, and `start_attempt` starts an attempt from any; the
diagrams show what everything else does.
"""


def attempts() -> list[str]:
    """Edges of the attempt machine, one for each pair of statuses."""
    edges: dict[tuple[str, str], list[str]] = {}
    for (status, event), after in lifecycle.ATTEMPT.items():
        edges.setdefault((status, after), []).append(event)
    reported = ("succeeded", "failed")
    lines = ["    [*] --> preparing: claim, start"]
    lines += [f"    {status} --> {after}: {', '.join(events)}" for (status, after), events in edges.items()]
    lines += [f"    {status} --> {after}: report" for status in ("preparing", "running") for after in reported]
    lines += [f"    {status} --> [*]" for status in sorted(lifecycle.SETTLED)]
    return lines


def rollouts() -> list[str]:
    """Edges of the rollout machine, from what follows of each attempt status and outcome."""
    retry = Config(max_attempts=2, retry_condition=tuple(lifecycle.ATTEMPT_STATUSES))
    edges: dict[tuple[str, str], set[str]] = {
        ("[*]", "queuing"): {"enqueue"},
        ("[*]", "preparing"): {"start"},
        ("queuing", "preparing"): {"claim"},
        ("requeuing", "preparing"): {"claim"},
        ("preparing", "requeuing"): {"claim withdrawn"},
        ("preparing", "queuing"): {"claim withdrawn"},
        ("queuing", "cancelled"): {"cancel"},
        ("requeuing", "cancelled"): {"cancel"},
        ("requeuing", "succeeded"): {"late success"},
        **{(status, "requeuing"): {"requeue"} for status in sorted(lifecycle.REQUEUABLE)},
    }
    for event, moves in (("span", lifecycle.ROLLOUT_ON_SPAN), ("heartbeat", lifecycle.ROLLOUT_ON_HEARTBEAT)):
        for status, after in moves.items():
            edges.setdefault((status, after), set()).add(event)
    ends = [(status, lifecycle.OUTCOME_OF_STATUS[status]) for status in [*sorted(lifecycle.SETTLED), "succeeded"]]
    ends += [("unresponsive", outcome) for outcome in ("runner_lost", "withdrawn")]
    ends += [("failed", outcome) for outcome in ("infra", "dropped", "cancelled")]
    for status, outcome in ends:
        for charged, left in ((1, True), (2, False)):  # to be tried again, or not
            after = lifecycle.rollout_after(status, outcome, retry, charged=charged, deliveries_left=left)
            for before in ("preparing", "running"):
                edges.setdefault((before, after), set()).add(str(outcome))
    lines = [f"    {before} --> {after}: {', '.join(sorted(labels))}" for (before, after), labels in edges.items()]
    return lines + [f"    {status} --> [*]" for status in sorted(lifecycle.FINISHED)]


def groups() -> list[str]:
    """Edges of the group machine, one for each pair of statuses."""
    edges: dict[tuple[str, str], list[str]] = {("[*]", lifecycle.OPEN): ["enqueue"]}
    for (status, event), after in lifecycle.GROUP.items():
        edges.setdefault((status, after), []).append(event)
    lines = [f"    {status} --> {after}: {', '.join(events)}" for (status, after), events in edges.items()]
    return lines + [f"    {status} --> [*]" for status in lifecycle.GROUP_STATUSES if status != lifecycle.OPEN]


def draw() -> str:
    """The text of docs/states.md."""
    parts = [HEADER]
    for title, lines in (("Rollout", rollouts()), ("Attempt", attempts()), ("Group", groups())):
        parts.append(f"## {title}\n\n{diagram(lines)}\n")
    return "\n".join(parts)


def diagram(lines: list[str]) -> str:
    """Lines of a state machine as a fenced diagram."""
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def inserted(path: Path, lines: list[str]) -> str:
    """A document with a diagram at its place."""
    start, end = "<!-- states: drawn by docs/draw_states.py -->", "<!-- /states -->"
    before, rest = path.read_text().split(start)
    return f"{before}{start}\n\n{diagram(lines)}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    drawn = {STATES: draw(), README: inserted(README, rollouts()), LOOP: inserted(LOOP, groups())}
    if "--check" in sys.argv:
        sys.exit(any(path.read_text() != text for path, text in drawn.items()))
    for path, text in drawn.items():
        path.write_text(text)

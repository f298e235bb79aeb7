"""Whether a history of concurrent calls could have happened one call at a time.

A queue with unique values needs no search: a history is wrong exactly if it shows one of four patterns. A register is
searched for an order of its calls (Wing and Gong), remembering what has been tried. A call without a known outcome may
have had its effect at any time after it began, or never.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

NEVER = float("inf")


@dataclass(slots=True, frozen=True)
class Call:
    """One call: what it did, with which value, and between which instants of one clock."""

    kind: str  # "put", "get" (of a queue: None if it came away empty), "write", "read"
    value: Any
    start: float
    end: float = NEVER  # for a call without a known outcome


def wrong_in_queue(calls: list[Call]) -> list[str]:
    """The patterns that no first-in first-out queue could show; `put` and `get` of unique values."""
    puts = {call.value: call for call in calls if call.kind == "put"}
    gets = [call for call in calls if call.kind == "get" and call.value is not None]
    wrong = [f"{call.value} came out and never went in" for call in gets if call.value not in puts]
    taken: dict[Any, Call] = {}
    for call in gets:
        if call.value in taken:
            wrong.append(f"{call.value} came out twice")
        taken[call.value] = call
        if call.value in puts and call.end < puts[call.value].start:
            wrong.append(f"{call.value} came out before it went in")
    # By the end of going in, when the last of them begins to come out:
    inside = sorted((put.end, taken[value].start if value in taken else NEVER) for value, put in puts.items())
    ends = [end for end, _ in inside]
    latest = list(accumulate((start for _, start in inside), max))

    def out_last(before: float) -> float:
        """When the last of those that were inside before an instant begins to come out."""
        count = bisect_left(ends, before)
        return latest[count - 1] if count else -NEVER

    for value, get in taken.items():
        if value in puts and out_last(puts[value].start) > get.end:
            wrong.append(f"{value} overtook one that was inside before it went in")
    for call in calls:
        if call.kind == "get" and call.value is None and out_last(call.start) > call.end:
            wrong.append(f"empty between {call.start} and {call.end}, although something was inside all the while")
    return wrong


def is_register(calls: list[Call], initial: Any = None) -> bool:
    """Whether there is an order of these reads and writes of one register that agrees with time and values."""
    known = [call for call in calls if call.end < NEVER or call.kind == "write"]  # a read nobody heard of says nothing
    must = frozenset(number for number, call in enumerate(known) if call.end < NEVER)
    tried: set[tuple[frozenset[int], Any]] = set()
    stack: list[tuple[frozenset[int], Any]] = [(frozenset(), initial)]
    while stack:
        done, value = stack.pop()
        if must <= done:
            return True
        if (done, value) in tried:
            continue
        tried.add((done, value))
        left = [number for number in range(len(known)) if number not in done]
        first_end = min(known[number].end for number in left)
        for number in left:
            call = known[number]
            if call.start > first_end:
                continue  # something else had ended before it began
            if call.kind == "write":
                stack.append((done | {number}, call.value))
            elif call.value == value:
                stack.append((done | {number}, value))
    return False

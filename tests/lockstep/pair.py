"""One operation on both stores: ask, compare the answers, compare what is held, and name what differs.

What differs must be on the list (`differences`); then the reference takes over what raystore holds, so that both go on
alike and every further difference is a new one.
"""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from raystore.errors import InvalidValueError
from tests.lockstep.sides import FIELDS, Ours, State, Theirs, made_by, plain

Place = tuple[Any, ...]


@dataclass(frozen=True)
class Missing:
    """What one side does not have."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = Missing()


@dataclass
class Case:
    """One operation, as the list of differences looks at it."""

    name: str
    arguments: dict[str, Any]
    before: State  # what both held
    after: State  # what ours holds now
    theirs_after: State
    ours: Any  # answer or error
    theirs: Any
    now: float
    memory: bool  # whether it is limited, and spans have a size of the caller's
    future_beats: set[tuple[str, str]]
    answers: dict[str, Any] = field(default_factory=dict)  # both answers as plain data

    def is_error(self, side: Any) -> bool:
        return isinstance(side, Exception)

    def rollout(self, rollout_id: Any, name: str) -> Any:
        """A field of a rollout before the operation."""
        return self.before.get(("rollout", rollout_id, name), NOTHING)

    def attempts(self, rollout_id: Any) -> list[str]:
        """The attempts of a rollout before the operation, the latest last."""
        found = [p for p in self.before if p[:2] == ("attempt", rollout_id) and p[3] == "sequence_id"]
        return [p[2] for p in sorted(found, key=lambda place: self.before[place])]

    def attempt(self, rollout_id: Any, attempt_id: Any, name: str) -> Any:
        """A field of an attempt before the operation."""
        return self.before.get(("attempt", rollout_id, attempt_id, name), NOTHING)


class Unlisted(AssertionError):
    """The stores differ, and the list of differences does not say so."""


class Pair:
    """The two stores."""

    def __init__(self, *, memory: bool = False, **options: Any) -> None:
        self.ours = Ours(memory=memory, **options)
        self.theirs = Theirs(memory=memory)
        self.met: Counter[str] = Counter()
        self.operations = 0
        self._state = self.ours.state()
        self._future_beats: set[tuple[str, str]] = set()

    # -- what there is to ask about ------------------------------------------------------------------------------------

    def rollouts(self) -> list[str]:
        """Ids of all rollouts, in the order of their making."""
        return [place[1] for place in self._state if place[0] == "rollout" and place[2] == "rollout_id"]

    def attempts(self, rollout_id: str) -> list[str]:
        """Ids of the attempts of a rollout."""
        return [p[2] for p in self._state if p[:2] == ("attempt", rollout_id) and p[3] == "attempt_id"]

    def resources(self) -> list[str]:
        """Ids of all resources."""
        return [place[1] for place in self._state if place[0] == "resources" and place[2] == "version"]

    @property
    def now(self) -> float:
        return float(self.ours.store._service.clock.now())

    # -- asking --------------------------------------------------------------------------------------------------------

    async def tick(self, seconds: float) -> None:
        """Let time pass for both; what is due by then happens."""
        await self._both("tick", {"seconds": seconds}, self.ours.tick(seconds), self.theirs.scan())

    async def ask(self, name: str, /, **arguments: Any) -> Any:
        """Ask both the same, and compare; ours' answer, None for an error."""
        answer = await self._both(
            name, arguments, _called(self.ours, name, arguments), _called(self.theirs, name, arguments)
        )
        if name.startswith(("update", "add", "start")):  # may have brought a deadline into the past
            moves = self.ours.moves
            await self.ours.tick(0.0)
            if moves != self.ours.moves or await self.theirs.is_due():
                await self.tick(0.0)
        return answer

    async def _both(self, name: str, arguments: dict[str, Any], ours: Any, theirs: Any) -> Any:
        self.operations += 1
        before = self._state
        mine = await _answer(ours)
        self.theirs.expect_ids(mine)
        case = Case(name, arguments, before, {}, {}, mine, None, self.now, self.theirs.memory, self._future_beats)
        case.answers["ours"] = plain(mine, FIELDS)
        case.theirs = await _answer(theirs)
        case.answers["theirs"] = plain(case.theirs, FIELDS)
        case.after, case.theirs_after = self.ours.state(), self.theirs.state()
        self._state = case.after
        self._note_beats(case)
        differs = False
        for place, one, other in self._compare(case):
            name = self._explain(case, place, one, other)
            if name == "only-attempts-that-run-time-out" and place[0] == "rollout":
                self.theirs.looked_at.add(place[1])  # it would be again and again
            differs = True
        if differs:
            self.theirs.become(self.ours)
            left = list(_differ(self._state, self.theirs.state()))
            assert not left, f"could not make the reference's store hold what ours holds: {left[:3]}"
        self.theirs.look_again(self.ours)
        return None if isinstance(mine, Exception) else mine

    def _note_beats(self, case: Case) -> None:
        for place, beat in case.after.items():
            if place[0] == "attempt" and place[3] == "last_heartbeat_time" and beat != case.before.get(place):
                key = (place[1], place[2])
                if beat is not None and (beat > case.now or beat == 0):
                    self._future_beats.add(key)
                else:
                    self._future_beats.discard(key)

    def _compare(self, case: Case) -> Iterator[tuple[Place, Any, Any]]:
        ours, theirs = case.ours, case.theirs
        if isinstance(ours, Exception) or isinstance(theirs, Exception):
            if not (isinstance(ours, Exception) and isinstance(theirs, Exception) and _alike(ours, theirs)):
                yield ("error",), ours, theirs
        else:
            yield from _walk(case.answers["ours"], case.answers["theirs"], ("answer",))
        yield from _differ(case.after, case.theirs_after)
        if self.theirs.left_in_queue:
            yield ("left in queue",), [], self.theirs.left_in_queue

    def _explain(self, case: Case, place: Place, one: Any, other: Any) -> str:
        """The name of the difference that this is."""
        from tests.lockstep.differences import DIFFERENCES

        for name, allows in DIFFERENCES.items():
            if allows(case, place, one, other):
                self.met[name] += 1
                return name
        raise Unlisted(
            f"{case.name}({', '.join(f'{k}={v!r}' for k, v in case.arguments.items())})\n"
            f"  at {place}: raystore has {one!r}, the reference {other!r}\n"
            f"  raystore answered {case.ours!r}\n  the reference    {case.theirs!r}"
        )

    def close(self) -> None:
        self.ours.close()


async def _called(side: Ours | Theirs, name: str, arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the 0.2 names, which are a difference of its own
        answer = getattr(side.store, name)(**made_by(side.types, arguments))
        return await answer if inspect.isawaitable(answer) else answer


async def _answer(asked: Any) -> Any:
    try:
        return await asked
    except (asyncio.CancelledError, AssertionError):
        raise
    except Exception as error:
        return error


def _alike(ours: Exception, theirs: Exception) -> bool:
    """The same class of error for whoever catches one, and the reference's words for what it is that is missing.

    Where a value is wrong as well, ours speaks of that first, before it looks for anything.
    """
    if isinstance(theirs, ValueError) and isinstance(ours, (InvalidValueError, ValidationError)):
        return True
    if isinstance(theirs, ValidationError) or not isinstance(theirs, (ValueError, RuntimeError)):
        return type(ours) is type(theirs)
    return isinstance(ours, (ValueError, RuntimeError)) and str(theirs) in str(ours)


def _differ(ours: State, theirs: State) -> Iterator[tuple[Place, Any, Any]]:
    for place in ours.keys() | theirs.keys():
        one, other = ours.get(place, NOTHING), theirs.get(place, NOTHING)
        if place[0] == "counter" and {one, other} == {0, NOTHING}:
            continue
        if one != other or type(one) is not type(other):
            yield place, one, other


def _walk(ours: Any, theirs: Any, place: Place) -> Iterator[tuple[Place, Any, Any]]:
    """Where two answers differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() | theirs.keys():
            yield from _walk(ours.get(key, NOTHING), theirs.get(key, NOTHING), (*place, key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _walk(one, other, (*place, index))
    elif ours != theirs or type(ours) is not type(theirs):
        yield place, ours, theirs

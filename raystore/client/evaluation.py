"""An evaluation beside training: reads its items, enqueues what was not enqueued before, and tells its result.

All that is known of it is in the store, so that the same call gives it again, in this process or in another one.
Not here: what counts as what (`core.evaluations`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Any, TypeVar

from raystore.client.claims import Claims
from raystore.client.datasets import check_dataset, is_indexed
from raystore.errors import InvalidValueError, OutcomeUnknownError, OverloadedError, SessionEndedError
from raystore.errors.text import summary
from raystore.reports.progress import Progress
from raystore.types.evaluations import EvaluationResult
from raystore.wire import checks
from raystore.wire import evaluations as wire
from raystore.wire.convert import Encoder
from raystore.wire.evaluations import EvalItem, EvalPlan, EvalWork
from raystore.wire.feeds import name_of

T = TypeVar("T")

WAIT_SECONDS = 3600.0  #: for which one call waits for the end
SHOWN_SECONDS = 1.0  #: after which progress is counted again
MOST_ITEMS = wire.ROLLOUTS  #: that are read: what gives more never ends
TRIES = 5  #: of a part, if the store has restarted or taken this process for dead each time


@dataclass(frozen=True, slots=True)
class EvalChannel:
    """How an evaluation reaches its store."""

    ask: Callable[[str, dict[str, Any]], Coroutine[Any, Any, Any]]
    encoder: Encoder
    store: Any  # of which `Claims` asks why nothing goes on
    rest: Callable[[float], Awaitable[Any]]  # waits, also in a blocking call
    block: Callable[[Coroutine[Any, Any, Any]], Any]  # runs a coroutine to its end in this thread
    rows: Callable[[str, dict[str, Any]], Coroutine[Any, Any, tuple[list[Any], Any]]]  # reads a long answer

    async def results(self, *, name: str | None = None, feed: str | None = None) -> list[EvaluationResult]:
        """The evaluations of a name, or of a feed, by version."""
        rows, _ = await self.rows("evaluations", {"name": name, "feed": feed})
        return [wire.to_result(row) for row in rows]


class Evaluation:
    """An evaluation that was begun; made by `store.evaluate` and `feed.evaluate`, which say what it is.

    It holds nothing: made again by the same call, it is the same. `sync` has its methods as blocking calls.

    Attributes:
        name: of the evaluation.
        version: of the policy that it is pinned to, else the newest one when it began; None if there was none.
        branch: of that version.
    """

    def __init__(self, channel: EvalChannel, row: Mapping[str, Any]) -> None:
        self.name: str = row["name"]
        self.version: int | None = row["version"]
        self.branch: int = row["branch"]
        self._channel = channel

    @property
    def sync(self) -> BlockingEvaluation:
        """The methods as blocking calls."""
        return BlockingEvaluation(self, self._channel.block)

    async def status(self) -> EvaluationResult:
        """Where it stands: the scores of what has finished so far. Raises `EvaluationNotFoundError` once it is gone."""
        return wire.to_result(await self._ask("evaluation_result"))

    async def result(self, *, timeout: float | None = None, progress: bool = False) -> EvaluationResult:
        """Wait until each sample of each item has finished, or it was dropped, which `status` says.

        With `progress` a driver draws on its terminal how far it is. Raises TimeoutError after `timeout` seconds, and
        `PoolFailedError` if all pools that could run what is left have failed.
        """
        until = math.inf if timeout is None else monotonic() + checks.duration("timeout", timeout)
        claims = Claims(self._channel.store)
        with Progress(f"evaluation {self.name}", is_wanted=checks.flag("progress", progress)) as shown:
            while True:
                seconds = max(min(until - monotonic(), SHOWN_SECONDS if shown.can_draw else WAIT_SECONDS), 0.0)
                found = wire.to_result(await self._ask("evaluation_result", timeout=seconds))
                if found.status != "running":
                    return found
                if monotonic() >= until:
                    total, done = found.items * found.samples, found.overall.samples
                    raise TimeoutError(
                        f"Evaluation {self.name!r} of version {self.version} has {done} of {total} samples after "
                        f"{timeout} s; it goes on, and status() says how far it is"
                    )
                if shown.can_draw:
                    note = found.why or await claims.why_none()
                    score = found.overall
                    shown.update(score.samples, failed=score.failed, total=found.items * found.samples, note=note)

    async def drop(self) -> bool:
        """Cancel what waits and runs of it; what was scored stays. Returns whether it still ran."""
        return bool(await self._ask("drop_evaluation"))

    async def _ask(self, verb: str, **more: Any) -> Any:
        named = {"name": self.name, "version": self.version, "branch": self.branch}
        return await self._channel.ask(verb, named | more)

    def __reduce__(self) -> Any:
        return _elsewhere, (self._channel.store, self.name, self.version, self.branch)

    def __repr__(self) -> str:
        branch = f", branch {self.branch}" if self.branch else ""
        return f"<Evaluation {self.name!r} of version {self.version}{branch}>"


def _elsewhere(store: Any, name: str, version: int | None, branch: int) -> Evaluation:
    """The same evaluation in a process that it was sent to."""
    return Evaluation(store.evaluating(), {"name": name, "version": version, "branch": branch})


class BlockingEvaluation:
    """The methods of an evaluation as blocking calls, which may be used inside a running event loop, too."""

    def __init__(self, evaluation: Evaluation, block: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._evaluation = evaluation
        self._block = block

    def status(self) -> EvaluationResult:
        """`Evaluation.status`."""
        return self._block(self._evaluation.status())  # type: ignore[no-any-return]

    def result(self, *, timeout: float | None = None, progress: bool = False) -> EvaluationResult:
        """`Evaluation.result`."""
        return self._block(self._evaluation.result(timeout=timeout, progress=progress))  # type: ignore[no-any-return]

    def drop(self) -> bool:
        """`Evaluation.drop`."""
        return bool(self._block(self._evaluation.drop()))


# -- beginning ---------------------------------------------------------------------------------------------------------


async def begin(plan: EvalPlan, items: Any, channel: EvalChannel) -> Evaluation:
    """Begin an evaluation, or go on with it; returns once all its items are enqueued."""
    named = isinstance(items, Mapping)
    work = wire.eval_work(plan, channel.encoder, read_items(plan.name, items), has_environments=named)
    asked = {
        "name": plan.name, "feed": plan.feed, "resources_id": plan.resources_id, "version": plan.version,
        "rule": plan.rule | {"total": len(work.requests), "items": work.digest}, "overtaken": plan.overtaken,
    }  # fmt: skip
    row = await channel.ask("begin_evaluation", asked)
    evaluation = Evaluation(channel, row)
    if row["status"] == "running":
        await _enqueue(plan, work, channel, evaluation, row["enqueued"], named=named)
    return evaluation


async def _enqueue(
    plan: EvalPlan, work: EvalWork, channel: EvalChannel, evaluation: Evaluation, position: int, *, named: bool
) -> None:
    """Enqueue the items from a position on, in parts; another process may do the same."""
    key = (evaluation.name, evaluation.version, evaluation.branch)
    where = dict(zip(("name", "version", "branch"), key, strict=True))
    samples, most, failures = plan.rule["samples"], wire.PART_ROLLOUTS, 0
    while position < len(work.requests):
        first, last = next(wire.parts(work, position, samples, most))
        try:
            position = await channel.ask("evaluation_add", wire.part(work, key, first, last, named=named))
        except OverloadedError as error:
            if error.asked > error.bound and last - first == 1:
                raise  # one item alone is more than may ever wait
            most = max(min(most, error.bound) // 2, samples) if error.asked > error.bound else most
            await channel.rest(min(error.retry_after_seconds, 1.0))
        except (SessionEndedError, OutcomeUnknownError):  # whether it came or not, the position says
            failures += 1
            if failures == TRIES:
                raise
            position = (await channel.ask("evaluation_result", where))["enqueued"]
        else:
            failures = 0


def read_items(name: str, items: Any) -> list[EvalItem]:
    """All items, with the environment and the index of each."""
    by_environment = dict(items) if isinstance(items, Mapping) else {name: items}
    if not by_environment:
        raise InvalidValueError("items", items, "at least one item")
    found: list[EvalItem] = []
    for environment, data in by_environment.items():
        place = "items"
        if isinstance(items, Mapping):
            name_of("items key", environment, without="~")
            place = f"items[{environment!r}]"
            _refuse_task(place, data, items)
        check_dataset(place, data)
        before = len(found)
        for index, item in enumerate(_each(place, data, MOST_ITEMS - before)):
            if item is None:
                raise InvalidValueError(f"{place}[{index}]", None, "a task: leave out what is none")
            found.append(EvalItem(environment, index, item))
        if len(found) == before:
            raise InvalidValueError(place, data, "at least one item; an iterator that was read gives none any more")
    return found


def _refuse_task(place: str, data: Any, items: Mapping[Any, Any]) -> None:
    """Refuse one task where tasks by environment are expected."""
    if isinstance(data, (str, bytes, int, float, Mapping, type(None))):
        expected = "a list of items: items are a list, or lists by the names of their environments"
        if not isinstance(data, Mapping):
            expected += f"; put one task alone into a list: [{{{next(iter(items))!r}: ...}}]"
        raise InvalidValueError(place, data, expected)


def _each(place: str, data: Any, most: int) -> Iterator[Any]:
    """The items of a dataset; what never ends is not read for ever."""
    number = 0
    try:
        given = (data[index] for index in range(len(data))) if is_indexed(data) else islice(data, most + 1)
        for item in given:
            if number >= most:
                raise InvalidValueError(
                    place, data, f"at most {MOST_ITEMS:,} items; this one gives more, or never ends"
                )
            number += 1
            yield item
    except InvalidValueError:
        raise
    except Exception as error:
        expected = f"items that can be read; after {number} of them reading raised {summary(error)}"
        raise InvalidValueError(place, data, expected) from error

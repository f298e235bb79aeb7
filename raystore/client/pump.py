"""The pump of a feed: a thread that draws items, judges groups, and calls what functions the user gave.

It does what the store says is to be done (`feed_work`), so that all that a feed knows is in the store; if it dies in
the midst, another one goes on from there. It needs no event loop of the driver, which a training step may block for
hours: it has a thread with a loop of its own, and the dataset, the sampler, `keep` and `order` are used on that thread
only. It goes on through restarts of the store, and ends at `stop`, with the client, if another pump has the feed, or if
a function of the user's raises; `error` says why.
Not here: batches, which the driver takes itself (`client.feed`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raystore.client.datasets import Draw, Position, SampledStream, Stream
from raystore.core.payload import Payload, size_of
from raystore.errors import (
    AnswerGoneError,
    FeedClosedError,
    FeedHeldError,
    InvalidValueError,
    JournalFullError,
    OverloadedError,
    SessionEndedError,
    SpansEvictedError,
    StoreClosedError,
    StoreError,
    StoreUnavailableError,
    copy_of,
)
from raystore.errors.text import summary
from raystore.reports.log import a_minute, logger_of
from raystore.tracing.calls import model_calls
from raystore.tracing.evidence import lacking, rewards_by_name
from raystore.tracing.trajectories import count_tokens
from raystore.types.contract import AnyRollout, Group, TakenGroup
from raystore.types.feeds import FeedGroup, Keep, Sampler
from raystore.types.spans import Span
from raystore.values.plain import scalar
from raystore.wire.codec import decode, encode
from raystore.wire.convert import Encoder
from raystore.wire.feeds import Plan, to_feed_group

logger: logging.Logger = logger_of("raystore")

WORK_SECONDS = 30.0  #: for which one call waits for something to do
REST_SECONDS = 1.0  #: after which the store is asked again, if nothing could be done of what it said
AT_ONCE = 16  #: groups that are judged in one go, since their spans are in memory then
DRAWN_AT_ONCE = 256  #: items that are drawn in one step, at most ...
DRAWN_BYTES = 1024 * 1024  #: ... or so many bytes of them
SKIPPED_AT_ONCE = 100  #: items that are passed over in one step, at most
UNREADABLE = 10_000  #: items in a row that cannot be read, after which the dataset counts as broken; or a whole epoch
STATE_BYTES = 16 * 1024 * 1024  #: of what a dataset or sampler keeps of its position
CLOSE_SECONDS = 5.0  #: for which the end of a pump is waited for
REWARDS_KEPT = 100_000  #: of judged groups, until somebody asks for them
REMEMBERED = 10_000  #: groups whose spans were read and that are not taken yet

#: Whether a group is trained on.
Test = Callable[[FeedGroup], bool]

#: What may come through from a store that restarts, or has taken this process for dead. The feed is opened again then.
PASSING = (AnswerGoneError, SessionEndedError, StoreUnavailableError)


class Reader(Protocol):
    """What a feed reads of its store by the store's methods."""

    async def query_many_spans(self, rollout_ids: Sequence[str]) -> dict[str, list[Span]]:
        """The spans of the latest attempts of these rollouts."""

    async def query_groups(self, *, group_id_in: Sequence[str] | None = None) -> Sequence[Group]:
        """Groups by id."""

    async def query_rollouts(self, *, rollout_id_in: Sequence[str] | None = None) -> Sequence[AnyRollout]:
        """Rollouts by id."""


@dataclass(frozen=True, slots=True)
class Channel:
    """How a feed reaches its store: operations, and methods of the store."""

    ask: Callable[[str, dict[str, Any]], Coroutine[Any, Any, Any]]
    #: The same for an operation that another process may stand against, which may just have died.
    open: Callable[[str, dict[str, Any]], Coroutine[Any, Any, Any]]
    reader: Reader
    encoder: Encoder
    #: A take by name and arguments, with `max_open`: rows of groups and rollouts, and the number of the batch.
    take: Callable[[str, dict[str, Any], int], Coroutine[Any, Any, tuple[list[Any], int]]]
    #: Publish named resources under an id by an operation, with these arguments of its own.
    put: Callable[[str, str, Any, dict[str, Any]], Coroutine[Any, Any, Any]]
    travels: bool  #: whether the store may be pickled


@dataclass(slots=True)
class Seen:
    """What the spans of a group's rollouts to train on say."""

    spans: dict[str, list[Span]]  # of all valid members
    tokens: int
    named_rewards: dict[str, dict[str, float]]
    unusable: dict[str, str]  # those that lack something, and what

    def tell(self, group: FeedGroup) -> None:
        """Put it into the group."""
        group.named_rewards = self.named_rewards
        if group.tokens is None:
            group.tokens = self.tokens


class Bell:
    """Wakes whoever waits, on any event loop, whenever it is rung."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for future in waiting:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                future.get_loop().call_soon_threadsafe(_set, future)

    def next(self) -> asyncio.Future[None]:
        """A future that the next ring answers; for `forget` after it was waited for."""
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.add(future)
        return future

    def forget(self, future: asyncio.Future[None]) -> None:
        """Wake this one no more."""
        with self._lock:
            self._waiting.discard(future)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Pump:
    """What draws the items of one feed; `start` begins it, on a thread of its own.

    Attributes:
        pump_id: by which the store tells it from other pumps.
        error: why it ended; None if it runs, or was stopped.
        is_ended: whether it draws nothing any more.
        is_open: whether the store has let it draw.
        is_over: whether nothing is left to be given out, by what the store said last.
        is_fresh: whether the feed was unknown when it was opened.
        is_published: whether the feed hands out.
        may_draw: whether this process has come so far that items may be drawn.
        is_drawing: whether items are being drawn.
        bell: rung when one of these changes.
    """

    def __init__(
        self, plan: Plan, streams: Sequence[tuple[Stream, float]], sampler: Sampler | None, channel: Channel
    ) -> None:
        self.plan: Plan = plan
        self.pump_id: str = secrets.token_hex(8)
        self.bell: Bell = Bell()
        self.error: BaseException | None = None
        self.is_ended: bool = False
        self.is_open: bool = False
        self.is_over: bool = False
        self.is_fresh: bool = False
        self.is_published: bool = False
        self.may_draw: bool = False
        self.is_drawing: bool = False
        self._streams = {stream.name: stream for stream, _ in streams}
        self._shares = {stream.name: share for stream, share in streams}
        self._sampler = sampler
        self._channel = channel
        self._rows: list[list[Any]] | None = None  # of the streams, as the store knows them
        self._pending: dict[str, deque[Draw]] = {name: deque() for name in self._streams}  # which may have come or not
        self._keep: Keep | Test | None = None
        self._is_judging = False  # whether `keep` is known
        self._must_open = False  # since it has changed what is judged
        self._seen: dict[str, Seen] = {}  # by group, until it is taken or has ended
        self._endings = 0  # the number of the last one that was told
        #: Rewards of the groups that `keep` has judged since they were asked for.
        self._judged: deque[float] = deque(maxlen=REWARDS_KEPT)
        self._unreadable: dict[str, int] = {}  # by stream: items passed over since the last one that could be read
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._poked: asyncio.Event | None = None
        self._is_stopping = False

    # -- from other threads ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, unless it has begun."""
        with self._lock:
            if self._thread is None and not self._is_stopping:
                name = f"raystore-feed-{self.plan.feed}"
                self._thread = threading.Thread(target=self._run_thread, name=name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Have it end soon, without an error."""
        with self._lock:
            self._is_stopping = True
            if self._thread is None:
                self.is_ended = True
            elif self._loop is not None and self._task is not None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._task.cancel)
        self.bell.ring()

    def join(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait until it has ended; a function of the user's that does not return is left behind."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(seconds)
        if thread.is_alive():
            self.say_it_hangs()

    def say_it_hangs(self) -> None:
        """Log that it has not ended."""
        logger.warning(
            "Feed %r is closed, and a function of yours that it called (the dataset, keep, order or the sampler) has "
            "not returned; its thread ends once it does", self.plan.feed,
        )  # fmt: skip

    def poke(self) -> None:
        """Have it ask the store now, if it rests."""
        with self._lock:
            if self._loop is not None and self._poked is not None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._poked.set)

    async def hold(self) -> None:
        """Have it draw nothing until `go_on`, and wait for what it is drawing."""
        self.may_draw = False
        while self.is_drawing and not self.is_ended:
            ring = self.bell.next()
            try:
                if self.is_drawing and not self.is_ended:
                    await ring
            finally:
                self.bell.forget(ring)

    def go_on(self) -> None:
        """Have it draw items, as there are places for them."""
        self.may_draw = True
        self.poke()

    def judge_by(self, keep: Keep | Test | None) -> None:
        """Judge groups by this from now on, and by what is required."""
        before = self._is_judged
        self._keep, self._is_judging = keep, True
        if before != self._is_judged:
            self._must_open = True
        self.poke()

    def take_seen(self, group_id: str) -> Seen | None:
        """What was read of a group's spans, which is forgotten here."""
        return self._seen.pop(group_id, None)

    def take_judged(self) -> list[float]:
        """The rewards of the groups that `keep` has judged since the last call, whether they passed or not."""
        with self._lock:
            judged = list(self._judged)
            self._judged.clear()
        return judged

    @property
    def reads_spans(self) -> bool:
        """Whether groups are looked into before they are trained on."""
        keep, plan = self._keep, self.plan
        by_reward_alone = keep is None or (isinstance(keep, Keep) and keep.of is None)
        return bool(plan.require or plan.rule["batch_tokens"] or plan.chooser) or not by_reward_alone

    @property
    def _is_judged(self) -> bool:
        """Whether the store is to ask about each group. It must not give any out before `keep` is known."""
        return (
            not self._is_judging or self._keep is not None or bool(self.plan.require or self.plan.rule["batch_tokens"])
        )

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run_thread(self) -> None:
        error: BaseException | None = None
        try:
            asyncio.run(self._run_all())
        except asyncio.CancelledError:
            pass
        except StoreClosedError:
            pass
        except BaseException as raised:
            error = raised
        self.error, self.is_ended = (None if self._is_stopping else error), True
        self.bell.ring()

    async def _run_all(self) -> None:
        with self._lock:
            self._loop, self._poked = asyncio.get_running_loop(), asyncio.Event()
            self._task = asyncio.current_task()
            if self._is_stopping:
                return
        try:
            await self._run()
        finally:
            if self.is_open:
                with contextlib.suppress(StoreError):
                    closing = self._channel.ask("close_feed", {"feed": self.plan.feed, "pump": self.pump_id})
                    await asyncio.wait_for(closing, CLOSE_SECONDS / 2)

    async def _run(self) -> None:
        await self._open_with_patience()
        while not self._is_stopping:
            try:
                if self._must_open:
                    await self._open()
                did = await self._do(await self._work())
            except (JournalFullError, OverloadedError) as error:
                logger.warning("Feed %r draws nothing for now: %s", self.plan.feed, error, extra=self._kind("full"))
                if isinstance(error, OverloadedError) and error.asked > error.bound:
                    raise  # one group alone is more than there may be
                await asyncio.sleep(min(error.retry_after_seconds, REST_SECONDS))
                continue
            except (*PASSING, FeedHeldError) as error:
                logger.info("Feed %r is opened again: %s", self.plan.feed, error)
                await self._open_with_patience()
                continue
            if not did:
                await self._rest()

    async def _open_with_patience(self) -> None:
        """Open the feed; again, however long the store cannot be reached."""
        while True:
            try:
                await self._open()
                return
            except PASSING as error:
                if not self.is_open and isinstance(error, StoreUnavailableError):
                    raise  # whoever has just begun is told
                logger.warning("Feed %r waits for its store: %s", self.plan.feed, error, extra=self._kind("waits"))
                await asyncio.sleep(REST_SECONDS)

    async def _open(self) -> None:
        """Let the store know of this pump, and go on where the feed is."""
        if self._rows is None:
            self._rows = [
                [name, self._shares[name], stream.length, stream.fingerprint()]
                for name, stream in self._streams.items()
            ]
        self._must_open = False
        arguments = {
            "feed": self.plan.feed, "pump": self.pump_id, "rule": self.plan.rule | {"judged": self._is_judged},
            "streams": self._rows, "changed": self.plan.changed,
        }  # fmt: skip
        answer = await self._channel.open("open_feed", arguments)
        branch, version, checkpoint, streams = answer
        is_first, self.is_open = not self.is_open, True
        if is_first:
            self.is_fresh = version is None and checkpoint is None and not branch
            self.is_published = version is not None
        for name, epoch, cursor, state, is_over in streams:
            if name in self._streams:
                await self._seek(self._streams[name], Position(epoch, cursor), state, is_over)
        self.bell.ring()

    async def _seek(self, stream: Stream, position: Position, state: bytes | None, is_over: bool) -> None:
        """Bring a stream to where the store is."""
        pending = self._pending[stream.name]
        while pending and pending[0].at != position:
            pending.popleft()
        if pending:
            await self._send(stream)
            return
        found = None
        if state is not None:
            endings, found = decode(state)
            if isinstance(stream, SampledStream) and found is not None and not self._endings:
                self._endings = endings
        stream.seek(position, found, is_over=is_over)
        if is_over and not stream.is_over:  # there are more epochs than there were
            await self._add(stream, Draw(stream.name, position, position))

    # -- what there is to do -----------------------------------------------------------------------------------------

    async def _ask(self, verb: str, **arguments: Any) -> Any:
        return await self._channel.ask(verb, {"feed": self.plan.feed, "pump": self.pump_id, **arguments})

    async def _work(self) -> dict[str, Any]:
        """What the store says is to be done; waits for it, unless it is poked."""
        assert self._poked is not None
        self._poked.clear()
        known = {"seen": self._endings, "over": self.is_over}
        asking = asyncio.ensure_future(self._ask("feed_work", **known, timeout=WORK_SECONDS))
        poked = asyncio.ensure_future(self._poked.wait())
        try:
            await asyncio.wait((asking, poked), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result() or {}
            return {}
        finally:
            for task in (asking, poked):
                task.cancel()
            await asyncio.gather(asking, poked, return_exceptions=True)

    async def _rest(self) -> None:
        """Nothing could be done: ask again a little later, or when somebody pokes."""
        assert self._poked is not None
        # Not `wait_for`, which before Python 3.12 forgets that it was cancelled if it was poked at the same time.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REST_SECONDS):
                await self._poked.wait()

    async def _do(self, work: Mapping[str, Any]) -> bool:
        """Do what the store said; whether there was anything that could be done."""
        if not work:  # poked, or nothing for a while
            return True
        did = False
        if work["over"] != self.is_over:
            self.is_over, did = bool(work["over"]), True
            self.bell.ring()
        did = did or bool(work["ended"])
        for number, group_id, ending, _ in work["ended"]:
            self._seen.pop(group_id, None)
            if self._sampler is not None and ending != "skipped":
                await self._observe(self._sampler, group_id, ending)
            self._endings = number
        if work["judge"] and self._is_judging:
            did = True
            await self._judge(list(work["judge"])[:AT_ONCE])
        if work["choose"] and self.plan.chooser is not None:
            did = True
            await self._choose(self.plan.chooser, list(work["choose"]))
        for name, number in dict(work["places"]).items():
            self.is_drawing = self.may_draw  # `hold` looks at them in the other order
            try:
                did = (self.may_draw and await self._draw(self._streams[name], number)) or did
            finally:
                self.is_drawing = False
                self.bell.ring()
        return did

    async def _observe(self, sampler: Sampler, group_id: str, ending: str) -> None:
        """Tell the sampler how the group of an item ended."""
        groups = await self._channel.reader.query_groups(group_id_in=[group_id])
        ids = groups[0].members if groups else []
        rollouts = await self._channel.reader.query_rollouts(rollout_id_in=ids) if ids else []
        rewards = [rollout.reward for rollout in rollouts if rollout.status == "succeeded"]
        self._users("sampler.observe", sampler.observe, group_id, ending, rewards)

    def _users(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the user's; what it raises ends the feed."""
        try:
            return function(*arguments)
        except Exception as error:
            raise FeedClosedError(self.plan.feed, f"{what} raised {summary(error)}") from error

    # -- drawing -----------------------------------------------------------------------------------------------------

    async def _draw(self, stream: Stream, count: int) -> bool:
        """Draw up to so many items; whether that changed anything."""
        if self._pending[stream.name]:  # the store was full
            await self._send(stream)
            return True
        at, was_over = stream.position, stream.is_over
        draw = Draw(stream.name, at, at)
        size = 0
        while len(draw.requests) < min(count, DRAWN_AT_ONCE) and size < DRAWN_BYTES:
            if len(draw.skipped) >= SKIPPED_AT_ONCE:
                break
            drawn = self._users("sampler.next" if self._sampler else "reading the dataset", stream.next)
            if drawn is None:
                break
            why, place = drawn.why, (drawn.environment, drawn.epoch, drawn.index)
            if why is None:
                try:
                    request = self.plan.request(self._channel.encoder, *place, drawn.item)
                except StoreError as error:  # the item is too large, or cannot be sent
                    why = str(error)
                else:
                    size += size_of(request["member"]["input"])
                    draw.requests.append(request)
                    draw.items.append(list(place))
                    draw.ends.append(stream.position)
                    self._unreadable[stream.name] = 0
                    continue
            draw.skipped.append([self.plan.group_id(*place), why])
            self._pass_over(stream, drawn.environment, drawn.index, why)
        if stream.position == at and stream.is_over == was_over:
            return False
        await self._add(stream, draw)
        return True

    def _state_of(self, stream: Stream) -> bytes | None:
        """What the data of a stream keeps of its position."""
        found = self._users("state_dict", stream.state)
        if found is None and not isinstance(stream, SampledStream):
            return None
        payload = encode([self._endings, found], "state_dict()", STATE_BYTES)
        if isinstance(payload, Payload) and payload.refs:
            raise InvalidValueError("state_dict()", found, "a state without object references, which outlives them")
        return payload.data if isinstance(payload, Payload) else payload

    async def _add(self, stream: Stream, draw: Draw) -> None:
        """Send a draw that ends where the stream is now."""
        draw.to, draw.over, draw.state_after = stream.position, stream.is_over, self._state_of(stream)
        self._pending[stream.name].append(draw)
        await self._send(stream)

    async def _send(self, stream: Stream) -> None:
        """Enqueue the groups of what was drawn and move the position, in one step for each draw."""
        pending = self._pending[stream.name]
        while pending:
            draw = pending[0]
            try:
                now = Position(*await self._ask("feed_add", **draw.arguments()))
            except OverloadedError as error:
                if error.asked <= error.bound or len(draw.requests) < 2:
                    raise
                pending[0], second = draw.halves()  # all at once would never fit
                pending.insert(1, second)
                continue
            pending.popleft()
            if now != draw.to:  # somebody else has drawn
                logger.info("Feed %r goes on at %s of stream %r, not at %s", self.plan.feed, now, stream.name, draw.to)
                self._must_open = True
                pending.clear()

    def _pass_over(self, stream: Stream, environment: str, index: int, why: str) -> None:
        """Log that an item is passed over, by the kind of reason; too many are a broken dataset."""
        logger.warning(
            "Feed %r passes over item %d of %r: %s (feed.status() counts them)",
            self.plan.feed, index, environment, why, extra=self._kind("passed over", why.partition(":")[0]),
        )  # fmt: skip
        count = self._unreadable[stream.name] = self._unreadable.get(stream.name, 0) + 1
        if count >= min(stream.length or UNREADABLE, UNREADABLE):
            error = InvalidValueError(f"data[{environment!r}]", why, f"items that can be read; {count} in a row cannot")
            raise FeedClosedError(self.plan.feed, str(error)) from error

    # -- judging and choosing ----------------------------------------------------------------------------------------

    async def _judge(self, group_ids: list[str]) -> None:
        """Say of complete groups whether they are trained on."""
        verdicts = []
        for group in await self.read(group_ids):
            seen = self._seen.get(group.group_id)
            unusable = seen.unusable if seen is not None else {}
            why = None
            if self._keep is not None:
                why = self._why_not(self._keep, group)
                self._remember_rewards(group)
            if unusable:
                self._say_unusable(unusable)
            tokens = seen.tokens if seen is not None else None
            verdicts.append([group.group_id, why, tokens, list(unusable)])
            if why is not None:
                self._seen.pop(group.group_id, None)
        if verdicts:
            await self._ask("feed_judge", verdicts=verdicts)

    def _remember_rewards(self, group: FeedGroup) -> None:
        rewards = [reward for reward in group.rewards if reward is not None]
        with self._lock:
            self._judged.extend(rewards)

    def _why_not(self, keep: Keep | Test, group: FeedGroup) -> str | None:
        if isinstance(keep, Keep):
            try:
                return keep.why_not(group)
            except InvalidValueError as error:  # no agent reports this reward
                raise InvalidValueError("of", keep.of, error.expected) from None
        name = getattr(keep, "__name__", type(keep).__name__)
        answer = scalar(self._users(f"keep ({name})", keep, group))
        if not isinstance(answer, bool):
            raise InvalidValueError("keep", answer, f"True or False from {name}(group)")
        return None if answer else f"{name} does not keep it"

    def _say_unusable(self, unusable: Mapping[str, str]) -> None:
        """Log that rollouts lack what training on them needs."""
        rollout_id, what = next(iter(unusable.items()))
        logger.warning(
            "Feed %r does not train on %d rollouts of a group, such as %s: %s, and require=%r asks for it. They "
            "count as failures",
            self.plan.feed, len(unusable), rollout_id, what, list(self.plan.require), extra=self._kind("unusable"),
        )  # fmt: skip

    def _kind(self, *kind: str) -> dict[str, Any]:
        """Tell a line of this kind, of this pump, once a minute."""
        return a_minute(self.pump_id, *kind)

    async def _choose(self, chooser: Callable[..., Any], group_ids: list[str]) -> None:
        """Have the user's function choose the groups of the next batch."""
        groups = await self.read(group_ids)
        name = f"order ({getattr(chooser, '__name__', type(chooser).__name__)})"
        chosen = self._users(name, chooser, groups)
        given = {id(group) for group in groups}
        if not isinstance(chosen, Sequence) or not chosen or any(id(group) not in given for group in chosen):
            raise InvalidValueError(
                "order", chosen, f"from {name}: a list of at least one of the groups that it was given"
            )
        ids = [group.group_id for group in chosen[: self.plan.rule["batch"]]]
        await self._ask("feed_choose", group_ids=ids)

    # -- reading -----------------------------------------------------------------------------------------------------

    async def read(self, group_ids: Sequence[str], taken: Sequence[TakenGroup] = ()) -> list[FeedGroup]:
        """The groups of these ids that are under way, with what their spans say if it is needed.

        Those that were just `taken` are known already. May be called on any event loop.
        """
        reader = self._channel.reader
        rows = await self._channel.ask("feed_items", {"feed": self.plan.feed, "group_ids": list(group_ids)})
        by_id = {row[0]: row for row in rows}
        groups: Sequence[Group] = taken or await reader.query_groups(group_id_in=list(by_id))
        groups = [group for group in groups if group.group_id in by_id]
        rollouts = {rollout.rollout_id: rollout for group in taken for rollout in group.rollouts}
        missing = [i for group in groups for i in group.members if i not in rollouts]
        if missing:
            rollouts |= {one.rollout_id: one for one in await reader.query_rollouts(rollout_id_in=missing)}
        reward = self.plan.rule["failure_reward"]
        found = {group.group_id: to_feed_group(group, by_id[group.group_id], rollouts, reward) for group in groups}
        made = [found[group_id] for group_id in group_ids if group_id in found]
        for group in made if self.reads_spans else ():
            seen = self._seen.get(group.group_id)
            if seen is None:
                seen = self._seen[group.group_id] = await self._look_into(group)
            seen.tell(group)
        while len(self._seen) > REMEMBERED:
            self._seen.pop(next(iter(self._seen)), None)
        return made

    async def _look_into(self, group: FeedGroup) -> Seen:
        """Read the spans of a group's valid members, and what they say."""
        spans, unusable = await self._spans_of(list(group.valid_rewards))
        train = [rollout.rollout_id for rollout in group.rollouts]
        tokens = 0
        for rollout_id in train:
            if rollout_id in unusable:
                continue
            calls = model_calls(spans[rollout_id])
            if (what := lacking(calls, self.plan.require)) is not None:
                unusable[rollout_id] = what
            else:
                tokens += count_tokens(calls)
        named = {rollout_id: rewards_by_name(found) for rollout_id, found in spans.items()}
        return Seen(spans, tokens, named, {i: what for i, what in unusable.items() if i in train})

    async def _spans_of(self, rollout_ids: list[str]) -> tuple[dict[str, list[Span]], dict[str, str]]:
        """The spans of rollouts; apart, those that have none any more."""
        lost: dict[str, str] = {}
        while True:
            left = [rollout_id for rollout_id in rollout_ids if rollout_id not in lost]
            try:
                return await self._channel.reader.query_many_spans(left), lost
            except SpansEvictedError as error:
                if error.rollout_id not in left:
                    raise
                lost[error.rollout_id] = str(error)

    def raise_error(self) -> None:
        """Raise what ended it, if something did."""
        if self.error is None:
            return
        if isinstance(self.error, StoreError):
            raise copy_of(self.error) from self.error.__cause__
        raise FeedClosedError(self.plan.feed, summary(self.error)) from self.error

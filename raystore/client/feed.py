"""A feed: whole groups of a dataset's items for a training loop, batch by batch, exact through crashes.

All that a feed knows is in the store. `Feed` gives the driver what is there: batches, and the words that a training
step has for the store (publish, acknowledge, checkpoint, restore).
Not here: drawing items and judging groups, on a thread of its own (`client.pump`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from raystore.client import evaluation as evaluating
from raystore.client.claims import Claims
from raystore.client.datasets import Stream
from raystore.client.evaluation import EvalChannel, Evaluation
from raystore.client.pump import CLOSE_SECONDS, Channel, Pump, Reader, Test
from raystore.client.steps import StepClock, endings, flat, of_evaluations
from raystore.errors import BatchHeldError, FeedClosedError, InvalidValueError
from raystore.errors.text import summary
from raystore.reports.log import a_minute, logger_of, once
from raystore.reports.progress import Progress
from raystore.tracing.calls import model_calls
from raystore.tracing.evidence import rewards_by_name
from raystore.tracing.trajectories import count_tokens
from raystore.types.contract import AnyRollout, ObjectResource, Resource, RolloutConfig, TagValue
from raystore.types.evaluations import EvaluationResult
from raystore.types.feeds import BatchManifest, FeedGroup, FeedStatus, Keep, Sampler, manifest_of
from raystore.types.spans import Span
from raystore.wire import checks
from raystore.wire import evaluations as wire_evaluations
from raystore.wire import feeds as wire_feeds
from raystore.wire import groups as wire_groups
from raystore.wire.evaluations import Overtaken
from raystore.wire.feeds import Plan

logger: logging.Logger = logger_of("raystore")

TAKE_SECONDS = 3600.0  #: for which one call waits for a batch
UNPUBLISHED_SECONDS = 10.0  #: after which whoever waits for a batch is told that nothing was published

SHOWN_SECONDS = 1.0  #: after which progress is counted again

#: What `on_step` takes: it gets the metrics of a step, and its number.
OnStep = Callable[[dict[str, float], int], Any]

WEIGHTS = "weights"  #: the name under which agents find what is published without one


class BatchShard:
    """The groups of a batch that one rank trains on. May be pickled, and read in another process.

    Attributes:
        rank: of the rank, from 0.
        world: how many ranks there are.
        groups: whole groups, in the order of the batch.
    """

    def __init__(self, rank: int, world: int, groups: Sequence[FeedGroup], reader: Reader, *, travels: bool) -> None:
        self.rank: int = rank
        self.world: int = world
        self.groups: list[FeedGroup] = list(groups)
        self._reader: Reader | None = reader
        self._travels = travels

    @property
    def rollouts(self) -> list[AnyRollout]:
        """The rollouts to train on, group by group."""
        return [rollout for group in self.groups for rollout in group.train]

    @property
    def rollout_ids(self) -> list[str]:
        """Their ids."""
        return [rollout.rollout_id for rollout in self.rollouts]

    async def spans(self, store: Reader | None = None) -> dict[str, list[Span]]:
        """The spans of these rollouts by id, read from the store by this process.

        `store` is needed where the shard came from an `InMemoryLightningStore` by pickling; that store has to be in
        this process.
        """
        reader = store or self._reader
        if reader is None:
            raise InvalidValueError("store", None, "a store: an InMemoryLightningStore does not travel with a shard")
        return await reader.query_many_spans(self.rollout_ids)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {} if self._travels else vars(self) | {"_reader": None}

    def __repr__(self) -> str:
        return f"<BatchShard {self.rank} of {self.world}: {len(self.groups)} groups, {len(self.rollouts)} rollouts>"


class FeedBatch:
    """Whole groups to train on, which this process holds until `ack` or `nack`.

    Attributes:
        consumer: name of the feed.
        number: of the batch, counted for each feed from 1.
        groups: in the order in which they are to be trained on.
        manifest: what it is made of, to be kept with the model.
    """

    def __init__(self, plan: Plan, channel: Channel, number: int, groups: Sequence[FeedGroup]) -> None:
        self.consumer: str = plan.feed
        self.number: int = number
        self.groups: list[FeedGroup] = list(groups)
        self.manifest: BatchManifest = manifest_of(plan.feed, number, self.groups)
        self._reader: Reader | None = channel.reader
        self._travels = channel.travels
        self._feed: Feed | None = None
        self._is_told = False  # whoever asked for steps, of this one
        self._spans: dict[str, list[Span]] | None = None

    @property
    def rollouts(self) -> list[AnyRollout]:
        """The rollouts to train on, group by group."""
        return [rollout for group in self.groups for rollout in group.train]

    async def ack(
        self,
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        per_rollout: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Tell that step `step` of the model has consumed the batch, which makes room for more work.

        Publish that step before, so that this work begins with its weights. `metrics`, and those of `per_rollout` by
        rollout id, are kept in the ledger as JSON. May be repeated. Raises `BatchConflictError` if the feed does not
        hold the batch any more, or if the step is before the last one.
        """
        at_step = checks.whole("step", step, at_least=0)
        noted = None if per_rollout is None else wire_feeds.notes(per_rollout, (r.rollout_id for r in self.rollouts))
        arguments = {
            "at_step": at_step,
            "note": None if metrics is None else wire_feeds.note("metrics", metrics),
            "notes": noted,
        }
        await self._ask("ack", arguments)
        if self._feed is not None and not self._is_told:
            self._is_told = True
            await self._feed.tell_of_step(self, at_step, metrics or {})

    async def nack(self) -> None:
        """Give the batch back unconsumed: its groups come again before all others.

        Raises `BatchConflictError` if the feed does not hold the batch any more.
        """
        await self._ask("nack", {})

    async def _ask(self, verb: str, arguments: dict[str, Any]) -> None:
        if self._feed is None:
            raise FeedClosedError(
                self.consumer, f"this copy of a batch is not its feed's: say {verb} where it was taken"
            )
        await self._feed.tell_of_batch(verb, {"consumer": self.consumer, "batch": self.number, **arguments})

    async def spans(self) -> dict[str, list[Span]]:
        """The spans of `rollouts` by rollout id, of their latest attempts. They are read once."""
        ids = [rollout.rollout_id for rollout in self.rollouts]
        if self._spans is None or any(rollout_id not in self._spans for rollout_id in ids):
            if self._reader is None:
                expected = "a batch in the process of its InMemoryLightningStore, which does not travel"
                raise InvalidValueError("batch", self, expected)
            wanted = [rollout_id for group in self.groups for rollout_id in group.valid_rewards]
            self._spans = await self._reader.query_many_spans(wanted)
            self._tell_groups(self._spans)
        return {rollout_id: self._spans[rollout_id] for rollout_id in ids}

    def _tell_groups(self, spans: Mapping[str, list[Span]]) -> None:
        """Let groups know what their spans say."""
        for group in self.groups:
            if group.named_rewards is None:
                group.named_rewards = {i: rewards_by_name(spans[i]) for i in group.valid_rewards}
            if group.tokens is None:
                group.tokens = sum(count_tokens(model_calls(spans[rollout.rollout_id])) for rollout in group.train)
        self.manifest = manifest_of(self.consumer, self.number, self.groups)

    def shard(self, rank: int, world: int) -> BatchShard:
        """The groups for one of `world` ranks: all get whole groups and about as many tokens as the others.

        Where tokens are not known, about as many groups. The same on each rank, and in each process. If there are more
        ranks than groups, some get none.
        """
        count = checks.whole("world", world, at_least=1)
        number = checks.whole("rank", rank, at_least=0)
        if number >= count:
            raise InvalidValueError("rank", rank, f"a whole number below world, which is {count}")
        dealt = deal([group.tokens for group in self.groups], count)[number]
        groups = [self.groups[place] for place in dealt]
        return BatchShard(number, count, groups, self._reader, travels=self._travels)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.groups)

    def __getstate__(self) -> dict[str, Any]:
        kept = vars(self) | {"_feed": None, "_spans": None}
        return kept if self._travels else kept | {"_reader": None}

    def __repr__(self) -> str:
        counts = f"{len(self.groups)} groups, {len(self.rollouts)} rollouts"
        return f"<FeedBatch {self.number} of {self.consumer!r}: {counts}>"


def deal(tokens: Sequence[int | None], world: int) -> list[list[int]]:
    """Deal groups of so many tokens to ranks: the places of the groups of each rank, in their order.

    The largest group that is left goes to the rank that has least. Unless all counts are known, each counts the same.
    """
    known = [count for count in tokens if count is not None]
    sizes = known if len(known) == len(tokens) else [1] * len(tokens)
    load = [(0, 0, rank) for rank in range(world)]  # tokens, groups, rank
    dealt: list[list[int]] = [[] for _ in range(world)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        total, number, rank = min(load)
        load[rank] = total + sizes[place], number + 1, rank
        dealt[rank].append(place)
    return [sorted(places) for places in dealt]


class Feed:
    """Whole groups of a dataset's items for a training loop; made by `store.feed`, which says what it does.

    May be used with `async with`, which closes it. The first call begins it: a thread of this process draws items and
    judges groups from then on, also while the driver's event loop is blocked. Functions of the user's (the dataset,
    `keep`, `order`, the sampler) run on that thread.

    Attributes:
        name: of the feed, and of the consumer that it is.
    """

    def __init__(
        self,
        plan: Plan,
        streams: Sequence[tuple[Stream, float]],
        sampler: Sampler | None,
        channel: Channel,
        epochs: int | None,
        evaluations: EvalChannel,
    ) -> None:
        self.name: str = plan.feed
        self._evaluations = evaluations
        self._epochs = epochs
        self._plan = plan
        self._channel = channel
        self._make = functools.partial(Pump, plan, streams, sampler, channel)
        self._pump = self._make()
        self._is_closed = False
        self._steps = StepClock()
        self._on_step: list[OnStep] = []
        self._evaluated = 0  # evaluations that had finished when they were looked at last
        #: Those that `on_step` need not be told of: they had finished before, or were told. By version and branch.
        self._told: set[tuple[str, int | None, int]] = set()
        self._asked: set[tuple[str, int | None, int]] = set()  # those that this process has asked for

    @property
    def is_pumping(self) -> bool:
        """Whether it draws items, or is about to: no other feed of its name may in the meantime."""
        return not self._is_closed and not self._pump.is_ended

    # -- the words of a training loop ----------------------------------------------------------------------------------

    async def restore(self, step: int | None) -> int:
        """Tell that the model is at step `step`, after it was loaded; returns how many groups come again.

        Those are the ones that later steps were trained on, and those that were taken and no step was trained on. They
        come first, are never too late, and nothing new is drawn before they are acknowledged. Nothing is handed out
        until `publish`, which begins a new branch of versions.

        None means that there is no saved model, so that it is at step 0. A training loop says this at each start; on
        the first there is nothing to do. Raises `BatchConflictError` for a step before the last checkpoint.
        """
        at = 0 if step is None else checks.whole("step", step, at_least=0)
        pump = await self._begun()
        if pump.is_fresh:
            return 0
        await pump.hold()  # or a draw that is on its way would come after the rewind
        count = int(await self._channel.ask("rewind", {"consumer": self.name, "at_step": at}))
        pump.is_published = False
        pump.poke()
        return count

    async def publish(self, weights: Any = None, *, version: int) -> None:
        """Publish step `version` of the model: rollouts that are claimed from now on run with it.

        `weights` is a value, which agents find as `ctx.resources["weights"].get()`; or resources by name, as for
        `update_resources`. None, or a function, says that the weights travel by other ways (NCCL, a shared disk): then
        the version alone is published, and the function is called by nobody.

        The first publish of a feed, and the first after `restore`, opens it. Raises `VersionConflictError` for a
        version before the newest, or with other content than it was published with.
        """
        step = checks.whole("version", version, at_least=0)
        resources = self._named(weights)
        pump = await self._begun()
        arguments = {
            "feed": self.name, "pump": pump.pump_id, "version": step, "digest": wire_feeds.content_of(resources),
        }  # fmt: skip
        await self._channel.put("publish_feed", self._plan.rule["resources_id"], resources, arguments)
        pump.is_fresh, pump.is_published = False, True
        pump.bell.ring()
        pump.go_on()

    @staticmethod
    def _named(weights: Any) -> dict[str, Any]:
        """What is published, by the names under which agents find it."""
        if weights is None or inspect.isroutine(weights) or isinstance(weights, functools.partial):
            return {}
        if wire_feeds.is_named(weights):
            return dict(weights)
        return {WEIGHTS: weights if isinstance(weights, Resource) else ObjectResource(value=weights)}

    def batches(
        self, keep: Keep | Test | None = None, *, max_open: int = 1, progress: bool = False
    ) -> AsyncIterator[FeedBatch]:
        """Iterate over batches of `batch` groups each, until all items have come to their ends.

        `keep` says which groups are trained on: `rs.keep(...)`, or a function of a `FeedGroup` that gives True or
        False. The others are filtered, and others come in their place, so that each batch is full; only the last one
        may be smaller. With `batch_tokens` a batch has fewer groups than `batch` if more would exceed it.

        A batch is held until `ack` or `nack`; up to `max_open` may be held at once, to fetch ahead. Another one raises
        `BatchHeldError`.

        With `progress` a driver draws on its terminal, while it waits for a batch, how many items have come to their
        ends, how fast, how many failed, and how much of the batch is there.

        Raises `FailureBudgetError` or `FilteredTooManyError` if the feed has paused: `resume` and iterate again.
        Raises `FeedClosedError` if the feed was closed, or if a function of the user's raised, which is its cause;
        `FeedHeldError` and `DatasetChangedError`; and what `store.take` raises.
        """
        if keep is not None and not isinstance(keep, Keep):
            if not callable(keep) or inspect.iscoroutinefunction(keep):
                expected = "rs.keep(...), or a plain function of a group that gives True or False"
                raise InvalidValueError("keep", keep, expected)
        checks.whole("max_open", max_open, at_least=1)
        shown = Progress(f"feed {self.name}", is_wanted=checks.flag("progress", progress))
        return self._batches(keep, max_open, shown)

    async def checkpoint(self, step: int) -> int:
        """Tell that the model of step `step` is durable; returns how many rollouts that releases.

        What was acknowledged up to it does not come again. Raises `BatchConflictError` if an earlier checkpoint has a
        higher step.
        """
        at_step = checks.whole("step", step, at_least=0)
        await self._begun()
        return int(await self._channel.ask("checkpoint", {"consumer": self.name, "at_step": at_step}))

    def on_step(self, function: OnStep) -> OnStep:
        """Call `function(metrics, step)` after each `ack` with what the step was like; returns the function.

        `metrics` is one flat mapping of names to floats, made anew for each call, with those of `ack(metrics=...)`;
        `docs/metrics.md` lists the names. `step` is that of `ack`. So a tracker is one line:
        `feed.on_step(lambda metrics, step: wandb.log(metrics, step=step))`.

        An asynchronous function is awaited. What a function raises is logged once, and never stops the training.
        """
        if not callable(function):
            raise InvalidValueError("function", function, "a function of (metrics, step), such as a tracker's log")
        self._on_step.append(function)
        return function

    async def tell_of_step(self, batch: FeedBatch, step: int, metrics: Mapping[str, Any]) -> None:
        """A batch was acknowledged: tell those who asked for it."""
        if not self._on_step:
            return
        judged = self._pump.take_judged()
        try:
            status = await self.status()
            found = self._steps.metrics(batch.groups, step, judged, status)
            found |= of_evaluations(await self._finished(status)) | flat(metrics)
        except Exception:  # whatever it is: the step is acknowledged, and training goes on
            logger.exception("What step %d of feed %r was like is not known", step, self.name, extra=once("step"))
            return
        for number, function in enumerate(self._on_step):
            try:
                answer = function(dict(found), step)
                if inspect.isawaitable(answer):
                    await answer
            except Exception as error:
                logger.exception(
                    "Function %d of on_step of feed %r failed at step %d, and training goes on: %s (told once)",
                    number, self.name, step, summary(error), extra=once("on_step", self.name, number),
                )  # fmt: skip

    async def evaluate(
        self,
        items: Any,
        *,
        version: int | None = None,
        samples: int = 1,
        name: str = "eval",
        threshold: float = 0.0,
        failure_reward: float = 0.0,
        eval_share: float | None = None,
        overtaken: Overtaken = "finish",
        config: RolloutConfig | None = None,
        queue: str | None = None,
        priority: int | None = None,
        tags: Mapping[str, TagValue] | None = None,
    ) -> Evaluation:
        """Measure a step of the policy on items beside its training: `LightningStore.evaluate` says how.

        With `version`, a step that this feed has published, all samples run with it: say this right after `publish`,
        since older weights are freed. The weights of that step stay until the evaluation has ended. If they travel by
        other ways, attempts carry the version, and the inference server must serve it. Without, samples run with what
        is newest at their claim, and the result tells from which version to which.

        `eval_share`, `config`, `queue` and `priority` are those of the feed unless they are given. After `restore`, an
        evaluation of a step that stands is found again, and one of a step that was undone is dropped if it still runs.
        May be called by a process that does not draw the items of the feed. Raises `FeedNotFoundError` before the feed
        has begun for the first time.
        """
        member = self._plan.member
        plan = wire_evaluations.eval_plan(
            name, feed=self.name, resources_id=member["resources_id"], version=version, samples=samples,
            threshold=threshold, failure_reward=failure_reward, overtaken=overtaken, tags=tags,
            eval_share=self._plan.eval_share if eval_share is None else eval_share,
            config=member["config"] if config is None else config,
            queue=member["queue"] if queue is None else queue,
            priority=member["priority"] if priority is None else priority,
        )  # fmt: skip
        made = await evaluating.begin(plan, items, self._evaluations)
        self._asked.add((made.name, made.version, made.branch))
        return made

    async def _finished(self, status: FeedStatus) -> list[EvaluationResult]:
        """The evaluations of this feed that have finished, and were not told."""
        if status.evaluations == self._evaluated:
            return []
        self._evaluated = status.evaluations
        ended = [one for one in await self._evaluations.results(feed=self.name) if one.status == "finished"]
        new = [one for one in ended if (one.name, one.version, one.branch) not in self._told]
        self._told.update((one.name, one.version, one.branch) for one in new)
        return new

    async def _pass_over(self, status: FeedStatus) -> None:
        """Do not tell of evaluations that had finished before this process began, unless it has asked for them."""
        await self._finished(status)
        self._told -= self._asked
        self._evaluated = -1 if self._asked else self._evaluated

    async def status(self) -> FeedStatus:
        """Where the feed stands. Raises `FeedNotFoundError` before it has begun for the first time."""
        return FeedStatus.model_validate(await self._channel.ask("feed_status", {"feed": self.name}))

    async def resume(self) -> None:
        """Go on after `FailureBudgetError` or `FilteredTooManyError`, and count failures anew."""
        await self._channel.ask("resume_feed", {"feed": self.name})
        self._pump.poke()

    async def close(self) -> None:
        """Draw nothing more. What is under way goes on, and another feed of the name goes on with it."""
        self._is_closed = True
        self._pump.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        while not self._pump.is_ended and (left := deadline - time.monotonic()) > 0:
            ring = self._pump.bell.next()
            if not self._pump.is_ended:
                await asyncio.wait((ring,), timeout=left)
            self._pump.bell.forget(ring)
        if not self._pump.is_ended:
            self._pump.say_it_hangs()

    def close_now(self) -> None:
        """The same for a thread without an event loop."""
        self._is_closed = True
        self._pump.stop()
        self._pump.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open" if self._pump.is_open else "not begun"
        return f"<Feed {self.name!r}, {state}>"

    # -- how ---------------------------------------------------------------------------------------------------------

    async def tell_of_batch(self, verb: str, arguments: dict[str, Any]) -> None:
        """Say what became of a batch."""
        await self._channel.ask(verb, arguments)
        self._pump.poke()

    async def _begun(self) -> Pump:
        """The pump, once the store has let it draw; raises what ended it."""
        if self._is_closed:
            raise FeedClosedError(self.name, "it was closed")
        pump = self._pump
        if pump.is_ended and not pump.is_open:  # whoever held the feed may have let go of it
            pump = self._pump = self._make()
        pump.start()
        while not pump.is_open:
            self._raise_end(pump)
            ring = pump.bell.next()
            try:
                if not pump.is_open and not pump.is_ended:
                    await ring
            finally:
                pump.bell.forget(ring)
        self._raise_end(pump)
        return pump

    def _raise_end(self, pump: Pump) -> None:
        if pump.is_ended:
            pump.raise_error()
            raise FeedClosedError(self.name, "it was closed" if self._is_closed else "its store was closed")

    async def _batches(self, keep: Keep | Test | None, max_open: int, shown: Progress) -> AsyncIterator[FeedBatch]:
        pump = await self._begun()
        pump.judge_by(keep)
        status = await self.status()
        if self._steps.begin(status) and self._on_step:
            await self._pass_over(status)
        if pump.is_published:
            pump.go_on()
        while True:
            since = time.monotonic()
            with shown:
                batch = await self._next(pump, max_open, shown)
            if batch is None:
                return
            self._steps.waited += time.monotonic() - since
            yield batch

    async def _next(self, pump: Pump, max_open: int, shown: Progress) -> FeedBatch | None:
        """The next batch; None if there will be none."""
        take: asyncio.Task[FeedBatch | None] | None = None
        claims = Claims(self._channel.reader)
        since = time.monotonic()
        is_told = False
        try:
            while True:
                ring = pump.bell.next()
                try:
                    self._raise_end(pump)
                    take = take or asyncio.ensure_future(self._take(pump, max_open))
                    left = None if is_told else max(UNPUBLISHED_SECONDS + since - time.monotonic(), 0.0)
                    if shown.can_draw:
                        await self._show(shown, claims)
                        left = SHOWN_SECONDS if left is None else min(left, SHOWN_SECONDS)
                    await asyncio.wait((take, ring), timeout=left, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    pump.bell.forget(ring)
                if take.done():
                    done, take = take, None
                    if (batch := done.result()) is not None or (await self.status()).over:
                        return batch
                elif not is_told and time.monotonic() - since >= UNPUBLISHED_SECONDS:
                    is_told = True
                    if not pump.is_published:
                        logger.warning(
                            "Feed %r hands out nothing until publish(weights, version=...): a batch has been waited "
                            "for %d s", self.name, time.monotonic() - since, extra=a_minute("unpublished", self.name),
                        )  # fmt: skip
        finally:
            if take is not None:
                await self._give_back(take)

    async def _show(self, shown: Progress, claims: Claims) -> None:
        """Show where the feed is, and how much of the next batch is there."""
        status = await self.status()
        found, size = endings(status), self._plan.rule["batch"]
        lengths = [stream.length for stream in status.streams.values()]
        known = [length for length in lengths if length is not None]
        total = sum(known) * self._epochs if self._epochs and len(known) == len(lengths) else None
        ready = min(status.under_way.get("complete", 0), size)
        note = await claims.why_none() or f"next batch: {ready} of {size} groups are complete"
        shown.update(found.total(), failed=found["failed"], total=total, note=note)

    async def _give_back(self, take: asyncio.Task[FeedBatch | None]) -> None:
        """Whoever waited has gone: a batch that has come meanwhile is not kept."""
        batch = await _cancelled(take)
        if batch is not None:
            await batch.nack()

    async def _take(self, pump: Pump, max_open: int) -> FeedBatch | None:
        """A batch, with what is known of its groups; None once there is none any more, or after a long time."""
        arguments = {"consumer": self.name, "count": self._plan.rule["batch"], "timeout": TAKE_SECONDS}
        try:
            items, number = await self._channel.take("take_groups", arguments, max_open)
        except BatchHeldError:
            if (await self.status()).over:  # whoever fetches ahead has all there is
                return None
            raise
        if not number:
            return None
        try:
            return await self._made(pump, items, number)
        except BaseException:
            await asyncio.shield(self._channel.ask("nack", {"consumer": self.name, "batch": number}))
            raise

    async def _made(self, pump: Pump, items: Sequence[Any], number: int) -> FeedBatch:
        taken = wire_groups.to_taken_groups(items)
        groups = await pump.read([group.group_id for group in taken], taken)
        spans = _merged(pump.take_seen(group.group_id) for group in groups)
        batch = FeedBatch(self._plan, self._channel, number, groups)
        batch._feed, batch._spans = self, spans
        return batch


def _merged(seen: Iterable[Any]) -> dict[str, list[Span]] | None:
    """The spans of all groups; None unless all were read."""
    found: dict[str, list[Span]] = {}
    for one in seen:
        if one is None:
            return None
        found |= one.spans
    return found


async def _cancelled(task: asyncio.Task[FeedBatch | None]) -> FeedBatch | None:
    """Cancel a task and wait until it has ended; what it gave if it was quicker."""
    task.cancel()
    await asyncio.wait((task,))
    return None if task.cancelled() or task.exception() is not None else task.result()

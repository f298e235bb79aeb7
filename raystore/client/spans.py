"""Spans: numbers, adding, querying.

Not here: what each method means (`raystore.api`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, Never

from pydantic import ValidationError

from raystore.api import LightningStore
from raystore.client.connection import Connection, cut
from raystore.core.payload import size_of
from raystore.errors import InvalidValueError, StoreError
from raystore.errors.calls import NOT_GIVEN, typed_as, unfit
from raystore.types import (
    FilterLogic,
    PaginatedResult,
    SortOrder,
    Span,
)
from raystore.values.mistakes import refusal
from raystore.wire import convert
from raystore.wire.convert import validated

logger: logging.Logger = logging.getLogger("raystore")


class SpanMethods(Connection):
    """Spans: numbers, adding, querying."""

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        named = convert.names(rollout_id, attempt_id)
        return int((await self._transport.call("next_numbers", {"rollout_ids": [named["rollout_id"]]}))[0])

    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        rollout_ids = [rollout_id for rollout_id, _ in convert.pairs("rollout_attempt_ids", rollout_attempt_ids)]
        return list(await self._transport.call("next_numbers", {"rollout_ids": rollout_ids}))

    @typed_as(LightningStore.add_span)
    async def add_span(self, span: Span, *unnamed: Never, **unknown: Never) -> Span | None:
        if unnamed or unknown or span is NOT_GIVEN:
            raise unfit(SpanMethods.add_span, unnamed, unknown, span=span)
        span = validated("span", Span, span)
        row = self._encoder.span(span)
        arguments = {"rollout_id": span.rollout_id, "attempt_id": span.attempt_id, "spans": [row]}
        ((stored, _),) = await self._transport.call("add_spans", arguments)
        if stored:
            return span
        log_duplicate(span)
        return None

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        groups: dict[tuple[str, str], list[tuple[Span, list[Any]]]] = {}
        for span in convert.spans(spans):
            row = self._encoder.span(span)
            groups.setdefault((span.rollout_id, span.attempt_id), []).append((span, row))
        parts: list[list[Span]] = []
        arguments = []
        for (rollout_id, attempt_id), members in groups.items():
            for first, last in cut([size_of(row[8]) for _, row in members]):
                part = members[first:last]
                parts.append([span for span, _ in part])
                rows = [row for _, row in part]
                arguments.append({"rollout_id": rollout_id, "attempt_id": attempt_id, "spans": rows})
        kept: list[Span] = []
        for answer, part_spans in zip(await self._parts("add_spans", arguments), parts, strict=True):
            for span, (stored, _) in zip(part_spans, answer, strict=True):
                if stored:
                    kept.append(span)
                else:
                    log_duplicate(span)
        return kept

    async def add_unnumbered_spans(self, spans: Sequence[Span]) -> None:
        """Store spans of one attempt, numbered by the store in the order given; for runners."""
        spans = convert.spans(spans)
        for first, last in cut([0] * len(spans)):
            rows = [self._encoder.span(span, numbered=False) for span in spans[first:last]]
            arguments = {"rollout_id": spans[0].rollout_id, "attempt_id": spans[0].attempt_id, "spans": rows}
            await self._transport.call("add_spans", arguments)

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: Any, sequence_id: int | None = None
    ) -> Span | None:
        arguments = convert.names(rollout_id, attempt_id)
        number = 0 if sequence_id is None else convert.whole("sequence_id", sequence_id, at_least=0)
        try:
            span = Span.from_opentelemetry(readable_span, **arguments, sequence_id=number)
        except ValidationError as error:
            raise refusal("readable_span", Span, error) from None
        except StoreError:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            expected = f"a ReadableSpan of OpenTelemetry (a Span of raystore goes to add_span); {error}"
            raise InvalidValueError("readable_span", readable_span, expected) from None
        if sequence_id is not None:
            return await self.add_span(span)
        rows = [self._encoder.span(span, numbered=False)]
        ((stored, span.sequence_id),) = await self._transport.call("add_spans", {**arguments, "spans": rows})
        if stored:
            return span
        log_duplicate(span)
        return None

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"] | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        allow_partial: bool = False,
    ) -> PaginatedResult[Span]:
        equal = {"trace_id": trace_id, "span_id": span_id, "parent_id": parent_id, "name": name}
        containing = {
            "trace_id": trace_id_contains,
            "span_id": span_id_contains,
            "parent_id": parent_id_contains,
            "name": name_contains,
        }
        arguments = {
            "rollout_id": convert.identifier("rollout_id", rollout_id),
            "attempt_id": convert.optional_identifier("attempt_id", attempt_id),
            "equal": {
                field: convert.optional_text(field, value) for field, value in equal.items() if value is not None
            },
            "containing": {
                field: convert.optional_text(f"{field}_contains", value)
                for field, value in containing.items()
                if value is not None
            },
            "filter_logic": filter_logic,
            "sort_by": convert.optional_text("sort_by", sort_by),
            "sort_order": sort_order,
            "allow_partial": convert.flag("allow_partial", allow_partial),
        }
        return await self._page("query_spans", arguments, limit, offset, convert.span)

    async def query_many_spans(
        self,
        rollout_ids: Sequence[str],
        attempt_id: Literal["latest"] | None = "latest",
        *,
        allow_partial: bool = False,
    ) -> dict[str, list[Span]]:
        ids = convert.identifiers("rollout_ids", rollout_ids)
        if attempt_id is not None and convert.optional_text("attempt_id", attempt_id) != "latest":
            raise InvalidValueError("attempt_id", attempt_id, "'latest' or None")
        arguments = {
            "rollout_ids": ids,
            "attempt_id": attempt_id,
            "allow_partial": convert.flag("allow_partial", allow_partial),
        }
        found: dict[str, list[Span]] = {rollout_id: [] for rollout_id in ids}
        items, _ = await self._many("query_many_spans", arguments)
        for item in items:
            span = convert.span(item)
            found[span.rollout_id].append(span)
        return found


def log_duplicate(span: Span) -> None:
    logger.error(
        "Duplicated span added: span %s of attempt %s of rollout %s is stored already",
        span.span_id, span.attempt_id, span.rollout_id,
    )  # fmt: skip

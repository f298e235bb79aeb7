"""Checks of the arguments of calls: each returns the value in plain form, or raises `InvalidValueError` that names it.

A store checks what it receives (`core.schema`). These checks run in the caller's process: they take the numbers of
numpy and torch, and recognise what a user is likely to pass by mistake (a record for its id, one item for a list).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, get_args, overload

from pydantic import BaseModel, TypeAdapter, ValidationError

from raystore.core.lifecycle import RETRY_OUTCOMES, TRAINABLE
from raystore.core.schema import MAX_TAGS, Id, checker
from raystore.errors import InvalidValueError
from raystore.types.contract import AttemptStatus, RetryRule, RolloutConfig, RolloutMode, Span
from raystore.values.models import refusal
from raystore.values.plain import number as number
from raystore.values.plain import scalar
from raystore.values.plain import whole as whole

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

AN_ID: str = get_args(Id)[1].expected
SHOWN_IN_A_LIST = 50  #: characters of a text that is shown as the list it should be in

#: Whether a value is an id in plain form.
is_id: Callable[[Any], bool] = checker(Id)


# -- numbers, texts, ids -----------------------------------------------------------------------------------------------


def duration(name: str, value: Any) -> float:
    """Seconds to wait: 0 or more, `math.inf` too."""
    expected = "a number of seconds, 0 or more"
    seconds = value if type(value) is float else number(name, value, expected)
    if not seconds >= 0:  # which NaN is not
        raise InvalidValueError(name, value, expected)
    return seconds


def flag(name: str, value: Any) -> bool:
    found = scalar(value)
    if type(found) is not bool:
        raise InvalidValueError(name, value, "True or False")
    return found


def optional_text(name: str, value: Any) -> str | None:
    if value is None or type(value) is str:
        return value
    if not isinstance(value, str):
        raise InvalidValueError(name, value, "text or None")
    return str.__str__(value)


def identifier(name: str, value: Any) -> str:
    """An id: text of 1 to 512 characters without control characters."""
    found = str.__str__(value) if isinstance(value, str) else value  # numpy's, or an enum's
    if not is_id(found):
        raise InvalidValueError(name, value, AN_ID + _id_of_a_record(name, value))
    return found


def _id_of_a_record(name: str, value: Any) -> str:
    """What to do about a record that was passed instead of its id."""
    fields = getattr(type(value), "model_fields", ())
    field = name.split("[")[0].rpartition(".")[2]
    if field not in fields:
        field = field.removesuffix("_in").removesuffix("s")
    return f"; pass its {field}" if field in fields else ""


def optional_identifier(name: str, value: Any) -> str | None:
    return None if value is None else identifier(name, value)


def attempt_ids(rollout_id: Any, attempt_id: Any) -> dict[str, Any]:
    """The two arguments that name an attempt."""
    return {"rollout_id": identifier("rollout_id", rollout_id), "attempt_id": identifier("attempt_id", attempt_id)}


# -- lists and mappings ------------------------------------------------------------------------------------------------


def listed(name: str, values: Any, expected: str) -> list[Any]:
    """The items of an iterable; a text, mapping or record is one item, passed instead of a list."""
    if isinstance(values, (str, bytes, Mapping, BaseModel)) or not isinstance(values, Iterable):
        raise InvalidValueError(name, values, f"{expected}{_in_a_list(values)}")
    return list(values)


def _in_a_list(value: Any) -> str:
    """What to do about one item that was passed instead of a list of them."""
    if isinstance(value, str) and len(value) < SHOWN_IN_A_LIST:
        return f"; put one alone into a list: [{value!r}]"
    return "; put one alone into a list" if isinstance(value, BaseModel) else ""


def identifiers(name: str, values: Any) -> list[str]:
    """Ids; a single text would otherwise be taken letter by letter."""
    if isinstance(values, str) or not isinstance(values, (Sequence, set, frozenset, dict)):
        raise InvalidValueError(name, values, f"a list of ids{_in_a_list(values)}")
    if all(map(is_id, values)):
        return list(values)
    return [identifier(f"{name}[{index}]", value) for index, value in enumerate(values)]


def id_pairs(name: str, values: Any) -> list[tuple[str, str]]:
    """Pairs of a rollout's id and the id of one of its attempts."""
    pairs = []
    for index, value in enumerate(listed(name, values, "a list of pairs: rollout id, attempt id")):
        place = f"{name}[{index}]"
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise InvalidValueError(place, value, "a pair: rollout id, attempt id")
        pairs.append((identifier(f"{place}.rollout_id", value[0]), identifier(f"{place}.attempt_id", value[1])))
    return pairs


def queue_names(values: Any) -> list[str]:
    """Names of queues to claim from, at least one, each once."""
    names = list(dict.fromkeys(identifiers("queues", values)))
    if not names:
        raise InvalidValueError("queues", values, "at least one name of a queue")
    return names


def queue_limit(name: str, value: Any, *, at_most: int) -> int | None:
    """How much of a queue may run or start; None: any number."""
    found = scalar(value)
    if found is None or (type(found) is int and 1 <= found <= at_most):
        return found
    to_stop = "; pause() hands out nothing" if type(found) is int and found == 0 else ""
    raise InvalidValueError(name, value, f"a whole number from 1 to {at_most:,}, or None for no limit{to_stop}")


def tag_dict(name: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Tags, or None: at most 16 names with a str, int, float or bool each."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_TAGS:
        raise InvalidValueError(
            name,
            value,
            f"a mapping of at most {MAX_TAGS} tags, {{'level': 3}}; longer texts and more of them belong into metadata",
        )
    checked = {}
    for key, item in value.items():
        tag = scalar(item)
        if type(tag) not in (str, int, float, bool) or tag != tag:
            raise InvalidValueError(
                f"{name}[{key!r}]", item, "a str, int, float or bool; anything else belongs into metadata"
            )
        checked[identifier(f"{name} name", key)] = tag
    return checked


# -- models and words of the contract ----------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


@overload
def validated(name: str, annotation: type[T], value: Any, remedy: str = "") -> T: ...
@overload
def validated(name: str, annotation: Any, value: Any, remedy: str = "") -> Any: ...
def validated(name: str, annotation: Any, value: Any, remedy: str = "") -> Any:
    """An argument of this type, an instance of a model as it is; `remedy` says what to do about another type."""
    if type(value) is annotation and issubclass(annotation, BaseModel):
        return value
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        raise refusal(name, annotation, error, remedy) from None


def model_of(cls: type[M], name: str, fields: dict[str, Any]) -> M:
    """A model of these fields: those of the argument of this name, or arguments of the call if the name is empty."""
    try:
        return cls.__pydantic_validator__.validate_python(fields)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise refusal(name, cls, error) from None


def within(place: str, name: str, *rest: Any) -> tuple[Any, ...]:
    """The arguments of an error about `name`, which stands within `place`."""
    return f"{place}{'' if name[:1] in ('', '[') else '.'}{name}", *rest


def rollout_config(name: str, config: Any) -> list[Any]:
    """A rollout's configuration in field order; checked even if it is one, since assignment is not validated."""
    if isinstance(config, RolloutConfig):
        fields = config.__dict__
        if type(config) is not RolloutConfig:
            fields = {field: value for field, value in fields.items() if field in RolloutConfig.model_fields}
        if rules := fields.get("retry_rules"):
            fields = fields | {"retry_rules": _unchecked(rules)}
        config = model_of(RolloutConfig, name, fields)
    else:
        config = validated(name, RolloutConfig, config)
    usual = [config.timeout_seconds, config.unresponsive_seconds, config.max_attempts, list(config.retry_condition)]
    if not config.retry_rules:  # its row is as it was before there were rules
        return usual
    rules = sorted(config.retry_rules.items(), key=lambda item: RETRY_OUTCOMES.index(item[0]))
    return [*usual, [[outcome, *(getattr(rule, field) for field in RetryRule.model_fields)] for outcome, rule in rules]]


def _unchecked(rules: Any) -> Any:
    """Rules as mappings, so that they are validated again."""
    if not isinstance(rules, Mapping):
        return rules
    return {outcome: vars(rule) if isinstance(rule, RetryRule) else rule for outcome, rule in rules.items()}


def spans(values: Any) -> list[Span]:
    found = listed("spans", values, "a list of spans")
    return [span if type(span) is Span else validated(f"spans[{n}]", Span, span) for n, span in enumerate(found)]


def _word(name: str, annotation: Any) -> Callable[[Any], Any]:
    """The check of a literal; the value is looked up first, since asking pydantic costs ten times as much."""
    words = frozenset(get_args(annotation))

    def checked(value: Any) -> Any:
        return value if type(value) is str and value in words else validated(name, annotation, value)

    return checked


mode: Callable[[Any], RolloutMode] = _word("mode", RolloutMode)
attempt_status: Callable[[Any], AttemptStatus] = _word("status", AttemptStatus)


def statuses(name: str, annotation: Any, values: Any) -> list[Any] | None:
    """Statuses to look for; None leaves it open."""
    return None if values is None else validated(name, annotation, listed(name, values, "a list of statuses"))


def filter_arguments(
    *, mode: Any = None, tags: Any = None, queue: Any = None, group_id: Any = None, status_in: Any = None
) -> dict[str, Any]:
    """Which rollouts a consumer takes, by field of a rollout; what is left open is left out."""
    given = {
        "mode": validated("mode", RolloutMode | None, mode),
        "tags": tag_dict("tags", tags) or None,
        "queue": optional_identifier("queue", queue),
        "group_id": optional_identifier("group_id", group_id),
        "status_in": None if status_in is None else _trainable(status_in),
    }
    return {name: value for name, value in given.items() if value is not None}


def _trainable(values: Any) -> list[str]:
    names = identifiers("status_in", values)
    if not names or set(names) - set(TRAINABLE):
        expected = "'succeeded', 'failed', or both in a list; what was cancelled or dropped is never given"
        raise InvalidValueError("status_in", names, expected)
    return sorted(names)

"""What somebody is told who gave a model or an argument what it does not take: which name was meant, what it takes.

pydantic knows what is wrong. Of a model that a user makes it stays pydantic's error, in better words (`Record`); of an
argument of a call it becomes an `InvalidValueError` that names the argument and the place in it (`refusal`).
Not here: calls that do not fit a method at all (`forms`), checks of single values (`convert`, `plain`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from raystore.errors import InvalidValueError
from raystore.errors.words import either, meant

PLACE_SHOWN = 200  #: characters of the place of a value that an error shows

#: What is expected where the type of pydantic's error begins like this.
_PLAINLY = {
    "int_": "a whole number",
    "float_": "a number",
    "string_": "text",
    "bool_": "True or False",
    "dict_": "a mapping",
    "list_": "a list",
}
_NO_MODEL = ("model_type", "model_attributes_type", "union_tag_not_found", "union_tag_invalid")
_PLAIN_TYPES: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}


class Record(BaseModel):
    """Base of the models that users make: who misspells a field, or leaves one out, is told which there are."""

    if not TYPE_CHECKING:  # a type checker knows the fields

        def __init__(self, /, *unnamed: Any, **fields: Any) -> None:
            __tracebackhide__ = True
            if unnamed:
                raise TypeError(_by_name(type(self), unnamed))
            try:
                self.__pydantic_validator__.validate_python(fields, self_instance=self)
            except ValidationError as error:
                raise _in_words(type(self), error) from None

        __init__.__pydantic_base_init__ = True  # pydantic's own does no more, and is not called for nested values


def _by_name(model: type[BaseModel], unnamed: Sequence[Any]) -> str:
    names = list(model.model_fields)
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    form = ", ".join(f"{name}=..." for name in required or names[:1])
    return (
        f"{model.__name__} takes its fields by name, and got {len(unnamed)} without: write {model.__name__}({form})."
        f" It has {', '.join(names)}"
    )


def _in_words(model: type[BaseModel], error: ValidationError) -> ValidationError:
    """The same error, in better words where there are any."""
    lines, is_better = [], False
    for line in error.errors(include_url=False):
        said, place, kind = line["msg"], line["loc"], line["type"]
        if kind == "extra_forbidden":
            holder = _model_at(model, place[:-1])
            said = f"{holder.__name__} has no field {place[-1]!r}{_or_its_fields(place[-1], holder)}"
        elif kind == "missing":
            holder = _model_at(model, place[:-1])
            said = f"{holder.__name__} needs {place[-1]!r}, which was not given{_takes(holder, place[-1])}"
        elif kind == "literal_error":
            said += meant(line["input"], _words(_walked(model, place)[0]))
        is_better = is_better or said != line["msg"]
        worded = PydanticCustomError(kind, "{said}", {"said": said})
        lines.append(InitErrorDetails(type=worded, loc=place, input=line["input"]))
    return ValidationError.from_exception_data(error.title, lines) if is_better else error


def refusal(name: str, annotation: Any, error: ValidationError, remedy: str = "") -> InvalidValueError:
    """What a caller is told of an argument that is not of this type, and what to do about it."""
    line = _telling(annotation, error.errors(include_url=False))
    if isinstance(cause := line.get("ctx", {}).get("error"), InvalidValueError):  # which says it better
        return cause
    place, kind = line["loc"], line["type"]
    if kind == "extra_forbidden":
        holder = _model_at(annotation, place[:-1])
        expected, remedy = f"a field of {holder.__name__}{_or_its_fields(place[-1], holder)}", ""
    elif kind == "missing":
        holder = _model_at(annotation, place[:-1])
        expected = f"{_a(holder.__name__)}, which needs {place[-1]!r}{_takes(holder, place[-1])}"
        place = place[:-1]
    elif kind in _NO_MODEL:
        expected = _a(either([model.__name__ for model in _models(_walked(annotation, place)[0])]))
    elif kind == "literal_error":
        words = _words(_walked(annotation, place)[0])
        expected = either([repr(word) for word in words]) + meant(line["input"], words)
    elif kind == "greater_than_equal":
        expected = f"{line['ctx']['ge']:g} or more"
    else:
        said = line["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
        expected = next((plainly for start, plainly in _PLAINLY.items() if kind.startswith(start)), said)
    where = f"{name}{_walked(annotation, place)[1]}".removeprefix(".")
    return InvalidValueError(where[:PLACE_SHOWN], line["input"], f"{expected}{remedy and '; ' + remedy}")


def _telling(annotation: Any, lines: list[ErrorDetails]) -> ErrorDetails:
    """The one of several errors that tells most: a field that is missing may be there under a wrong name."""
    missing = [line["loc"][-1] for line in lines if line["type"] == "missing"]
    for line in lines:
        if line["type"] == "extra_forbidden":
            fields = missing or _model_at(annotation, line["loc"][:-1]).model_fields
            if meant(line["loc"][-1], [str(field) for field in fields]):
                return line
    return lines[0]


def _or_its_fields(name: Any, model: type[BaseModel]) -> str:
    fields = model.model_fields
    return f"{meant(name, fields) or ';'} {model.__name__} has {', '.join(fields)}"


def _takes(model: type[BaseModel], field: Any) -> str:
    """What a field takes, as far as a word says it."""
    annotation = model.model_fields[field].annotation
    words = either([repr(word) for word in _words(annotation)]) or _PLAIN_TYPES.get(annotation, "")
    return words and f": {words}"


def _a(noun: str) -> str:
    return f"{'an' if noun.startswith(('A', 'E', 'O', 'LLM')) else 'a'} {noun}"


# -- types -------------------------------------------------------------------------------------------------------------


def _walked(annotation: Any, place: Sequence[int | str]) -> tuple[Any, str]:
    """The type at a place within a value of this type, and the place as Python writes it."""
    shown = ""
    for part in place:
        models = list(_models(annotation))
        field = next((model.model_fields[part] for model in models if part in model.model_fields), None)
        if get_origin(annotation) in (dict, list):
            annotation, shown = get_args(annotation)[-1], f"{shown}[{part!r}]"
        elif field is not None:
            annotation, shown = field.annotation, f"{shown}.{part}"
        elif tagged := [model for model in models if _is_tag(model, part)]:  # which pydantic puts into the place
            annotation = tagged[0]
        else:  # a key or index of something else
            shown = f"{shown}[{part!r}]"
    return annotation, shown


def _is_tag(model: type[BaseModel], part: Any) -> bool:
    return any(_words(field.annotation) == (part,) for field in model.model_fields.values())


def _model_at(annotation: Any, place: Sequence[int | str]) -> type[BaseModel]:
    """The model whose field it is that pydantic speaks of."""
    return next(_models(_walked(annotation, place)[0]))


def _within(annotation: Any) -> Iterator[Any]:
    """A type and those that it is made of."""
    yield annotation
    for part in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _within(part)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    return (part for part in _within(annotation) if isinstance(part, type) and issubclass(part, BaseModel))


def _words(annotation: Any) -> tuple[Any, ...]:
    """The values that a type of literals has; empty for another."""
    return next((get_args(part) for part in _within(annotation) if get_origin(part) is Literal), ())

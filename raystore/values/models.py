"""Base classes of the public models, and what is said of a model or an argument that does not fit its type.

`Model` is for what users make: pydantic's errors in better words. `StoredModel` is for what a store answers with: a
field whose value cannot be decoded in this process raises `PayloadNotReadableError` when it is read, and not before.
`refusal` turns pydantic's error about an argument of a call into an `InvalidValueError` that names the place.
Not here: calls that do not fit a method at all (`errors.text`), checks of single values (`wire.checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from raystore.errors import InvalidValueError, PayloadNotReadableError, StoreError
from raystore.errors.text import either, meant, summary

EXTRA = "__pydantic_extra__"  #: stands for the fields that a model does not know, among the names of its fields
PLACE_SHOWN = 200  #: characters of the place of a value that an error shows


class Model(BaseModel):
    """A model that users make: an error about a field that is misspelt or missing names the fields that it has."""

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
        # pydantic makes the signature of each model from this one, in which `unnamed` is no argument.
        __init__.__signature__ = signature(BaseModel.__init__)


# -- fields that cannot be decoded -------------------------------------------------------------------------------------
#
# Such a field is missing in the model's `__dict__`, and its payload stands in `__pydantic_private__`, which is None in
# other models: they pay nothing. Each reading tries again, since the missing module may be there by now.


def not_readable(name: str, error: Exception) -> PayloadNotReadableError:
    """How to say that a value cannot be decoded here, because of an error."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return PayloadNotReadableError(name, missing, summary(error))


class Undecoded:
    """A payload that could not be decoded, with the function that decodes it; equal to another of the same payload."""

    __slots__ = ("_decode", "_name", "_payload")

    def __init__(self, name: str, decode: Callable[[Any], dict[str, Any]], payload: Any) -> None:
        self._name = name  # for the error
        self._decode = decode  # gives the values of fields by name
        self._payload = payload

    def decode(self) -> dict[str, Any]:
        """The values of the fields. Raises `PayloadNotReadableError` if they still cannot be decoded."""
        try:
            return self._decode(self._payload)
        except StoreError:  # says already what is wrong
            raise
        except Exception as error:  # whatever a user's class raises while it is unpickled
            raise not_readable(self._name, error) from error

    def _content(self) -> Any:
        payload = self._payload
        return self._name, payload if isinstance(payload, bytes) else (payload.data, payload.refs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Undecoded) and self._content() == other._content()

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        try:
            self.decode()
        except Exception as error:
            return f"<not readable here: {error}>"
        return "<not read yet>"


class StoredModel(Model):
    """A model that a store answers with; reading a field that could not be decoded tries it again, or raises."""

    if not TYPE_CHECKING:  # a type checker would take any name for a field, and knows pydantic's methods

        def __getattr__(self, name: str) -> Any:
            undecoded = _undecoded_fields(self).get(name)
            if undecoded is None:
                return super().__getattr__(name)
            fields = undecoded.decode()
            if EXTRA in fields:
                object.__setattr__(self, EXTRA, fields.pop(EXTRA))
            vars(self).update(fields)
            left = {other: kept for other, kept in self.__pydantic_private__.items() if other not in fields}
            object.__setattr__(self, "__pydantic_private__", left or None)  # as if it had been decoded at once
            return fields[name]

        def __repr_args__(self) -> Any:
            yield from super().__repr_args__()
            yield from _undecoded_fields(self).items()

        def __iter__(self) -> Any:
            decode_all(self)
            return super().__iter__()

        def model_dump(self, *arguments: Any, **options: Any) -> Any:
            decode_all(self)
            return super().model_dump(*arguments, **options)

        def model_dump_json(self, *arguments: Any, **options: Any) -> Any:
            decode_all(self)
            return super().model_dump_json(*arguments, **options)


def _undecoded_fields(model: BaseModel) -> dict[str, Undecoded]:
    try:
        private = object.__getattribute__(model, "__pydantic_private__")
    except AttributeError:  # the model is being made
        return {}
    return {} if not private else {name: field for name, field in private.items() if name not in vars(model)}


def _models_in(value: Any) -> Iterator[StoredModel]:
    if isinstance(value, StoredModel):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _models_in(item)


def decode_all(model: BaseModel) -> bool:
    """Decode every field that is not decoded yet, also of the models within; returns whether there was any.

    Raises `PayloadNotReadableError` for the first that cannot be decoded.
    """
    names = list(_undecoded_fields(model))
    for name in names:
        getattr(model, name)
    inner = [decode_all(held) for value in vars(model).values() for held in _models_in(value)]
    return bool(names) or any(inner)


# -- pydantic's errors in better words ---------------------------------------------------------------------------------

#: What is expected where the type of pydantic's error begins like this.
_PLAINLY = {
    "int_": "a whole number",
    "float_": "a number",
    "string_": "text",
    "bool_": "True or False",
    "dict_": "a mapping",
    "list_": "a list",
}
_PLAIN_TYPES: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
_NO_MODEL = ("model_type", "model_attributes_type", "union_tag_not_found", "union_tag_invalid")


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
        if kind == "extra_forbidden" and (holder := _model_at(model, place[:-1])):
            said = f"{holder.__name__} has no field {place[-1]!r}{_or_its_fields(place[-1], holder)}"
        elif kind == "missing" and (holder := _model_at(model, place[:-1])):
            said = f"{holder.__name__} needs {place[-1]!r}, which was not given{_takes(holder, place[-1])}"
        elif kind == "literal_error":
            said += meant(line["input"], _words(_walked(model, place)[0]))
        is_better = is_better or said != line["msg"]
        worded = PydanticCustomError(kind, "{said}", {"said": said})
        lines.append(InitErrorDetails(type=worded, loc=place, input=line["input"]))
    if not is_better:
        return error
    is_hidden = model.model_config.get("hide_input_in_errors", False)
    return ValidationError.from_exception_data(error.title, lines, hide_input=is_hidden)


def refusal(name: str, annotation: Any, error: ValidationError, remedy: str = "") -> InvalidValueError:
    """The error for an argument that is not of this type.

    The remedy says what to do about a wrong argument, or a wrong item of it; it is left out where the mistake is within
    a model.
    """
    line = _most_telling(annotation, error.errors(include_url=False))
    if isinstance(cause := line.get("ctx", {}).get("error"), InvalidValueError):  # which says it better
        return cause
    place, kind = line["loc"], line["type"]
    if kind == "extra_forbidden" and (holder := _model_at(annotation, place[:-1])):
        expected, remedy = f"a field of {holder.__name__}{_or_its_fields(place[-1], holder)}", ""
    elif kind == "missing" and (holder := _model_at(annotation, place[:-1])):
        expected = f"{_a(holder.__name__)}, which needs {place[-1]!r}{_takes(holder, place[-1])}"
        place = place[:-1]
    elif kind in _NO_MODEL and (models := list(filter(_is_model, _within(_walked(annotation, place)[0])))):
        expected = _a(either([model.__name__ for model in models]))
    elif kind == "literal_error" and (words := _words(_walked(annotation, place)[0])):
        expected = either([repr(word) for word in words]) + meant(line["input"], words)
    elif kind == "greater_than_equal" and isinstance(least := line["ctx"]["ge"], (int, float)):
        expected = f"{least:g} or more"
    else:
        said = line["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
        expected = next((plainly for start, plainly in _PLAINLY.items() if kind.startswith(start)), said)
    if place and not (kind in _NO_MODEL and not _model_at(annotation, place[:-1])):
        remedy = ""
    where = f"{name}{_walked(annotation, place)[1]}".removeprefix(".")
    return InvalidValueError(where[:PLACE_SHOWN], line["input"], f"{expected}{remedy and '; ' + remedy}")


def _most_telling(annotation: Any, lines: list[ErrorDetails]) -> ErrorDetails:
    """One of several errors: a misspelt field, since it explains why another is missing; else the first."""
    missing = [line["loc"][-1] for line in lines if line["type"] == "missing"]
    for line in lines:
        if line["type"] == "extra_forbidden":
            holder = _model_at(annotation, line["loc"][:-1])
            if meant(line["loc"][-1], [str(field) for field in missing or (_fields(holder) if holder else ())]):
                return line
    return lines[0]


def _or_its_fields(name: Any, model: type[BaseModel]) -> str:
    fields = _fields(model)
    return f"{meant(name, fields) or ';'} {model.__name__} has {', '.join(fields)}"


def _fields(model: type[BaseModel]) -> list[str]:
    """The names under which its fields are given."""
    aliases = {name: field.validation_alias for name, field in model.model_fields.items()}
    return [alias if isinstance(alias, str) else name for name, alias in aliases.items()]


def _field(model: type[BaseModel], called: Any) -> FieldInfo | None:
    for name, field in model.model_fields.items():
        if called in (name, field.validation_alias):
            return field
    return None


def _takes(model: type[BaseModel], called: Any) -> str:
    """What a field takes, if a few words can say it."""
    field = _field(model, called)
    annotation = field.annotation if field else None
    words = either([repr(word) for word in _words(annotation)])
    words = words or next((said for plain, said in _PLAIN_TYPES.items() if annotation is plain), "")
    return words and f": {words}"


def _a(noun: str) -> str:
    return f"{'an' if noun.startswith(('A', 'E', 'O', 'LLM')) else 'a'} {noun}"


# -- places in types ---------------------------------------------------------------------------------------------------


def _walked(annotation: Any, place: Sequence[int | str]) -> tuple[Any, str]:
    """The type at a place within a value of this type (`Any` if it is not known), and the place as Python writes it."""
    if len(place) > 1 and place[-1] == "[key]":  # of the mapping in which the part before is a key
        mapping, shown = _walked(annotation, place[:-2])
        if isinstance(get_origin(mapping), type) and issubclass(get_origin(mapping), Mapping):
            return get_args(mapping)[0], f"{shown} key"
    annotation, shown = _bare(annotation), ""
    for part in place:
        if get_origin(annotation) in _UNIONS:  # pydantic's place names the member, which is no part of the value
            annotation = _bare(next((one for one in get_args(annotation) if _is_called(one, part)), Any))
        elif _is_model(annotation) and (field := _field(annotation, part)):
            annotation, shown = _bare(field.annotation), f"{shown}.{part}"
        else:  # a key or index
            items = get_args(annotation) if get_origin(annotation) is not tuple else ()
            annotation, shown = _bare(items[-1] if items else Any), f"{shown}[{part!r}]"
    return annotation, shown


_UNIONS = (Union, UnionType)


def _bare(annotation: Any) -> Any:
    """A type without `Annotated` and `| None`, which pydantic's places leave out."""
    while True:
        parts = get_args(annotation)
        if get_origin(annotation) in _UNIONS:
            parts = tuple(part for part in parts if part is not NoneType)
            if len(parts) > 1:
                return annotation
        elif get_origin(annotation) is not Annotated:
            return annotation
        annotation = parts[0]


def _is_called(one: Any, name: Any) -> bool:
    """Whether pydantic's name for a member of a union is this: its class, or its discriminator."""
    if getattr(one, "__name__", None) == name:
        return True
    return _is_model(one) and any(_words(field.annotation) == (name,) for field in one.model_fields.values())


def _model_at(annotation: Any, place: Sequence[int | str]) -> type[BaseModel] | None:
    """The model at a place within a value of this type; None if something else stands there."""
    found = _walked(annotation, place)[0]
    return found if _is_model(found) else None


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _within(annotation: Any) -> Iterator[Any]:
    """A type and those that it is made of."""
    yield annotation
    for part in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _within(part)


def _words(annotation: Any) -> tuple[Any, ...]:
    """The values of the first `Literal` in a type; empty if there is none."""
    return next((get_args(part) for part in _within(annotation) if get_origin(part) is Literal), ())

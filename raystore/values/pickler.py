"""One pickler for tasks, resources and agents: classes and functions of a script keep their identity.

A class of the script itself (`__main__`) cannot be imported by other processes, so cloudpickle sends a copy, and the
unpickled class is another one: after a restart `task is Kind.MATH` is false in the very script that enqueued it. Here
such a class, or function, is pickled as its origin (script and qualified name) and the copy. In a process whose
`__main__` is that script, the script's own class is used; elsewhere one copy serves the whole process, so that
`isinstance`, `is` and `==` hold among all values that are unpickled there. The script is never imported.
What cannot be found by its name (a local class, a lambda) is copied as cloudpickle does.
"""

from __future__ import annotations

import enum
import functools
import io
import operator
import os
import pickle
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

_MAINS = ("__main__", "__mp_main__")  # the latter is the script in a process that multiprocessing spawned
_RAY_PACKAGE = re.compile(r".*/_ray_pkg_[0-9a-f]+/")  # where Ray unpacks a working directory: another for each content


class Origin(NamedTuple):
    """The script of a class or function, and its name there.

    `script` is the file that ran as `__main__`, "" if there was none (a notebook) or it is not known; `module` the name
    under which `python -m` ran it, else "". `content` is a digest that tells one class of that name from another.
    """

    script: str
    module: str
    name: str
    content: str


class _ByObject:
    """A weak mapping by identity: a metaclass may have made its classes equal, or not hashable."""

    def __init__(self) -> None:
        self._items: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def get(self, key: Any) -> Any:
        """The value of an object, None if it has none."""
        found = self._items.get(id(key))
        return found[1] if found is not None and found[0]() is key else None

    def put(self, key: Any, value: Any) -> None:
        """Give an object a value, until one of the two is gone."""
        number = id(key)
        self._items[number] = weakref.ref(key, lambda _: self._items.pop(number, None)), value

    def discard(self, key: Any) -> None:
        self._items.pop(id(key), None)


_copies: dict[Origin, type] = {}  # classes of other scripts, one for each content
_adopted: dict[tuple[str, str], Any] = {}  # classes and functions of the agent that runs here, by script and name
_origins = _ByObject()  # of copies, so that these are pickled as the originals
_unfilled = _ByObject()  # copies that have no attributes yet
_contents = _ByObject()  # digests by class or function

# -- origins -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _script(path: str) -> str:
    return _RAY_PACKAGE.sub("", os.path.realpath(path))


def _main() -> tuple[str, str]:
    """Script and module name of this process's `__main__`."""
    main = sys.modules.get("__main__")
    path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    return _script(path) if path else "", getattr(spec, "name", None) or ""


def _find(name: str) -> Any:
    """The object of this qualified name in `__main__`; None if there is none."""
    found: Any = sys.modules.get("__main__")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def origin_of(obj: Any) -> Origin | None:
    """The origin of a class or function of a script; None for others, and for those that no name leads to."""
    known: Origin | None = _origins.get(obj)
    if known is not None:
        return known
    name = obj.__qualname__
    if obj.__module__ not in _MAINS or "<" in name:  # "<locals>", "<lambda>"
        return None
    found = _find(name)
    if found is obj:
        return Origin(*_main(), name, content_of(obj))
    if found is None:  # Ray copied it here: its script is not known, and its content may tell
        return Origin("", "", name, content_of(obj))
    return None


def _own(origin: Origin) -> Any:
    """The class or function of this origin in this process's own script; None if there is none."""
    script, module = _main()
    found = _find(origin.name)
    if found is None:
        return None
    if (origin.script and origin.script == script) or (origin.module and origin.module == module):
        return found
    may_have_moved = os.path.basename(origin.script) in ("", os.path.basename(script))
    is_ours = isinstance(found, (type, types.FunctionType)) and found.__module__ in _MAINS
    return found if may_have_moved and is_ours and content_of(found) == origin.content else None


# -- digests of classes and functions ----------------------------------------------------------------------------------

_WRITTEN = (types.FunctionType, staticmethod, classmethod, property)


def content_of(obj: Any) -> str:
    """A digest of the code of a class or function, the same in every process that ran the same lines."""
    known: str | None = _contents.get(obj)
    if known is None:
        parts = _parts_of(obj) if isinstance(obj, type) else [_shape(obj)]
        known = blake2b("\n".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        _contents.put(obj, known)
    return known


def _parts_of(cls: Any) -> list[str]:
    parts = [f"{base.__module__}.{base.__qualname__}" for base in cls.__bases__]
    if isinstance(cls, enum.EnumMeta):
        members: dict[str, Any] = dict(cls.__members__)
        parts += [f"{name}={_shape(member._value_)}" for name, member in members.items()]
    for name, value in sorted(vars(cls).items()):
        is_written = isinstance(value, _WRITTEN) and name not in ("__annotate__", "__annotate_func__")
        if is_written or name == "__annotations__" or not name.startswith("_"):
            parts.append(f"{name}:{_shape(value)}")
    for name, field in (getattr(cls, "__pydantic_fields__", None) or {}).items():
        parts.append(f"{name}:{_shape(field.default)}")
    return parts


def _shape(value: Any) -> str:
    """An attribute of a class as text that depends on its code only."""
    if isinstance(value, types.FunctionType):
        return f"def {_shape(value.__code__)} {_shape(value.__defaults__)} {_shape(value.__kwdefaults__)}"
    if isinstance(value, types.CodeType):
        return f"{value.co_code.hex()} {value.co_names} {value.co_varnames} {_shape(value.co_consts)}"
    if isinstance(value, (staticmethod, classmethod)):
        return f"{type(value).__name__} {_shape(value.__func__)}"
    if isinstance(value, property):
        return f"property {_shape((value.fget, value.fset, value.fdel))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_shape, value))})"
    if isinstance(value, (set, frozenset)):
        return f"set({', '.join(sorted(map(_shape, value)))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_shape(key)}: {_shape(item)}' for key, item in value.items())})"
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, (str, bytes, int, float, complex)):
        return f"{type(value).__name__} {value!r}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


# -- pickling ----------------------------------------------------------------------------------------------------------


def _reduced(obj: Any, reduction: tuple[Any, ...], here: Callable[..., Any]) -> tuple[Any, ...]:
    """cloudpickle's reduction of a class or function by value, with the origin added."""
    make, arguments, state, _, _, fill = reduction
    return here, (tuple(origin_of(obj) or ()), make, arguments), (fill, state), None, None, _fill


@functools.cache
def _pickler() -> type[Any]:
    """The class of the pickler; made when it is first needed, since plain values need no Ray."""
    from ray.cloudpickle import cloudpickle

    class ScriptPickler(cloudpickle.Pickler):  # type: ignore[misc]
        """cloudpickle's, except for classes and functions of a script, and object references."""

        def __init__(self, file: io.BytesIO, refs: list[Any] | None, buffers: list[Any] | None) -> None:
            beside = None if buffers is None else buffers.append
            super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=beside)
            self._refs = refs
            self._object_ref = getattr(sys.modules["ray"], "ObjectRef", ())

        def persistent_id(self, obj: Any) -> int | None:
            if self._refs is None or not isinstance(obj, self._object_ref):
                return None
            self._refs.append(obj)
            return len(self._refs) - 1

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type):
                if origin_of(obj) is not None:
                    generic = vars(obj).get("__pydantic_generic_metadata__")
                    if generic and generic["origin"] is not None:  # Model[int], which pydantic makes once
                        return operator.getitem, (generic["origin"], generic["args"])
                    return _reduced(obj, cloudpickle._dynamic_class_reduce(obj), _class_here)
            elif type(obj) is types.FunctionType and origin_of(obj) is not None:
                return _reduced(obj, self._dynamic_function_reduce(obj), _function_here)
            return super().reducer_override(obj)

    return ScriptPickler


def prepare() -> None:
    """Import what pickling needs, which takes a second, before a process forks."""
    _pickler()


def dumps(value: Any, refs: list[Any] | None = None, *, prefix: bytes = b"", buffers: list[Any] | None = None) -> bytes:
    """A value as bytes behind a prefix.

    Object references in it are added to `refs` and left out of the bytes; so are buffers of arrays, if `buffers` is
    given.
    """
    buffer = io.BytesIO()
    buffer.write(prefix)
    _pickler()(buffer, refs, buffers).dump(value)
    return buffer.getvalue()


# -- unpickling --------------------------------------------------------------------------------------------------------

# Pickles in journals name modules of this package, and `_class_here`, `_function_here` and `_fill` of this one: these
# names are part of the format.
_FORMER_MODULES = {
    "raystore.pickler": __name__,
    "raystore.types": "raystore.types.contract",
    "raystore.spans": "raystore.types.spans",
    "raystore.feeds": "raystore.types.feeds",
    "raystore.options": "raystore.types.options",
    "raystore.objects": "raystore.values.objects",
    "raystore.triplet": "raystore.tracing.trajectories",
    "raystore.trajectory": "raystore.tracing.trajectories",
    "raystore.integrations.otel": "raystore.runner.otel",
    "raystore.remote.cluster": "raystore.remote.store",
    "raystore.runner.run_one": "raystore.runner.inline_agents",
}


class Unpickler(pickle.Unpickler):
    """Reads what any version has written."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(_FORMER_MODULES.get(module, module), name)


def loads_agent(data: bytes) -> Any:
    """An agent for this process. From now on its classes and functions are used for those of its tasks, also for tasks
    that an earlier version of the script enqueued.
    """
    _loading.is_agent = True
    try:
        return pickle.loads(data)
    finally:
        _loading.is_agent = False


class _Loading(threading.local):
    is_agent = False


_loading = _Loading()


def _class_here(origin: tuple[str, str, str, str], make: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    """The class of this origin in this process; a new copy still lacks its attributes (`_fill`)."""
    place = Origin(*origin)
    found = _known(place)
    known: type | None = found if isinstance(found, type) else _copies.get(place)
    if known is None:
        tracked = getattr(sys.modules[make.__module__], "_DYNAMIC_CLASS_TRACKER_BY_ID", {})
        known = tracked.get(arguments[-2])  # Ray has unpickled it here, or pickled it here
        known = _copies.setdefault(place, _new(place, make, arguments) if known is None else known)
        if _origins.get(known) is None:
            _origins.put(known, place)
    _adopt(place, known)
    return known


def _function_here(origin: tuple[str, str, str, str], make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The function of this origin in this process; each time a new copy in a process that has another script, since the
    values that it refers to may have changed.
    """
    place = Origin(*origin)
    known = _known(place)
    if not isinstance(known, types.FunctionType):
        known = _new(place, make, arguments)
    _adopt(place, known)
    return known


def _known(place: Origin) -> Any:
    """The class or function of this origin in this process's script, or in its agent's; None if there is none."""
    own = _own(place)
    if own is None and not _loading.is_agent:
        own = _adopted.get((place.script or place.module, place.name))
    return own


def _new(place: Origin, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    made = make(*arguments)
    _unfilled.put(made, True)
    _origins.put(made, place)
    return made


def _adopt(place: Origin, found: Any) -> None:
    if _loading.is_agent and (place.script or place.module):
        _adopted[place.script or place.module, place.name] = found


def _fill(obj: Any, filling: tuple[Callable[[Any, Any], Any], Any]) -> None:
    """Give a copy its attributes, once; a script's own classes and functions stay as they are."""
    if _unfilled.get(obj):
        fill, state = filling
        fill(obj, state)
        _unfilled.discard(obj)

"""The architecture, held by tests: imports go downwards only, the core is pure, the package imports quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent.parent / "raystore"

# From the bottom up; a module imports from its own layer and those above it in this list.
LAYERS = [
    ["errors"],
    ["reports.log"],
    ["reports.progress"],
    ["core"],
    ["values"],
    ["tracing.semconv"],
    ["types"],
    ["types.spans"],
    ["tracing"],
    ["types.contract"],
    ["types.feeds"],
    ["reports"],
    ["types.evaluations"],
    ["wire"],
    ["client.datasets"],
    ["client.claims"],
    ["client.steps"],
    ["client.pump"],
    ["client.evaluation"],
    ["client.feed"],
    ["api"],
    ["types.options"],
    ["journal"],
    ["service"],
    ["client.transport"],
    ["client.sync"],
    ["client"],
    ["remote"],
    ["runner"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: number for number, names in enumerate(LAYERS) for name in names}

PURE = {"asyncio", "logging", "msgpack", "psutil", "pydantic", "random", "ray", "threading", "time"}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module with its dotted name below the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports: at the top, inside functions, or for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if is_module(full) else node.module


def is_module(dotted: str) -> bool:
    """Whether a dotted name is that of a module or folder of the package."""
    path = PACKAGE.parent / dotted.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def level_of(name: str) -> int | None:
    """The layer of a module, by its longest known prefix."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in LEVEL:
            return LEVEL[".".join(parts[:length])]
    return None


def test_every_module_has_a_layer() -> None:
    """A new module is put into the picture."""
    unplaced = [name for name, _ in modules() if level_of(name) is None and name != "__init__"]
    assert unplaced == []


def test_imports_go_downwards_only() -> None:
    """Nothing imports from a layer that stands on it."""
    upward = []
    for name, path in modules():
        if name == "__init__":
            continue  # the front door, which imports by name when asked
        level = level_of(name)
        for imported in imports(path):
            below = level_of(imported.removeprefix("raystore.")) if imported.startswith("raystore.") else None
            if below is not None and level is not None and below > level:
                upward.append(f"{name} -> {imported}")
    assert upward == []


def test_no_imports_in_circles() -> None:
    """Each module has a floor of its own: what it imports, also for type checkers only, stands on lower floors."""
    waiting = {
        name: {i.removeprefix("raystore.") for i in imports(path) if i.startswith("raystore.")} - {name}
        for name, path in modules()
        if name != "__init__"  # the front door, which imports by name when asked
    }
    while floor := {name for name, imported in waiting.items() if not imported & waiting.keys()}:
        for name in floor:
            del waiting[name]
    assert waiting == {}, "these import each other"


def test_only_the_command_line_needs_click_and_rich() -> None:
    """And progress, which draws; whoever imports raystore loads neither. The picture of curves needs none of them."""
    needing = {
        name for name, path in modules() for imported in imports(path) if imported.split(".")[0] in ("click", "rich")
    }
    assert {name for name in needing if not name.startswith("cli.")} == {"reports.progress"}


def test_the_core_is_pure() -> None:
    """Standard library only, and nothing that waits, sleeps, draws lots or reads a clock."""
    impure = [
        f"{name} -> {imported}"
        for name, path in modules()
        if name.startswith("core") or name == "remote.session_state"
        for imported in imports(path)
        if imported.split(".")[0] in PURE
    ]
    assert impure == []


def run(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_import_is_quick_and_light() -> None:
    """`import raystore` takes less than 0.6 s, best of five, and loads neither Ray nor what is heavier."""
    code = """
import sys, time
start = time.perf_counter()
import raystore
print(time.perf_counter() - start)
loaded = {"ray", "agentlightning", "torch", "matplotlib", "pydantic", "numpy"} & set(sys.modules)
assert not loaded, loaded
"""
    assert min(float(run(code)) for _ in range(5)) < 0.6


def test_the_actor_imports_no_pydantic() -> None:
    """The actor process starts with the core and the service only."""
    code = """
import sys
import raystore.remote.actor
assert "pydantic" not in sys.modules and "raystore.types.contract" not in sys.modules
"""
    run(code)


def test_memory_store_needs_no_ray() -> None:
    """Plain tasks in process work without Ray being loaded."""
    code = """
import sys, raystore as rs
store = rs.InMemoryLightningStore()
store.sync.enqueue_rollout({"q": 1})
store.sync.dequeue_rollout()
assert "ray" not in sys.modules
"""
    run(code)


@pytest.mark.parametrize("name", ["start", "Rollout", "InMemoryLightningStore", "find_final_reward", "Abort"])
def test_public_names(name: str) -> None:
    """Names are there when asked for, and listed."""
    import raystore

    assert getattr(raystore, name) is not None and name in dir(raystore) and name in raystore.__all__
    package: Any = raystore
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018


def test_public_names_are_not_hidden_by_modules() -> None:
    """Importing a module sets its name on the package: a public function must not have that name."""
    import raystore

    names = {name.split(".")[0] for name, _ in modules()}
    assert names & set(raystore.__all__) == set()

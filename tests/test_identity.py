"""Classes and functions of a script keep their identity: through a journal, in other processes, and back."""

from __future__ import annotations

import base64
import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

import raystore as rs
from raystore.core.payload import PICKLED
from raystore.runner import inline_agents
from raystore.values import pickler
from raystore.values.objects import Kept, Origin, Source
from raystore.wire import codec
from tests.scripts import zoo

SCRIPTS = Path(__file__).parent / "scripts"
COUNT = len(zoo.values())


def run(*arguments: Any, folder: Path | None = None, **environment: Any) -> str:
    """What a script prints."""
    root = str(SCRIPTS.parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, cwd=folder, env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal into which the script has put everything."""
    path = tmp_path_factory.mktemp("zoo") / "journal"
    run(SCRIPTS / "zoo.py", path, "put")
    return path


def copy_of(journal: Any, tmp_path: Path) -> Path:
    """So that a test may add to it."""
    for suffix in ("", ".agent"):
        source = Path(f"{journal}{suffix}")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / f"j{suffix}")
    return tmp_path / "j"


def test_the_script_again_and_what_it_spawned(journal: Path, tmp_path: Path) -> None:
    """After a restart values are of the script's own classes, also in a process that multiprocessing spawned."""
    assert f"{COUNT} values" in run(SCRIPTS / "zoo.py", copy_of(journal, tmp_path), "spawn")


def test_another_script_and_back(journal: Path, tmp_path: Path) -> None:
    """Elsewhere there is one copy in the process, without an import, and what goes back is the script's own."""
    copied = copy_of(journal, tmp_path)
    run(SCRIPTS / "onlooker.py", copied, "none")
    assert f"{COUNT} values" in run("-m", "zoo", copied, "get", folder=SCRIPTS)


def test_a_script_that_moved(journal: Path, tmp_path: Path) -> None:
    """At another path, as on another machine, it is known by its name and by what its classes consist of."""
    moved = shutil.copy(SCRIPTS / "zoo.py", tmp_path)
    assert f"{COUNT} values" in run(moved, copy_of(journal, tmp_path), "get")


def test_without_a_file(tmp_path: Path) -> None:
    """As in a notebook: by what the classes consist of."""
    code = f"exec(open({str(SCRIPTS / 'zoo.py')!r}).read())"
    run("-c", code, tmp_path / "j", "put")
    assert f"{COUNT} values" in run("-c", code, tmp_path / "j", "get")


def test_a_script_that_was_edited(tmp_path: Path) -> None:
    """Its own classes of today are used; of one that is gone there is the copy. An agent's classes are its tasks'."""
    script = tmp_path / "edited.py"
    text = (SCRIPTS / "zoo.py").read_text()
    script.write_text(text)
    run(script, tmp_path / "j", "put")
    edited = text.replace("    MATH = 1\n", "    MATH = 1\n    ART = 3\n").replace("Couple", "Duo")
    script.write_text(edited.replace('"couple": Duo(1, 2), ', "").replace('"couple"', '"no"'))
    run(script, tmp_path / "j", "get")
    assert "reward 1.0" in run(SCRIPTS / "onlooker.py", tmp_path / "j", tmp_path / "j.agent")


def test_runners_on_ray(cluster: None, tmp_path: Path) -> None:
    """An agent of the script knows its tasks, and what it enqueues is of the script's classes to the driver."""
    address = ray.get_runtime_context().gcs_address
    assert f"{COUNT} values came back" in run(SCRIPTS / "zoo.py", tmp_path, "runners", RAY_ADDRESS=address)


#: `[task, Task]` of a script `/scripts/gone.py`, where `Task` has `kind = "math"`, and `task.number` is 7.
KEPT = """
AoAFlYwBAAAAAAAAXZQojBByYXlzdG9yZS5waWNrbGVylIwLX2NsYXNzX2hlcmWUk5QojBAvc2NyaXB0cy9nb25lLnB5lIwAlIwE
VGFza5SMIDI5YzJjZDY4NzI5MzQyMDUxNzBiZDBhMjUzOTNkODY4lHSUjBtyYXkuY2xvdWRwaWNrbGUuY2xvdWRwaWNrbGWUjBRf
bWFrZV9za2VsZXRvbl9jbGFzc5STlCiMCGJ1aWx0aW5zlIwEdHlwZZSTlGgGaAyMBm9iamVjdJSTlIWUfZSMCl9fbW9kdWxlX1+U
jAhfX21haW5fX5RzjCAzYzE1NjJhNmI4MDQ0OWM4YTk1MTM0N2M1MjJmNjFhNpROdJSHlFKUaAGMBV9maWxslJOUaBhoCYwPX2Ns
YXNzX3NldHN0YXRllJOUfZQojAdfX2RvY19flE6MCl9fbW9kdWxlX1+UaBSMDV9fc2xvdG5hbWVzX1+UXZSMBGtpbmSUjARtYXRo
lHV9lIaUhpSGUjApgZR9lIwGbnVtYmVylEsHc2JoGGUu
"""


def test_what_journals_hold_is_read() -> None:
    """The functions of `pickler` that a pickle names are part of the format, whatever becomes of the others."""
    payload = base64.b64decode(KEPT)
    (task, kind), (_, again) = codec.decode(payload), codec.decode(payload)
    assert type(task) is kind is again and (task.kind, task.number) == ("math", 7)


def test_objects_in_journals_of_the_first_version_are_read() -> None:
    """Resources in journals name the module in which their classes were then."""
    source = Source(Kept("ab", 3), Origin("/objects"), "r", 1)
    written = pickle.dumps(source, 2).replace(b"raystore.values.objects", b"raystore.objects")
    assert codec.decode(bytes((PICKLED,)) + written) == source


@pytest.mark.parametrize(("module", "name", "meant"), [
    ("raystore.pickler", "loads_agent", pickler.loads_agent),
    ("raystore.objects", "Kept", Kept),
    ("raystore.triplet", "Triplet", rs.Triplet),
    ("raystore.trajectory", "Trajectory", rs.Trajectory),
    ("raystore.integrations.otel", "instrument", rs.otel.instrument),
    ("raystore.remote.cluster", "connect", rs.connect),
    ("raystore.runner.run_one", "Run", inline_agents.Run),
])  # fmt: skip
def test_names_of_former_modules_are_found(module: str, name: str, meant: Any) -> None:
    """A value that names where something stood in an earlier version has what stands there now."""
    assert pickler.Unpickler(io.BytesIO(f"c{module}\n{name}\n.".encode())).load() is meant

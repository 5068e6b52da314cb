"""Imports point downward only, the face costs nothing to import, and nothing is ambient."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanovllm

PACKAGE = Path(nanovllm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Higher up may import what is further down, and its own floor.
FLOORS = [
    {"__init__", "llm"},
    {"engine"},
    {"models"},
    {"layers"},
    {"attention"},
    {"kernels"},
    {"config", "sampling_params", "outputs"},
    {"utils"},
    {"errors"},
]
TORCH_FREE = ["batch", "block_manager", "executor", "llm_engine", "row_table", "scheduler", "sequence"]


def floor_of(room: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(tree: ast.AST) -> Iterator[str]:
    """Rooms of the package that a file imports, wherever in it: at the top, in a function, for types alone."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("nanovllm."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_up(path: Path) -> None:
    room = room_of(path)
    for imported in imported_rooms(ast.parse(path.read_text(encoding="utf-8"))):
        assert floor_of(imported) >= floor_of(room), f"{room} imports {imported}, which lies above it"


def test_the_walk_sees_an_arrow() -> None:
    source = "def f():\n    from nanovllm.engine.scheduler import Scheduler"
    assert list(imported_rooms(ast.parse(source))) == ["engine"]
    assert floor_of("engine") < floor_of("utils")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_ambient(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"set_default_d(evice|type)|^\s*global ", source, re.MULTILINE)
    if path.name not in ("env.py", "triton_support.py"):
        assert not re.search(r"os\.environ|getenv\(", source), "the environment is read in utils/env.py"
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(source)), "a module says what it is for"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_face_imports_fast_and_without_torch() -> None:
    code = (
        "import time; t = time.perf_counter(); import nanovllm, sys; seconds = time.perf_counter() - t; "
        "nanovllm.SamplingParams(); nanovllm.InvalidArgumentError; "
        "print(seconds, 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    seconds, heavy = min(python(code).split() for _ in range(3))
    assert float(seconds) < 0.3
    assert heavy == "False"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_deciding_needs_no_torch(module: str) -> None:
    assert python(f"import nanovllm.engine.{module}, sys; print('torch' in sys.modules)") == "False"


def test_the_public_names_are_there() -> None:
    assert set(nanovllm.__all__) <= set(dir(nanovllm))
    for name in nanovllm.__all__:
        assert getattr(nanovllm, name).__name__ == name
    with pytest.raises(AttributeError, match="Schedular"):
        nanovllm.Schedular  # noqa: B018 - the access is what is tested

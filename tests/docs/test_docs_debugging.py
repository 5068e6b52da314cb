"""docs/debugging.md: every block runs, in its order, in one folder, and says what the text says of it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ROOT, WATCHDOG, environment

TEXT = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# For each block, in order: what it needs beside Python, and what its output (both streams) has to show.
EXPECTED: list[tuple[str, str]] = [
    ("", r"\[Rank 0\] Preparing DECODE batch: 1 sequences"),
    ("", r"\['MainThread'\]"),
    ("", r"scheduler\.py\(\d+\)schedule\(\)[\s\S]*\(1, \d+\)[\s\S]*llm_engine\.py\(\d+\)_step\(\)"),
    ("", r"Generating"),  # what the log file has is for the blocks that follow
    ("grep", r'"event": "request\.added"[\s\S]*"event": "sequence\.finished"'),
    ("jq", r"request\.added: [\s\S]*blocks\.allocated: [\s\S]*sequence\.finished: "),
    ("jq", r'"request_id": "generate-4"[\s\S]*"ttft_ms": \d'),
    ("", r"Scheduled PREFILL batch[\s\S]*Postprocess: "),
    ("jq", r"^$"),  # five short requests have room at once
    ("jq", r"^$"),
    ("", r"prefill, .* decoding[\s\S]*'generate-0' ended with"),
    ("", r"report\.html: 1 engine\(s\)"),
    ("jq", r'("wall_ms":[\s\S]*){5}'),
    ("", r"Self CPU"),
    ("", r"Memory of cpu[\s\S]*kv_cache"),
    ("", r"Memory settles over 8 runs"),
    ("", r"(call|return) +\d+ .*engine/"),
    ("", r"Current thread"),
]


@dataclass(frozen=True)
class Recipe:
    language: str
    code: str
    needs: str
    shows: str


BLOCKS = [(language, code) for language, code in BLOCK.findall(TEXT) if language != "text"]  # text: an example output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as far as the recipes use one; what a block writes, those after it read."""
    path = tmp_path_factory.mktemp("debugging")
    for name in ("example.py", "nanovllm"):
        (path / name).symlink_to(ROOT / name)
    binaries = path / "bin"
    binaries.mkdir()
    python = binaries / "python"  # no link: a virtual environment's interpreter finds its packages by its own path
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return path


def run(recipe: Recipe, folder: Path) -> str:
    variables = environment(PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
    variables.pop("CUDA_LAUNCH_BLOCKING", None)
    shell = [sys.executable] if recipe.language == "python" else ["bash", "-euo", "pipefail"]
    done = subprocess.run(
        [*shell, "-c", recipe.code], cwd=folder, env=variables, capture_output=True, text=True, timeout=WATCHDOG
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_block_is_expected() -> None:
    assert len(BLOCKS) == len(EXPECTED)
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize("index", range(len(EXPECTED)))
def test_the_recipe_runs_and_shows_what_it_promises(folder: Path, index: int) -> None:
    recipe = Recipe(*BLOCKS[index], *EXPECTED[index])
    if recipe.needs and shutil.which(recipe.needs) is None:
        pytest.skip(f"no {recipe.needs}: apt-get install {recipe.needs}")
    output = run(recipe, folder)
    assert re.search(recipe.shows, output), output[-3000:]


def test_breakpoints_are_where_the_table_says() -> None:
    rows = re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)\.(\w+)` \|", TEXT, re.MULTILINE)
    assert len(rows) == 9
    for file, cls, function in rows:
        tree = ast.parse((ROOT / "nanovllm" / file).read_text(encoding="utf-8"))
        (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
        assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}, (file, cls, function)


def test_what_the_breakpoint_table_names_is_there() -> None:
    """Attributes that the text tells readers to look at exist in the file that it tells them to open."""
    for file, names in {
        "engine/scheduler.py": ["self.waiting", "self.rows", "self.block_manager"],
        "engine/block_manager.py": ["table.num_registered", "num_free_blocks"],
    }.items():
        source = (ROOT / "nanovllm" / file).read_text(encoding="utf-8")
        for name in names:
            assert name in source, (file, name)


def test_the_log_is_written_by_the_thread_that_logs() -> None:
    """No queue, no listener, no thread in the logging modules: a debugger that stops all threads stops nobody else."""
    for path in (ROOT / "nanovllm" / "utils").glob("log*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            assert not {"QueueHandler", "QueueListener", "threading", "Thread", "multiprocessing"} & set(names), path

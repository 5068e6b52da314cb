"""examples/learn: every script runs as a learner runs it, and what its lesson states is so."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

ROOT = Path(nanovllm.__file__).resolve().parents[1]
LEARN = ROOT / "examples" / "learn"
SCRIPTS = sorted(path.stem for path in LEARN.glob("step*.py"))


def start(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NANOVLLM_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)


@functools.cache
def lesson(script: str, *arguments: str) -> str:
    """What the script prints; run once. Nothing else is heard of it: no log, no warning."""
    done = start([sys.executable, str(LEARN / f"{script}.py"), *arguments], ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    return done.stdout


def numbers(pattern: str, text: str) -> list[int]:
    """The groups of the pattern's first match, which must be there."""
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern!r} in\n{text}"
    return [int(group.replace(",", "")) for group in match.groups()]


def one_line(text: str) -> str:
    """Paragraphs are wrapped: as one line they can be searched."""
    return " ".join(text.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring_and_names_what_to_read(script: str) -> None:
    done = start([sys.executable, str(LEARN / f"{script}.py"), "--help"], ROOT)
    assert done.returncode == 0, done.stderr
    assert f"python examples/learn/{script}.py" in done.stdout
    files = re.findall(r"nanovllm/[\w/]+\.py", done.stdout)
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_readme_has_each_script_once_in_order() -> None:
    text = (LEARN / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[`(step\w+)\.py`\]\((?:step\w+)\.py\) \|", text, re.MULTILINE)
    assert sorted(named) == SCRIPTS
    assert [name[:5] for name in named] == sorted(name[:5] for name in named)


# ---- step 1


def test_basic_inference_follows_a_request_to_its_answer() -> None:
    text = lesson("step1_basic_inference")
    (num_tokens,) = numbers(r"characters -> (\d+) tokens", text)
    assert f"embed_tokens                       [{num_tokens}, 256]" in text
    assert re.search(rf"qkv_proj\.query\s+\[{num_tokens}, 4, 64\]", text)
    assert re.search(rf"qkv_proj\.key\s+\[{num_tokens}, 2, 64\]", text)
    assert f"exactly {num_tokens} slots are no longer zero" in one_line(text)
    assert re.search(r"embed_tokens\s+\[1, 256\]", text)  # a decode step
    assert "'27 + 58 = 85'" in text
    assert "the same tokens as by hand: True" in text


def test_basic_inference_asks_what_it_is_told_to() -> None:
    text = lesson("step1_basic_inference", "--question", "reverse the word planet", "--max-tokens", "3")
    assert "finish_reason='length'; 3 tokens -> 'ten'" in text
    assert "the same tokens as by hand: True" in text


# ---- step 2


@pytest.mark.parametrize("num_blocks", [12, 14, 18])
def test_paged_attention_loses_no_block_and_changes_no_token(num_blocks: int) -> None:
    text = lesson("step2_paged_attention", "--num-blocks", str(num_blocks))
    (preemptions, in_use) = numbers(r"(\d+) preemption\(s\); blocks in use at the end: (\d+)", text)
    assert preemptions >= 1
    assert in_use == 0
    assert "gives the same tokens: True" in one_line(text)
    assert "only 6 of B's 22 prompt tokens were computed" in one_line(text)
    shared = re.search(r"held by +AB +AB +A +A +B ", text)
    assert shared, "A and B hold the first two blocks together"
    assert re.search(r"A has ended(?s:.)*?held by +B +B +~", text), "A's own block is remembered"
    assert re.search(r"D goes on(?s:.)*?held by +BD +BD +D ", text), "and D has it back"
    assert "~" in text.split("was evicted")[0]
    assert "was evicted: its old tokens are forgotten" in one_line(text)

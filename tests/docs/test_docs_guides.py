"""The guides: their Python gives what they say, and what they name (files, functions, sections, scripts) is there."""

from __future__ import annotations

import ast
import doctest
import re
from functools import cache
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python

DOCS = ROOT / "docs"
GUIDES = (
    *(
        "kv-cache",
        "prefill-and-decode",
        "weights",
        "qwen3",
        "inference-mode",
        "choosing-settings",
        "vs-vllm",
        "serving",
    ),
)
# The module of the package that has the options of a thin script.
OPTIONS_OF = {"bench.py": "nanovllm/cli/bench.py", "tools/bench_latency.py": "nanovllm/benchmarks/decode_latency.py"}
RUNNING = ("kv-cache", "prefill-and-decode", "weights", "qwen3")
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")


@pytest.mark.parametrize("guide", RUNNING)
def test_the_page_s_code_gives_what_the_page_says(guide: str) -> None:
    results = doctest.testfile(str(DOCS / f"{guide}.md"), module_relative=False, encoding="utf-8")
    assert results.attempted >= 5
    assert results.failed == 0


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = LINK.sub(lambda link: link["text"], heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def definitions(path: Path) -> set[str]:
    """Names of a module's classes, functions, methods (`Class.method`) and constants."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Also to the section they name; and a link whose text is a name in code leads to a file that defines it."""
    for link in LINK.finditer(without_code(page.read_text(encoding="utf-8"))):
        text, target = link["text"], link["target"]
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"
        symbol = re.fullmatch(r"`([A-Za-z_][\w.]*)`", text)
        if symbol and path.suffix == ".py" and not symbol[1].endswith(".py"):
            assert symbol[1] in definitions(path), f"{page.name}: {symbol[1]} is not in {name}"


@pytest.mark.parametrize("guide", GUIDES)
def test_a_command_names_a_script_and_options_that_exist(guide: str) -> None:
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    for script, options in re.findall(r"python ((?:tools/)?\w+\.py)([^\n`]*)", text):
        source = (ROOT / OPTIONS_OF.get(script, script)).read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z][\w-]+", options):
            assert f'"{option}"' in source, f"{guide}: {script} {option}"


@pytest.mark.heavy("a measurement, which says nothing that another test does not check")
@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("measure_inference_mode.py --rounds 2 --tokens 6 --prompt 8", r"inference_mode +\d+[\s\S]*grad [\s\S]* MB"),
        ("measure_kv_cache.py --tokens 32 --device cpu", r"allocated[^\n]*65,536 bytes[\s\S]*2 blocks"),
        ("measure_settings.py --runs 1 --num-seqs 3 --only max_num_seqs --device cpu", r"max_num_seqs=16 +\d"),
    ],
)
def test_the_scripts_that_give_the_guides_their_figures_run(command: str, shows: str) -> None:
    script, *arguments = command.split()
    done = run_python(str(ROOT / "tools" / script), *arguments, NANOVLLM_CPU_KVCACHE_GB="0.2")
    assert done.returncode == 0, done.stderr
    assert re.search(shows, done.stdout), done.stdout

""".vscode/launch.json and what docs/debugging.md says of it: programs, settings and breakpoints are there."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from tests.processes import ROOT

LAUNCH: dict[str, Any] = json.loads((ROOT / ".vscode" / "launch.json").read_text(encoding="utf-8"))
CONFIGURATIONS = {configuration["name"]: configuration for configuration in LAUNCH["configurations"]}
TEXT = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")


def test_names_are_unique_and_programs_exist() -> None:
    assert len(CONFIGURATIONS) == len(LAUNCH["configurations"])
    for configuration in CONFIGURATIONS.values():
        program = configuration["program"].replace("${workspaceFolder}", str(ROOT))
        assert program == "${file}" or Path(program).is_file(), program


def test_every_lesson_has_a_configuration() -> None:
    lessons = {path.stem for path in (ROOT / "examples" / "learn").glob("step*.py")}
    assert {name.removeprefix("learn: ") for name in CONFIGURATIONS if name.startswith("learn: step")} == lessons


def test_all_threads_run_while_stepping_and_workers_are_debugged_too() -> None:
    for configuration in CONFIGURATIONS.values():
        assert configuration["type"] == "debugpy"
        assert configuration["steppingResumesAllThreads"] is True
        assert configuration["subProcess"] is True
        assert configuration["env"]["PYTHONPATH"] == "${workspaceFolder}"


def test_the_settings_that_the_page_explains_are_those_of_every_configuration() -> None:
    explained = json.loads("{" + ",".join(re.findall(r"^\| `(\".*)` \|", TEXT, re.MULTILINE)) + "}")
    assert explained.keys() == {"steppingResumesAllThreads", "subProcess", "justMyCode", "env"}
    for configuration in CONFIGURATIONS.values():
        for name, value in explained.items():
            if name == "env":
                assert configuration["env"].items() >= value.items()
            else:
                assert configuration[name] == value


def test_breakpoints_of_the_lessons_exist() -> None:
    rows = re.findall(r"^\| `(learn: \w+)` \| `([\w/]+\.py)` \| `([\w.]+)` \|", TEXT, re.MULTILINE)
    assert {name for name, _, _ in rows} == {name for name in CONFIGURATIONS if name.startswith("learn: step")}
    for name, file, function in rows:
        body: list[ast.stmt] = ast.parse((ROOT / "nanovllm" / file).read_text(encoding="utf-8")).body
        *classes, last = function.split(".")
        for cls in classes:
            (body,) = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == cls]
        assert last in {node.name for node in body if isinstance(node, ast.FunctionDef)}, (name, file, function)

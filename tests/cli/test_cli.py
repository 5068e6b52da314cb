"""`python -m nanovllm`: the subcommands, their help, and what each imports."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm
from nanovllm.cli.main import COMMANDS, main
from nanovllm.config import EngineConfig
from nanovllm.utils.arguments import arguments_of

ROOT = Path(__file__).resolve().parents[2]


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanovllm", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_the_version(arguments: list[str]) -> None:
    done = run_cli(*arguments)
    assert (done.returncode, done.stdout) == (0, f"nanovllm {nanovllm.__version__}\n")


@pytest.mark.parametrize("arguments", ["version", "--help", "bench --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_gets_no_traceback(arguments: str, unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nanovllm", *arguments.split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert done.stderr == ""


def test_closed_streams_end_nothing() -> None:
    command = f"{shlex.quote(sys.executable)} -m nanovllm version >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, timeout=120)
    assert done.returncode == 0


def test_help_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name, about in COMMANDS.items():
        assert f"  {name} " in text
        assert about in text


def test_every_module_of_the_command_line_is_a_subcommand() -> None:
    modules = {path.stem for path in (ROOT / "nanovllm" / "cli").glob("*.py")}
    assert modules - {"__init__", "main"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert usage.startswith(f"usage: nanovllm {name} [-h]")
    assert lines[0] == "", "a usage of one line"


@pytest.mark.parametrize("name", ["serve", "chat", "generate"])
def test_help_has_the_commands_own_options_first_and_the_engines_in_a_group(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    own, _, engine = capsys.readouterr().out.partition("\nEngine:\n")
    engine, _, others = engine.partition("\nOptions of vLLM without effect:\n")
    assert own.count("\n") < 100
    assert "--swap-space" in others
    for each in arguments_of(EngineConfig):
        assert f"  --{each.name.replace('_', '-')}" in engine
    assert engine.split().count("Default:") == len(list(arguments_of(EngineConfig)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["bnech"], "invalid choice: 'bnech'"),
        (["version", "extra"], "unrecognized arguments: extra (see nanovllm version --help)"),
        (["serve", "--max_model_lenn=5"], "unrecognized arguments: --max-model-lenn=5. Did you mean --max-model-len?"),
        (["chat", "--temprature", "1"], "unrecognized arguments: --temprature. Did you mean --temperature?"),
        (["generate", "--bogus"], "unrecognized arguments: --bogus (see nanovllm generate --help)"),
        (["serve", "--port", "x"], "--port: 'x' is not an integer from 0 (any free port) to 65535"),
        (["serve", "--dev=maybe"], "argument --dev/--no-dev: 'maybe' is not true or false"),
        (["bench", "--runs", "1"], "nanovllm bench: error: --runs must be at least 2"),
        (["report"], "the following arguments are required: log"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.endswith("--help)")


def test_a_report_that_cannot_be_written_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("nanovllm report: log='nowhere.jsonl' is not allowed")


@pytest.mark.parametrize("command", ["version", "bench --help", "bench --runs 1", "report --help"])
def test_an_answer_that_needs_no_engine_imports_no_torch(command: str) -> None:
    script = (
        "import sys; from nanovllm.cli.main import main\n"
        f"try: main({command.split()!r})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

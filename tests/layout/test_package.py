"""What is installed is all that is needed: the wheel has every module, the types marker and the checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import nanovllm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the build reads, so that nothing is left in the working tree."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "nanovllm", folder / "nanovllm", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "nanovllm"
    paths = [*package.rglob("*.py"), package / "py.typed", *package.glob("assets/tiny-qwen3/*")]
    paths += package.glob("server/assets/*")
    files = {path.relative_to(ROOT).as_posix() for path in paths}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files
    for name in (
        "py.typed",
        "server/assets/chat.html",
        "assets/tiny-qwen3/config.json",
        "assets/tiny-qwen3/model.safetensors",
    ):
        assert f"nanovllm/{name}" in packed


def test_the_wheel_runs_anywhere_and_has_the_license(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("LICENSE") for name in archive.namelist())


def test_version_and_pythons(metadata: Message) -> None:
    assert metadata["Version"] == nanovllm.__version__
    assert sorted(metadata["Requires-Python"].split(",")) == ["<3.14", ">=3.10"]


def test_requirements(metadata: Message) -> None:
    """The core is small, and every import of the package is covered by it or by an extra."""
    requirements = metadata.get_all("Requires-Dist", [])
    names = {re.split(r"[<>=;\s\[]", line)[0] for line in requirements if "extra ==" not in line}
    assert names == {
        "huggingface-hub",
        "jinja2",
        "numpy",
        "pyyaml",
        "safetensors",
        "torch",
        "tqdm",
        "transformers",
        "triton",
        "xxhash",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "bench",
        "dev",
        "examples",
        "flash-attn",
        "otel",
        "ray",
        "server",
        "structured",
    }


def test_an_installed_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """Unpacked is installed, for a wheel of pure Python."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from nanovllm import LLM, SamplingParams; import nanovllm;"
        f"assert nanovllm.__file__.startswith({str(tmp_path)!r});"
        "llm = LLM('tiny', device='cpu'); p = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True);"
        "print(len(llm.generate('Hello', p, use_tqdm=False)[0].outputs[0].token_ids))"
    )
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


def test_an_installed_wheel_has_the_command(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, without the dependencies: help and version need none of them."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "python")]
    without_path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    installed = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--quiet", str(wheel)],
        env=without_path,
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    for command in ("nanovllm bench --help", "nanovllm report --help", "python -m nanovllm version"):
        program, *arguments = command.split()
        done = subprocess.run(
            [str(folder / program), *arguments], cwd=tmp_path, env=without_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "nanovllm" in done.stdout


def test_pip_finds_the_constraints_of_a_checkout_whose_path_has_spaces(tmp_path: Path) -> None:
    checkout = tmp_path / "two words"
    checkout.mkdir()
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    probe = "probe: ; $(PYTHON) -m pip install --dry-run --no-index numpy"  # which is installed
    done = subprocess.run(
        ["make", f"PYTHON={shlex.quote(sys.executable)}", "--eval", probe, "probe"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

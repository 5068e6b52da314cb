"""What `pip install .` installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nanovllm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip would, from a copy, so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = ["pyproject.toml", "README.md", "LICENSE", "nanovllm"]
    subprocess.run(["cp", "-r", *files, f"{source.mkdir() or source}/"], cwd=ROOT, check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, source],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_the_checkpoint_and_the_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = {f"nanovllm/assets/tiny-qwen3/{path.name}" for path in (ROOT / "nanovllm/assets/tiny-qwen3").iterdir()}
    assert {"nanovllm/py.typed", "nanovllm/assets/tiny-qwen3/model.safetensors"} | assets <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nanovllm").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


def test_it_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from nanovllm import LLM, SamplingParams; import nanovllm; print(nanovllm.__file__); "
        "print(LLM('tiny', device='cpu').chat([{'role': 'user', 'content': 'What is 2 + 3?'}], "
        "SamplingParams(temperature=0), use_tqdm=False)[0]['text'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "site",
        env={"PATH": "/usr/bin:/bin", "NANOVLLM_LOG_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, answer = run.stdout.strip().splitlines()
    assert Path(path).is_relative_to(tmp_path)
    assert answer == "2 + 3 = 5"
    assert run.stderr == "", "asked for silence"


def test_the_version_is_said_once_and_the_same(wheel: Path) -> None:
    assert wheel.name.startswith(f"nanovllm-{nanovllm.__version__}-")

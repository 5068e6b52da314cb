"""Where a model's folder is found."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from nanovllm.errors import ModelLoadError
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER, resolve_model_folder


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_folder(str(tmp_path)) == tmp_path
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model_folder("models/mine") == Path("models/mine"), "a folder goes before an id of the same form"


def test_tiny_is_the_checkpoint_that_ships() -> None:
    assert resolve_model_folder("tiny") == TINY_MODEL_FOLDER
    assert TINY_MODEL_FOLDER.parts[-3:] == ("nanovllm", "assets", "tiny-qwen3")


@pytest.mark.parametrize("model", ["/no/such/folder", "./absent", "~/absent", "qwen3-0.6b", "a/b/c", ""])
def test_what_is_neither_folder_nor_id_is_refused_with_the_ways_there_are(model: str) -> None:
    with pytest.raises(ModelLoadError, match=r"no such folder\. model must be a folder .* Hugging Face id .* 'tiny'"):
        resolve_model_folder(model)


def test_a_file_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="no such folder"):
        resolve_model_folder("org/name")


def test_an_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append((repo_id, options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model_folder("Qwen/Qwen3-0.6B", "main") == tmp_path
    assert asked == [("Qwen/Qwen3-0.6B", "main")]


def test_a_download_that_fails_names_the_ways_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline and nothing cached: huggingface_hub's own error, inside ours."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"(?s)nobody/nothing.*download failed.*model must be a folder") as caught:
        resolve_model_folder("nobody/nothing")
    assert caught.value.__cause__ is not None

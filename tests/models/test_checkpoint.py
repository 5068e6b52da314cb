"""Where a model's folder is found."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub.constants
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
    with pytest.raises(ModelLoadError, match=r"'org/name': this is a file, not a folder\. model must be a folder"):
        resolve_model_folder("org/name")


@pytest.mark.parametrize("model", ["~nobody-here/model", "/" + "x" * 5000, "a\0b", "org/na\0me", "org/" + "x" * 5000])
def test_a_name_that_no_system_has_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="model must be a folder") as caught:
        resolve_model_folder(model)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_or_a_device_in_the_folder_is_refused_before_anybody_reads_it(name: str, tmp_path: Path) -> None:
    """What reads a pipe waits for ever, and /dev/zero never ends."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelLoadError, match=rf"{name} is a pipe, a socket or a device"):
        resolve_model_folder(str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ModelLoadError, match=rf"{name} is a pipe, a socket or a device"):
        resolve_model_folder(str(tmp_path))


def test_links_to_files_and_links_to_nowhere_are_fine_in_a_folder(tmp_path: Path) -> None:
    """A cache of huggingface_hub links to its blobs, and some blobs may not be downloaded."""
    snapshot, blob = tmp_path / "snapshots" / "main", tmp_path / "blobs" / "0123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/absent")
    assert resolve_model_folder(str(snapshot)) == snapshot


def test_an_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append((repo_id, options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model_folder("Qwen/Qwen3-0.6B", "main") == tmp_path
    assert asked == [("Qwen/Qwen3-0.6B", "main")]


@pytest.mark.parametrize(("architecture", "downloads"), [("OPTForCausalLM", 2), ("LlamaForCausalLM", 1)])
def test_pytorchs_format_is_downloaded_for_old_models_without_safetensors(
    architecture: str, downloads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(f'{{"architectures": ["{architecture}"]}}')
    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model_folder("facebook/opt-125m") == tmp_path
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True][:downloads]


def test_a_download_that_fails_names_the_ways_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline and nothing cached: huggingface_hub's own error, inside ours."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"(?s)nobody/nothing.*download failed.*model must be a folder") as caught:
        resolve_model_folder("nobody/nothing")
    assert caught.value.__cause__ is not None

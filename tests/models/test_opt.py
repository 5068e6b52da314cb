"""OPT's weights as they are published: in PyTorch's format, under two kinds of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanovllm.errors import ModelLoadError
from nanovllm.models.model_config import ModelConfig
from tests.models.checkpoints import make_checkpoint
from tests.models.paged_model import PagedModel, load_model
from tests.models.test_qwen3 import prompts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "opt", "350m")


def logits(folder: Path) -> torch.Tensor:
    return PagedModel(load_model(folder), ModelConfig.from_folder(folder)).step({0: prompts(320)[0]})[0]


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder."])
@pytest.mark.parametrize("form", ["whole", "shards", "of before torch 1.6"])
def test_weights_in_pytorchs_format(folder: Path, prefix: str, form: str) -> None:
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.decoder.", prefix): tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors[f"{prefix}embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    if form == "shards":
        files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        weight_map = {name: files[index % 2] for index, name in enumerate(tensors)}
        for file in files:
            torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "whole")
    assert torch.equal(logits(folder), expected)


class Program:
    """What a pickle runs when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_a_file_that_is_a_program_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Program(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin cannot be read as weights of PyTorch: "):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_weights_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin cannot be read as weights of PyTorch: ") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", [[torch.ones(2)], {"lm_head.weight": 5}])
def test_a_file_without_tensors_by_name_is_refused(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="it must hold tensors by their names"):
        load_model(folder)

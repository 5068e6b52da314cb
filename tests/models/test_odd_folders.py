"""Model folders from the wild, from start to tokens: each gives the tiny checkpoint's tokens or one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, ModelLoadError, OutOfMemoryError, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER
from nanovllm.runner import startup

Change = Callable[[Path], object]
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_MODEL_FOLDER, tmp_path / "model"))


def tokens(folder: Path, **settings: Any) -> list[int]:
    with LLM(str(folder), device="cpu", num_kvcache_blocks=8, **settings) as llm:
        return llm.generate("count from 3 to 9", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return tokens(TINY_MODEL_FOLDER)


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def config_without(*names: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def to_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    for name, dtype in zip(tensors, [torch.float32, torch.float64, torch.bfloat16] * len(tensors), strict=False):
        tensors[name] = tensors[name].to(dtype)


def to_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{1 + index % 2}-of-00002.safetensors" for index in range(len(tensors))]
    weight_map = dict(zip(tensors, names, strict=True))
    for file in set(names):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def to_subfolder(folder: Path) -> None:
    files = list(folder.iterdir())
    (folder / "inner").mkdir()
    for path in files:
        path.rename(folder / "inner" / path.name)


HEAD = "lm_head.weight"
LOADED: dict[str, Change] = {
    "head_dim null": config(head_dim=None),
    "torch_dtype with its module": config(torch_dtype="torch.bfloat16"),
    "dtype with its module": config(dtype="torch.float32", torch_dtype=None),
    "max_window_layers null": config(max_window_layers=None),
    "architectures null": config(architectures=None),
    "no model_type": config_without("model_type"),
    "an unknown model_type": config(model_type="mine"),
    "no max_position_embeddings": config_without("max_position_embeddings"),
    "yarn with attn_factor": config(
        rope_scaling={"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096, "attn_factor": 0.5}
    ),
    "a generation_config that is no JSON": lambda folder: (folder / "generation_config.json").write_text("{"),
    "null and -1 among the end tokens": lambda folder: (folder / "generation_config.json").write_text(
        '{"eos_token_id": [null, -1, 509]}'
    ),
    "shards": to_shards,
    "the head beside the embedding it is tied to": weights(
        lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].clone()})
    ),
    "several dtypes": weights(to_dtypes),
    "rotary buffers": weights(
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})
    ),
    "PyTorch's format beside": lambda folder: (folder / "pytorch_model.bin").touch(),
}


@pytest.mark.parametrize("case", LOADED)
def test_loaded(case: str, folder: Path, expected: list[int]) -> None:
    LOADED[case](folder)
    assert tokens(folder) == expected


REFUSED: dict[str, tuple[Change, str]] = {
    "layers by the million": (config(num_hidden_layers=10**7), r"num_hidden_layers=10000000 .* from 1 to 1024\."),
    "more layers than weights": (config(num_hidden_layers=1000), "missing from the checkpoint: model.layers.10.* more"),
    "wider than the weights": (config(hidden_size=2**18), r"embed_tokens.weight has shape \[512, 256\] and needs"),
    "untied without a head": (config(tie_word_embeddings=False), r"lm_head\.weight\. hf_overrides={'tie_word_emb"),
    "a bias that no layer has": (
        weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(256)})),
        r"unknown to the model: model\.layers\.0\.self_attn\.q_proj\.bias\.",
    ),
    "FP8 weights without a word": (
        weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(256).to(torch.float8_e4m3fn)})),
        r"model\.norm\.weight has dtype F8_E4M3 and needs one of",
    ),
    "another architecture": (
        config(architectures=["BertModel"]),
        r"'BertModel'\] is not supported: it is an encoder",
    ),
    "a model in a subfolder": (to_subfolder, "config.json is missing.* has its model in the folder 'inner': name that"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], r"config\.json is missing; a model"),
    "GGUF": (
        lambda folder: [(folder / "model.gguf").touch(), (folder / "config.json").unlink()],
        "config.json is missing.* has GGUF files",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "gives no tokenizer: it has no tokenizer files. Name one with tokenizer=",
    ),
    "a pointer of Git LFS": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"model\.safetensors cannot be read as safetensors: .*download it again\.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, folder: Path) -> None:
    change, message = REFUSED[case]
    change(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        tokens(folder)
    assert len(str(caught.value)) < 2000


def test_the_rotary_table_is_as_long_as_a_request_may_be(folder: Path) -> None:
    config(max_position_embeddings=2**24)(folder)
    runner = ModelRunner(EngineConfig(str(folder), device="cpu", num_kvcache_blocks=8, max_model_len=100))
    assert runner.model.get_buffer("model.cos_sin_cache").shape == (100, 64)
    runner.shutdown()


def test_a_rotary_table_that_does_not_fit_is_refused_before_it_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(max_position_embeddings=2**24)(folder)
    monkeypatch.setattr(startup, "free_memory", lambda device: 10**9)
    with pytest.raises(OutOfMemoryError, match=r"max_model_len=16777216 tokens needs .* Give a smaller max_model_len"):
        tokens(folder)


def test_weights_that_no_machine_holds_are_refused(folder: Path) -> None:
    """Without files there are no shapes to compare with."""
    config(hidden_size=2**18, intermediate_size=2**20, vocab_size=2**24)(folder)
    with pytest.raises(OutOfMemoryError, match="GB of .*'s weights do not fit on cpu: .* Choose a smaller model"):
        tokens(folder, load_format="dummy")

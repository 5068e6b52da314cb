"""The text part of Gemma3ForConditionalGeneration, as transformers saves it and as it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from nanovllm.errors import ModelLoadError
from nanovllm.models.model_config import ModelConfig
from tests.models.checkpoints import GEMMA3, SMALL
from tests.models.paged_model import PagedModel, load_model
from tests.models.test_qwen3 import TOLERANCE, in_two_chunks, largest_difference, prompts

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def reference(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    text = {**SMALL, **GEMMA3, "initializer_range": 0.3}
    config = Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300, dtype="float32"
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    return model


def as_published(folder: Path) -> None:
    """Renames the tensors to the names that the published files have."""
    tensors = load_file(folder / "model.safetensors")

    def rename(name: str) -> str:
        name = name.removeprefix("language_model.").removeprefix("model.language_model.")
        return name if name.startswith(("vision", "multi")) else f"language_model.model.{name.removeprefix('model.')}"

    renamed = {rename(name.removeprefix("model.")): tensor for name, tensor in tensors.items()}
    assert "language_model.model.layers.0.mlp.up_proj.weight" in renamed
    assert any(name.startswith("vision_tower.") for name in renamed)
    save_file(renamed, folder / "model.safetensors")


@pytest.mark.parametrize("published", [False, True])
def test_logits_of_text_equal_transformers(reference: Any, published: bool, tmp_path: Path) -> None:
    if published:
        as_published(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    tokens = {seq: [token % 300 for token in ids] for seq, ids in prompts(320).items()}
    with torch.inference_mode():
        expected = {seq: reference(torch.tensor([ids])).logits[0] for seq, ids in tokens.items()}
    logits = in_two_chunks(PagedModel(load_model(tmp_path), config), tokens)
    assert largest_difference(logits, expected) < TOLERANCE


def test_the_config_as_published() -> None:
    """google/gemma-3-4b-it: what is left out means what Gemma3TextConfig says."""
    config = ModelConfig.from_dict(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16",
        }
    )
    assert config.windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert config.local_rope is not None
    assert (config.rope.theta, config.rope.factor, config.local_rope.theta) == (1e6, 8.0, 1e4)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert (config.max_context_len, config.eos_token_ids, config.dtype) == (131_072, (1, 106), "bfloat16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": None}, "text_config=None .*an object with the fields of the text model"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping=30.0 .*absent"),
        ({"text_config": {"hidden_activation": "relu"}}, "hidden_activation='relu' .*'silu' or 'gelu_pytorch_tanh'"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], **sizes, **fields}
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_dict(config)

"""Small random Qwen3 checkpoints, made by transformers, for tests that compare with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as ReferenceQwen3

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": [1, 2],
    "bos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}

# Every form that a published Qwen3 may have: what makes it, and `make_qwen3_checkpoint` takes.
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim_is_hidden_over_heads": {"head_dim": 16},
    "group_size_1": {"num_key_value_heads": 4},
    "group_size_4": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "bias": {"attention_bias": True},
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    "rope_dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
    "rope_yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope_yarn_attn_factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attn_factor": 0.8782488562869419,
        }
    },
    "rope_yarn_mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        }
    },
    "rope_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "rope_theta_beside": {"legacy_rope": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}},
    "rope_scaling_beside": {
        "legacy_rope": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        },
    },
    "sharded": {"max_shard_size": "60KB", "num_hidden_layers": 3},
}


def make_qwen3_checkpoint(
    folder: Path, *, seed: int = 0, max_shard_size: str = "1GB", legacy_rope: bool = False, **overrides: Any
) -> Path:
    """Save a random fp32 Qwen3 (config.json, generation_config.json, safetensors) in `folder`; the same for a seed.

    `overrides` are fields of Qwen3Config. `legacy_rope` writes the config as transformers 4 did: rope_theta
    beside rope_scaling. Weights are large enough that greedy continuations wander and logits spread by units.
    """
    config = Qwen3Config(**{**SMALL, **overrides}, architectures=["Qwen3ForCausalLM"], dtype="float32")
    model = ReferenceQwen3(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(2.0 * noise * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if legacy_rope:
        _write_legacy_rope(folder / "config.json")
    return folder


def load_reference(folder: Path) -> ReferenceQwen3:
    """The transformers model of a folder: fp32, eager attention, on the CPU."""
    return ReferenceQwen3.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _write_legacy_rope(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))

"""Small random checkpoints of every family, made by transformers, for tests that compare with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": [1, 2],
    "bos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """An architecture: its configuration in transformers, and every form that a published checkpoint may have."""

    architecture: str
    model_type: str
    variants: dict[str, dict[str, Any]]
    small: dict[str, Any] = field(default_factory=lambda: SMALL)


def rope(rope_type: str, theta: float = 10_000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **fields}}


SHARDED = {"max_shard_size": "60KB", "num_hidden_layers": 3}
LLAMA3 = rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
WINDOW_BESIDE_FULL = {
    "use_sliding_window": True,
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA3 = {
    "num_hidden_layers": 3,
    "head_dim": 32,
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
OPT_FIELDS = {*SMALL} - {"intermediate_size", "num_key_value_heads"}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        {
            "group_size_2": {},
            "group_size_1": {"num_key_value_heads": None},
            "group_size_4_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
            "head_dim": {"head_dim": 32},
            "rope_llama3": LLAMA3,
            "biases": {"attention_bias": True, "mlp_bias": True},
            "sharded": SHARDED,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        {
            "window": {"sliding_window": 11},
            "no_window": {"sliding_window": None, "head_dim": 32},
            "window_wider_than_a_page": {"sliding_window": 21, "head_dim": 32, "max_shard_size": "60KB"},
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        {
            "bias": {"tie_word_embeddings": True},
            "rope_yarn": rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=64),
            "window_from_layer_1_on": {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
            "sharded": SHARDED,
        },
    ),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", {"window": WINDOW_BESIDE_FULL | {"head_dim": 32}}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {
            "renormalized": {"norm_topk_prob": True},
            "every_second_layer_sparse": {"decoder_sparse_step": 2, "num_hidden_layers": 3, "max_shard_size": "60KB"},
            "first_layer_dense": {"mlp_only_layers": [0], "norm_topk_prob": True},
            "stacked": {"save_original_format": False, "use_sliding_window": True, "sliding_window": 11},
        },
        {**SMALL, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {
            "window_and_global_layers": {},
            "linear_rope": {"rope_parameters": GEMMA3_ROPES, "query_pre_attn_scalar": 20, "max_shard_size": "60KB"},
        },
        {**SMALL, **GEMMA3},
    ),
    "opt": Family(
        "OPTForCausalLM",
        "opt",
        {
            "125m": {"max_shard_size": "60KB"},
            "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
            "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
            "untied": {"tie_word_embeddings": False, "_remove_final_layer_norm": True},
        },
        {**{name: value for name, value in SMALL.items() if name in OPT_FIELDS}, "ffn_dim": 96},
    ),
}
CASES = [(family, variant) for family, of in FAMILIES.items() for variant in of.variants]


def make_checkpoint(
    folder: Path, family: str, variant: str | None = None, *, seed: int = 0, max_shard_size: str = "1GB", **fields: Any
) -> Path:
    """Saves a random fp32 checkpoint in `folder`; the same for a seed. `fields` are those of the configuration.

    Weights are large enough that greedy continuations wander and logits spread by units.
    """
    of = FAMILIES[family]
    fields = {**of.small, **(of.variants[variant] if variant else {}), **fields}
    max_shard_size = fields.pop("max_shard_size", max_shard_size)
    save_original_format = fields.pop("save_original_format", True)  # False: as transformers holds the tensors
    config = AutoConfig.for_model(of.model_type, **fields, architectures=[of.architecture], dtype="float32")
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_((0.0 if family == "gemma3" else 1.0) + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(2.0 * noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=save_original_format)
    return folder


def load_reference(folder: Path) -> Any:
    """The transformers model of a folder: fp32, eager attention, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

"""BUILTIN_SHAPES: published models without their weights, for benchmarks with random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.models.model_config import ModelConfig


def _qwen3(hidden_size: int, intermediate_size: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": tied,
        "eos_token_id": [151_645, 151_643],
        "torch_dtype": "bfloat16",
    }


def _llama3(
    hidden_size: int, intermediate_size: int, layers: int, head_dim: int, rope_factor: float, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": tied,
        "eos_token_id": 128_001,
        "torch_dtype": "bfloat16",
    }


# config.json as published, without fields that do not change a computation.
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, layers=28, heads=16, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, layers=36, heads=32, tied=False),
    "qwen3-32b": _qwen3(5120, 25_600, layers=64, heads=64, tied=False),
    "qwen3-30b-a3b": {
        **_qwen3(2048, 6144, layers=48, heads=32, tied=False),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "llama-3.2-1b": _llama3(2048, 8192, layers=16, head_dim=64, rope_factor=32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 14_336, layers=32, head_dim=128, rope_factor=8.0, tied=False),
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 131_072,
        "sliding_window": 131_072,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
        "eos_token_id": 151_643,
        "torch_dtype": "bfloat16",
    },
    "mistral-7b": {  # v0.3
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32_768,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    },
    "opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": 50_272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "word_embed_proj_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    },
}
BUILTIN_SHAPES: Mapping[str, ModelConfig] = {name: ModelConfig.from_dict(config) for name, config in PUBLISHED.items()}

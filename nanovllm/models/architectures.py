"""The supported architectures: the name in config.json → the module that has a class of this name.

Plain data, which `models.model_config` reads without torch and `models.registry` turns into classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ModelLoadError, shown
from nanovllm.models.architecture_kinds import DECODER, kind_of

MODELS: Mapping[str, str] = {  # each a module of this package
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# The architecture of a config.json that names only its model_type.
OF_MODEL_TYPE: Mapping[str, str] = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "opt": "OPTForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_GEMMA3 = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
_QWEN = {"max_position_embeddings": 32_768, "max_window_layers": 28, "sliding_window": 4096}
# What a field means that config.json leaves out, as in transformers' configuration class.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "OPTForCausalLM": {
        "vocab_size": 50_272,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "attention_bias": True,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": {**_QWEN, "head_dim": 128},
    "Qwen3MoeForCausalLM": {
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
# Our name of a field → the name that config.json has for it, where that differs.
FIELD_NAMES: Mapping[str, Mapping[str, str]] = {
    "Gemma3ForCausalLM": {"hidden_act": "hidden_activation"},
    "Gemma3ForConditionalGeneration": {"hidden_act": "hidden_activation"},
    "OPTForCausalLM": {
        "hidden_act": "activation_function",
        "intermediate_size": "ffn_dim",
        "attention_bias": "enable_bias",
    },
}
GATES = ("silu", "gelu_pytorch_tanh")  # activations of a gated MLP
# The activations of an architecture that has others or fewer, its own first.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {"OPTForCausalLM": ("relu", "gelu"), "Qwen3MoeForCausalLM": ("silu",)}
_WAY_OUT = "docs/adding-a-model.md shows how a new one is added."
# Architectures of which the text model runs, whose fields are in `text_config`.
TEXT_PARTS = frozenset({"Gemma3ForConditionalGeneration"})
WITH_EXPERTS = frozenset({"Qwen3MoeForCausalLM"})
WITHOUT_ROPE = frozenset({"OPTForCausalLM"})  # learned positions
# Architectures whose layers with a window have a rope of their own.
LOCAL_ROPE = frozenset({"Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"})
# Architectures whose published weights are as old as PyTorch's own format.
WITH_TORCH_FILES = frozenset({"OPTForCausalLM"})


def check_architecture(architecture: str, config: Mapping[str, Any] | None = None) -> None:
    """Raises ModelLoadError, with the supported architectures, when `architecture` is not one of them.

    `config`, the content of config.json, helps to say what kind of model it is.
    """
    if architecture in MODELS:
        return
    kind = kind_of(architecture, config or {})
    way_out = f" {_WAY_OUT}" if kind in ("", DECODER) else ""
    raise ModelLoadError(
        f"architectures=[{shown(architecture)}] is not supported{kind and f': it is {kind}'}. "
        f"Supported: {', '.join(MODELS)}.{way_out}"
    )

"""ConfigFields: the fields of a config.json, each read with a check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanovllm.config import DTYPES
from nanovllm.errors import ModelLoadError, shown
from nanovllm.models.architectures import DEFAULTS, FIELD_NAMES, MODELS, OF_MODEL_TYPE, TEXT_PARTS, check_architecture
from nanovllm.models.rope_fields import MAX_POSITIONS

# The smallest and the largest value of each number: what is built from them stays within bounds, and no published model
# comes near the largest.
_RANGES = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 18),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 10),
    "word_embed_proj_dim": (1, 1 << 18),
    "max_position_embeddings": (2, MAX_POSITIONS),  # a prompt and an output of one token each
    "sliding_window": (1, MAX_POSITIONS),
    "max_window_layers": (0, 1 << 10),
    "sliding_window_pattern": (1, 1 << 10),
    "num_experts": (1, 1 << 10),
    "num_local_experts": (1, 1 << 10),
    "num_experts_per_tok": (1, 1 << 6),
    "moe_intermediate_size": (1, 1 << 20),
    "decoder_sparse_step": (1, 1 << 10),
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Returns the first supported one of `architectures`, or the first; without any, that of `model_type`."""
    names = config.get("architectures")
    if not names:
        model_type = config.get("model_type")
        names = [OF_MODEL_TYPE[model_type]] if isinstance(model_type, str) and model_type in OF_MODEL_TYPE else None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise unsupported(config, "architectures", f"a list of names, such as [{next(iter(MODELS))!r}]")
    supported: list[str] = [name for name in names if name in MODELS]
    return supported[0] if supported else str(names[0])


def unsupported(config: Mapping[str, Any], name: str, supported: str) -> ModelLoadError:
    """Returns the error that names a field of config.json, its value, and what is supported."""
    state = f"{name}={shown(config[name])} is not supported" if name in config else f"{name} is missing"
    return ModelLoadError(f"config.json: {state}: it must be {supported}.")


def with_text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns config.json with the fields of `text_config` at the top, for a model of which that part alone runs."""
    if architecture_of(config) not in TEXT_PARTS:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise unsupported(config, "text_config", "an object with the fields of the text model")
    return {**text, **config}


class ConfigFields:
    """config.json with checks: each accessor raises ModelLoadError that names field, value and what is supported.

    A field that is left out has the default of its architecture, as in transformers.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.architecture = architecture_of(values)
        check_architecture(self.architecture, values)
        self._defaults = DEFAULTS.get(self.architecture, {})
        self._names = FIELD_NAMES.get(self.architecture, {})

    def __contains__(self, name: str) -> bool:
        """Returns whether the field has a value other than null, its own or the default."""
        return self.get(name) is not None

    def get(self, name: str) -> Any:
        """Returns the field as it is, or its default."""
        return self.values.get(self._names.get(name, name), self._defaults.get(name))

    def unsupported(self, name: str, supported: str) -> ModelLoadError:
        return unsupported(self.values, self._names.get(name, name), supported)

    def count(self, name: str, default: int | None = None) -> int:
        """Returns an integer within its range. default: what null and a field without a default mean."""
        value = default if name not in self else self.get(name)
        lowest, highest = _RANGES[name]
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise self.unsupported(name, f"an integer from {lowest} to {highest}")
        return value

    def fraction(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
            raise self.unsupported(name, "a number > 0, at most 1")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name) if name in self else default
        if not isinstance(value, bool):
            raise self.unsupported(name, "true or false")
        return value

    def number(self, name: str) -> float | None:
        """Returns a number above 0, or None."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e9:
            raise self.unsupported(name, "a number > 0, below 1e9")
        return float(value)

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """Returns one of `allowed`; the first where the field is left out."""
        value = self.get(name) if name in self else allowed[0]
        if value not in allowed:
            raise self.unsupported(name, " or ".join(map(repr, allowed)))
        return str(value)

    def dtype(self) -> str:
        """Returns `dtype`, as transformers 5 writes it, or the earlier `torch_dtype`; neither means float32."""
        field = "dtype" if self.values.get("dtype") is not None else "torch_dtype"
        value = str(self.values.get(field) or "float32").removeprefix("torch.")
        if value not in DTYPES:
            raise self.unsupported(field, f"one of {', '.join(DTYPES)}")
        return value

    def windows(self, num_layers: int) -> tuple[int | None, ...]:
        """Returns how many keys a query of each layer attends to; None: all.

        `layer_types` says which layers have a window. Without it, each architecture has a rule of its own.
        """
        slides = _WINDOW_RULES.get(self.architecture)
        if slides is None:
            return (None,) * num_layers
        types = self.values.get("layer_types")
        if self.architecture in _WITHOUT_LAYER_TYPES or types is None:
            sliding = [slides(self, layer) for layer in range(num_layers)]
        elif (
            not isinstance(types, (list, tuple))
            or len(types) < num_layers
            or any(each not in _LAYER_TYPES for each in types)
        ):
            raise self.unsupported("layer_types", "'full_attention' or 'sliding_attention' for every layer")
        else:
            sliding = [each == "sliding_attention" for each in types[:num_layers]]
        window = self.count("sliding_window") if any(sliding) else None
        return tuple(window if each else None for each in sliding)


def _slides_if_any(fields: ConfigFields, layer: int) -> bool:
    """Mistral: every layer, unless `sliding_window` is null."""
    return "sliding_window" in fields


def _slides_by_pattern(fields: ConfigFields, layer: int) -> bool:
    """Gemma 3: all layers but every `sliding_window_pattern`th."""
    return (layer + 1) % fields.count("sliding_window_pattern") != 0


def _slides_if_used(fields: ConfigFields, layer: int) -> bool:
    """Qwen3-MoE: every layer, with `use_sliding_window`."""
    return fields.flag("use_sliding_window") and "sliding_window" in fields


def _slides_from_max_window_layers(fields: ConfigFields, layer: int) -> bool:
    """Qwen: with `use_sliding_window`, the layers from `max_window_layers` on."""
    return (
        fields.flag("use_sliding_window") and "sliding_window" in fields and layer >= fields.count("max_window_layers")
    )


_LAYER_TYPES = ("full_attention", "sliding_attention")
# Architectures for which transformers does not read `layer_types`.
_WITHOUT_LAYER_TYPES = frozenset({"MistralForCausalLM", "Qwen3MoeForCausalLM"})
_WINDOW_RULES: Mapping[str, Callable[[ConfigFields, int], bool]] = {  # architectures that may have sliding windows
    "Gemma3ForCausalLM": _slides_by_pattern,
    "Gemma3ForConditionalGeneration": _slides_by_pattern,
    "MistralForCausalLM": _slides_if_any,
    "Qwen2ForCausalLM": _slides_from_max_window_layers,
    "Qwen3ForCausalLM": _slides_from_max_window_layers,
    "Qwen3MoeForCausalLM": _slides_if_used,
}

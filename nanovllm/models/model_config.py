"""ModelConfig: the content of a checkpoint's config.json, read without transformers and without torch.

`ModelConfig.from_folder(folder)` for a checkpoint; `models.builtin_shapes` has configurations that need no folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelLoadError, UnknownArgumentError, shown
from nanovllm.layers.rope_parameters import RopeParameters
from nanovllm.logs import events
from nanovllm.models.architecture_kinds import EXPERT_COUNTS
from nanovllm.models.architectures import ACTIVATIONS, GATES, LOCAL_ROPE, WITH_EXPERTS, WITHOUT_ROPE
from nanovllm.models.config_fields import ConfigFields, with_text_config
from nanovllm.models.expert_fields import EXPERT_FIELDS, ExpertsConfig, read_experts
from nanovllm.models.rope_fields import read_rope_parameters
from nanovllm.utils.logger import setup_logger
from nanovllm.utils.model_files import other_format, read_json

logger = setup_logger(__name__)

_ROPE_FIELDS = (
    "rope_theta",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
# Every field of config.json that is read below, and that hf_overrides may name.
_KNOWN_FIELDS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "ffn_dim",
    "word_embed_proj_dim",
    "enable_bias",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
    "layer_norm_elementwise_affine",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "max_position_embeddings",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "use_sliding_window",
    "sliding_window",
    "sliding_window_pattern",
    "max_window_layers",
    "layer_types",
    *EXPERT_COUNTS,
    *EXPERT_FIELDS,
    *_ROPE_FIELDS,
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer and what the engine needs to know about its checkpoint."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    embedding_size: int  # of a token's vector in the embedding and the head
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeParameters | None  # None: learned positions
    local_rope: RopeParameters | None  # of layers with a window, where these have their own
    query_pre_attn_scalar: float | None  # scores are divided by its root; None: by head_dim's
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    do_layer_norm_before: bool  # of OPT, as has_final_norm and has_norm_weights
    has_final_norm: bool
    has_norm_weights: bool
    hidden_act: str  # of the MLP
    experts: ExpertsConfig | None  # None: every layer has a dense MLP
    windows: tuple[int | None, ...]  # of each layer: how many keys a query attends to, its own included; None: all
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str  # the checkpoint's: one of DTYPES
    quantization_config: Mapping[str, Any] | None = None  # None: the weights are not quantised

    @property
    def max_context_len(self) -> int:
        """The longest context in tokens, with rope scaling: the upper bound of max_model_len."""
        # Gemma 3's max_position_embeddings is the length after scaling.
        if self.rope is None or self.local_rope is not None:
            return self.max_position_embeddings
        return self.rope.max_context_len(self.max_position_embeddings)

    @property
    def mlp_sizes(self) -> dict[str, int]:
        """The inner sizes of the layers' MLPs, by the names of their fields."""
        sparse = 0 if self.experts is None else len(self.experts.sparse_layers)
        sizes = {"intermediate_size": self.intermediate_size} if sparse < self.num_layers else {}
        return sizes if self.experts is None else sizes | {"moe_intermediate_size": self.experts.moe_intermediate_size}

    @classmethod
    def from_folder(cls, folder: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
        """Reads config.json and, if present, generation_config.json. A broken one of the latter counts as absent.

        `overrides` (the user's hf_overrides) replaces fields of config.json under the names they have there.
        Raises ModelLoadError for a missing or broken file and for a model that is not supported,
        UnknownArgumentError for an override that names no field.
        """
        folder = Path(folder)
        try:
            if not (folder / "config.json").exists():
                instead = f" This one {what}." if folder.is_dir() and (what := other_format(folder)) else ""
                raise ModelLoadError(
                    f"config.json is missing; a model folder has config.json and *.safetensors.{instead}"
                )
            return cls.from_dict(read_json(folder / "config.json"), _generation_config(folder), overrides)
        except ModelLoadError as error:
            raise ModelLoadError(f"{folder}: {error}") from error

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """Builds the config from dictionaries with the content of the two files."""
        overrides = overrides or {}
        for name in overrides:
            if name not in _KNOWN_FIELDS:
                raise UnknownArgumentError("hf_overrides", name, _KNOWN_FIELDS)
        text_config = with_text_config(config)
        fields = ConfigFields({**text_config, **overrides})
        _refuse_unsupported(fields)
        num_layers = fields.count("num_hidden_layers")
        hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        num_kv_heads = fields.count("num_key_value_heads", num_heads)
        head_dim = fields.count("head_dim", hidden_size // num_heads)  # of null; left out, it is the default
        if num_heads % num_kv_heads:
            raise fields.unsupported("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
        if head_dim % 2:
            raise fields.unsupported("head_dim", "an even number (rotary embedding turns pairs)")
        max_position_embeddings = fields.count("max_position_embeddings")
        norm_before = fields.flag("do_layer_norm_before", True)
        rope, local_rope = _read_ropes(fields.architecture, [text_config, overrides], max_position_embeddings)
        stop_sources = [overrides] if "eos_token_id" in overrides else [generation_config or {}, text_config]
        return cls(
            architecture=fields.architecture,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden_size,
            embedding_size=fields.count("word_embed_proj_dim", hidden_size),
            intermediate_size=fields.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.fraction("rms_norm_eps", 1e-6),
            rope=rope,
            local_rope=local_rope,
            query_pre_attn_scalar=fields.number("query_pre_attn_scalar"),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            do_layer_norm_before=norm_before,
            has_final_norm=norm_before and not fields.flag("_remove_final_layer_norm"),
            has_norm_weights=fields.flag("layer_norm_elementwise_affine", True),
            hidden_act=fields.choice("hidden_act", ACTIVATIONS.get(fields.architecture, GATES)),
            experts=read_experts(fields, num_layers),
            windows=fields.windows(num_layers),
            max_position_embeddings=max_position_embeddings,
            eos_token_ids=_eos_token_ids(stop_sources, fields.count("vocab_size")),
            dtype=fields.dtype(),
            quantization_config=fields.get("quantization_config"),
        )


def _refuse_unsupported(fields: ConfigFields) -> None:
    if "quantization_config" in fields and not isinstance(fields.get("quantization_config"), Mapping):
        raise fields.unsupported("quantization_config", "an object")
    for name in EXPERT_COUNTS:
        if fields.architecture not in WITH_EXPERTS and fields.get(name):
            raise fields.unsupported(name, "absent (this architecture is dense)")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if fields.values.get(name):
            raise fields.unsupported(name, "absent")


def _read_ropes(
    architecture: str, sources: Sequence[Mapping[str, Any]], max_position_embeddings: int
) -> tuple[RopeParameters | None, RopeParameters | None]:
    """Returns the rope of the model, and that of its layers with a window where they have their own.

    `sources` are config.json and the overrides, the latter stronger.
    """
    if architecture in WITHOUT_ROPE:
        return None, None
    if architecture not in LOCAL_ROPE:
        return read_rope_parameters(_rope_fields(sources), max_position_embeddings), None
    full = [{**source, "rope_parameters": _of_layers(source, "full_attention")} for source in sources]
    local = [
        {
            "rope_theta": source.get("rope_local_base_freq"),
            "rope_parameters": _of_layers(source, "sliding_attention"),
        }
        for source in sources
    ]
    return (
        read_rope_parameters({"rope_theta": 1_000_000.0} | _rope_fields(full), max_position_embeddings),
        read_rope_parameters(_rope_fields(local), max_position_embeddings),
    )


def _of_layers(source: Mapping[str, Any], layer_type: str) -> Any:
    """Returns the part of `rope_parameters` for a type of layers."""
    parameters = source.get("rope_parameters")
    return parameters.get(layer_type) if isinstance(parameters, Mapping) else parameters


def _rope_fields(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one dictionary from `rope_theta` beside `rope_scaling`, or from transformers 5's `rope_parameters`.

    An override of the scaling replaces the file's scaling, and keeps its theta unless it has its own.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        scaling = source.get("rope_scaling") or source.get("rope_parameters")
        if scaling is not None:
            if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
                raise ModelLoadError(
                    f"config.json: rope parameters {shown(scaling)} are not supported: they must be one flat object, "
                    "the same for every layer."
                )
            merged = {name: merged[name] for name in ("rope_theta",) if name in merged} | dict(scaling)
        if source.get("original_max_position_embeddings") is not None:  # beside the object, it goes before its own
            merged["original_max_position_embeddings"] = source["original_max_position_embeddings"]
        for name in ("rope_theta", "partial_rotary_factor"):
            # Within one source, transformers looks inside the scaling object first.
            if source.get(name) is not None and not (scaling and scaling.get(name) is not None):
                merged[name] = source[name]
    return merged


def _eos_token_ids(sources: Iterable[Mapping[str, Any]], vocab_size: int) -> tuple[int, ...]:
    """Returns all end-of-sequence ids in order, each once; any of them ends a sequence.

    An id outside the vocabulary, such as -1, ends none: it is left out, as null is, and the log says so.
    """
    found: dict[int, None] = {}
    for source in sources:
        value = source.get("eos_token_id")
        listed: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
        token_ids = [token_id for token_id in listed if token_id is not None]
        if any(not isinstance(token_id, int) or isinstance(token_id, bool) for token_id in token_ids):
            raise ModelLoadError(
                f"eos_token_id={shown(value)} is not supported: it must be token ids from 0 to {vocab_size - 1}."
            )
        inside = [token_id for token_id in token_ids if 0 <= token_id < vocab_size]
        found |= dict.fromkeys(inside)
        if len(inside) < len(token_ids):
            ignored = f"What eos_token_id={shown(value)} has outside the vocabulary"
            events.model_ignored.log(logger, ignored=ignored, why=f"token ids go from 0 to {vocab_size - 1}")
    return tuple(found)


def _generation_config(folder: Path) -> dict[str, Any]:
    """Returns the content of generation_config.json; nothing if it is absent or, as for transformers, broken."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except ModelLoadError as error:
        events.model_ignored.log(logger, ignored=str(path), why=str(error))
        return {}

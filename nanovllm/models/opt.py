"""OPT (arXiv:2205.01068): learned positions, layer norms and a ReLU MLP, all with biases.

The 350m model norms after each block instead of before, and its embeddings are narrower than its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.attention.interface import LayerKVCache
from nanovllm.layers.linear import Activation, ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parallel import Shard
from nanovllm.layers.parameter import WeightPart, empty_parameter
from nanovllm.models.decoder import DecoderAttention, DecoderForCausalLM, DecoderModel, StepInputs
from nanovllm.models.model_context import ModelContext
from nanovllm.utils.loader import CheckpointForm

_OFFSET = 2  # the position table's first rows are not used
_EPS = 1e-5
_ACTIVATIONS: Mapping[str, Activation] = {"relu": torch.relu, "gelu": F.gelu}


class _Table(nn.Module):
    """Parameters that every rank holds whole."""

    weight: nn.Parameter

    def __init__(self, context: ModelContext, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, empty_parameter(*shape, dtype=context.dtype))

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        names = {name: f"{prefix}.{name}" for name, _ in self.named_parameters()}
        return {full: [WeightPart(full, tuple(getattr(self, name).shape))] for name, full in names.items()}


class LayerNorm(_Table):
    """A layer norm that adds to the residual stream first, as `layers.layernorm.RMSNorm` does."""

    def __init__(self, context: ModelContext) -> None:
        shape = (context.config.hidden_size,)
        super().__init__(context, {"weight": shape, "bias": shape} if context.config.has_norm_weights else {})
        self.shape = shape

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        stream = hidden if residual is None else hidden + residual
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        return F.layer_norm(stream, self.shape, weight, bias, _EPS), stream


class OPTAttention(DecoderAttention):
    output_name = "out_proj"


class OPTDecoderLayer(nn.Module):
    def __init__(self, context: ModelContext, index: int) -> None:
        super().__init__()
        config, bias = context.config, context.config.attention_bias
        self.norms_before = config.do_layer_norm_before
        self.self_attn = OPTAttention(context, index, qkv_bias=bias, output_bias=bias)
        self.self_attn_layer_norm, self.final_layer_norm = LayerNorm(context), LayerNorm(context)
        inner = context.parallel.shard("intermediate_size", config.intermediate_size)
        self.fc1 = ColumnParallelLinear(context, config.hidden_size, {None: inner}, bias)
        self.fc1.act = _ACTIVATIONS[config.hidden_act]
        self.fc2 = RowParallelLinear(context, config.intermediate_size, config.hidden_size, bias=bias)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, step: StepInputs, kv_cache: LayerKVCache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.norms_before:
            hidden, residual = self.self_attn(hidden, residual, self.self_attn_layer_norm, step, kv_cache)
            inner, residual = self.fc1(hidden, residual, self.final_layer_norm)
            hidden, residual = self.fc2(inner, residual)
            return hidden, residual
        hidden, residual = self.self_attn(hidden, None, None, step, kv_cache)
        hidden = self.self_attn_layer_norm(hidden, residual)[0]
        hidden, residual = self.fc2(*self.fc1(hidden, None, None))
        return self.final_layer_norm(hidden, residual)[0], None


class _Projection(LinearLayer):
    """Between the widths of the embeddings and of the layers. Every rank computes it whole."""

    def __init__(self, context: ModelContext, input_size: int, output_size: int) -> None:
        outputs: dict[str | None, Shard] = {None: Shard.whole(output_size)}
        method = context.linear_method
        super().__init__(outputs, Shard.whole(input_size), method=method, dtype=context.dtype, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.method.multiply(self, hidden)


class _Output(nn.Module):
    """What follows the last layer: a norm and a projection, where the model has them."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        config = context.config
        self.final_layer_norm = LayerNorm(context) if config.has_final_norm else None
        narrower = config.embedding_size != config.hidden_size
        self.project_out = _Projection(context, config.hidden_size, config.embedding_size) if narrower else None

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden, residual)[0]
        elif residual is not None:
            hidden = hidden + residual
        return hidden if self.project_out is None else self.project_out(hidden), None


class OPTModel(DecoderModel):
    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, OPTDecoderLayer)
        config = context.config
        self.embed_positions = _Table(
            context, {"weight": (config.max_position_embeddings + _OFFSET, config.hidden_size)}
        )
        narrower = config.embedding_size != config.hidden_size
        self.project_in = _Projection(context, config.embedding_size, config.hidden_size) if narrower else None
        self.norm = _Output(context)

    def embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedded = super().embed(input_ids, positions)
        if self.project_in is not None:
            embedded = self.project_in(embedded)
        return embedded + F.embedding(positions + _OFFSET, self.embed_positions.weight)


class OPTForCausalLM(DecoderForCausalLM):
    checkpoint_form = CheckpointForm(
        {
            f"{decoder}{name}": f"model.{instead}"
            for decoder in ("model.decoder.", "decoder.")  # the files of the 125m model have the latter
            for name, instead in (
                ("final_layer_norm.", "norm.final_layer_norm."),
                ("project_out.", "norm.project_out."),
                ("", ""),
            )
        },
        torch_files=True,
    )

    def __init__(self, context: ModelContext) -> None:
        super().__init__(context, OPTModel(context))

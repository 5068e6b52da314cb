"""Quantization: which linear layers and experts of a model are quantised, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.experts.experts_method import Experts, ExpertsMethod
from nanovllm.experts.sparse_moe import TopKRouter
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear import QKVParallelLinear
from nanovllm.layers.linear_method import LinearLayer, LinearMethod
from nanovllm.logs import events
from nanovllm.models.causal_lm import CausalLM
from nanovllm.quantization.experts import DequantizedExperts, expert_parts, quantized_experts
from nanovllm.quantization.head import DequantizedHead
from nanovllm.quantization.linear import DequantizedLinear, matrix_parts
from nanovllm.quantization.matrix import Format
from nanovllm.quantization.module_names import matches
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.utils.device_memory import GB
from nanovllm.utils.loader import CheckpointForm
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

EVERY_LINEAR_LAYER = ("Linear",)
# Scales of a KV cache that some checkpoints have. The FP8 cache measures its own, for each token and head.
_CACHE_SCALES = ("k_scale", "v_scale", "attn.k_scale", "attn.v_scale", "k_proj.k_scale", "v_proj.v_scale")


@dataclass(frozen=True)
class Group:
    """Modules that a checkpoint stores in the same format."""

    targets: tuple[str, ...]  # names as in `module_names`, or "Linear": every linear layer
    format: Format


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a model are stored.

    A group that names a module counts before one that has every linear layer. Modules of no group are not quantised.
    """

    name: str  # as `quantization` and `quant_method` spell it
    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    has_head: bool = False  # the LM head is one of these matrices, unless it is the embedding
    is_made: bool = False  # from unquantised weights, when they are loaded

    def format_of(self, names: Sequence[str]) -> Format:
        """Returns the format of a module, which may have several names."""
        if not any(matches(name, self.ignore) for name in names):
            for group in self.groups:
                if any(matches(name, group.targets) for name in names):
                    return group.format
            for group in self.groups:
                if EVERY_LINEAR_LAYER[0] in group.targets:
                    return group.format
        return UNQUANTIZED

    def apply(self, model: CausalLM, device: torch.device) -> None:
        """Gives each linear layer of a model without weights, and the experts of each layer, their method.

        Raises ModelLoadError when the device cannot multiply by such weights.
        """
        linear_layers: Counter[str] = Counter()
        experts: Counter[str] = Counter()
        for prefix, module in model.named_modules():
            if isinstance(module, Experts):
                experts_method = self._experts_method(module, prefix, model.checkpoint_form)
                if experts_method is not None:
                    del module.gate_up_proj, module.down_proj
                    module.method = experts_method
                    experts_method.create_weights(module)
                experts[_kept_as(module.method)] += 1
            if isinstance(module, LinearLayer) and not isinstance(module, TopKRouter):
                method = self._method(module, prefix, model.checkpoint_form)
                if method is not None:
                    del module.weight
                    module.method = method
                    method.create_weights(module)
                linear_layers[_kept_as(module.method)] += 1
            if isinstance(module, QKVParallelLinear):
                model.redundant_weights |= {f"{prefix.rpartition('.')[0]}.{name}" for name in _CACHE_SCALES}
            if self.has_head and prefix == "lm_head" and isinstance(module, VocabParallelEmbedding):  # not tied
                form = self.format_of(_stored_names(prefix, model.checkpoint_form))
                if form != UNQUANTIZED:
                    module.method = DequantizedHead(form)
        has_fp8 = "fp8" in linear_layers or "fp8" in experts
        if has_fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ModelLoadError(
                f"FP8 weights cannot run on {torch.cuda.get_device_name(device)}: FP8 begins with compute capability "
                "8.9 (Ada, Hopper). quantization='int8' or 'int4' makes other weights from a checkpoint in bfloat16."
            )
        events.quantization_chosen.log(
            logger,
            quantization=self.name,
            origin="made from unquantised weights" if self.is_made else "as the checkpoint has it",
            gigabytes=sum(parameter.nbytes for parameter in model.parameters()) / GB,
            layers=_counts(linear_layers) + (f"; layers with experts: {_counts(experts)}" if experts else ""),
        )

    def _method(self, layer: LinearLayer, prefix: str, form: CheckpointForm) -> LinearMethod | None:
        """Returns the method of a layer; None if it is not quantised."""
        formats = [self.format_of(_stored_names(part.name, form)) for part in matrix_parts(layer, prefix)]
        if all(each == UNQUANTIZED for each in formats):
            return None
        method = formats[0].linear_method(layer) if len(set(formats)) == 1 else None
        return method or DequantizedLinear(formats)

    def _experts_method(self, experts: Experts, prefix: str, form: CheckpointForm) -> ExpertsMethod | None:
        """Returns the method of a layer's experts; None if they are not quantised."""
        formats = [
            {stack: [self.format_of(_stored_names(part.name, form)) for part in parts] for stack, parts in each.items()}
            for each in expert_parts(experts, prefix)
        ]
        found = {form for each in formats for stack in each.values() for form in stack}
        if found == {UNQUANTIZED}:
            return None
        method = quantized_experts(experts, found.pop()) if len(found) == 1 else None
        return method or DequantizedExperts(formats)


def _kept_as(method: object) -> str:
    return getattr(method, "kept_as", "unquantised")


def _counts(methods: Counter[str]) -> str:
    return ", ".join(f"{count} {kept_as}" for kept_as, count in sorted(methods.items()))


def _stored_names(name: str, form: CheckpointForm) -> list[str]:
    """Returns the model's name of a module, and what the checkpoint may have instead."""
    instead = [(prefix, model) for prefix, model in form.prefixes.items() if model is not None]
    return [name, *(prefix + name.removeprefix(model) for prefix, model in instead if name.startswith(model))]

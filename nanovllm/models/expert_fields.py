"""Reads the fields of a config.json that describe experts, and which layers have them."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.models.architectures import WITH_EXPERTS
from nanovllm.models.config_fields import ConfigFields

EXPERT_FIELDS = (
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of a model's sparse layers."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # of each expert
    norm_topk_prob: bool  # whether the weights of a token's experts add up to 1
    sparse_layers: frozenset[int]  # the other layers have a dense MLP

    @property
    def active_size(self) -> int:
        """The intermediate size of a dense MLP that would multiply by as many weights for each token."""
        return self.num_experts_per_tok * self.moe_intermediate_size


def read_experts(fields: ConfigFields, num_layers: int) -> ExpertsConfig | None:
    """Returns the experts of a model; None for a dense one."""
    if fields.architecture not in WITH_EXPERTS:
        return None
    num_experts = fields.count("num_experts")
    if "num_local_experts" in fields:  # as transformers 5 writes it
        if fields.values.get("num_experts") not in (None, fields.get("num_local_experts")):
            raise fields.unsupported("num_local_experts", f"num_experts={num_experts}, or absent")
        num_experts = fields.count("num_local_experts")
    per_token = fields.count("num_experts_per_tok")
    if per_token > num_experts:
        raise fields.unsupported("num_experts_per_tok", f"at most num_experts={num_experts}")
    dense = fields.get("mlp_only_layers") or ()
    if not isinstance(dense, (list, tuple)) or any(type(layer) is not int for layer in dense):
        raise fields.unsupported("mlp_only_layers", "a list of layers' indices")
    step = fields.count("decoder_sparse_step", 1)
    return ExpertsConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        moe_intermediate_size=fields.count("moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        sparse_layers=frozenset(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense),
    )

"""The bytes that decoding has to read, from a `ModelConfig` and the requests. No torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from nanovllm.benchmarks.workloads import Requests
from nanovllm.models.architectures import GATES
from nanovllm.models.expert_fields import ExpertsConfig
from nanovllm.models.model_config import ModelConfig


@dataclass(frozen=True)
class Traffic:
    """Bytes that decoding has to read. Activations, KV writes and prefill's reads are small and not counted."""

    weight_bytes: int  # per step
    kv_bytes: int  # of all decode rows at their contexts

    def total(self, num_steps: int) -> int:
        """Returns the bytes read in `num_steps` steps."""
        return num_steps * self.weight_bytes + self.kv_bytes


def traffic(config: ModelConfig, itemsize: int, requests: Requests, *, fp8_cache: bool = False) -> Traffic:
    """Returns the traffic of decoding `requests`.

    A request of p prompt and n output tokens decodes n - 1 times, at the contexts p + 1 … p + n - 1; prefill gives
    the first token. A prefix that all requests share has to be read once per step, not once per row.
    """
    layer_bytes = kv_bytes_per_token(config, itemsize, fp8_cache=fp8_cache) // config.num_layers
    num_tokens = sum(count * _tokens_read(requests, window) for window, count in Counter(config.windows).items())
    num_weights = weights_per_step(config, mean_decode_rows(requests))
    return Traffic(weight_bytes=itemsize * num_weights, kv_bytes=layer_bytes * num_tokens)


def mean_decode_rows(requests: Requests) -> float:
    """Returns the mean number of rows in the steps that decode, when all requests run at once."""
    return sum(count - 1 for count in requests.output_lens) / max(max(requests.output_lens) - 1, 1)


def _tokens_read(requests: Requests, window: int | None) -> int:
    """Returns how many tokens' keys a layer with this window reads. Only a layer without one reads a prefix once."""
    lengths = [(len(prompt), count) for prompt, count in zip(requests.prompts, requests.output_lens, strict=True)]
    if window is not None:
        return sum(min(context, window) for length, count in lengths for context in range(length + 1, length + count))
    num_row_tokens = sum(
        (count - 1) * (length - requests.shared_len) + count * (count - 1) // 2 for length, count in lengths
    )
    return num_row_tokens + (max(requests.output_lens) - 1) * requests.shared_len  # at least so many steps decode


def kv_bytes_per_token(config: ModelConfig, itemsize: int, *, fp8_cache: bool = False) -> int:
    """Returns the bytes of a token's keys and values in all layers; an FP8 cache adds a float32 scale per head."""
    head_bytes = config.head_dim + 4 if fp8_cache else config.head_dim * itemsize
    return 2 * config.num_layers * config.num_kv_heads * head_bytes


def weights_per_step(config: ModelConfig, num_rows: float = 1) -> int:
    """Returns the number of parameters that a step reads: layers and LM head, but not the embedding.

    Of a layer's experts, those that `num_rows` tokens choose on average.
    """
    hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    attention = hidden * config.head_dim * (heads + config.num_heads)
    if config.attention_bias:
        attention += heads * config.head_dim + hidden
    mlp = (3 if config.hidden_act in GATES else 2) * hidden * config.intermediate_size
    norms = 2 * hidden + 2 * config.head_dim
    mlps = config.num_layers * mlp
    if (experts := config.experts) is not None:
        num_read = experts.num_experts * share_of_experts(experts, num_rows)
        sparse = hidden * (experts.num_experts + round(num_read * 3 * experts.moe_intermediate_size))
        mlps += len(experts.sparse_layers) * (sparse - mlp)
    return config.num_layers * (attention + norms) + mlps + hidden + config.vocab_size * config.embedding_size


def share_of_experts(experts: ExpertsConfig, num_rows: float) -> float:
    """Returns the share of a layer's experts that `num_rows` tokens choose on average when all are equally likely."""
    return 1 - math.pow(1 - experts.num_experts_per_tok / experts.num_experts, num_rows)


def quantized_weight_bytes(config: ModelConfig, requests: Requests, *, stored: int, experts: int, unread: int) -> int:
    """Returns the bytes of quantised weights that a step reads, of `stored` bytes in all.

    experts: of those, the bytes of all experts. unread: of those, the bytes of what no step reads: the embedding.
    """
    if config.experts is not None:
        unread += round(experts * (1 - share_of_experts(config.experts, mean_decode_rows(requests))))
    return stored - unread

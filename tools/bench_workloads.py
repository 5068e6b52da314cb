"""What bench.py runs and what it holds the results against: workloads, bytes that must be moved, peers' figures.

No torch here: the sizes follow from a `ModelConfig` alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from nanovllm.models.model_config import ModelConfig

_LARGEST_TOKEN_ID = 10_000  # what nano-vllm's benchmark draws from


@dataclass(frozen=True)
class Requests:
    """Prompts and how many tokens each asks for."""

    prompts: list[list[int]]
    output_lens: list[int]
    shared_len: int  # tokens that all prompts begin with

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)


@dataclass(frozen=True)
class Workload:
    """Lengths are drawn evenly from (least, most), both included."""

    about: str
    num_seqs: int
    prompt_len: tuple[int, int]  # without the shared prefix
    output_len: tuple[int, int]
    shared_len: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request it can draw."""
        return self.shared_len + self.prompt_len[1] + self.output_len[1]

    def draw(self, num_seqs: int, vocab_size: int, seed: int) -> Requests:
        """The same requests for a seed; with seed 0 and "classic" those of nano-vllm's bench.py, token for token."""
        rng = random.Random(seed)
        largest = min(_LARGEST_TOKEN_ID, vocab_size - 1)

        def tokens(count: int) -> list[int]:
            return [rng.randint(0, largest) for _ in range(count)]

        prefix = tokens(self.shared_len)
        prompts = [prefix + tokens(rng.randint(*self.prompt_len)) for _ in range(num_seqs)]
        output_lens = [rng.randint(*self.output_len) for _ in range(num_seqs)]
        return Requests(prompts, output_lens, self.shared_len)


WORKLOADS: Mapping[str, Workload] = {
    "classic": Workload("nano-vllm's benchmark", 256, (100, 1024), (100, 1024)),
    "single": Workload("one user waits", 1, (128, 128), (512, 512)),
    "prefill": Workload("prompts only", 64, (2048, 2048), (1, 1)),
    "shared": Workload("all prompts begin with the same 2048 tokens", 256, (64, 64), (64, 64), shared_len=2048),
    "long": Workload("long contexts", 32, (8000, 8000), (256, 256)),
    "wide": Workload("many short requests, 512 at a time", 2048, (64, 64), (128, 128)),
    "mixed": Workload("mixed lengths, small enough for a CPU", 64, (16, 256), (16, 256)),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes that decoding has to read. Activations, KV writes and what prefill reads are left out: they are small."""

    weight_bytes: int  # of one step
    kv_bytes: int  # of all decode rows, each at its context

    def total(self, num_steps: int) -> int:
        return num_steps * self.weight_bytes + self.kv_bytes


def traffic(config: ModelConfig, itemsize: int, requests: Requests, *, fp8_cache: bool = False) -> Traffic:
    """A request of p prompt and n output tokens decodes n - 1 times (prefill gives the first token), at the
    contexts p + 1 … p + n - 1. A prefix that all requests share must be read once a step, not once a row.
    """
    num_row_tokens = sum(
        (count - 1) * (len(prompt) - requests.shared_len) + count * (count - 1) // 2
        for prompt, count in zip(requests.prompts, requests.output_lens, strict=True)
    )
    num_shared_tokens = (max(requests.output_lens) - 1) * requests.shared_len  # at least so many steps decode
    return Traffic(
        weight_bytes=itemsize * weights_per_step(config),
        kv_bytes=kv_bytes_per_token(config, itemsize, fp8_cache=fp8_cache) * (num_row_tokens + num_shared_tokens),
    )


def kv_bytes_per_token(config: ModelConfig, itemsize: int, *, fp8_cache: bool = False) -> int:
    """Keys and values of one token in all layers; an FP8 cache has a float32 scale for each head of them."""
    head_bytes = config.head_dim + 4 if fp8_cache else config.head_dim * itemsize
    return 2 * config.num_layers * config.num_kv_heads * head_bytes


def weights_per_step(config: ModelConfig) -> int:
    """Parameters that a step reads: the layers and the LM head. Of the embedding it reads a few rows."""
    hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    attention = hidden * config.head_dim * (heads + config.num_heads)
    if config.attention_bias:
        attention += heads * config.head_dim + hidden
    mlp = 3 * hidden * config.intermediate_size
    norms = 2 * hidden + 2 * config.head_dim
    return config.num_layers * (attention + mlp + norms) + hidden + config.vocab_size * hidden


@dataclass(frozen=True)
class Peers:
    """What other engines did: seconds of the best run after the first, by workload."""

    model: str
    measured: str  # when, where and with what
    seconds: Mapping[str, Mapping[str, float]]
    fp8_seconds: Mapping[str, Mapping[str, float]]  # with an FP8 KV cache
    start_seconds: Mapping[str, float]  # to the first request, nothing compiled before


def _by_peer(nano_vllm: float, mini_sglang: float, vllm: float) -> Mapping[str, float]:
    return {"nano-vllm": nano_vllm, "mini-sglang": mini_sglang, "vLLM": vllm}


PEERS = Peers(
    model="qwen3-0.6b",
    measured="2026-11-21, one NVIDIA H200, torch 2.11+cu130, bfloat16; nano-vllm of April 2026 with flash-attn 2.8.3, "
    "mini-sglang with FA3 and FlashInfer, vLLM 0.22.1",
    seconds={
        "classic": _by_peer(6.74, 6.14, 5.66),
        "single": _by_peer(1.144, 0.899, 0.849),
        "prefill": _by_peer(0.422, 0.318, 0.355),
        "shared": _by_peer(1.20, 1.29, 1.01),
        "long": _by_peer(3.76, 3.21, 3.10),
        "wide": _by_peer(4.00, 5.43, 4.27),
    },
    fp8_seconds={"classic": {"vLLM": 5.42}, "long": {"vLLM": 2.75}},
    start_seconds=_by_peer(26, 68, 74),
)


def peers_of(model: str, workload: str, num_seqs: int, *, fp8_cache: bool = False) -> Mapping[str, float]:
    """Seconds of the peers that ran the same, with the same kind of cache; empty where nobody did."""
    same = model.rpartition("/")[2].lower() == PEERS.model and num_seqs == WORKLOADS[workload].num_seqs
    seconds = PEERS.fp8_seconds if fp8_cache else PEERS.seconds
    return seconds.get(workload, {}) if same else {}

"""The times of other engines for the same workloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanovllm.benchmarks.workloads import WORKLOADS


@dataclass(frozen=True)
class Peers:
    """Seconds of the best run after the warm-up, by workload and engine."""

    model: str
    measured: str  # when, where and with what
    seconds: Mapping[str, Mapping[str, float]]
    fp8_seconds: Mapping[str, Mapping[str, float]]  # with an FP8 KV cache


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
)


def peers_of(model: str, workload: str, num_seqs: int, *, fp8_cache: bool = False) -> Mapping[str, float]:
    """Returns the seconds of each engine measured on the same work with the same kind of cache, or nothing."""
    same = model.rpartition("/")[2].lower() == PEERS.model and num_seqs == WORKLOADS[workload].num_seqs
    seconds = PEERS.fp8_seconds if fp8_cache else PEERS.seconds
    return seconds.get(workload, {}) if same else {}

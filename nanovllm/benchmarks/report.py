"""The report of a benchmark: the entries of its JSON line, and the same as text.

The bandwidth reached is what decoding has to read (`traffic`) over the whole time of a run, prefill included.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanovllm.benchmarks.peers import PEERS, peers_of
from nanovllm.benchmarks.settings import Say
from nanovllm.benchmarks.traffic import quantized_weight_bytes, traffic
from nanovllm.benchmarks.workloads import Requests
from nanovllm.models.model_config import ModelConfig

BUSY = 0.5  # load average above which a CPU's figures come with a warning


@dataclass(frozen=True)
class Run:
    """One `generate` over a workload's requests."""

    seconds: float
    decode_seconds: float  # the part spent in steps without a prompt
    num_steps: int
    mean_batch: float  # tokens sampled per step
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int  # of those, right
    token_ids: list[list[int]]


def result_of(
    name: str, requests: Requests, runs: Sequence[Run], config: ModelConfig, report: dict[str, Any]
) -> dict[str, Any]:
    """Returns one entry of the report's `results`. The first of `runs` is the warm-up."""
    best = min(runs[1:], key=lambda run: run.seconds)
    itemsize = getattr(torch, report["engine"]["dtype"]).itemsize
    fp8_cache = report["engine"]["kv_cache_dtype"] == "fp8_e4m3"
    needed = traffic(config, itemsize, requests, fp8_cache=fp8_cache)
    is_quantized = report["engine"]["quantization"] is not None
    if is_quantized:
        embedding = 0 if config.tie_word_embeddings else itemsize * config.vocab_size * config.embedding_size
        stored, experts = report["weight_bytes"], report["expert_bytes"]
        weight_bytes = quantized_weight_bytes(config, requests, stored=stored, experts=experts, unread=embedding)
        needed = replace(needed, weight_bytes=weight_bytes)
    reached = needed.total(best.num_steps) / best.seconds
    peers = peers_of(report["model"], name, len(requests.prompts), fp8_cache=fp8_cache)
    return {
        "workload": name,
        "num_seqs": len(requests.prompts),
        "num_prompt_tokens": requests.num_prompt_tokens,
        "num_output_tokens": requests.num_output_tokens,
        "warm_up_seconds": runs[0].seconds,
        **spread_of([run.seconds for run in runs[1:]]),
        "output_tokens_per_second": requests.num_output_tokens / best.seconds,
        "prompt_tokens_per_second": requests.num_prompt_tokens / best.seconds,
        "num_steps": best.num_steps,
        "mean_batch": best.mean_batch,
        "num_preemptions": best.num_preemptions,
        "num_draft_tokens": best.num_draft_tokens,
        "num_accepted_tokens": best.num_accepted_tokens,
        "weight_bytes_per_step": needed.weight_bytes,
        "kv_bytes": needed.kv_bytes,
        "bytes_moved": needed.total(best.num_steps),
        "bytes_per_second": reached,
        "share_of_copy_bandwidth": reached / report["copy_bytes_per_second"],
        "peers_seconds": {} if is_quantized or report["tensor_parallel_size"] > 1 else dict(peers),
    }


def spread_of(seconds: list[float]) -> dict[str, Any]:
    """Returns best, median and spread of runs; the spread is (slowest − best) / median."""
    best, median = min(seconds), statistics.median(seconds)
    spread = (max(seconds) - best) / median
    return {"run_seconds": seconds, "best_seconds": best, "median_seconds": median, "spread": spread}


def introduce(report: dict[str, Any], say: Say) -> None:
    """Prints versions, device and engine."""
    engine, found = report["engine"], report["versions"]
    say(
        f"nanovllm {found['nanovllm']}, torch {found['torch']} on {report['device_name']}\n"
        f"model {report['model']} (load_format={report['load_format']}) in {engine['dtype']}, "
        f"weights in {engine['quantization'] or engine['dtype']}; attention: prefill "
        f"{engine['prefill_backend']}, decode {engine['decode_backend']}, pages of {engine['block_size']} tokens "
        f"in {engine['kv_cache_dtype']}; "
        f"CUDA graphs: {'yes' if engine['use_cuda_graphs'] else 'no'}; temperature {report['temperature']}; "
        f"tensor parallel size {report['tensor_parallel_size']}\n"
        f"engine started in {report['start_seconds']:.2f} s; first output {report['first_output_seconds']:.2f} s after "
        f"the start of this script\n"
        f"copy bandwidth of all devices: {report['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written"
    )
    if engine["device"] == "cpu" and (report["load_average"] or 0) > BUSY:
        say(
            f"Other work runs on this machine (load average {report['load_average']:.1f}): threads that wait for each "
            "other then take many times as long, so these figures say little."
        )


def describe(result: dict[str, Any], say: Say) -> None:
    """Prints one entry of `results`."""
    say(
        f"  best {result['best_seconds']:.3f} s, median {result['median_seconds']:.3f} s, "
        f"spread {result['spread']:.1%}\n"
        f"  {result['output_tokens_per_second']:,.0f} output tokens/s, "
        f"{result['prompt_tokens_per_second']:,.0f} prompt tokens/s\n"
        f"  {result['num_steps']:,} steps, mean batch {result['mean_batch']:.1f}, "
        f"{result['num_preemptions']} preemptions\n"
        f"  to be read: {result['bytes_moved'] / 1e9:,.1f} GB "
        f"(weights {result['weight_bytes_per_step'] / 1e9:.3f} GB a step, KV {result['kv_bytes'] / 1e9:,.1f} GB), "
        f"at {result['bytes_per_second'] / 1e9:,.1f} GB/s: "
        f"{result['share_of_copy_bandwidth']:.1%} of the copy bandwidth"
    )
    if result["num_draft_tokens"]:
        say(f"  {result['num_draft_tokens']:,} tokens drafted, {result['num_accepted_tokens']:,} of them right")
    if result["peers_seconds"]:
        peers = ", ".join(f"{name} {seconds} s" for name, seconds in result["peers_seconds"].items())
        say(f"  peers: {peers} ({PEERS.measured})")

"""The fields of events. A name has one type and one meaning in all events."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from types import GenericAlias, UnionType

from nanovllm.logs.records import Event


@dataclass(frozen=True)
class Field:
    """A field's type, as in an annotation, and its meaning."""

    type: type | UnionType | GenericAlias
    meaning: str


SHAPE = list[int]
FIELDS: Mapping[str, Field] = {
    "activations_gb": Field(float, "memory of the largest steps apart from weights and cache, in GB"),
    "allocated_bytes": Field(int, "GPU memory in use by torch tensors of this process"),
    "arrival": Field(float, "when the request arrived, on the clock `mono`"),
    "available_gb": Field(float, "memory left for the KV cache, in GB"),
    "batched_tokens": Field(int, "prompt tokens that the step computes"),
    "block_size": Field(int, "tokens in a block of the KV cache"),
    "bytes": Field(int, "size of the message"),
    "cache_hits": Field(int, "blocks found in the prefix cache"),
    "coming": Field(int, "blocks that become free when steps in flight end"),
    "decode": Field(str, "attention backend for decoding"),
    "decode_reason": Field(str, "why this backend was chosen for decoding"),
    "decode_step": Field(int, "number of the decode step in this generation, from 1"),
    "decode_time": Field(float, "seconds in steps that only decoded"),
    "device": Field(int | str, "index of the GPU, or the device's name"),
    "dtype": Field(str, "data type of the model, or of the KV cache"),
    "e2e_ms": Field(float, "from arrival to the end"),
    "edits_logits": Field(bool, "whether rows have logit edits: penalties, token biases, bans or a grammar's mask"),
    "elapsed_ms": Field(float | None, "wall time; null: not measured"),
    "endpoint": Field(str, "URL of an OpenTelemetry collector"),
    "error": Field(str, "the error"),
    "failed": Field(bool, "whether the body raised"),
    "finished": Field(float, "when the sequence ended, on the clock `mono`"),
    "first_scheduled": Field(float | None, "when its first step was scheduled, on the clock `mono`; null: never"),
    "first_token": Field(float | None, "when its first token was known, on the clock `mono`; null: never"),
    "folder": Field(str, "where the profile is written"),
    "free_blocks": Field(int, "blocks of the KV cache that are free now"),
    "free_bytes": Field(int, "free memory of the whole device"),
    "free_gb": Field(float, "free memory of the whole device, in GB"),
    "freed": Field(int, "blocks that are free now: no other sequence holds them"),
    "generation_tokens_per_second": Field(float, "tokens sampled per second since the last such event"),
    "gigabytes": Field(float, "size of the weights, in GB"),
    "gpu_ms": Field(float | None, "GPU time between two CUDA events; null: not measured"),
    "head_dim": Field(int, "size of a head"),
    "hidden_size": Field(int, "size of a hidden state"),
    "is_prefill": Field(bool, "whether the step computes any prompt token"),
    "itl_ms": Field(float | None, "mean time between tokens; null: fewer than two"),
    "k": Field(SHAPE, "shape of the keys"),
    "k_cache": Field(SHAPE, "shape of the layer's key cache"),
    "kind": Field(str, "prefill, decode or mixed (PREFILL, DECODE in `runner.*`)"),
    "kv_cache_usage": Field(float, "share of the blocks in use, 0 to 1"),
    "logits": Field(SHAPE, "shape of the logits"),
    "lost_rank": Field(int, "rank of the process that was lost"),
    "max_graph_tokens": Field(int, "tokens of the largest step with prompt tokens that is a CUDA graph"),
    "max_model_len": Field(int, "maximum number of tokens of a request, prompt and output together"),
    "max_seqlen_k": Field(int, "largest number of keys of a sequence in the step"),
    "max_seqlen_q": Field(int, "largest number of queries of a sequence in the step"),
    "max_tokens": Field(int, "maximum number of output tokens of the request"),
    "model": Field(str, "folder or name of the checkpoint"),
    "new": Field(int, "free blocks taken"),
    "num_blocks": Field(int, "number of blocks of the sequence, or of the whole KV cache"),
    "num_cached_tokens": Field(int, "prompt tokens found in the prefix cache"),
    "num_captured": Field(int, "CUDA graphs captured so far"),
    "num_decode_seqs": Field(int, "sequences that decode in the step"),
    "num_decode_tokens": Field(int, "decode tokens of the step; they come before prompt tokens"),
    "num_files": Field(int, "files read; 0: random weights"),
    "num_finished": Field(int, "sequences that the step finished"),
    "num_heads": Field(int, "query heads (in `attention.store`: heads stored)"),
    "num_kv_heads": Field(int, "key-value heads"),
    "num_layers": Field(int, "decoder layers"),
    "num_logprobs": Field(
        int | None, "number of most likely tokens with log-probabilities; null: no request asks for them"
    ),
    "num_output_tokens": Field(int, "tokens that the step sampled"),
    "num_prefill_seqs": Field(int, "sequences whose prompt the step computes, in whole or in part"),
    "num_prefill_tokens": Field(int, "prompt tokens that the step computed"),
    "num_prompt_tokens": Field(int, "length of the prompt, or of all prompts"),
    "num_prompts": Field(int, "number of prompts of the call"),
    "num_rows": Field(int, "sampled rows of the graph"),
    "num_running": Field(int, "running sequences"),
    "num_seqs": Field(int, "sequences of the step"),
    "num_sharing": Field(int, "decode rows that share the reading of a common prefix"),
    "num_slots": Field(int, "cache slots that are written"),
    "num_steps": Field(int, "steps of the generation"),
    "num_tensors": Field(int, "tensors loaded"),
    "num_threads": Field(int, "threads of torch's operators on a CPU, in this process"),
    "num_tokens": Field(int, "tokens of the step, or tokens to compute again"),
    "num_waiting": Field(int, "sequences that wait to run"),
    "operation": Field(str, "the collective, or the kind of message"),
    "output": Field(SHAPE, "shape of the layer's output"),
    "output_len": Field(int, "tokens generated"),
    "part": Field(str, "the model or the sampling"),
    "parts": Field(str, "the parts of `seconds`, as text"),
    "peak_bytes": Field(int, "peak memory: of torch on a GPU, otherwise of the process"),
    "preempted": Field(int, "sequences preempted since the last such event"),
    "preemptions": Field(int, "how often sequences (or this one) were preempted"),
    "prefill": Field(str, "attention backend for prompts"),
    "prefill_reason": Field(str, "why this backend was chosen for prompts"),
    "prefill_time": Field(float, "seconds in steps that computed any prompt token"),
    "prefix_cache_hit_rate": Field(float, "share of prompt tokens found in the prefix cache, 0 to 1"),
    "problem": Field(str, "what is wrong"),
    "prompt": Field(str | None, "the prompt's text; null: it was token ids"),
    "prompt_tokens_per_second": Field(float, "prompt tokens computed per second since the last such event"),
    "q": Field(SHAPE, "shape of the queries"),
    "queue_ms": Field(float | None, "from arrival to the first step; null: never scheduled"),
    "rank": Field(int, "rank of the process that logs"),
    "reason": Field(str, "eos, max_tokens (also when the model's length is reached), stop or abort"),
    "request_id": Field(str, "the request"),
    "reserved_bytes": Field(int, "GPU memory reserved by torch in this process"),
    "resident_bytes": Field(int, "resident memory of this process"),
    "saved_tokens": Field(int, "tokens that a step reads once instead of once for each row"),
    "seconds": Field(float | dict[str, float], "time taken; in `engine.startup`, by part"),
    "section": Field(str, "what is timed"),
    "seq_id": Field(int, "number of the sequence, in order of arrival"),
    "seqs": Field(list[str], "the sequences, at most 16"),
    "shapes": Field(dict[str, object] | list[object], "shapes by name, or in order"),
    "shares_prefix": Field(bool, "whether common prefixes are read once for several rows"),
    "size": Field(int, "sequences in the batch"),
    "source": Field(str, "where the level was set"),
    "state": Field(str, "whether the engine goes on"),
    "step": Field(int, "number of the step since the engine started"),
    "table": Field(str, "the most expensive operators"),
    "table_file": Field(str, "the file with the table"),
    "text": Field(str, "the output as text"),
    "threads_reason": Field(str, "why this number of threads"),
    "total": Field(int, "blocks that the sequence held"),
    "total_bytes": Field(int, "memory of the whole device"),
    "total_gb": Field(float, "size of the KV cache (in `kv_cache.sizing`: of the device), in GB"),
    "total_output_tokens": Field(int, "tokens generated"),
    "total_seconds": Field(float, "time from the first import to the first request"),
    "total_tokens": Field(int, "tokens of the step"),
    "trace": Field(str, "the file with the Chrome trace"),
    "truncates": Field(bool, "whether rows use top-k, top-p or min-p"),
    "ttft_ms": Field(float | None, "from arrival to the first token; null: there was none"),
    "used_blocks": Field(int, "blocks of the KV cache in use"),
    "utilization": Field(float, "the setting gpu_memory_utilization"),
    "v": Field(SHAPE, "shape of the values"),
    "v_cache": Field(SHAPE, "shape of the layer's value cache"),
    "valid_levels": Field(str, "the valid levels"),
    "vocab_size": Field(int, "size of the vocabulary"),
    "wall_ms": Field(float, "wall time; for a section on a GPU, the time to launch its work"),
    "wanted": Field(int, "the requested length"),
    "weights_gb": Field(float, "size of the weights, in GB"),
    "what": Field(str, "`failed` or `was interrupted`"),
    "why_eager": Field(str, "why a CUDA graph does not serve"),
    "world_size": Field(int, "number of ranks"),
}


def fields_of(event: Event) -> dict[str, tuple[Field, bool]]:
    """Returns an event's fields, in the order sentence, `more`, `optional`, each with whether it is always present."""
    placeholders = [name for _, name, _, _ in string.Formatter().parse(event.sentence) if name]
    names = [*placeholders, *event.more.split(), *event.optional.split()]
    optional = event.optional.split()
    return {name: (FIELDS[name], name not in optional) for name in names if name in FIELDS}

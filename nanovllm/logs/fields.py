"""What the fields of events are: one type and one meaning for a name, whichever event has it."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from types import GenericAlias, UnionType

from nanovllm.logs.records import Event


@dataclass(frozen=True)
class Field:
    """What a field holds: `type`, as an annotation has it, and what it means."""

    type: type | UnionType | GenericAlias
    meaning: str


SHAPE = list[int]
FIELDS: Mapping[str, Field] = {
    "activations_gb": Field(float, "what the largest steps take beside weights and cache, in GB"),
    "allocated_bytes": Field(int, "what torch's tensors hold on the GPU, in this process"),
    "arrival": Field(float, "when the request came, on the clock `mono`"),
    "available_gb": Field(float, "what is left for the KV cache, in GB"),
    "batched_tokens": Field(int, "prompt tokens that the step computes"),
    "block_size": Field(int, "tokens in a block of the KV cache"),
    "bytes": Field(int, "size of the message"),
    "cache_hits": Field(int, "blocks found in the prefix cache"),
    "coming": Field(int, "blocks that come free when steps in flight end"),
    "decode": Field(str, "attention backend for decoding"),
    "decode_reason": Field(str, "why that one"),
    "decode_step": Field(int, "decode steps of this generation, this one included"),
    "decode_time": Field(float, "seconds in steps that only decoded"),
    "device": Field(int | str, "index of the GPU, or the device's name"),
    "dtype": Field(str, "of what is spoken of: the model, or the KV cache"),
    "e2e_ms": Field(float, "from arrival to the end"),
    "elapsed_ms": Field(float | None, "wall time it took; null: not measured"),
    "endpoint": Field(str, "URL of an OpenTelemetry collector"),
    "error": Field(str, "the exception"),
    "failed": Field(bool, "whether the body raised"),
    "finished": Field(float, "when the sequence ended, on the clock `mono`"),
    "first_scheduled": Field(float | None, "when its first step was scheduled, on the clock `mono`; null: never"),
    "first_token": Field(float | None, "when its first token was known, on the clock `mono`; null: never"),
    "folder": Field(str, "where the profile is written"),
    "free_blocks": Field(int, "blocks of the KV cache that are free now"),
    "free_bytes": Field(int, "free memory of the whole device"),
    "free_gb": Field(float, "free memory of the whole device, in GB"),
    "freed": Field(int, "blocks that nobody else holds and that are free now"),
    "generation_tokens_per_second": Field(float, "tokens sampled, since the last such event"),
    "gigabytes": Field(float, "size of the weights, in GB"),
    "gpu_ms": Field(float | None, "GPU time between two CUDA events; null: not measured"),
    "head_dim": Field(int, "size of a head"),
    "hidden_size": Field(int, "size of a hidden state"),
    "is_prefill": Field(bool, "whether any prompt token is computed"),
    "itl_ms": Field(float | None, "mean time between tokens; null: fewer than two"),
    "k": Field(SHAPE, "shape of the keys"),
    "k_cache": Field(SHAPE, "shape of the layer's key cache"),
    "kind": Field(str, "prefill, decode or mixed (PREFILL, DECODE in `runner.*`)"),
    "kv_cache_usage": Field(float, "share of the blocks in use, 0 to 1"),
    "logits": Field(SHAPE, "shape of the logits"),
    "lost_rank": Field(int, "rank of the process that is gone"),
    "max_model_len": Field(int, "longest request in tokens, prompt and output together"),
    "max_seqlen_k": Field(int, "most keys that a sequence of the step has"),
    "max_seqlen_q": Field(int, "most queries that a sequence of the step has"),
    "max_tokens": Field(int, "most tokens the request may get"),
    "model": Field(str, "folder or name of the checkpoint"),
    "new": Field(int, "blocks taken from the free ones"),
    "num_blocks": Field(int, "blocks: of the sequence, or of the whole KV cache"),
    "num_cached_tokens": Field(int, "prompt tokens found in the prefix cache"),
    "num_decode_seqs": Field(int, "sequences that decode in the step"),
    "num_decode_tokens": Field(int, "tokens of the step that are decoded, before those of prompts"),
    "num_files": Field(int, "files read; 0: random weights"),
    "num_finished": Field(int, "sequences that the step ended"),
    "num_heads": Field(int, "query heads (in `attention.store`: heads stored)"),
    "num_kv_heads": Field(int, "key-value heads"),
    "num_layers": Field(int, "decoder layers"),
    "num_logprobs": Field(int | None, "likeliest tokens whose log-probabilities come too; null: nobody asks"),
    "num_output_tokens": Field(int, "tokens that the step sampled"),
    "num_prefill_seqs": Field(int, "sequences whose prompt the step computes, or a part of it"),
    "num_prefill_tokens": Field(int, "prompt tokens that the step computed"),
    "num_prompt_tokens": Field(int, "length of the prompt, or of all prompts"),
    "num_prompts": Field(int, "prompts of the call"),
    "num_running": Field(int, "sequences that hold a row"),
    "num_seqs": Field(int, "sequences of the step"),
    "num_sharing": Field(int, "decode rows whose prefix is read once for many"),
    "num_slots": Field(int, "places in the cache that are written"),
    "num_steps": Field(int, "steps of the generation"),
    "num_tensors": Field(int, "tensors loaded"),
    "num_threads": Field(int, "threads of torch's operators on a CPU, in this process"),
    "num_tokens": Field(int, "tokens, of the step or to compute again"),
    "num_waiting": Field(int, "sequences that wait for a row or for blocks"),
    "operation": Field(str, "the collective, or the kind of message"),
    "output": Field(SHAPE, "shape of the layer's output"),
    "output_len": Field(int, "tokens generated"),
    "parts": Field(str, "`seconds` as text"),
    "peak_bytes": Field(int, "most memory held so far, of torch on a GPU, else of the process"),
    "preempted": Field(int, "sequences preempted since the last such event"),
    "preemptions": Field(int, "how often sequences (or this one) were preempted"),
    "prefill": Field(str, "attention backend for prompts"),
    "prefill_reason": Field(str, "why that one"),
    "prefill_time": Field(float, "seconds in steps that computed any prompt token"),
    "prefix_cache_hit_rate": Field(float, "share of prompt tokens found in the prefix cache, 0 to 1"),
    "problem": Field(str, "what is wrong with it"),
    "prompt": Field(str | None, "the prompt's text; null: it was token ids"),
    "prompt_tokens_per_second": Field(float, "prompt tokens computed, since the last such event"),
    "q": Field(SHAPE, "shape of the queries"),
    "queue_ms": Field(float | None, "from arrival to the first step; null: never scheduled"),
    "rank": Field(int, "rank of the process that speaks"),
    "reason": Field(str, "eos, max_tokens (also when the model's length is reached), stop or abort"),
    "request_id": Field(str, "the request"),
    "reserved_bytes": Field(int, "what torch has taken from the GPU, in this process"),
    "resident_bytes": Field(int, "resident memory of this process"),
    "saved_tokens": Field(int, "tokens that a step need not read again"),
    "seconds": Field(float | dict[str, float], "time it took; by part in `engine.startup`"),
    "section": Field(str, "what is timed"),
    "seq_id": Field(int, "the sequence, numbered by arrival"),
    "seqs": Field(list[str], "the sequences, 16 at most"),
    "shapes": Field(dict[str, object] | list[object], "shapes by name, or in order"),
    "edits_logits": Field(bool, "whether rows have penalties, biases, bans or a mask"),
    "shares_prefix": Field(bool, "whether common prefixes are read once for many rows"),
    "size": Field(int, "sequences in the batch"),
    "source": Field(str, "where it was set"),
    "state": Field(str, "whether the engine goes on"),
    "step": Field(int, "steps since the engine started"),
    "table": Field(str, "the operators that took most time"),
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
    "ttft_ms": Field(float | None, "from arrival to the first token; null: none came"),
    "used_blocks": Field(int, "blocks of the KV cache in use"),
    "utilization": Field(float, "the setting gpu_memory_utilization"),
    "v": Field(SHAPE, "shape of the values"),
    "v_cache": Field(SHAPE, "shape of the layer's value cache"),
    "valid_levels": Field(str, "what is allowed"),
    "vocab_size": Field(int, "size of the vocabulary"),
    "wall_ms": Field(float, "wall time; on a GPU that of a section is the time to launch"),
    "wanted": Field(int, "the length asked for"),
    "weights_gb": Field(float, "size of the weights, in GB"),
    "what": Field(str, "failed, or was interrupted"),
    "world_size": Field(int, "number of ranks"),
}


def fields_of(event: Event) -> dict[str, tuple[Field, bool]]:
    """An event's fields and whether each is always there: the sentence's, then `more`, then `optional`."""
    placeholders = [name for _, name, _, _ in string.Formatter().parse(event.sentence) if name]
    names = [*placeholders, *event.more.split(), *event.optional.split()]
    optional = event.optional.split()
    return {name: (FIELDS[name], name not in optional) for name in names if name in FIELDS}

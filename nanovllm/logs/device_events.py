"""The events of a step on its device, of profiles and traces, and of other processes.

`events.py` has all events; code imports them from there.
"""

from __future__ import annotations

from logging import DEBUG, ERROR, INFO, WARNING

from nanovllm.logs.records import Event

_PREPARING = "[Rank {rank}] Preparing {kind} batch: {num_seqs} sequences"
runner_prepare_prefill = Event("runner.prepare_prefill", DEBUG, "engine.model_runner", _PREPARING, "step")
runner_prepare_decode = Event("runner.prepare_decode", DEBUG, "engine.model_runner", _PREPARING, "step")
runner_prefill_tensors = Event(
    "runner.prefill_tensors", DEBUG, "engine.model_runner", "[Rank {rank}] PREFILL tensors: {shapes}", "step"
)
runner_decode_tensors = Event(
    "runner.decode_tensors", DEBUG, "engine.model_runner", "[Rank {rank}] DECODE tensors: {shapes}", "step"
)
runner_prefill_shape = Event(
    "runner.prefill_shape",
    DEBUG,
    "engine.model_runner",
    "[Rank {rank}] PREFILL: max_seqlen_q={max_seqlen_q}, max_seqlen_k={max_seqlen_k}, total_tokens={total_tokens}",
    "step",
)
section_start = Event("section.start", DEBUG, "engine.model_runner", "[START] {section}", optional="step")
section_end = Event(
    "section.end",
    DEBUG,
    "engine.model_runner",
    "[END] {section} - Elapsed: {elapsed}",
    "wall_ms gpu_ms failed",
    optional="step",
)
runner_output = Event("runner.output", DEBUG, "engine.model_runner", "[Rank {rank}] Output: logits={logits}", "step")
attention_forward = Event(
    "attention.forward",
    DEBUG,
    "layers.attention",
    "Attention forward: is_prefill={is_prefill}, q={q}, k={k}, v={v}",
    "num_decode_tokens",
    optional="step",
)
attention_store = Event(
    "attention.store",
    DEBUG,
    "layers.attention",
    "Storing KV cache: N={num_tokens}, num_heads={num_heads}, head_dim={head_dim}, num_slots={num_slots}",
    optional="step",
)
attention_decode = Event(
    "attention.decode",
    DEBUG,
    "layers.attention",
    "Decode attention: k_cache={k_cache}, v_cache={v_cache}",
    optional="step",
)
attention_output = Event("attention.output", DEBUG, "layers.attention", "Attention output: {output}", optional="step")
graph_captured = Event(
    "graph.captured",
    DEBUG,
    "runner.cuda_graph",
    "Captured the decode step for batch size {size} in {elapsed_ms:.0f}ms",
    "shares_prefix truncates num_logprobs edits_logits skips_draft_model",
    optional="step",
    unseen="a GPU, and CUDA graphs",
)
graph_mixed_captured = Event(
    "graph.mixed_captured",
    DEBUG,
    "runner.mixed_graphs",
    "Captured the {part} of steps with prompt tokens for {num_tokens} tokens and {num_rows} rows in {elapsed_ms:.0f}ms",
    "shares_prefix truncates num_logprobs edits_logits skips_draft_model",
    optional="step",
    unseen="a GPU, and CUDA graphs",
)
graph_mixed_ready = Event(
    "graph.mixed_ready",
    INFO,
    "engine.model_runner",
    "Steps with prompt tokens are CUDA graphs up to {max_graph_tokens} tokens, {num_captured} of them captured already",
    unseen="a GPU, and CUDA graphs",
)
graph_mixed_off = Event(
    "graph.mixed_off",
    INFO,
    "engine.model_runner",
    "Steps with prompt tokens are launched kernel by kernel: {why_eager}",
    unseen="a GPU, and CUDA graphs",
)
step_eager = Event(
    "step.eager",
    DEBUG,
    "engine.model_runner",
    "Step {step} is launched kernel by kernel: {why_eager}",
    unseen="a GPU, and CUDA graphs",
)
profile_started = Event(
    "profile.started", INFO, "diagnostics.rank", "Profiling into {folder} until stop_profile", "rank"
)
profile_written = Event(
    "profile.written",
    INFO,
    "diagnostics.rank",
    "Profile written: {trace} (open it at https://ui.perfetto.dev) and {table_file}\n{table}",
    "rank",
)
function_trace = Event(
    "function_trace.started",
    INFO,
    "diagnostics.function_trace",
    "Function trace of rank {rank}: {path}",
    of_each_rank=True,
)
trace_full = Event(
    "trace.full",
    WARNING,
    "tracing.trace_file",
    "{path} has reached {megabytes} MB: later events are not in it. Raise NANOVLLM_TRACE_MAX_MB for more.",
)
tensors = Event("tensors", DEBUG, "", "{prefix}tensors: {shapes}")
worker_lost = Event(
    "worker.lost",
    ERROR,
    "distributed.worker_pool",
    "Rank {lost_rank} {problem}",
    unseen="more than one rank",
)
engine_process_lost = Event(
    "engine_process.lost",
    ERROR,
    "async_engine.engine_process",
    "The engine has ended: {problem}",
    unseen="an AsyncLLM whose process is killed",
)
actor_ended = Event(
    "actor.ended",
    ERROR,
    "integrations.ray.data",
    "The engine has ended, and so does its actor, which Ray starts again: {error}",
    unseen="an actor of Ray whose engine is killed",
)
grammar_output = Event(
    "grammar.output",
    WARNING,
    "requests.grammar_process",
    "The process of grammars: {stderr}",
    unseen="a failure in that process",
)
communication = Event(
    "communication",
    DEBUG,
    "layers.parallel distributed.worker_process distributed.worker_messages",
    "[Rank {rank}/{world_size}] {operation}: {details}",
    "elapsed_ms",
    optional="shapes bytes wait_ms move_ms started step",
    unseen="more than one rank",
)

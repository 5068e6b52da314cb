"""Every event that nanovllm logs, declared once: name, level, logger, sentence, fields.

    events.graph_captured.log(logger, size=8, shares_prefix=False, elapsed_ms=812.0)

`fields.py` says what the fields mean. tools/generate_logging_docs.py makes the tables of LOGGING.md from both, and
tests/logs/test_events.py compares the records of a running engine with these declarations.
"""

from __future__ import annotations

from logging import DEBUG, ERROR, INFO, WARNING

from nanovllm.logs.records import Event

# ---- start-up

rule = Event("rule", INFO, "engine.llm_engine llm", "{line}")
engine_init = Event("engine.init", INFO, "engine.llm_engine", "Initializing LLMEngine")
engine_model = Event("engine.model", INFO, "engine.llm_engine", "Model: {model}")
engine_config = Event(
    "engine.config", INFO, "engine.llm_engine", "Configuration: {all_fields}", others="every argument by its name"
)
cpu_threads = Event("cpu.threads", INFO, "runner.cpu_threads", "CPU threads: {num_threads} ({threads_reason})")
runner_init = Event("runner.init", INFO, "engine.model_runner", "Initializing ModelRunner (rank {rank})")
attention_selected = Event(
    "attention.selected",
    INFO,
    "attention.selection",
    "Attention backends: prefill={prefill} ({prefill_reason}), decode={decode} ({decode_reason}), "
    "block_size={block_size}",
)
model_loading = Event("model.loading", INFO, "engine.model_runner", "[Rank {rank}] Loading model: {model}")
model_config = Event(
    "model.config",
    INFO,
    "engine.model_runner",
    "Model config: {all_fields}",
    "num_layers hidden_size num_heads num_kv_heads head_dim vocab_size dtype device",
)
model_weights = Event(
    "model.weights",
    INFO,
    "engine.model_runner",
    "[Rank {rank}] Loaded {num_tensors} tensors, {gigabytes:.2f}GB from {num_files} files in {seconds:.2f}s",
    of_each_rank=True,
)
kv_cache_sizing = Event(
    "kv_cache.sizing",
    INFO,
    "engine.model_runner",
    "KV cache sizing: total={total_gb:.2f}GB, gpu_memory_utilization={utilization}, weights={weights_gb:.2f}GB, "
    "activations={activations_gb:.2f}GB, free={free_gb:.2f}GB, so available={available_gb:.2f}GB",
    unseen="a GPU, and no num_kvcache_blocks",
    of_each_rank=True,
)
kv_cache_config = Event(
    "kv_cache.config",
    INFO,
    "engine.model_runner",
    "KV cache configuration: num_kv_heads={num_kv_heads}, head_dim={head_dim}, block_size={block_size}, dtype={dtype}",
)
kv_cache_allocated = Event(
    "kv_cache.allocated",
    INFO,
    "engine.model_runner",
    "Allocating {num_blocks} KV cache blocks, total_size={total_gb:.2f}GB",
)
engine_resolved = Event(
    "engine.resolved", INFO, "engine.llm_engine", "Resolved: {all_fields}", others="every setting by its name"
)
engine_startup = Event(
    "engine.startup", INFO, "engine.llm_engine", "Start-up: {total_seconds:.2f}s, of which {parts}", "seconds"
)
engine_max_model_len = Event(
    "engine.max_model_len",
    (WARNING, INFO),
    "runner.model_plan",
    "max_model_len lowered from {wanted} to {max_model_len}: the KV cache holds no more tokens. "
    "Raise num_kvcache_blocks or the memory for the cache for longer requests.",
)
spans_started = Event("spans.started", INFO, "tracing.request_spans", "Sending a span for each request to {endpoint}")
spans_missing = Event(
    "spans.missing",
    INFO,
    "tracing.request_spans",
    "No spans go to {endpoint}: pip install 'nanovllm[otel]' ({error})",
)
logging_level = Event(
    "logging.level", WARNING, "logs.configuration", "{source}: {problem}. Valid levels: {valid_levels}"
)

# ---- memory

_GPU_MEMORY = "allocated_bytes reserved_bytes free_bytes total_bytes"
_MEMORY = f"device peak_bytes resident_bytes {_GPU_MEMORY}"  # which of them are present depends on the device

memory = Event("memory", INFO, "", "{prefix}{memory}", optional=_MEMORY)
model_loaded = Event(
    "model.loaded", INFO, "engine.model_runner", "After model loading - {memory}", optional=_MEMORY, of_each_rank=True
)
kv_cache_memory = Event(
    "kv_cache.memory",
    INFO,
    "engine.model_runner",
    "After KV cache allocation - {memory}",
    optional=_MEMORY,
    of_each_rank=True,
)
generation_memory = Event("generation.memory", INFO, "llm", "After generation - {memory}", optional=_MEMORY)

# ---- generations and requests

generation_start = Event("generation.start", INFO, "llm", "Starting generation for {num_prompts} prompts")
generation_prompt_tokens = Event("generation.prompt_tokens", INFO, "llm", "Total prompt tokens: {num_prompt_tokens}")
generation_complete = Event(
    "generation.complete",
    INFO,
    "llm",
    "Generation complete: {num_steps} steps, total_output_tokens={total_output_tokens}, "
    "prefill_time={prefill_time:.2f}s, decode_time={decode_time:.2f}s",
)
request_added = Event(
    "request.added",
    DEBUG,
    "engine.llm_engine",
    "Request added: request_id={request_id}, seq_id={seq_id}, num_prompt_tokens={num_prompt_tokens}, "
    "max_tokens={max_tokens}",
    optional="prompt",
)
sequence_finished = Event(
    "sequence.finished",
    DEBUG,
    "engine.scheduler",
    "Sequence finished: seq_id={seq_id}, output_len={output_len}, reason={reason}",
    "request_id num_prompt_tokens num_cached_tokens arrival first_scheduled first_token finished queue_ms ttft_ms "
    "itl_ms e2e_ms preemptions",
)
request_output = Event("request.output", DEBUG, "engine.llm_engine", "Request {request_id} finished: {text!r}")
request_failed = Event("request.failed", WARNING, "llm", "Request {request_id} is given up, the others go on: {error}")
engine_statistics = Event(
    "engine.statistics",
    INFO,
    "engine.metrics",
    "Statistics: prompt {prompt_tokens_per_second:.0f} tok/s, generation {generation_tokens_per_second:.0f} tok/s, "
    "running={num_running}, waiting={num_waiting}, kv_cache_usage={kv_cache_usage:.1%}, "
    "prefix_cache_hit_rate={prefix_cache_hit_rate:.1%}, preemptions={preemptions}",
)
_STOPPED = "A step {what} ({error}); its requests are aborted, and the engine {state}"
engine_error = Event("engine.error", ERROR, "engine.llm_engine", _STOPPED)
engine_interrupted = Event("engine.interrupted", INFO, "engine.llm_engine", _STOPPED)

# ---- scheduling

batch_prefill = Event(
    "batch.prefill",
    INFO,
    "engine.scheduler",
    "Scheduled PREFILL batch: size={size}, batched_tokens={batched_tokens}, seqs={seqs}",
    "step",
)
batch_decode = Event(
    "batch.decode",
    (INFO, DEBUG),
    "engine.scheduler",
    "Scheduled DECODE batch (step {decode_step}): size={size}, preempted={preempted}, seqs={seqs}",
    "step shares_prefix",
)
batch_shares_prefix = Event(
    "batch.shares_prefix",
    INFO,
    "engine.scheduler",
    "{num_sharing} of {size} decode rows share prefixes: {saved_tokens} tokens less to read in a step",
)
sequence_preempted = Event(
    "sequence.preempted",
    INFO,
    "engine.scheduler",
    "Preempted seq_id={seq_id}: freed={freed} blocks, {coming} more when its steps in flight end, "
    "{num_tokens} tokens to compute again, free_blocks={free_blocks}",
    "request_id",
)
batch_postprocess = Event(
    "batch.postprocess",
    DEBUG,
    "engine.scheduler",
    "Postprocess: {num_finished}/{num_seqs} sequences finished",
    "step",
)
step_done = Event(
    "step.done",
    DEBUG,
    "engine.llm_engine",
    "Step {step} done: {kind}, prefill_tokens={num_prefill_tokens}, decode_seqs={num_decode_seqs}, "
    "output_tokens={num_output_tokens}, used_blocks={used_blocks}/{num_blocks}, wall={wall_ms:.2f}ms",
    "num_prefill_seqs preempted num_running num_waiting gpu_ms",
)
blocks_allocating = Event(
    "blocks.allocating",
    DEBUG,
    "engine.block_manager",
    "Allocating blocks for seq_id={seq_id}, num_blocks={num_blocks}",
)
blocks_allocated = Event(
    "blocks.allocated",
    DEBUG,
    "engine.block_manager",
    "Allocated blocks for seq_id={seq_id}: new={new}, cache_hits={cache_hits}, free_blocks={free_blocks}, "
    "used_blocks={used_blocks}",
)
blocks_freed = Event(
    "blocks.freed",
    DEBUG,
    "engine.block_manager",
    "Deallocated blocks for seq_id={seq_id}: freed={freed}/{total}, free_blocks={free_blocks}",
)

# ---- a step on its device

_PREPARING = "[Rank {rank}] Preparing {kind} batch: {num_seqs} sequences"
runner_prepare_prefill = Event("runner.prepare_prefill", DEBUG, "engine.model_runner", _PREPARING, "step")
runner_prepare_decode = Event("runner.prepare_decode", DEBUG, "engine.model_runner", _PREPARING, "step")
runner_prefill_tensors = Event(
    "runner.prefill_tensors", DEBUG, "engine.model_runner", "[Rank {rank}] PREFILL tensors: {shapes}"
)
runner_decode_tensors = Event(
    "runner.decode_tensors", DEBUG, "engine.model_runner", "[Rank {rank}] DECODE tensors: {shapes}"
)
runner_prefill_shape = Event(
    "runner.prefill_shape",
    DEBUG,
    "engine.model_runner",
    "[Rank {rank}] PREFILL: max_seqlen_q={max_seqlen_q}, max_seqlen_k={max_seqlen_k}, total_tokens={total_tokens}",
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
runner_output = Event("runner.output", DEBUG, "engine.model_runner", "[Rank {rank}] Output: logits={logits}")
attention_forward = Event(
    "attention.forward",
    DEBUG,
    "layers.attention",
    "Attention forward: is_prefill={is_prefill}, q={q}, k={k}, v={v}",
    "num_decode_tokens",
)
attention_store = Event(
    "attention.store",
    DEBUG,
    "layers.attention",
    "Storing KV cache: N={num_tokens}, num_heads={num_heads}, head_dim={head_dim}, num_slots={num_slots}",
)
attention_decode = Event(
    "attention.decode", DEBUG, "layers.attention", "Decode attention: k_cache={k_cache}, v_cache={v_cache}"
)
attention_output = Event("attention.output", DEBUG, "layers.attention", "Attention output: {output}")
graph_captured = Event(
    "graph.captured",
    DEBUG,
    "runner.cuda_graph",
    "Captured the decode step for batch size {size} in {elapsed_ms:.0f}ms",
    "shares_prefix truncates num_logprobs edits_logits",
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
tensors = Event("tensors", DEBUG, "", "{prefix}tensors: {shapes}")
worker_lost = Event(
    "worker.lost",
    ERROR,
    "distributed.worker_pool",
    "Rank {lost_rank} {problem}",
    unseen="more than one rank",
)
grammar_output = Event(
    "grammar.output",
    WARNING,
    "requests.grammar_process",
    "The process of grammars: {line}",
    unseen="a failure in that process",
)
communication = Event(
    "communication",
    DEBUG,
    "layers.parallel distributed.worker_process distributed.worker_messages",
    "[Rank {rank}/{world_size}] {operation}: {details}",
    "elapsed_ms",
    optional="shapes bytes",
    unseen="more than one rank",
)

EVENTS = {value.name: value for value in list(globals().values()) if isinstance(value, Event)}

"""Every event that nanovllm logs, declared once: name, level, logger, sentence, fields.

    events.graph_captured.log(logger, size=8, shares_prefix=False, elapsed_ms=812.0)

`fields.py` says what the fields mean. tools/generate_logging_docs.py makes the tables of LOGGING.md from both, and
tests/logs/test_events.py compares the records of a running engine with these declarations.
"""

from __future__ import annotations

from logging import DEBUG, ERROR, INFO, WARNING

from nanovllm.logs.device_events import *  # noqa: F403 - declared there, for the size of this file
from nanovllm.logs.records import Event
from nanovllm.logs.replica_events import *  # noqa: F403

SCHEMA = 1  # the version of the events and their fields: a change that a reader of logs notices raises it

# ---- start-up

engine_versions = Event(
    "engine.versions", INFO, "engine.llm_engine", "Versions: {versions}, device={device}", "schema variables"
)
rule = Event("rule", INFO, "engine.llm_engine", "{line}")
engine_init = Event("engine.init", INFO, "engine.llm_engine", "Initializing LLMEngine")
engine_model = Event("engine.model", INFO, "engine.llm_engine", "Model: {model}")
engine_config = Event(
    "engine.config", INFO, "engine.llm_engine", "Configuration: {all_fields}", others="every argument by its name"
)
cpu_threads = Event(
    "cpu.threads", INFO, "runner.cpu_threads", "CPU threads: {num_threads} ({threads_reason})", in_summary=False
)
runner_init = Event(
    "runner.init", INFO, "engine.model_runner", "Initializing ModelRunner (rank {rank})", in_summary=False
)
model_ignored = Event(
    "model.ignored", WARNING, "models.model_config quantization.compressed_tensors", "{ignored} is ignored: {why}"
)
attention_selected = Event(
    "attention.selected",
    INFO,
    "attention.selection",
    "Attention backends: prefill={prefill} ({prefill_reason}), decode={decode} ({decode_reason}), "
    "block_size={block_size}",
    in_summary=False,
)
model_loading = Event(
    "model.loading", INFO, "engine.model_runner", "[Rank {rank}] Loading model: {model}", in_summary=False
)
model_config = Event(
    "model.config",
    INFO,
    "engine.model_runner",
    "Model config: {all_fields}",
    "num_layers hidden_size num_heads num_kv_heads head_dim vocab_size dtype device",
)
quantization_chosen = Event(
    "quantization.chosen",
    INFO,
    "quantization.scheme",
    "Quantization {quantization}, {origin}: {gigabytes:.2f}GB of weights, linear layers: {layers}",
)
model_weights = Event(
    "model.weights",
    INFO,
    "engine.model_runner",
    "[Rank {rank}] Loaded {num_tensors} tensors, {gigabytes:.2f}GB from {num_files} files in {seconds:.2f}s",
    of_each_rank=True,
    in_summary=False,
)
kv_cache_sizing = Event(
    "kv_cache.sizing",
    INFO,
    "engine.model_runner",
    "KV cache sizing: total={total_gb:.2f}GB, gpu_memory_utilization={utilization}, weights={weights_gb:.2f}GB, "
    "activations={activations_gb:.2f}GB, free={free_gb:.2f}GB, so available={available_gb:.2f}GB",
    unseen="a GPU, and no num_kvcache_blocks",
    of_each_rank=True,
    in_summary=False,
)
kv_cache_config = Event(
    "kv_cache.config",
    INFO,
    "engine.model_runner",
    "KV cache configuration: num_kv_heads={num_kv_heads}, head_dim={head_dim}, block_size={block_size}, dtype={dtype}",
    in_summary=False,
)
kv_cache_allocating = Event("kv_cache.allocating", INFO, "engine.model_runner", "Allocating KV cache")
kv_cache_allocated = Event(
    "kv_cache.allocated",
    INFO,
    "engine.model_runner",
    "Allocating {num_blocks} KV cache blocks, total_size={total_gb:.2f}GB",
)
engine_resolved = Event(
    "engine.resolved",
    INFO,
    "engine.llm_engine",
    "Resolved: {all_fields}",
    others="every setting by its name",
    in_summary=False,
)
engine_start_failed = Event(
    "engine.start_failed", ERROR, "engine.llm_engine", "The engine did not start: {error}", on_console=False
)
engine_exit = Event(
    "engine.exit",
    INFO,
    "engine.llm_engine",
    "Engine ended: {outcome}, {num_unfinished} unfinished requests",
    optional="error",
    in_summary=False,
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
default_params_invalid = Event(
    "default_params.invalid",
    WARNING,
    "requests.default_params",
    "generation_config.json in {folder}: {error} It has no effect.",
)
spans_started = Event("spans.started", INFO, "tracing.request_spans", "Sending a span for each request to {endpoint}")
spans_missing = Event(
    "spans.missing",
    INFO,
    "tracing.request_spans",
    "No spans go to {endpoint}: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http ({error})",
)
unknown_variable = Event(
    "environment.unknown",
    WARNING,
    "logs.configuration",
    "{variable} is set, but nanovllm reads no variable of this name.{hint}",
)
log_lost = Event(
    "log.lost", WARNING, "logs.lost_lines", "{path} cannot be written ({error}): {num_lost} lines are lost"
)
log_dropped = Event(
    "log.dropped",
    WARNING,
    "async_engine.log_records",
    "The process that writes the log has not read it for a while: {num_lost} records are lost",
)
meters_started = Event("meters.started", INFO, "tracing.request_metrics", "Sending metrics of requests to {endpoint}")
meters_missing = Event(
    "meters.missing",
    INFO,
    "tracing.request_metrics",
    "No metrics go to {endpoint}: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http ({error})",
)
logging_level = Event(
    "logging.level", WARNING, "logs.configuration", "{source}: {problem}. Valid levels: {valid_levels}"
)

argument_without_effect = Event(
    "argument.without_effect", DEBUG, "compat.unsupported", "{callee}: {argument}={given} has no effect: {why}"
)

# ---- memory

_GPU_MEMORY = "allocated_bytes reserved_bytes free_bytes total_bytes"
_MEMORY = f"device peak_bytes resident_bytes {_GPU_MEMORY}"  # which of them are present depends on the device

memory = Event("memory", INFO, "", "{prefix}{memory}", optional=_MEMORY)
model_loaded = Event(
    "model.loaded",
    INFO,
    "engine.model_runner",
    "After model loading - {memory}",
    optional=_MEMORY,
    of_each_rank=True,
    in_summary=False,
)
kv_cache_memory = Event(
    "kv_cache.memory",
    INFO,
    "engine.model_runner",
    "After KV cache allocation - {memory}",
    optional=_MEMORY,
    of_each_rank=True,
    in_summary=False,
)
generation_memory = Event(
    "generation.memory", INFO, "engine.llm_engine", "After generation - {memory}", optional=_MEMORY
)

# ---- generations and requests

generation_start = Event("generation.start", INFO, "engine.llm_engine", "Starting generation for {num_prompts} prompts")
generation_prompt_tokens = Event(
    "generation.prompt_tokens", INFO, "engine.llm_engine", "Total prompt tokens: {num_prompt_tokens}"
)
generation_complete = Event(
    "generation.complete",
    INFO,
    "engine.llm_engine",
    "Generation complete: {num_steps} steps, total_output_tokens={total_output_tokens}, "
    "prefill_time={prefill_time:.2f}s, decode_time={decode_time:.2f}s",
)
request_added = Event(
    "request.added",
    DEBUG,
    "engine.llm_engine",
    "Request added: request_id={request_id}, seq_id={seq_id}, num_prompt_tokens={num_prompt_tokens}, "
    "max_tokens={max_tokens}",
    optional="prompt client_request_id trace_id span_id",
)
sequence_finished = Event(
    "sequence.finished",
    DEBUG,
    "engine.scheduler",
    "Sequence finished: seq_id={seq_id}, output_len={output_len}, reason={reason}",
    "request_id step num_prompt_tokens num_cached_tokens arrival first_scheduled first_token finished queue_ms ttft_ms "
    "itl_ms e2e_ms preemptions",
    optional="client_request_id trace_id span_id",
)
request_output = Event(
    "request.output",
    DEBUG,
    "engine.llm_engine",
    "Request {request_id} finished: {text!r}",
    optional="client_request_id trace_id span_id",
)
request_failed = Event(
    "request.failed",
    WARNING,
    "engine.llm_engine",
    "Request {request_id} is given up, {others}: {error}",
    "cause",
    "client_request_id trace_id span_id",
)
request_finished = Event(
    "request.finished",
    INFO,
    "engine.llm_engine",
    "Request {request_id} finished: {cause} after {e2e_s:.2f}s (queued {queue_s:.2f}, prefill {prefill_s:.2f}, "
    "decode {decode_s:.2f}, preempted {preempted_s:.2f}), prompt_tokens={num_prompt_tokens}, "
    "output_tokens={num_output_tokens}",
    "seq_ids finish_reason stop_reason ttft_s itl_s longest_stall_s stall_cause stall_step stall_reason "
    "num_cached_tokens num_preemptions queued_behind kv_cache_usage arrival finished first_step last_step",
    optional="num_draft_tokens num_accepted_tokens completions error client_request_id trace_id span_id",
)
logits_invalid = Event(
    "logits.invalid",
    ERROR,
    "engine.llm_engine",
    "Invalid logits, first in request {request_id} after {output_len} output tokens; the others go on: {error}",
    "step",
    optional="client_request_id trace_id span_id",
)
chat_tools_ignored = Event(
    "chat.tools_ignored",
    WARNING,
    "requests.chat",
    "The chat template of {model} does not read tools: the model does not see them",
)
engine_statistics = Event(
    "engine.statistics",
    INFO,
    "engine.metrics",
    "Statistics: prompt {prompt_tokens_per_second:.0f} tok/s, generation {generation_tokens_per_second:.0f} tok/s, "
    "running={num_running}, waiting={num_waiting}, kv_cache_usage={kv_cache_usage:.1%}, "
    "prefix_cache_hit_rate={prefix_cache_hit_rate:.1%}, preemptions={preemptions}",
    "final seconds num_steps num_prompt_tokens num_output_tokens num_prefix_queries num_prefix_hits num_blocks "
    "peak_kv_cache_usage peak_kv_cache_at peak_waiting peak_waiting_at wall_s device_s slowest_step slowest_step_kind "
    "slowest_step_ms slowest_step_gpu_ms slowest_step_prompt_tokens slowest_step_decode_seqs slowest_step_request_ids "
    "finished_by_cause num_failed num_refused prefill_steps_by_budget",
)
speculation_statistics = Event(
    "speculation.statistics",
    INFO,
    "engine.metrics",
    "Speculation: {num_accepted_tokens} of {num_draft_tokens} drafted tokens right ({acceptance_rate:.1%}), "
    "{mean_acceptance_length:.2f} tokens for each step of a sequence with a draft",
    "num_drafts final",
)
_STOPPED = "A step {what} ({error}); its requests are aborted, and the engine {state}"
_STOPPED_FIELDS = "step request_ids num_requests traceback"
engine_error = Event("engine.error", ERROR, "engine.llm_engine", _STOPPED, _STOPPED_FIELDS)
engine_interrupted = Event("engine.interrupted", INFO, "engine.llm_engine", _STOPPED, _STOPPED_FIELDS)

engine_slow = Event(
    "engine.slow",
    WARNING,
    "engine.llm_engine",
    "Slow {what}: {seconds:.1f}s, longer than {threshold:g}s ({slow_reason})",
    "step request_id",
    unseen="a step of more than NANOVLLM_LOG_SLOW_SECONDS",
)

# ---- the server

_SERVER = "a running `nanovllm serve`"
server_started = Event(
    "server.started", INFO, "server.serve server.supervisor", "Serving {model} at {address}", unseen=_SERVER
)
server_draining = Event(
    "server.draining",
    INFO,
    "server.serve server.supervisor",
    "Shutting down: {num_unfinished} unfinished requests have {threshold:g}s to end",
    unseen=_SERVER,
)
api_process_lost = Event(
    "api_process.lost", WARNING, "server.supervisor", "An API process has ended unexpectedly: {problem}", unseen=_SERVER
)
api_process_dropped = Event(
    "api_process.dropped",
    WARNING,
    "async_engine.process_main",
    "API process {client_pid} does not read what the engine sends: {unsent_bytes} bytes are left after {seconds:g}s. "
    "The engine ends its requests and goes on without it",
    unseen=_SERVER,
)
server_stopped = Event(
    "server.stopped", INFO, "server.serve server.supervisor", "Server ended: {outcome}, status {status}", unseen=_SERVER
)
server_error = Event(
    "server.error", ERROR, "server.errors", "A request failed unexpectedly: {error}", "traceback", unseen=_SERVER
)
field_ignored = Event(
    "field.ignored", INFO, "server.service", "Unknown field of requests, which is ignored: {field}", unseen=_SERVER
)
http_request = Event(
    "http.request",
    INFO,
    "server.middleware",
    "{method} {path} {status} in {duration_s:.3f}s, request_id={request_id}, prompt_tokens={num_prompt_tokens}, "
    "output_tokens={num_output_tokens}",
    "client_request_id",
    unseen=_SERVER,
)

# ---- scheduling

batch_prefill = Event(
    "batch.prefill",
    INFO,
    "engine.scheduler",
    "Scheduled PREFILL batch: size={size}, batched_tokens={batched_tokens}, seqs={seqs}",
    "step budget budget_reason",
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
    "step",
    in_summary=False,
)
speculation_off = Event(
    "speculation.off",
    INFO,
    "speculation.drafter",
    "{request_id} runs without speculative decoding: {why}",
    in_summary=False,
)
sequence_preempted = Event(
    "sequence.preempted",
    INFO,
    "engine.scheduler",
    "Preempted seq_id={seq_id}: freed={freed} blocks, {coming} more when its steps in flight end, "
    "{num_tokens} tokens to compute again, free_blocks={free_blocks}, for {whom} (needed {needed} blocks, "
    "{free_before} free)",
    "request_id for_seq_id for_request_id step",
    optional="client_request_id trace_id span_id",
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
    "request_id step",
)
blocks_allocated = Event(
    "blocks.allocated",
    DEBUG,
    "engine.block_manager",
    "Allocated blocks for seq_id={seq_id}: new={new}, cache_hits={cache_hits}, free_blocks={free_blocks}, "
    "used_blocks={used_blocks}",
    "request_id step",
)
blocks_freed = Event(
    "blocks.freed",
    DEBUG,
    "engine.block_manager",
    "Deallocated blocks for seq_id={seq_id}: freed={freed}/{total}, free_blocks={free_blocks}",
    "request_id step",
)

EVENTS = {value.name: value for value in list(globals().values()) if isinstance(value, Event)}

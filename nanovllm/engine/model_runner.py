"""ModelRunner: one rank's device work. It turns a `ScheduledBatch` into sampled tokens.

Everything a step needs is in the batch and in the device's rows, so `submit` only launches: the tokens
come back through pinned memory, and whoever wants them waits on the handle.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import numpy as np
import torch

from nanovllm.attention.selection import select_attention
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import IntArray, OpenedRow, ScheduledBatch, StepNeeds
from nanovllm.errors import OutOfMemoryError
from nanovllm.kernels.logprobs import SampledTokens, TokenLogprobs, token_logprobs
from nanovllm.kernels.sample import best_candidates, sample, sample_candidates
from nanovllm.kernels.truncate import keep_thresholds
from nanovllm.layers.linear import pack_linear_weights
from nanovllm.layers.parallel import TensorParallel
from nanovllm.logs import events
from nanovllm.models.registry import get_model_class
from nanovllm.runner.cuda_graph import DecodeGraphs
from nanovllm.runner.device_rows import DeviceRows, ModelInputs
from nanovllm.runner.kv_cache import GPUMemory, KVCacheShape, num_cpu_blocks
from nanovllm.runner.model_plan import ModelPlan
from nanovllm.runner.out_of_memory import step_out_of_memory
from nanovllm.runner.step_handle import LaunchedStep, wait_for
from nanovllm.runner.warm_up import WarmUp
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.utils import env
from nanovllm.utils.device_memory import GB, free_memory
from nanovllm.utils.loader import load_dummy_weights, load_weights, materialise
from nanovllm.utils.logger import log_gpu_memory, setup_logger, shapes_of, timed_section
from nanovllm.utils.stopwatch import Stopwatch

logger = setup_logger(__name__)

_PROMPT_LOGPROB_TOKENS = 256  # prompt tokens whose logits are in memory at a time


class ModelRunner:
    """Loads the model, sizes the KV cache from what is measured, and runs steps.

    `resolved` says what was decided. Raises a NanoVLLMError with the way out when the model or the cache
    do not fit, or when device, dtype or backend are not to be had.
    """

    def __init__(
        self,
        config: EngineConfig,
        parallel: TensorParallel | None = None,
        stopwatch: Stopwatch | None = None,
        check: Callable[[], None] = lambda: None,  # called while the weights load; what it raises ends that
    ) -> None:
        stopwatch = stopwatch or Stopwatch()
        self.parallel = parallel or TensorParallel()
        section = f"[Rank {self.parallel.rank}] Model forward"
        self._sections = {  # (has chunks, has decode rows) → what the log calls such a step
            (True, False): f"{section} PREFILL",
            (False, True): f"{section} DECODE",
            (True, True): f"{section} PREFILL+DECODE",
        }
        events.runner_init.log(logger, rank=self.parallel.rank)
        plan = ModelPlan.of(config)
        self.device = plan.device
        attention = select_attention(
            config.attention_backend,
            plan.device,
            plan.dtype,
            plan.model_config.head_dim,
            config.kvcache_block_size,
            fp8_cache=plan.has_fp8_cache,
        )
        model = plan.model_config
        num_kv_heads = self.parallel.divide_kv_heads(model.num_kv_heads)
        shape = KVCacheShape.of(model, attention.block_size, plan.kv_cache_dtype, num_kv_heads)
        self._query_group = model.num_heads // self.parallel.size // num_kv_heads
        self._uses_shared_prefixes = attention.decode.uses_shared_prefixes and not plan.has_fp8_cache
        self._graphs: DecodeGraphs | None = None
        self._traces = env.trace_file() is not None
        use_graphs = self.device.type == "cuda" and not config.enforce_eager and attention.decode.supports_cuda_graphs
        with torch.inference_mode(), self._on_device():
            stopwatch.lap("configuration")
            self.model = get_model_class(plan.model_config.architecture)(
                plan.model_config, attention, self.parallel, plan.dtype, self.device
            )
            self._load(plan, config, shape, check)
            stopwatch.lap("weights")
            num_blocks = self.parallel.minimum(self._num_blocks(config, shape, plan.max_model_len), self.device)
            stopwatch.lap("largest steps")
            max_model_len = plan.fit_max_model_len(config, num_blocks * attention.block_size)
            self._log_cache(shape, num_blocks, plan.kv_cache_dtype_name)
            self._allocate(shape, num_blocks, config.max_num_seqs, max_model_len)
            stopwatch.lap("KV cache")
            if use_graphs:
                self._graphs = DecodeGraphs(self._decode, config.max_num_seqs, self.rows.null_row, self.device)
                self._graphs.capture(
                    config.max_num_seqs, StepNeeds()
                )  # the largest first: the others fit into its memory
                stopwatch.lap("first CUDA graph")
        log_gpu_memory(logger, device=self.device, event=events.kv_cache_memory)
        self.resolved = ResolvedConfig(
            model=str(plan.folder or config.model),
            device=str(self.device),
            dtype=plan.dtype_name,
            vocab_size=plan.model_config.vocab_size,
            eos_token_ids=plan.model_config.eos_token_ids,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prefill_tokens_beside_decode=config.max_prefill_tokens_beside_decode,
            block_size=attention.block_size,
            num_blocks=num_blocks,
            kv_cache_dtype=plan.kv_cache_dtype_name,
            enable_prefix_caching=config.enable_prefix_caching,
            use_cuda_graphs=use_graphs,
            prefill_backend=attention.prefill.name,
            decode_backend=attention.decode.name,
            pipeline_depth=plan.pipeline_depth(config),
        )

    # Steps

    @property
    def graph_pool(self) -> tuple[int, int] | None:
        """The memory pool of the CUDA graphs; None without graphs."""
        return None if self._graphs is None else self._graphs.pool

    def submit(self, batch: ScheduledBatch) -> LaunchedStep:
        """Launches a step and returns without waiting for the device.

        Raises OutOfMemoryError, with the settings to change, when the step does not fit.
        """
        try:
            return self._submit(batch)
        except torch.OutOfMemoryError as error:
            if not hasattr(self, "resolved"):  # a warm-up step: the caller knows what it tried
                raise
            raise step_out_of_memory(error, batch.num_tokens, self.device, self.resolved) from error

    def _submit(self, batch: ScheduledBatch) -> LaunchedStep:
        has_chunks, has_decode = len(batch.chunks) > 0, len(batch.decode_rows) > 0
        needs = batch.needs
        if needs.shares_prefix and not self._uses_shared_prefixes:
            needs = replace(needs, shares_prefix=False)
        section = self._sections[has_chunks, has_decode]
        with torch.inference_mode(), self._on_device():
            began = self._record_event() if self._traces or logger.isEnabledFor(logging.DEBUG) else None
            words = self._upload(batch.buffer)
            self.rows.apply(batch, words)
            self._log_preparing(batch)
            with timed_section(logger, section, device=self.device, step=batch.step):
                rows = words[batch.sections["decode_rows"].offset :]
                if has_chunks:
                    inputs = self.rows.mixed_inputs(batch, words, self._shared_group(needs))
                    sampled = self._forward(inputs, needs, batch)
                elif self._graphs is not None and (needs.num_logprobs or 0) <= MAX_LOGPROBS:
                    sampled = self._graphs.replay(rows, needs)
                else:  # a graph would hold memory for a log-probability of every token
                    sampled = self._decode(rows, needs)
            return self._download(sampled, began)

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on torch's current device, which need not be ours."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def synchronize(self) -> None:
        """Waits for the device. Raises what a step in flight raised there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def becomes_idle(self, seconds: float) -> bool:
        """Whether all steps in flight end within that time, be it with an error."""
        deadline = time.monotonic() + seconds

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            if (event := self._record_event(with_time=False)) is not None:
                wait_for(event, check)
        except TimeoutError:
            return False
        except RuntimeError:  # of CUDA's, met by whoever waited for the step
            pass
        return True

    def shutdown(self) -> None:
        """Gives the memory back; the runner can not be used after."""
        with suppress(RuntimeError):  # a device out of order: whoever waited for it has heard of it
            self.synchronize()
        del self.model, self.rows, self.kv_caches, self._graphs
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _shared_group(self, needs: StepNeeds) -> int | None:
        return self._query_group if needs.shares_prefix else None

    def _decode(self, rows: torch.Tensor, needs: StepNeeds) -> SampledTokens:
        """rows [num_rows] int32 → a token each. What a CUDA graph records."""
        return self._forward(self.rows.decode_inputs(rows, self._shared_group(needs)), needs)

    def _forward(self, inputs: ModelInputs, needs: StepNeeds, batch: ScheduledBatch | None = None) -> SampledTokens:
        """Computes, samples, and writes the tokens into their rows. batch: where it has chunks."""
        self._log_inputs(inputs)
        hidden = self.model(inputs.input_ids, inputs.positions, inputs.attention, self.kv_caches)
        rows = inputs.sampled_rows
        prompt_logprobs = () if batch is None else self._score(hidden, batch)
        if not len(rows):  # a chunk that ends before its prompt does
            return SampledTokens(rows, None, prompt_logprobs)
        if inputs.sampled_tokens is not None:
            hidden = hidden[inputs.sampled_tokens]
        head = self.model.lm_head
        in_one_place = self.parallel.size == 1 or needs.all_logits
        logits = self.model.compute_logits(hidden) if in_one_place else head.logits_share(hidden)
        events.runner_output.log(logger, rank=self.parallel.rank, logits=list(logits.shape))
        state = (self.rows.temperatures, self.rows.seeds, self.rows.lengths, rows)
        if in_one_place:
            drawn_from = self.rows.shape(logits, rows) if needs.edits_logits else logits
            truncation = (self.rows.temperatures, self.rows.truncations, rows)
            thresholds = keep_thresholds(drawn_from, *truncation) if needs.truncates else None
            token_ids = sample(drawn_from, *state, thresholds)
        else:  # the ranks' winners are gathered, not their logits
            candidates = sample_candidates(logits, *state, first_token=head.first)
            token_ids = best_candidates(self.parallel.all_gather(candidates))
        self.rows.append(rows, token_ids)
        logprobs = None if needs.num_logprobs is None else token_logprobs(logits, token_ids, needs.num_logprobs)
        return SampledTokens(token_ids, logprobs, prompt_logprobs)

    def _score(self, hidden: torch.Tensor, batch: ScheduledBatch) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of prompt tokens, from the states [num_tokens, hidden_size] before them. Few at a time:
        the logits of a whole prompt do not fit."""
        scores = []
        for index, row, position, count, num_top in batch.scored.tolist():
            states = hidden[len(batch.decode_rows) + index :][:count].split(_PROMPT_LOGPROB_TOKENS)
            token_ids = self.rows.token_ids[row, position + 1 :][:count].split(_PROMPT_LOGPROB_TOKENS)
            parts = zip(states, token_ids, strict=True)
            scores.append(
                TokenLogprobs.join(token_logprobs(self.model.compute_logits(part), ids, num_top) for part, ids in parts)
            )
        return tuple(scores)

    def _upload(self, buffer: IntArray) -> torch.Tensor:
        words = torch.from_numpy(buffer)
        if self.device.type == "cpu":
            return words
        # The caching host allocator keeps pinned memory until the copy that reads it has passed.
        return words.pin_memory().to(self.device, non_blocking=True)

    def _record_event(self, with_time: bool = True) -> torch.cuda.Event | None:
        """An event on the current stream; None on a CPU, where a call returns when its work is done."""
        if self.device.type == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=with_time)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _download(self, sampled: SampledTokens, began: torch.cuda.Event | None) -> LaunchedStep:
        if self.device.type == "cpu":
            return LaunchedStep(sampled, None, None)

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        host = sampled.map(to_host)
        return LaunchedStep(host, self._record_event(with_time=began is not None), began)

    # Start-up

    def _load(self, plan: ModelPlan, config: EngineConfig, cache: KVCacheShape, check: Callable[[], None]) -> None:
        name = plan.folder or config.model
        rank = self.parallel.rank
        events.model_loading.log(logger, rank=rank, model=str(name))
        shape = plan.model_config
        events.model_config.log(
            logger,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            dtype=plan.dtype_name,
            device=str(self.device),
        )
        model = self.model
        warm_up = None
        try:
            if self.device.type == "cuda":
                materialise(model, self.device)
                self._allocate(cache, 0, config.max_num_seqs, plan.max_model_len)
                if self.parallel.size == 1:  # ranks must run their collectives in one order
                    warm_up = WarmUp(self.submit, config.max_num_seqs)
            if plan.folder is None or config.load_format == "dummy":
                report = load_dummy_weights(model, self.device, config.seed)
            else:
                report = load_weights(model, plan.folder, self.device, model.redundant_weights, check)
            if self.device.type == "cpu":
                pack_linear_weights(model)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The {sum(weight.nbytes for weight in model.parameters()) / GB:.2f} GB of {name}'s weights do "
                f"not fit on {self.device}: {error} Choose a smaller model, or end the other processes on this device."
            ) from error
        finally:
            if warm_up is not None:
                warm_up.wait()
        events.model_weights.log(
            logger,
            rank=rank,
            num_tensors=report.num_tensors,
            gigabytes=report.num_bytes / GB,
            num_files=report.num_files,
            seconds=report.seconds,
        )
        log_gpu_memory(logger, device=self.device, event=events.model_loaded)

    def _num_blocks(self, config: EngineConfig, shape: KVCacheShape, max_model_len: int) -> int:
        if config.num_kvcache_blocks is not None:
            return config.num_kvcache_blocks
        if self.device.type == "cpu":
            return num_cpu_blocks(shape, config.max_num_seqs, max_model_len)
        try:
            memory = self._measure_memory(config, shape, max_model_len)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"A step of max_num_batched_tokens={config.max_num_batched_tokens} tokens and "
                f"max_num_seqs={config.max_num_seqs} sequences does not fit on {self.device}: {error} Lower "
                f"them, to {config.max_num_batched_tokens // 2} and {max(1, config.max_num_seqs // 2)} for a start."
            ) from error
        events.kv_cache_sizing.log(
            logger,
            total_gb=memory.total / GB,
            utilization=memory.utilization,
            weights_gb=memory.weights / GB,
            activations_gb=memory.activations / GB,
            free_gb=memory.free / GB,
            available_gb=memory.available / GB,
        )
        return memory.num_blocks(shape)

    def _measure_memory(self, config: EngineConfig, shape: KVCacheShape, max_model_len: int) -> GPUMemory:
        """Runs the largest steps there can be, on a cache of the null block alone, and reads what they took."""
        num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        each, rest = divmod(config.max_num_batched_tokens, num_seqs)
        lengths = [min(each + (row < rest), max_model_len - 1) for row in range(num_seqs)]
        tokens = np.zeros(max(lengths), dtype=np.int32)
        prefill = ScheduledBatch.build(
            0,
            opened=[OpenedRow(row, tokens[:length], temperature=1.0, seed=0) for row, length in enumerate(lengths)],
            chunks=[(row, 0, length) for row, length in enumerate(lengths)],
            num_final_chunks=num_seqs,
        )
        decode = ScheduledBatch.build(0, decode_rows=range(num_seqs))
        self._allocate(shape, 0, config.max_num_seqs, max_model_len)
        weights = torch.cuda.memory_allocated(self.device)
        activations = 0
        for batch in (prefill, decode):  # a decode step's memory stays with its graph, beside that of prefill
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.submit(batch).wait()
            activations += torch.cuda.max_memory_allocated(self.device) - weights
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return GPUMemory(
            total=total,
            utilization=config.gpu_memory_utilization,
            weights=weights,
            activations=activations,
            free=free,
        )

    def _allocate(self, shape: KVCacheShape, num_blocks: int, max_num_seqs: int, max_model_len: int) -> None:
        try:
            vocab_size = self.model.lm_head.vocab_size
            self.rows = DeviceRows(max_num_seqs, max_model_len, shape.block_size, num_blocks, vocab_size, self.device)
            self.kv_caches = shape.allocate(num_blocks, self.device)
        except (MemoryError, RuntimeError, ValueError) as error:  # by size and device, numpy's, torch's or CUDA's
            raise OutOfMemoryError(
                f"{num_blocks} blocks of {shape.block_bytes / GB:.4f} GB for the KV cache, and rows for "
                f"max_num_seqs={max_num_seqs} sequences of max_model_len={max_model_len} tokens, do not fit on "
                f"{self.device}, which has {(free := free_memory(self.device)) / GB:.2f} GB left: {error} Lower "
                f"num_kvcache_blocks below {free // shape.block_bytes} (or leave it out), max_num_seqs, max_model_len."
            ) from error

    def _log_cache(self, shape: KVCacheShape, num_blocks: int, dtype: str) -> None:
        events.kv_cache_config.log(
            logger,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=shape.block_size,
            dtype=dtype,
        )
        events.kv_cache_allocated.log(logger, num_blocks=num_blocks, total_gb=num_blocks * shape.block_bytes / GB)

    # Lines at DEBUG

    def _log_preparing(self, batch: ScheduledBatch) -> None:
        rank, step, num_prefill, num_decode = self.parallel.rank, batch.step, len(batch.chunks), len(batch.decode_rows)
        if num_prefill:
            events.runner_prepare_prefill.log(logger, rank=rank, step=step, kind="PREFILL", num_seqs=num_prefill)
        if num_decode:
            events.runner_prepare_decode.log(logger, rank=rank, step=step, kind="DECODE", num_seqs=num_decode)

    def _log_inputs(self, inputs: ModelInputs) -> None:
        if not logger.isEnabledFor(logging.DEBUG):
            return
        rank, attention = self.parallel.rank, inputs.attention
        prefill, decode = attention.prefill, attention.decode
        tensors = {"input_ids": inputs.input_ids, "positions": inputs.positions}
        if prefill is not None:
            tensors["slot_mapping"] = attention.slot_mapping
            events.runner_prefill_tensors.log(logger, rank=rank, shapes=shapes_of(tensors))
            events.runner_prefill_shape.log(
                logger,
                rank=rank,
                max_seqlen_q=prefill.max_seqlen_q,
                max_seqlen_k=prefill.max_seqlen_k,
                total_tokens=len(inputs.input_ids),
            )
        elif decode is not None:
            tensors |= {"context_lens": decode.context_lens, "block_tables": decode.block_tables}
            events.runner_decode_tensors.log(logger, rank=rank, shapes=shapes_of(tensors))

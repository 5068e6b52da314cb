"""Startup: what happens before a model runner's first step. It loads the model and allocates the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.attention.selection import AttentionSelection, select_attention
from nanovllm.attention.triton_backend import MIN_COPYING_QUERIES
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import Chunk, OpenedRow, ScheduledBatch, StepHandle, StepNeeds
from nanovllm.errors import OutOfMemoryError
from nanovllm.experts.experts_method import finish_loading_experts
from nanovllm.kernels.fused_linear import largest_prompt_sizes
from nanovllm.layers.linear_method import finish_loading
from nanovllm.layers.parallel import TensorParallel
from nanovllm.logs import events
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.model_context import ModelContext
from nanovllm.models.registry import get_model_class
from nanovllm.runner.cuda_graph import DecodeGraphs, DecodeStep, GraphPool
from nanovllm.runner.device_rows import DeviceRows
from nanovllm.runner.draft_model import ModelWithDraft
from nanovllm.runner.kv_cache import GPUMemory, KVCacheShape, lower_cache_size, num_cpu_blocks
from nanovllm.runner.mixed_graphs import MixedGraphs, Model, Sample
from nanovllm.runner.model_plan import ModelPlan
from nanovllm.runner.warm_up import WarmUp
from nanovllm.utils.device_memory import GB, free_memory
from nanovllm.utils.loader import LoadReport, check_weights, load_dummy_weights, load_weights, materialise
from nanovllm.utils.logger import log_gpu_memory, setup_logger
from nanovllm.utils.stopwatch import Stopwatch

_LAUNCH_SECONDS = 1e-3  # to launch a layer from Python: 0.7 to 1.5 ms on the hosts that were measured
_FLOPS = 600e12  # a second, of a Hopper GPU's matrix products in bf16
_MIN_GRAPH_TOKENS, _MAX_GRAPH_TOKENS = 512, 16384

logger = setup_logger("nanovllm.engine.model_runner")  # the name that users' documents show


class StartingRunner(Protocol):
    """The part of the model runner that start-up uses: it sets `rows` and `kv_caches`, and launches steps on them."""

    model: CausalLM
    rows: DeviceRows
    kv_caches: list[LayerKVCache]

    def launch(self, batch: ScheduledBatch) -> StepHandle: ...


class Startup:
    """One rank's start-up. Its public methods are its stages, to be called in order; each adds a lap to `stopwatch`.

    They raise a NanoVLLMError that says what to do when the model or the cache does not fit, or when a device, a dtype
    or a backend is not available.
    """

    def __init__(self, config: EngineConfig, parallel: TensorParallel, stopwatch: Stopwatch) -> None:
        events.runner_init.log(logger, rank=parallel.rank)
        self._config = config
        self._parallel = parallel
        self._stopwatch = stopwatch
        self.plan = plan = ModelPlan.of(config)
        self.device = plan.device
        self.attention = self._select_attention(plan, config.kvcache_block_size)
        self._cache = self._cache_of(plan)
        self._attentions = [self.attention]  # of the model, then of the draft model
        if plan.draft is not None:
            self._attentions.append(self._select_attention(plan.draft, self.attention.block_size))
            self._cache = replace(self._cache, draft=self._cache_of(plan.draft))
        self._use_cuda_graphs = (
            plan.device.type == "cuda"
            and not config.enforce_eager
            and all(attention.decode.supports_cuda_graphs for attention in self._attentions)
        )
        stopwatch.lap("configuration")

    def _select_attention(self, plan: ModelPlan, block_size: int | None) -> AttentionSelection:
        backend, head_dim = self._config.attention_backend, plan.model_config.head_dim
        return select_attention(backend, plan.device, plan.dtype, head_dim, block_size, fp8_cache=plan.has_fp8_cache)

    def _cache_of(self, plan: ModelPlan) -> KVCacheShape:
        num_kv_heads = self._parallel.divide_kv_heads(plan.model_config.num_kv_heads)
        return KVCacheShape.of(plan.model_config, self.attention.block_size, plan.kv_cache_dtype, num_kv_heads)

    @property
    def query_group(self) -> int | None:
        """Number of query heads that share a KV head; None if decode attention cannot read a shared prefix once."""
        if self.plan.has_fp8_cache or not self.attention.decode.uses_shared_prefixes:
            return None
        if None not in self.plan.model_config.windows:  # no layer attends to what lies before its window
            return None
        return self.plan.model_config.num_heads // self._parallel.size // self._cache.num_kv_heads

    @property
    def _starts_fast(self) -> bool:
        """Whether kernels are compiled, and graphs captured, when they are first needed."""
        return self._config.fast_start is not False

    # Weights

    def build_model(self) -> CausalLM:
        """Returns the model, and the draft model if there is one, without their weights."""
        model = self._build(self.plan, self.attention)
        if (draft := self.plan.draft) is None:
            return model
        return ModelWithDraft(model, self._build(draft, self._attentions[-1]), draft.model_config.num_layers)

    def _build(self, plan: ModelPlan, attention: AttentionSelection) -> CausalLM:
        needed = 3 * plan.max_model_len * plan.model_config.head_dim * torch.float32.itemsize  # the table and its parts
        if needed > (free := free_memory(self.device)):
            raise OutOfMemoryError(
                f"The rotary table for max_model_len={plan.max_model_len} tokens needs {needed / GB:.2f} GB to be "
                f"made, and {self.device} has {free / GB:.2f} GB left. Give a smaller max_model_len."
            )
        context = ModelContext(
            config=plan.model_config,
            max_positions=plan.max_model_len,
            backends=attention,
            parallel=self._parallel,
            dtype=plan.dtype,
            device=self.device,
        )
        model = get_model_class(context.config.architecture)(context)
        if plan.quantization is not None:
            plan.quantization.apply(model, self.device)
        return model

    def load(self, runner: StartingRunner, check: Callable[[], None]) -> None:
        """Loads the weights of all models and, on a GPU, compiles the kernels meanwhile.

        check: called while the weights load; may raise to stop loading.
        """
        rank, model = self._parallel.rank, runner.model
        models = {model: self.plan}
        if isinstance(model, ModelWithDraft) and self.plan.draft is not None:
            models = {model.target: self.plan, model.draft: self.plan.draft}
        warm_up = None
        for each, plan in models.items():
            events.model_loading.log(logger, rank=rank, model=plan.name)
            self._log_model(plan.model_config)
            if (folder := self._weights_folder(plan)) is not None:
                check_weights(each, folder, each.redundant_weights, each.checkpoint_form)
        try:
            if self.device.type == "cuda":
                materialise(runner.model, self.device)
                self._set_rows_and_cache(runner, 0, self.plan.max_model_len)
                if self._parallel.size == 1:  # with threads, ranks could run collectives in different orders
                    config = self._config
                    warm_up = WarmUp(
                        runner.launch,
                        config.max_num_rows,
                        drafts=config.speculative_config is not None,
                        draft_model=self.plan.draft is not None,
                        everything=not self._starts_fast,
                    )
            reports = [self._load_weights(each, plan, check) for each, plan in models.items()]
            finish_loading(runner.model)
            finish_loading_experts(runner.model)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # of a CPU
                raise
            num_bytes = sum(weight.nbytes for weight in runner.model.parameters())
            raise OutOfMemoryError(
                f"The {num_bytes / GB:.2f} GB of {self.plan.name}'s weights do not fit on {self.device}: {error} "
                "Choose a smaller model, or end the other processes on this device."
            ) from error
        finally:
            if warm_up is not None:
                warm_up.wait()
        for report in reports:
            events.model_weights.log(
                logger,
                rank=rank,
                num_tensors=report.num_tensors,
                gigabytes=report.num_bytes / GB,
                num_files=report.num_files,
                seconds=report.seconds,
            )
        log_gpu_memory(logger, device=self.device, event=events.model_loaded)
        self._stopwatch.lap("weights")

    def _load_weights(self, model: CausalLM, plan: ModelPlan, check: Callable[[], None]) -> LoadReport:
        if (folder := self._weights_folder(plan)) is None:
            return load_dummy_weights(model, self.device, self._config.seed)
        return load_weights(model, folder, self.device, model.redundant_weights, check, model.checkpoint_form)

    def _weights_folder(self, plan: ModelPlan) -> Path | None:
        """Returns the folder that weights are read from; None for random weights."""
        return None if self._config.load_format == "dummy" else plan.folder

    def _log_model(self, shape: ModelConfig) -> None:
        events.model_config.log(
            logger,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            dtype=self.plan.dtype_name,
            device=str(self.device),
        )

    # Cache

    def size_cache(self, runner: StartingRunner) -> int:
        """Returns the number of blocks of the cache: as configured, or as many as fit. The same on every rank."""
        num_blocks = self._parallel.minimum(self._num_blocks(runner), self.device)
        self._stopwatch.lap("largest steps")
        return num_blocks

    def _num_blocks(self, runner: StartingRunner) -> int:
        config = self._config
        if config.num_kvcache_blocks is not None:
            return config.num_kvcache_blocks
        if self.device.type == "cpu":
            size = self._parallel.size
            return num_cpu_blocks(self._cache, config.max_num_seqs, self.plan.max_model_len, size)
        try:
            memory = self._measure_memory(runner)
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
        return memory.num_blocks(self._cache)

    def _measure_memory(self, runner: StartingRunner) -> GPUMemory:
        """Runs the largest possible steps, on a cache of the null block alone, and measures the memory they take."""
        self._set_rows_and_cache(runner, 0, self.plan.max_model_len)
        weights = torch.cuda.memory_allocated(self.device)
        prompts = self._largest_prompt_steps()
        peaks = {size: self._peak_memory(runner, batch) - weights for size, batch in prompts.items()}
        # Summed, since CUDA graphs keep their memory during other steps.
        activations = max(peaks.values()) + self._peak_memory(runner, self._largest_decode_step()) - weights
        if self._has_mixed_graphs:  # a graph of prompts takes as much for each token
            most = self._max_graph_tokens()
            activations += max(peak * min(most, size) // prompts[size].num_tokens for size, peak in peaks.items())
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return GPUMemory(
            total=total,
            utilization=self._config.gpu_memory_utilization,
            weights=weights,
            activations=activations,
            free=free,
        )

    def _peak_memory(self, runner: StartingRunner, batch: ScheduledBatch) -> int:
        """Returns how many bytes are allocated at most while a step runs."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        runner.launch(batch).wait()
        return torch.cuda.max_memory_allocated(self.device)

    def _largest_decode_step(self) -> ScheduledBatch:
        num_rows = min(self._config.max_num_rows, self._config.max_num_batched_tokens)
        return ScheduledBatch.build(0, decode_rows=range(num_rows))

    def _largest_prompt_steps(self) -> dict[int, ScheduledBatch]:
        """Returns the prefill steps that may take most memory, by their sizes; the largest is the last one."""
        return {size: self._prompt_step(size) for size in largest_prompt_sizes(self._config.max_num_batched_tokens)}

    def _prompt_step(self, num_tokens: int) -> ScheduledBatch:
        """Returns a step of so many tokens, or of fewer if prompts of all sequences cannot have as many."""
        num_seqs = min(self._config.max_num_seqs, num_tokens)
        each, rest = divmod(num_tokens, num_seqs)
        lengths = [min(each + (row < rest), self.plan.max_model_len - 1) for row in range(num_seqs)]
        tokens = np.zeros(max(lengths), dtype=np.int32)  # [longest]
        return ScheduledBatch.build(
            0,
            opened=[OpenedRow(row, tokens[:length], temperature=1.0, seed=0) for row, length in enumerate(lengths)],
            chunks=[Chunk(row=row, start=0, length=length) for row, length in enumerate(lengths)],
            num_final_chunks=num_seqs,
        )

    def allocate(self, runner: StartingRunner, num_blocks: int) -> int:
        """Allocates the runner's rows and cache. Returns max_model_len, at most as many tokens as the cache holds."""
        max_model_len = self.plan.fit_max_model_len(self._config, num_blocks * self._cache.block_size)
        events.kv_cache_allocating.log(logger)
        events.kv_cache_config.log(
            logger,
            num_kv_heads=self._cache.num_kv_heads,
            head_dim=self._cache.head_dim,
            block_size=self._cache.block_size,
            dtype=self.plan.kv_cache_dtype_name,
        )
        total_gb = num_blocks * self._cache.block_bytes / GB
        events.kv_cache_allocated.log(logger, num_blocks=num_blocks, total_gb=total_gb)
        self._set_rows_and_cache(runner, num_blocks, max_model_len)
        if self.device.type == "cuda" and not self._starts_fast:
            for batch in (*self._largest_prompt_steps().values(), self._largest_decode_step()):
                # torch keeps the memory that it needs
                runner.launch(batch).wait()
        self._stopwatch.lap("KV cache")
        return max_model_len

    def _set_rows_and_cache(self, runner: StartingRunner, num_blocks: int, max_model_len: int) -> None:
        """Allocates the runner's rows, for requests of up to `max_model_len` tokens, and its cache."""
        shape, config = self._cache, self._config
        try:
            vocab_size = runner.model.lm_head.vocab_size
            runner.rows = DeviceRows(
                config.max_num_rows, max_model_len, shape.block_size, num_blocks, vocab_size, self.device
            )
            runner.kv_caches = shape.allocate(num_blocks, self.device)
        except (MemoryError, RuntimeError, ValueError) as error:  # numpy, torch and CUDA raise different ones
            free = free_memory(self.device)
            cache = lower_cache_size(config.num_kvcache_blocks, free, shape.block_bytes, self.device)
            raise OutOfMemoryError(
                f"{num_blocks} blocks of {shape.block_bytes / GB:.4f} GB for the KV cache, and rows for "
                f"max_num_seqs={config.max_num_seqs} sequences of max_model_len={max_model_len} tokens, do not fit on "
                f"{self.device}, which has {free / GB:.2f} GB left: {error} Lower {cache}, max_num_seqs, max_model_len."
            ) from error

    # Graphs

    def capture(self, decode_step: DecodeStep, null_row: int) -> DecodeGraphs | None:
        """Captures the graphs of decode steps, or with `fast_start` the largest. Returns None without graphs."""
        if not self._use_cuda_graphs:
            return None
        pool = GraphPool(self.device, self._parallel.step)
        graphs = DecodeGraphs(pool, decode_step, self._config.max_num_rows, null_row)
        missing = graphs.capture_missing(StepNeeds())
        for _ in islice(missing, 1) if self._starts_fast else missing:
            pass
        self._stopwatch.lap("CUDA graphs")
        return graphs

    def mixed_graphs(
        self, decode_graphs: DecodeGraphs | None, model: Model, sample: Sample, null_row: int
    ) -> MixedGraphs | None:
        """Returns the graphs of steps with chunks, or None when these run without graphs."""
        if decode_graphs is None:
            return None
        if not self._has_mixed_graphs:
            why = f"the prefill backend {self.attention.prefill.name} cannot be captured"
            events.graph_mixed_off.log(logger, why_eager=why)
            return None
        config = self.plan.model_config
        graphs = MixedGraphs(
            decode_graphs.pool,
            model,
            sample,
            max_tokens=self._max_graph_tokens(),
            max_num_rows=self._config.max_num_rows,
            hidden_size=config.embedding_size,
            dtype=self.plan.dtype,
            null_row=null_row,
        )
        if not self._starts_fast:
            for _ in graphs.capture_missing(StepNeeds()):
                pass
        events.graph_mixed_ready.log(logger, max_graph_tokens=graphs.max_tokens, num_captured=graphs.num_captured)
        self._stopwatch.lap("CUDA graphs of prompts")
        return graphs

    def _max_graph_tokens(self) -> int:
        """Returns up to how many tokens a step with chunks is a graph.

        The device takes as long for more tokens as the host takes to launch the step, so that a graph gains nothing.
        """
        most = self._config.max_num_batched_tokens
        if self.plan.has_fp8_cache:
            return min(MIN_COPYING_QUERIES - 1, most)
        config = self.plan.model_config
        inner_size = config.intermediate_size if config.experts is None else config.experts.active_size
        weights = config.hidden_size * (
            (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim + 3 * inner_size
        )
        tokens = _LAUNCH_SECONDS * _FLOPS * self._parallel.size / (2 * weights)
        return min(max(int(tokens), _MIN_GRAPH_TOKENS), _MAX_GRAPH_TOKENS, most)

    @property
    def _has_mixed_graphs(self) -> bool:
        return self._use_cuda_graphs and all(each.prefill.supports_prefill_graphs for each in self._attentions)

    def finish(self, runner: StartingRunner, num_blocks: int, max_model_len: int) -> ResolvedConfig:
        """Logs the memory in use and returns the settings that were chosen."""
        log_gpu_memory(logger, device=self.device, event=events.kv_cache_memory)
        config, plan = self._config, self.plan
        return ResolvedConfig(
            model=plan.name,
            device=str(self.device),
            dtype=plan.dtype_name,
            vocab_size=plan.model_config.vocab_size,
            eos_token_ids=plan.model_config.eos_token_ids,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prefill_tokens_beside_decode=config.max_prefill_tokens_beside_decode,
            inter_token_latency_target_ms=config.inter_token_latency_target_ms or None,
            block_size=self.attention.block_size,
            num_blocks=num_blocks,
            kv_cache_dtype=plan.kv_cache_dtype_name,
            enable_prefix_caching=config.enable_prefix_caching,
            use_cuda_graphs=self._use_cuda_graphs,
            prefill_backend=self.attention.prefill.name,
            decode_backend=self.attention.decode.name,
            pipeline_depth=plan.pipeline_depth(config),
            quantization=None if plan.quantization is None else plan.quantization.name,
            draft_cost=runner.model.draft_cost if isinstance(runner.model, ModelWithDraft) else 0.0,
        )

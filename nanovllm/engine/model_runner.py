"""ModelRunner: one rank's device work. It turns a `ScheduledBatch` into sampled tokens.

Everything a step needs is in the batch and in the device's rows, so `submit` only launches: the tokens come back
through pinned memory, and the step's handle waits for them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.config import EngineConfig
from nanovllm.engine.batch import IntArray, ScheduledBatch, StepNeeds
from nanovllm.kernels.logprobs import SampledTokens, TokenLogprobs
from nanovllm.layers.parallel import TensorParallel
from nanovllm.runner.cuda_graph import DecodeGraphs
from nanovllm.runner.device_batch import DeviceBatch
from nanovllm.runner.device_rows import DeviceRows, ModelInputs
from nanovllm.runner.out_of_memory import step_out_of_memory
from nanovllm.runner.sampler import Sampler, prompt_logprobs
from nanovllm.runner.startup import Startup
from nanovllm.runner.step_handle import DeviceStepHandle, wait_for
from nanovllm.runner.step_log import StepLog
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.utils import env
from nanovllm.utils.stopwatch import Stopwatch


class ModelRunner:
    """Loads the model, sizes the KV cache from what is measured, and runs steps.

    `resolved` says what was decided. Raises a NanoVLLMError with the way out when the model or the cache does not fit,
    or when a device, a dtype or a backend is not available.
    """

    rows: DeviceRows
    kv_caches: list[LayerKVCache]

    def __init__(
        self,
        config: EngineConfig,
        parallel: TensorParallel | None = None,
        stopwatch: Stopwatch | None = None,
        check: Callable[[], None] = lambda: None,  # called while the weights load; what it raises ends that
    ) -> None:
        self.parallel = parallel or TensorParallel()
        startup = Startup(config, self.parallel, stopwatch or Stopwatch())
        self.device = startup.device
        self._query_group = startup.query_group
        self._graphs: DecodeGraphs | None = None
        self._log = StepLog(self.parallel.rank, self.device)
        self._traces = env.trace_file() is not None
        with torch.inference_mode(), self._on_device():
            self.model = startup.build_model()
            self.sampler = Sampler(self.parallel, self.model.lm_head.first)
            startup.load(self, check)
            num_blocks = startup.size_cache(self)
            max_model_len = startup.allocate(self, num_blocks)
            self._graphs = startup.capture(self._decode, self.rows.null_row)
        self.resolved = startup.finish(num_blocks, max_model_len)

    @property
    def graph_pool(self) -> tuple[int, int] | None:
        """The memory pool of the CUDA graphs; None where there are none."""
        return self._graphs.pool if self._graphs else None

    def submit(self, batch: ScheduledBatch) -> DeviceStepHandle:
        """Launches a step and returns without waiting for the device. Raises OutOfMemoryError, with the numbers."""
        try:
            return self.launch(batch)
        except torch.OutOfMemoryError as error:
            raise step_out_of_memory(error, batch.num_tokens, self.device, self.resolved) from error

    def synchronize(self) -> None:
        """Waits for the device. Raises what a submitted step raised there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def becomes_idle(self, seconds: float) -> bool:
        """Whether all submitted steps end within that time, with or without an error."""
        deadline = time.monotonic() + seconds

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            if (event := self._record_event(with_time=False)) is not None:
                wait_for(event, check)
        except TimeoutError:
            return False
        except RuntimeError:  # CUDA's; the step's handle raises it too
            pass
        return True

    def shutdown(self) -> None:
        """Gives the memory back. The runner cannot be used afterwards."""
        with suppress(RuntimeError):  # the device is out of order; a step's handle has raised that
            self.synchronize()
        del self.model, self.rows, self.kv_caches, self._graphs
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # A step

    def launch(self, batch: ScheduledBatch) -> DeviceStepHandle:
        """`submit`, with torch's own error where memory runs out."""
        needs = batch.needs
        if needs.shares_prefix and self._query_group is None:
            needs = replace(needs, shares_prefix=False)
        with torch.inference_mode(), self._on_device():
            began = self._record_event() if self._traces or self._log.is_detailed else None
            uploaded = DeviceBatch(batch, self._upload(batch.buffer))
            self.rows.apply(uploaded)
            self._log.preparing(batch)
            with self._log.forward(batch):
                sampled = self._run(uploaded, needs)
            return self._download(sampled, began)

    def _run(self, batch: DeviceBatch, needs: StepNeeds) -> SampledTokens:
        if batch.has("chunks"):
            return self._forward(self.rows.mixed_inputs(batch, self._shared_group(needs)), needs, batch.host)
        rows = batch.values("decode_rows")
        # A graph that gives the log-probability of every token would hold much memory.
        if self._graphs is None or (needs.num_logprobs or 0) > MAX_LOGPROBS:
            return self._decode(rows, needs)
        return self._graphs.replay(rows, needs)

    def _decode(self, rows: torch.Tensor, needs: StepNeeds) -> SampledTokens:
        """rows [num_rows] int32 → a token each. What a CUDA graph records."""
        return self._forward(self.rows.decode_inputs(rows, self._shared_group(needs)), needs)

    def _forward(self, inputs: ModelInputs, needs: StepNeeds, batch: ScheduledBatch | None = None) -> SampledTokens:
        """Computes, samples, and writes the tokens into their rows. batch: given where it has chunks."""
        self._log.inputs(inputs)
        hidden = self.model(inputs.input_ids, inputs.positions, inputs.attention, self.kv_caches)
        of_prompts = self._prompt_logprobs(hidden, batch) if batch is not None else ()
        rows = inputs.sampled_rows
        if not len(rows):  # a chunk that ends before its prompt does
            return SampledTokens(rows, None, of_prompts)
        if inputs.sampled_tokens is not None:
            hidden = hidden[inputs.sampled_tokens]
        logits = self._logits(hidden, needs)
        sampled = self.sampler(logits, rows, self.rows, needs)
        self.rows.append(rows, sampled.token_ids)
        return replace(sampled, prompt_logprobs=of_prompts)

    def _logits(self, hidden: torch.Tensor, needs: StepNeeds) -> torch.Tensor:
        """hidden [num_rows, hidden_size] → [num_rows, vocab_size or this rank's share of it], as the sampler takes."""
        takes_all = self.sampler.takes_all_logits(needs)
        logits = self.model.compute_logits(hidden) if takes_all else self.model.lm_head.logits_share(hidden)
        self._log.logits(logits)
        return logits

    def _prompt_logprobs(self, hidden: torch.Tensor, batch: ScheduledBatch) -> tuple[TokenLogprobs, ...]:
        """hidden: of the batch's decode rows and chunks, [num_tokens, hidden_size]."""
        of_chunks = hidden[len(batch.decode_rows) :]  # [num_prefill_tokens, hidden_size]
        return tuple(
            prompt_logprobs(
                hidden=of_chunks[item.chunk_token :][: item.num_tokens],
                token_ids=self.rows.token_ids[item.row, item.position + 1 :][: item.num_tokens],
                compute_logits=self.model.compute_logits,
                num_top=item.num_top,
            )
            for item in batch.prompt_logprobs
        )

    def _shared_group(self, needs: StepNeeds) -> int | None:
        return self._query_group if needs.shares_prefix else None

    # To the device and back

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on torch's current device, which need not be ours."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _upload(self, buffer: IntArray) -> torch.Tensor:
        words = torch.from_numpy(buffer)
        if self.device.type == "cpu":
            return words
        # The caching host allocator keeps pinned memory until the copy that reads it has passed.
        return words.pin_memory().to(self.device, non_blocking=True)

    def _download(self, sampled: SampledTokens, began: torch.cuda.Event | None) -> DeviceStepHandle:
        if self.device.type == "cpu":
            return DeviceStepHandle(sampled, done=None, began=None)

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        host = sampled.map(to_host)
        return DeviceStepHandle(host, done=self._record_event(with_time=began is not None), began=began)

    def _record_event(self, with_time: bool = True) -> torch.cuda.Event | None:
        """An event on the current stream; None on a CPU, where a call returns when its work is done."""
        if self.device.type == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=with_time)
        event.record(torch.cuda.current_stream(self.device))
        return event

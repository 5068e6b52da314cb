"""ModelRunner: one rank's work on its device. It turns a `ScheduledBatch` into sampled tokens.

Everything that a step needs is in the batch and in the device's rows, so `submit` only launches work. The tokens are
copied to pinned memory, and the step's handle waits for them.
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
from nanovllm.engine.batch import ScheduledBatch, StepNeeds
from nanovllm.kernels.logprobs import SampledTokens, TokenLogprobs
from nanovllm.layers.parallel import TensorParallel
from nanovllm.runner.cuda_graph import DecodeGraphs
from nanovllm.runner.device_batch import BatchUploads, DeviceBatch
from nanovllm.runner.device_rows import DeviceRows, ModelInputs
from nanovllm.runner.draft_model import DraftSteps
from nanovllm.runner.mixed_graphs import MixedGraphs, PaddedStep, missing_graphs
from nanovllm.runner.out_of_memory import step_out_of_memory
from nanovllm.runner.sampler import Sampler, prompt_logprobs
from nanovllm.runner.startup import Startup
from nanovllm.runner.step_handle import DeviceStepHandle, EventPool, wait_for
from nanovllm.runner.step_log import StepLog
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.utils import env
from nanovllm.utils.stopwatch import Stopwatch


class ModelRunner:
    """Loads the model, measures how large the KV cache can be, and runs steps.

    `resolved` holds the settings that were chosen. Raises a NanoVLLMError that says what to do when the model or the
    cache does not fit, or when a device, a dtype or a backend is not available.
    """

    rows: DeviceRows
    kv_caches: list[LayerKVCache]

    def __init__(
        self,
        config: EngineConfig,
        parallel: TensorParallel | None = None,
        stopwatch: Stopwatch | None = None,
        check: Callable[[], None] = lambda: None,  # called while the weights load; may raise to stop loading
    ) -> None:
        self.parallel = parallel or TensorParallel()
        startup = Startup(config, self.parallel, stopwatch or Stopwatch())
        self.device = startup.device
        self._query_group = startup.query_group
        self._graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        self._log = StepLog(self.parallel, self.device)
        self._events = EventPool(self.device)
        self._uploads = BatchUploads(self.device)
        self._has_timeline = env.trace_file() is not None
        with torch.inference_mode(), self._on_device():
            self.model = startup.build_model()
            self.sampler = Sampler(self.parallel, self.model.lm_head.first)
            self._drafts = DraftSteps(self)
            startup.load(self, check)
            num_blocks = startup.size_cache(self)
            max_model_len = startup.allocate(self, num_blocks)
            self._graphs = startup.capture(self._decode, self.rows.null_row)
            self._mixed_graphs = startup.mixed_graphs(self._graphs, self._hidden, self._sample, self.rows.null_row)
        draft_graphs = self._drafts.make_graphs(self._graphs)
        self._missing_graphs = missing_graphs(self.device, self._graphs, draft_graphs, self._mixed_graphs)
        self.resolved = startup.finish(self, num_blocks, max_model_len)

    @property
    def graph_pool(self) -> tuple[int, int] | None:
        """The memory pool of the CUDA graphs; None without graphs."""
        return self._graphs.pool.handle if self._graphs else None

    def submit(self, batch: ScheduledBatch) -> DeviceStepHandle:
        """Launches a step and returns without waiting for the device.

        Raises OutOfMemoryError, which has the numbers, when the step does not fit.
        """
        try:
            return self.launch(batch)
        except torch.OutOfMemoryError as error:
            raise step_out_of_memory(error, batch.num_tokens, self.device, self.resolved) from error

    def synchronize(self) -> None:
        """Waits for the device. Raises what a submitted step raised there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def capture_ahead(self) -> bool:
        """Captures one of the CUDA graphs that later steps may need. Returns False when none of these is missing."""
        with torch.inference_mode(), self._on_device():
            return any(True for _ in self._missing_graphs)  # at the first

    def becomes_idle(self, seconds: float) -> bool:
        """Waits for at most `seconds`. Returns whether all submitted steps have ended, with or without an error."""
        deadline = time.monotonic() + seconds

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            if (event := self._events.record(with_time=False)) is not None:
                wait_for(event, check)
        except TimeoutError:
            return False
        except RuntimeError:  # a CUDA error, which the step's handle raises too
            pass
        return True

    def shutdown(self) -> None:
        """Frees the device's memory. The runner cannot be used afterwards."""
        with suppress(RuntimeError):  # a CUDA error, which a step's handle has raised already
            self.synchronize()
        del self.model, self.rows, self.kv_caches, self._graphs, self._mixed_graphs, self._missing_graphs, self._drafts
        del self._uploads
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # A step

    def launch(self, batch: ScheduledBatch) -> DeviceStepHandle:
        """Launches a step like `submit`, but raises torch's own error when memory runs out."""
        needs = batch.needs if self._query_group is not None else replace(batch.needs, shares_prefix=False)
        with torch.inference_mode(), self._on_device():
            began = self._events.record(with_time=True) if self._has_timeline or self._log.is_timed else None
            uploaded = self._uploads.upload(batch)
            self.rows.apply(uploaded)
            self._log.preparing(batch)
            with self._log.forward(batch):
                sampled = self._run(uploaded, needs)
            return self._download(self._drafts.finish(uploaded, sampled), began)

    def _run(self, batch: DeviceBatch, needs: StepNeeds) -> SampledTokens:
        """Runs a step. Replays CUDA graphs where there are some for it."""
        host = batch.host
        problem = _graph_problem(batch, needs)
        if not batch.has("chunks"):
            rows = batch.values("decode_rows")
            if self._graphs is not None and problem is None:
                return self._graphs.replay(rows, needs)
            sampled = self._decode(rows, needs)
        else:
            if self._mixed_graphs is not None and problem is None:
                shape = self._mixed_graphs.shape_of(host)
                if shape is not None:
                    return self._mixed_graphs.replay(host, needs, shape)
                problem = f"more than {self._mixed_graphs.max_tokens} tokens"
            sampled = self._forward(self.rows.mixed_inputs(batch, self._shared_group(needs)), needs, host)
        if self._graphs is not None and problem is not None:
            self._log.eager(host, problem)
        return sampled

    def _hidden(self, step: PaddedStep, needs: StepNeeds) -> torch.Tensor:
        """Returns the hidden states of a padded step's sampled tokens. This is what a CUDA graph records."""
        inputs = self.rows.padded_inputs(step, self._shared_group(needs))
        self._log.inputs(inputs)
        hidden = self._drafts.run_model(inputs, needs)
        return hidden[inputs.sampled_tokens]

    def _decode(self, rows: torch.Tensor, needs: StepNeeds) -> SampledTokens:
        """Decodes `rows` [num_rows] int32, one token each. This is what a CUDA graph records."""
        return self._forward(self.rows.decode_inputs(rows, self._shared_group(needs)), needs)

    def _forward(self, inputs: ModelInputs, needs: StepNeeds, batch: ScheduledBatch | None = None) -> SampledTokens:
        """Runs the model, samples, and appends the tokens to their rows. batch: None unless it has chunks."""
        self._log.inputs(inputs)
        hidden = self._drafts.run_model(inputs, needs)
        of_prompts = self._prompt_logprobs(hidden, batch) if batch is not None else ()
        rows = inputs.sampled_rows
        if not len(rows):  # only a chunk that does not reach the end of its prompt
            return SampledTokens(rows, None, of_prompts)
        if inputs.sampled_tokens is not None:
            hidden = hidden[inputs.sampled_tokens]
        return replace(self._sample(hidden, rows, needs), prompt_logprobs=of_prompts)

    def _sample(self, hidden: torch.Tensor, rows: torch.Tensor, needs: StepNeeds) -> SampledTokens:
        """Samples a token for each of `rows` [num_rows] from hidden [num_rows, hidden_size], and appends them."""
        logits = self._logits(hidden, needs)
        sampled = self.sampler(logits, rows, self.rows, needs)
        self.rows.append(rows, sampled.token_ids)
        return sampled

    def _logits(self, hidden: torch.Tensor, needs: StepNeeds) -> torch.Tensor:
        """Returns logits for `hidden` [num_rows, hidden_size] → [num_rows, vocab_size or this rank's share of it]."""
        takes_all = self.sampler.takes_all_logits(needs)
        logits = self.model.compute_logits(hidden) if takes_all else self.model.lm_head.logits_share(hidden)
        self._log.logits(logits)
        return logits

    def _prompt_logprobs(self, hidden: torch.Tensor, batch: ScheduledBatch) -> tuple[TokenLogprobs, ...]:
        """Returns the log-probabilities that the batch asks for. hidden: all its tokens', [num_tokens, hidden_size]."""
        of_chunks = hidden[len(batch.computed_rows) :]  # [num_prefill_tokens, hidden_size]
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
        """Returns the argument `query_group` of the inputs: None when the step does not look for shared prefixes."""
        return self._query_group if needs.shares_prefix else None

    # To the device and back

    def _on_device(self) -> AbstractContextManager[object]:
        """Returns a context in which the runner's device is torch's current one, on which Triton launches kernels."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _download(self, sampled: SampledTokens, began: torch.cuda.Event | None) -> DeviceStepHandle:
        """Starts to copy the tokens to the host. Returns a handle that waits for them."""
        if self.device.type == "cpu":
            return DeviceStepHandle(sampled, done=None, began=None, events=self._events)

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        host = sampled.map(to_host)
        done = self._events.record(with_time=began is not None)
        return DeviceStepHandle(host, done=done, began=began, events=self._events)


def _graph_problem(batch: DeviceBatch, needs: StepNeeds) -> str | None:
    """Returns why a step cannot be a CUDA graph, or None."""
    if batch.has("prompt_logprobs"):
        return "prompt_logprobs"
    if (needs.num_logprobs or 0) > MAX_LOGPROBS:  # such a graph would keep too much memory
        return f"logprobs of more than {MAX_LOGPROBS} tokens"
    return None

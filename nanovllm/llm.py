"""LLM: prompts in, results out, in order."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from nanovllm.config import EngineArguments, EngineConfig
from nanovllm.diagnostics.leak_check import LeakCheck, MemoryUse, check_leak
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.metrics import EngineStatistics
from nanovllm.engine.tokenizing import Prompt
from nanovllm.errors import InvalidArgumentError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils import events
from nanovllm.utils.logger import flush_timed_sections, log_gpu_memory, log_rule, setup_logger

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nanovllm.diagnostics.memory import MemoryReport

logger = setup_logger(__name__)


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm without its monitor thread, which takes the lock that log lines take: a debugger that stops all threads
    could stop it while it holds the lock."""

    monitor_interval = 0


class LLM:
    """Offline inference on one model.

        llm = LLM("tiny")
        outputs = llm.generate(["Hello", "1 + 1 ="], SamplingParams(temperature=0))

    model: a folder, a Hugging Face id, or "tiny"; the other arguments are the fields of
    `nanovllm.config.EngineConfig`, and vLLM's `block_size` and `num_gpu_blocks_override`.
    Raises a NanoVLLMError that says what is wrong and what to do about it.
    """

    def __init__(self, model: str, **arguments: Unpack[EngineArguments]) -> None:
        self.llm_engine = LLMEngine(EngineConfig.from_arguments(model, arguments))
        self._counter = itertools.count()

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt; results come in the order of the prompts.

        prompts: a text, token ids, {"prompt": …}, {"prompt_token_ids": …}, or a list that mixes these.
        sampling_params: one for all, one for each, or None for the defaults.
        Raises InvalidArgumentError, before anything runs, if any prompt is not allowed.
        """
        batch = _as_list(prompts)
        if not batch:
            return []
        params = _params_for_each(sampling_params, len(batch))
        request_ids: list[str] = []
        try:
            for prompt, param in zip(batch, params, strict=True):
                request_ids.append(f"generate-{next(self._counter)}")  # first: Ctrl-C may come in between
                self.llm_engine.add_request(request_ids[-1], prompt, param)
            return self._run(request_ids, use_tqdm)
        except BaseException:  # Ctrl-C included: nothing of this call stays behind
            self.llm_engine.discard_requests(request_ids)
            raise

    def chat(
        self,
        messages: Seq[Mapping[str, Any]] | Seq[Seq[Mapping[str, Any]]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Seq[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Completes one conversation, or each of a list of them, through the checkpoint's chat template.

        A message is {"role": "user", "content": "…"}; `chat_template_kwargs` go to the template
        (Qwen3 reads `enable_thinking`), and so do `tools`, each {"type": "function", "function": {…}}; what the model
        calls is in its text.
        """
        tokenizer = self.get_tokenizer()
        if not tokenizer.chat_template:
            raise InvalidArgumentError("tokenizer", tokenizer.name_or_path, "one with a chat template", "Use generate.")
        conversations = list(messages) if isinstance(messages, (list, tuple)) else [messages]
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        for chat in conversations:
            if not isinstance(chat, (list, tuple)) or not all(isinstance(message, Mapping) for message in chat):
                raise InvalidArgumentError("messages", chat, "a list of messages, each {'role': …, 'content': …}")
        if tools is not None and (
            not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise InvalidArgumentError("tools", tools, "a list of {'type': 'function', 'function': {…}}, or None")
        extra = {**(chat_template_kwargs or {}), **({"tools": list(tools)} if tools else {})}
        prompts: list[Prompt] = [
            tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True, **extra)
            for chat in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        if self.llm_engine.tokenizer is None:
            raise InvalidArgumentError("skip_tokenizer_init", True, "False to have a tokenizer")
        return self.llm_engine.tokenizer

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix."""
        self.llm_engine.reset_prefix_cache()

    # Looking inside: docs/debugging.md

    def start_profile(self, folder: str | Path) -> None:
        """Records every rank with torch's profiler from now to `stop_profile`, into `folder`, made if need be.

        Raises InvalidStateError when a profile runs already, InvalidArgumentError when `folder` can not be written.
        """
        self.llm_engine.diagnostics.start_profile(Path(folder))

    def stop_profile(self) -> str:
        """Writes, for each rank, `profile_rank0.json`, a Chrome trace that Perfetto opens, and the table of the dearest
        operators and kernels, `profile_rank0.txt`; the tables are logged and returned too. Raises InvalidStateError
        when none runs.
        """
        return self.llm_engine.diagnostics.stop_profile()

    def memory_report(self) -> MemoryReport:
        """Where the device's memory went, in bytes, and in `others` that of the other ranks; `print` shows tables."""
        return self.llm_engine.diagnostics.memory_report()

    def check_memory_leak(
        self,
        prompts: Prompt | Seq[Prompt] | None = None,
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        num_runs: int = 8,
    ) -> LeakCheck:
        """Generates the same `num_runs` times (None: a few tokens of our own) and says whether memory settles.

        Measured are used memory and Python objects of all ranks, and KV blocks, after each run. Raises
        InvalidArgumentError for fewer than 4 runs, or prompts that are not allowed.
        """
        if prompts is None:
            prompts = [[token % self.llm_engine.resolved.vocab_size for token in range(1, 9)]] * 4
            sampling_params = sampling_params or SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

        def measure() -> MemoryUse:
            used_blocks = self.llm_engine.scheduler.block_manager.num_used_blocks
            return MemoryUse(*self.llm_engine.diagnostics.memory_use(), used_blocks)

        return check_leak(lambda: self.generate(prompts, sampling_params, use_tqdm=False), measure, num_runs)

    def exit(self) -> None:
        """Gives the device's memory back; calling it again does nothing."""
        self.llm_engine.exit()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    def _run(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        engine = self.llm_engine
        before = engine.statistics.copy()
        log_rule(logger, "-")
        events.generation_start.log(logger, num_prompts=len(request_ids))
        events.generation_prompt_tokens.log(logger, num_prompt_tokens=engine.num_waiting_tokens)
        outputs: dict[str, RequestOutput] = {}
        foreign: list[RequestOutput] = []  # of requests that someone queued before with add_request
        wanted = set(request_ids)
        use_tqdm = use_tqdm and logger.isEnabledFor(logging.INFO)  # who asks the log for silence means the bar, too
        with ProgressBar(total=len(request_ids), desc="Generating", dynamic_ncols=True, disable=not use_tqdm) as bar:
            while wanted or engine.is_draining:
                for output in engine.step():
                    if output.request_id not in wanted:
                        foreign.append(output)
                        continue
                    wanted.remove(output.request_id)
                    outputs[output.request_id] = output
                    bar.update()
                if use_tqdm:
                    bar.set_postfix_str(_speeds(engine.statistics.since(before)), refresh=False)
        engine.hand_back(foreign)
        done = engine.statistics.since(before)
        flush_timed_sections()
        events.generation_complete.log(
            logger,
            num_steps=done.num_steps,
            total_output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs.values()),
            prefill_time=done.prefill_seconds,
            decode_time=done.decode_seconds,
        )
        log_gpu_memory(logger, device=engine.resolved.device, event=events.generation_memory)
        return [outputs[request_id] for request_id in request_ids]


def _speeds(done: EngineStatistics) -> str:
    """What the progress bar shows beside the count of finished requests."""
    seconds = max(done.prefill_seconds + done.decode_seconds, 1e-9)
    return f"in {done.num_prompt_tokens / seconds:.0f} tok/s, out {done.num_output_tokens / seconds:.0f} tok/s"


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A single prompt (text, dictionary, token ids) as a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    try:
        batch: list[Any] = list(prompts)
    except TypeError:
        raise InvalidArgumentError("prompts", prompts, "a text, token ids, a dictionary, or a list of these") from None
    return [batch] if batch and all(isinstance(item, (int, np.integer)) for item in batch) else batch


def _params_for_each(
    sampling_params: SamplingParams | Seq[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    try:
        params = list(sampling_params)
    except TypeError:
        raise InvalidArgumentError("sampling_params", sampling_params, "a SamplingParams or a list of them") from None
    if len(params) != num_prompts:
        raise InvalidArgumentError(
            "sampling_params", f"a list of {len(params)}", f"one for all, or one for each of the {num_prompts} prompts"
        )
    return params

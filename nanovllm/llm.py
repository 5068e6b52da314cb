"""LLM: offline inference, from a list of prompts to a list of outputs in the same order."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from nanovllm.config import EngineConfig, takes_engine_arguments
from nanovllm.diagnostics.leak_check import LeakCheck, MemoryUse, check_leak
from nanovllm.engine.statistics import EngineStatistics
from nanovllm.engine.turns import Call
from nanovllm.engine_factory import make_engine
from nanovllm.errors import InvalidArgumentError, StepFailedError
from nanovllm.logs import events
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.streaming import StreamCall
from nanovllm.utils import env
from nanovllm.utils.logger import flush_timed_sections, log_gpu_memory, log_rule, setup_logger

if TYPE_CHECKING:
    from nanovllm.diagnostics.memory import MemoryReport

logger = setup_logger(__name__)

_FIELDS_WITH_TEXT = ("prompt", "messages", "structured_outputs", "stop", "bad_words")  # errors quote what users wrote


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm without its monitor thread.

    That thread takes the lock that log lines need, and a debugger that stops all threads could stop it while it holds
    the lock.
    """

    monitor_interval = 0


class LLM:
    """Offline inference on one model.

        llm = LLM("tiny")
        outputs = llm.generate(["Hello", "1 + 1 ="], SamplingParams(temperature=0))

    `__init__` lists the arguments. Raises a NanoVLLMError, which says what is wrong and what to do about it.
    """

    @takes_engine_arguments
    def __init__(self, config: EngineConfig) -> None:
        self.llm_engine = make_engine(config)
        self._counter = itertools.count()

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt and returns the outputs in the order of the prompts.

        prompts: a text, token ids, {"prompt": …}, {"prompt_token_ids": …}, or a list that mixes these.
        sampling_params: one for all prompts, one for each, or None for the defaults.
        A request that is not allowed fails alone: its output has an `error` and no tokens, and a log line says so.
        Raises InvalidArgumentError, before anything runs, if no request of the call is allowed.
        """
        return self._generate(_as_list(prompts), sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Completes each prompt, and yields the new part of each output after every step.

        The arguments are those of `generate`. `outputs[0]` holds the text, tokens and log-probabilities since the
        request's previous output. With n > 1, `outputs` holds the completions that grew, identified by their `index`,
        and in the last output all of them. The parts of a request joined equal what `generate` returns: text that was
        yielded never changes. `finished` and `finish_reason` are set in a request's last output. The numbers at the end
        of the request ids rise in the order of the prompts. Nothing runs before the first output is requested. Closing
        the iterator, or leaving its loop, aborts the unfinished requests.
        """
        engine = self.llm_engine
        call = StreamCall(engine)
        try:
            with call.running:
                engine.open(call)
                refused = self._add_requests(_as_list(prompts), sampling_params, call)
                yield from (output for output in refused.values() if output is not None)
                while call.request_ids:
                    yield from call.outputs(self._next_outputs(call))
        finally:
            engine.close(call)

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

        A message is {"role": "user", "content": "…"}. The template gets `chat_template_kwargs` (Qwen3's reads
        `enable_thinking`) and `tools`, each {"type": "function", "function": {…}}. Tool calls are part of the output's
        text.
        """
        tokenizer = self.get_tokenizer()
        if not tokenizer.chat_template:
            raise InvalidArgumentError("tokenizer", tokenizer.name_or_path, "one with a chat template", "Use generate.")
        conversations = list(messages) if isinstance(messages, (list, tuple)) else [messages]
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        if tools is not None and (
            not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise InvalidArgumentError("tools", tools, "a list of {'type': 'function', 'function': {…}}, or None")
        if chat_template_kwargs is not None and not (
            isinstance(chat_template_kwargs, Mapping) and all(isinstance(name, str) for name in chat_template_kwargs)
        ):
            raise InvalidArgumentError(
                "chat_template_kwargs", chat_template_kwargs, "a dictionary of the template's variables, or None"
            )
        extra = {**(chat_template_kwargs or {}), **({"tools": list(tools)} if tools else {})}
        prompts = [_as_prompt(tokenizer, chat, extra) for chat in conversations]
        return self._generate(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        return self.llm_engine.get_tokenizer()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix."""
        self.llm_engine.reset_prefix_cache()

    # Debugging, see docs/debugging.md

    def start_profile(self, folder: str | Path) -> None:
        """Records every rank with torch's profiler until `stop_profile`. Creates `folder`, which gets the files.

        Raises InvalidStateError when a profile already runs, and InvalidArgumentError when `folder` cannot be written.
        """
        self.llm_engine.diagnostics.start_profile(Path(folder))

    def stop_profile(self) -> str:
        """Ends the profile, writes its files, and returns the tables, which are also logged.

        Each rank has two, such as `profile_rank0.json`, a Chrome trace that Perfetto opens, and `profile_rank0.txt`, a
        table of the most expensive operators and kernels. Raises InvalidStateError when no profile runs.
        """
        return self.llm_engine.diagnostics.stop_profile()

    def memory_report(self) -> MemoryReport:
        """Returns how the device's memory is used, in bytes; `print` shows tables. `others` has the other ranks."""
        report: MemoryReport = self.llm_engine.diagnostics.memory_report()
        return report

    def check_memory_leak(
        self,
        prompts: Prompt | Seq[Prompt] | None = None,
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        num_runs: int = 8,
    ) -> LeakCheck:
        """Generates the same outputs `num_runs` times, and returns whether memory use stops growing.

        Measures the memory and the Python objects of all ranks, and the KV blocks in use, after each run. prompts: None
        for a few short ones. Raises InvalidArgumentError for fewer than 4 runs, or prompts that are not allowed.
        """
        if prompts is None:
            prompts = [[token % self.llm_engine.resolved.vocab_size for token in range(1, 9)]] * 4
            sampling_params = sampling_params or SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

        def measure() -> MemoryUse:
            used_blocks = self.llm_engine.scheduler.block_manager.num_used_blocks
            return MemoryUse(*self.llm_engine.diagnostics.memory_use(), used_blocks)

        return check_leak(lambda: self.generate(prompts, sampling_params, use_tqdm=False), measure, num_runs)

    def exit(self) -> None:
        """Frees the device's memory. Calling it again does nothing."""
        self.llm_engine.exit()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    def _add_requests(
        self,
        batch: Seq[Prompt | InvalidArgumentError],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
        call: Call,
    ) -> dict[str, RequestOutput | None]:
        """Queues the requests that are allowed, as those of `call`.

        Returns the outputs of the refused ones by request id, and None for the others, in the order of the prompts.
        Raises the first error if all are refused.
        """
        engine = self.llm_engine
        outputs: dict[str, RequestOutput | None] = {}
        errors: dict[str, InvalidArgumentError] = {}
        for prompt, params in zip(batch, _params_for_each(sampling_params, len(batch)), strict=True):
            request_id, arrival = f"generate-{next(self._counter)}", engine.clock()
            outputs[request_id] = None
            try:
                if isinstance(prompt, InvalidArgumentError):
                    raise prompt
                prepared = engine.prepare(prompt, params)
            except InvalidArgumentError as error:
                outputs[request_id], errors[request_id] = _refused(request_id, prompt, error), error
                continue
            call.request_ids[request_id] = None  # before it is queued, so that Ctrl-C leaves no request without a call
            call.queued(request_id, engine.enqueue(request_id, prepared, arrival))
        if errors and len(errors) == len(batch):
            raise next(iter(errors.values()))
        for request_id, reason in errors.items():
            events.request_failed.log(logger, request_id=request_id, error=_without_text(reason))
        return outputs

    def _generate(
        self,
        batch: Seq[Prompt | InvalidArgumentError],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if not isinstance(use_tqdm, bool):
            raise InvalidArgumentError("use_tqdm", use_tqdm, "True or False")
        if not batch:
            return []
        call = Call()
        try:
            with call.running:
                self.llm_engine.open(call)
                outputs = self._add_requests(batch, sampling_params, call)
                outputs |= self._run(call, use_tqdm)
        finally:  # including Ctrl-C: no request of this call stays behind
            self.llm_engine.close(call)
        return [output for output in outputs.values() if output is not None]

    def _next_outputs(self, call: Call) -> list[RequestOutput]:
        """Returns the outputs of `call` that a step brings. Raises StepFailedError if another call's step lost some."""
        outputs = self.llm_engine.next_outputs(call)
        for output in outputs:
            if isinstance(output.error, StepFailedError):
                raise output.error
            del call.request_ids[output.request_id]
        return outputs

    def _run(self, call: Call, use_tqdm: bool) -> dict[str, RequestOutput]:
        """Runs steps until the requests of `call` have ended. Returns their outputs by id."""
        engine = self.llm_engine
        before = engine.statistics.copy()
        log_rule(logger, "-")
        events.generation_start.log(logger, num_prompts=len(call.request_ids))
        events.generation_prompt_tokens.log(logger, num_prompt_tokens=engine.num_waiting_tokens)
        outputs: dict[str, RequestOutput] = {}
        use_tqdm = use_tqdm and logger.isEnabledFor(logging.INFO)  # a silent log silences the bar too
        num_requests = len(call.request_ids)
        with ProgressBar(total=num_requests, desc="Generating", dynamic_ncols=True, disable=not use_tqdm) as bar:
            while call.request_ids:
                for output in self._next_outputs(call):
                    outputs[output.request_id] = output
                    if isinstance(output.error, InvalidArgumentError):
                        why = _without_text(output.error)
                        events.request_failed.log(logger, request_id=output.request_id, error=why)
                    bar.update()
                if use_tqdm:
                    bar.set_postfix_str(_speeds(engine.statistics.since(before)), refresh=False)
            engine.drain()
        done = engine.statistics.since(before)
        flush_timed_sections()
        events.generation_complete.log(
            logger,
            num_steps=done.num_steps,
            total_output_tokens=sum(len(each.token_ids) for output in outputs.values() for each in output.outputs),
            prefill_time=done.prefill_seconds,
            decode_time=done.decode_seconds,
        )
        log_gpu_memory(logger, device=engine.resolved.device, event=events.generation_memory)
        return outputs


def _as_prompt(tokenizer: Any, chat: object, extra: Mapping[str, Any]) -> Prompt | InvalidArgumentError:
    """Returns one conversation as text from the chat template, or the error if it is not allowed."""
    if not isinstance(chat, (list, tuple)) or not all(isinstance(message, Mapping) for message in chat):
        return InvalidArgumentError("messages", chat, "a list of messages, each {'role': …, 'content': …}")
    try:
        text: str = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True, **extra)
    except Exception as error:  # templates raise any kind for input that they do not take
        return InvalidArgumentError("messages", chat, f"what the chat template takes ({type(error).__name__}: {error})")
    return text


def _refused(request_id: str, prompt: object, error: InvalidArgumentError) -> RequestOutput:
    """Returns the output of a request that could not be queued."""
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=[],
        outputs=[CompletionOutput(index=0, text="", token_ids=[], finish_reason="abort")],
        finished=True,
        num_cached_tokens=0,
        metrics=None,
        error=error,
    )


def _without_text(error: InvalidArgumentError) -> str:
    """Returns the error as text for the log. It has no text of users unless NANOVLLM_LOG_PROMPTS is set."""
    if env.log_prompts() or error.field.split(".")[0] not in _FIELDS_WITH_TEXT:
        return str(error)
    return f"{error.field} must be {error.allowed}. {error.hint}".rstrip()


def _speeds(done: EngineStatistics) -> str:
    """Returns the rates that the progress bar shows."""
    seconds = max(done.prefill_seconds + done.decode_seconds, 1e-9)
    return f"in {done.num_prompt_tokens / seconds:.0f} tok/s, out {done.num_output_tokens / seconds:.0f} tok/s"


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """Returns the prompts as a list. A single prompt (text, dictionary, token ids) becomes a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, Set)) or not isinstance(prompts, Iterable):  # bytes are not text, sets have no order
        raise InvalidArgumentError("prompts", prompts, "a text, token ids, a dictionary, or a list of these")
    batch: list[Any] = list(prompts)
    return [batch] if batch and all(isinstance(item, (int, np.integer)) for item in batch) else batch


def _params_for_each(
    sampling_params: SamplingParams | Seq[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """Returns a SamplingParams for each of `num_prompts` prompts."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if isinstance(sampling_params, (str, bytes, Mapping, Set)) or not isinstance(sampling_params, Iterable):
        raise InvalidArgumentError("sampling_params", sampling_params, "a SamplingParams or a list of them")
    params = list(sampling_params)
    if len(params) != num_prompts:
        raise InvalidArgumentError(
            "sampling_params", f"a list of {len(params)}", f"one for all, or one for each of the {num_prompts} prompts"
        )
    return params

"""LLM: offline inference, from a list of prompts to a list of outputs in the same order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.compat.interface import VllmInterface
from nanovllm.compat.unsupported import REQUEST_ARGUMENTS, accepting
from nanovllm.config import EngineConfig, takes_engine_arguments
from nanovllm.diagnostics import default_profile_folder
from nanovllm.diagnostics.leak_check import LeakCheck, MemoryUse, check_leak
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.turns import Call
from nanovllm.errors import InvalidArgumentError, StepFailedError
from nanovllm.generation_log import GenerationLog
from nanovllm.metrics import Metric
from nanovllm.outputs import RequestOutput, failed_output
from nanovllm.requests.chat import ChatArguments, ChatOptions, ChatRenderer, Conversation
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.streaming import StreamCall

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nanovllm.diagnostics.memory import MemoryReport


class LLM(VllmInterface):
    """Offline inference on one model.

        llm = LLM("tiny")
        outputs = llm.generate(["Hello", "1 + 1 ="], SamplingParams(temperature=0))

    `__init__` lists the arguments. Raises a NanoVLLMError, which says what is wrong and what to do about it.
    """

    @takes_engine_arguments
    def __init__(self, config: EngineConfig) -> None:
        self.llm_engine = LLMEngine.from_engine_args(config)
        self._counter = itertools.count()
        self._chat = ChatRenderer()

    @accepting(REQUEST_ARGUMENTS)
    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt and returns the outputs in the order of the prompts.

        prompts: a text, token ids, {"prompt": …}, {"prompt_token_ids": …}, or a list that mixes these.
        sampling_params: one for all prompts, one for each, or None for `get_default_sampling_params()`.
        A request that is not allowed fails alone: its output has an `error` and no tokens, and a log line says so.
        Raises InvalidArgumentError, before anything runs, if no request of the call is allowed.
        """
        return self._generate(_as_list(prompts), sampling_params, use_tqdm)

    @accepting(REQUEST_ARGUMENTS)
    def stream(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Completes each prompt, and yields the new part of each output after every step.

        The arguments are those of `generate`. `outputs[0]` holds the text, tokens and log-probabilities since the
        request's previous output, unless its `output_kind` says otherwise. With n > 1, `outputs` holds the completions
        that grew, identified by their `index`, and in the last output all of them. The parts of a request joined equal
        what `generate` returns: text that was yielded never changes. `finished` and `finish_reason` are set in a
        request's last output. The numbers at the end of the request ids rise in the order of the prompts. Nothing runs
        before the first output is requested. Closing the iterator, or leaving its loop, aborts the unfinished requests.
        """
        yield from self._stream(_as_list(prompts), sampling_params)

    def _stream(
        self,
        batch: Seq[Prompt | InvalidArgumentError],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
    ) -> Iterator[RequestOutput]:
        engine = self.llm_engine
        call = StreamCall(engine)
        try:
            with call.running:
                engine.open(call)
                refused = self._add_requests(batch, sampling_params, call)
                yield from (output for output in refused.values() if output is not None)
                while call.request_ids:
                    yield from call.outputs(self._next_outputs(call))
        finally:
            engine.close(call)

    @accepting(REQUEST_ARGUMENTS)
    def chat(
        self,
        messages: Conversation | Seq[Conversation],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **options: Unpack[ChatArguments],
    ) -> list[RequestOutput]:
        """Completes one conversation, or each of a list of them, through the checkpoint's chat template.

        messages: [{"role": "user", "content": "…"}, …]. A content may be a list of {"type": "text", "text": "…"}.
        options: chat_template=None, add_generation_prompt=True, continue_final_message=False, tools=None and
        chat_template_kwargs=None, see `ChatOptions`. The template writes the special tokens; none are added.
        """
        prompts = self._chat.prompts(self.get_tokenizer(), messages, ChatOptions(**options))
        return self._generate(prompts, sampling_params, use_tqdm)

    @accepting(REQUEST_ARGUMENTS)
    def stream_chat(
        self,
        messages: Conversation | Seq[Conversation],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        **options: Unpack[ChatArguments],
    ) -> Iterator[RequestOutput]:
        """Completes conversations as `chat` does, and yields the new part of each output as `stream` does."""
        prompts = self._chat.prompts(self.get_tokenizer(), messages, ChatOptions(**options))
        yield from self._stream(prompts, sampling_params)

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters of requests without any: those of the checkpoint's generation_config.json."""
        return self.llm_engine.get_default_sampling_params()

    def get_metrics(self) -> list[Metric]:
        """Returns the engine's counters, gauges and histograms under vLLM's names. `nanovllm.metrics` has the types."""
        engine = self.llm_engine
        return engine.metrics.snapshot(engine.scheduler.load).metrics(model_name=engine.config.model, engine="0")

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, and the outputs of earlier requests that drafts are made from."""
        self.llm_engine.reset_prefix_cache()

    # Debugging, see docs/debugging.md

    def start_profile(self, folder: str | Path | None = None) -> None:
        """Records every rank with torch's profiler until `stop_profile`. Creates `folder`, which gets the files.

        folder: None for the one in `profiler_config`, or else a new temporary one, which the log names.

        Raises InvalidStateError when a profile already runs, and InvalidArgumentError when `folder` cannot be written.
        """
        self.llm_engine.diagnostics.start_profile(Path(folder or default_profile_folder(self.llm_engine.config)))

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
                engine.refuse_request(request_id, error)
                text = prompt if isinstance(prompt, str) else None
                outputs[request_id], errors[request_id] = failed_output(request_id, error, prompt=text), error
                continue
            call.num_prompt_tokens += len(prepared.token_ids)
            call.request_ids[request_id] = None  # before it is queued, so that Ctrl-C leaves no request without a call
            call.queued(request_id, engine.enqueue(request_id, prepared, arrival))
        if errors and len(errors) == len(batch):
            raise next(iter(errors.values()))
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
        outputs: dict[str, RequestOutput] = {}
        with GenerationLog(engine, call, use_tqdm=use_tqdm) as log:
            while call.request_ids:
                for output in log.step(self._next_outputs(call)):
                    outputs[output.request_id] = output
            engine.drain()
        return outputs


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """Returns the prompts as a list. A single prompt (text, dictionary, token ids) becomes a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, Set)) or not isinstance(prompts, Iterable):  # bytes are not text, sets have no order
        raise InvalidArgumentError("prompts", prompts, "a text, token ids, a dictionary, or a list of these")
    batch: list[Any] = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)  # a tensor or an array
    return [batch] if batch and all(isinstance(item, (int, np.integer)) for item in batch) else batch


def _params_for_each(
    sampling_params: SamplingParams | Seq[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams | None]:
    """Returns the parameters of each of `num_prompts` prompts. None: the default ones."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if isinstance(sampling_params, (str, bytes, Mapping, Set)) or not isinstance(sampling_params, Iterable):
        raise InvalidArgumentError("sampling_params", sampling_params, "a SamplingParams or a list of them")
    params: list[SamplingParams | None] = list(sampling_params)
    if len(params) != num_prompts:
        raise InvalidArgumentError(
            "sampling_params", f"a list of {len(params)}", f"one for all, or one for each of the {num_prompts} prompts"
        )
    return params

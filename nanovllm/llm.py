"""LLM: offline inference, from a list of prompts to a list of outputs in the same order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.compat.interface import VllmInterface
from nanovllm.compat.unsupported import REQUEST_ARGUMENTS, accepting
from nanovllm.config import EngineConfig, takes_engine_arguments
from nanovllm.diagnostics import default_profile_folder
from nanovllm.diagnostics.leak_check import LeakCheck, MemoryUse, check_leak
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.turns import Call
from nanovllm.errors import InvalidArgumentError, StepFailedError
from nanovllm.feed import Feed
from nanovllm.generation_log import GenerationLog
from nanovllm.metrics import Metric
from nanovllm.outputs import RequestOutput
from nanovllm.requests.batch_arguments import Params, Prompts, as_list
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
        return self._generate(as_list(prompts), sampling_params, use_tqdm)

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
        before the first output is requested, and lists of token ids must not change before the last one. Closing the
        iterator, or leaving its loop, aborts the unfinished requests.
        """
        yield from self._stream(as_list(prompts), sampling_params)

    def _stream(self, batch: Prompts, sampling_params: Params) -> Iterator[RequestOutput]:
        call = StreamCall(self.llm_engine)
        feed = Feed(self.llm_engine, call, self._counter, batch, sampling_params)
        try:
            with call.running:
                self.llm_engine.open(call)
                while feed.num_left or call.request_ids:
                    yield from feed.advance()
                    yield from call.outputs(self._next_outputs(call))
        finally:
            self.llm_engine.close(call)

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

    def _generate(self, batch: Prompts, sampling_params: Params, use_tqdm: bool) -> list[RequestOutput]:
        if not isinstance(use_tqdm, bool):
            raise InvalidArgumentError("use_tqdm", use_tqdm, "True or False")
        if not batch:
            return []
        call = Call()
        feed = Feed(self.llm_engine, call, self._counter, batch, sampling_params)
        try:
            with call.running:
                self.llm_engine.open(call)
                outputs = self._run(call, feed, use_tqdm)
        finally:  # including Ctrl-C: no request of this call stays behind
            self.llm_engine.close(call)
        return [outputs[name] for name in feed.names]

    def _next_outputs(self, call: Call) -> list[RequestOutput]:
        """Returns the outputs of `call` that a step brings. Raises StepFailedError if another call's step lost some."""
        outputs = self.llm_engine.next_outputs(call)
        for output in outputs:
            if isinstance(output.error, StepFailedError):
                raise output.error
            del call.request_ids[output.request_id]
        return outputs

    def _run(self, call: Call, feed: Feed, use_tqdm: bool) -> dict[str, RequestOutput]:
        """Runs steps until all requests of `call` have ended. Returns their outputs by id."""
        outputs = {output.request_id: output for output in feed.advance()}
        with GenerationLog(self.llm_engine, call, feed, use_tqdm=use_tqdm) as log:
            while feed.num_left or call.request_ids:
                ended = log.step([*self._next_outputs(call), *feed.advance()])
                outputs |= {output.request_id: output for output in ended}
            self.llm_engine.drain()
        return outputs

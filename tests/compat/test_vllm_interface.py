"""vLLM's interface where it is larger than ours: names, arguments without effect, and what is refused by name."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    InvalidArgumentError,
    LLMEngine,
    NotSupportedError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
    UnknownArgumentError,
)
from nanovllm.compat import unsupported
from nanovllm.compat.unsupported import Unsupported
from nanovllm.utils import FlexibleArgumentParser
from tests.processes import ROOT
from tests.small_llm import GREEDY

TINY = ROOT / "nanovllm" / "assets" / "tiny-qwen3"
PROMPT = "count from 3 to 9"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=4, num_kvcache_blocks=64, kvcache_block_size=4) as llm:
        yield llm


# ---- names


@pytest.mark.parametrize(
    ("module", "name", "ours"),
    [
        ("nanovllm.engine.arg_utils", "EngineArgs", EngineArgs),
        ("nanovllm.engine.arg_utils", "AsyncEngineArgs", AsyncEngineArgs),
        ("nanovllm.engine.async_llm_engine", "AsyncLLMEngine", nanovllm.AsyncLLMEngine),
        ("nanovllm.engine.llm_engine", "LLMEngine", LLMEngine),
        ("nanovllm.entrypoints.llm", "LLM", LLM),
        ("nanovllm.inputs", "TextPrompt", TextPrompt),
        ("nanovllm.inputs", "TokensPrompt", TokensPrompt),
        ("nanovllm.sampling_params", "RequestOutputKind", RequestOutputKind),
        ("nanovllm.utils", "FlexibleArgumentParser", FlexibleArgumentParser),
        ("nanovllm.utils.argparse_utils", "FlexibleArgumentParser", FlexibleArgumentParser),
        ("nanovllm.v1.engine.async_llm", "AsyncLLM", AsyncLLM),
        ("nanovllm.v1.engine.llm_engine", "LLMEngine", LLMEngine),
    ],
)
def test_names_are_where_scripts_import_them_from(module: str, name: str, ours: object) -> None:
    assert getattr(importlib.import_module(module), name) is ours


# ---- EngineArgs


def test_engine_args_are_the_arguments_of_an_engine() -> None:
    args = EngineArgs(model="tiny", max_num_seqs=8, block_size=32)
    assert args.max_num_seqs == 8
    assert args.kvcache_block_size == 32
    args.max_num_seqs, args.block_size = 4, 16  # type: ignore[misc]  # those of an EngineConfig are read-only
    assert dataclasses.asdict(args)["max_num_seqs"] == 4
    assert dataclasses.asdict(args)["kvcache_block_size"] == 16
    assert dataclasses.replace(args, seed=3).seed == 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(args)


@pytest.mark.parametrize("make", [EngineArgs, AsyncEngineArgs])
def test_engine_args_refuse_what_an_engine_refuses(make: Callable[..., Any]) -> None:
    with pytest.raises(
        UnknownArgumentError, match=f"{make.__name__} has no argument 'max_seqs'. Did you mean 'max_num"
    ):
        make(model="tiny", max_seqs=4)
    with pytest.raises(InvalidArgumentError, match="max_num_seqs=0"):
        make(model="tiny", max_num_seqs=0)
    args = make(model="tiny")
    with pytest.raises(UnknownArgumentError, match="'max_num_sequences'"):
        args.max_num_sequences = 3
    with pytest.raises(InvalidArgumentError, match="cpu_offload_gb=4"):
        args.cpu_offload_gb = 4
    args.cpu_offload_gb = 0
    args.max_num_seqs = 0  # checked when it is used
    with pytest.raises(InvalidArgumentError, match="max_num_seqs=0"):
        LLMEngine.from_engine_args(args)


def test_an_engine_is_made_from_engine_args() -> None:
    args = EngineArgs(model="tiny", device="cpu", num_kvcache_blocks=32, max_num_seqs=3)
    with LLM(**dataclasses.asdict(args)) as llm:
        expected = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]
        assert llm.llm_engine.config == LLM.from_engine_args(args).llm_engine.config
    with LLMEngine.from_engine_args(args) as engine:
        engine.add_request("a", PROMPT, GREEDY)
        outputs: list[RequestOutput] = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert [output["token_ids"] for output in outputs] == [expected]
        assert engine.resolved.max_num_seqs == 3


def parser() -> FlexibleArgumentParser:
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def test_the_command_line_has_every_argument() -> None:
    given = parser().parse_args([])
    assert vars(given) == {**vars(EngineArgs()), "block_size": None, "num_gpu_blocks_override": None}
    assert EngineArgs.from_cli_args(given) == EngineArgs()
    help_text = parser().format_help()
    for name in {*unsupported.ENGINE_ARGUMENTS, *vars(EngineArgs())}:
        assert "--" + name.replace("_", "-") in help_text


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("--max-model-len 256 --model tiny", {"max_model_len": 256, "model": "tiny"}),
        ("--max_model_len=256", {"max_model_len": 256}),
        ("--gpu-memory-utilization 0.5 --dtype half", {"gpu_memory_utilization": 0.5, "dtype": "half"}),
        ("--no-enable-prefix-caching --enforce-eager", {"enable_prefix_caching": False, "enforce_eager": True}),
        ('--hf-overrides {"rope_theta":2}', {"hf_overrides": {"rope_theta": 2}}),
        ("--block-size 32 --tensor-parallel-size 2", {"block_size": 32, "tensor_parallel_size": 2}),
        ("--swap-space 4 --enable-chunked-prefill --no-enable-lora --disable-log-stats", {}),
        ("--task generate --pipeline-parallel-size 1", {}),
        ("--quantization fp8 --load-format dummy", {"quantization": "fp8", "load_format": "dummy"}),
    ],
)
def test_options_are_arguments(line: str, arguments: dict[str, Any]) -> None:
    given = parser().parse_args(line.split())
    assert EngineArgs.from_cli_args(given) == EngineArgs(**arguments)
    assert AsyncEngineArgs.from_cli_args(argparse.Namespace(port=8000, **vars(given))).model


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max-num-seqs 0", "argument --max-num-seqs: '0' is not an integer ≥ 1"),
        ("--max-num-seqs many", "argument --max-num-seqs: 'many' is not an integer ≥ 1"),
        ("--dtype int8", "argument --dtype: 'int8' is not one of 'auto',"),
        ("--hf-overrides {", "argument --hf-overrides: '{' is not a dictionary"),
        ("--max-seqs 3", "unrecognized arguments: --max-seqs 3"),
    ],
)
def test_a_mistake_in_an_option_is_answered_at_once(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(line.split())
    assert message in capsys.readouterr().err


# ---- arguments without effect

PASS: dict[str, list[Any]] = {  # of LLM
    "task": ["generate"],
    "runner": ["auto", "generate"],
    "enable_chunked_prefill": [True],
    "disable_log_stats": [True, False],
    "swap_space": [0, 4, 0.5],
    "pipeline_parallel_size": [1],
    "tokenizer_mode": ["auto"],
    "enable_lora": [False],
    "seed": [None],
    "distributed_executor_backend": ["mp", None],
    "disable_custom_all_reduce": [True, False],
    "cpu_offload_gb": [0, 0.0],
    "download_dir": [None],
    "compilation_config": [3, {"level": 3}, None],
    "max_seq_len_to_capture": [8192],
    "async_scheduling": [True, False],
    "logits_processors": [None],
    "speculative_config": [None],
}
REFUSED: dict[str, Any] = {
    "task": "embed",
    "runner": "pooling",
    "enable_chunked_prefill": False,
    "pipeline_parallel_size": 2,
    "tokenizer_mode": "mistral",
    "enable_lora": True,
    "distributed_executor_backend": "ray",
    "cpu_offload_gb": 4,
    "download_dir": "/models",
    "logits_processors": [print],
    "speculative_config": {"method": "ngram"},
    "enable_sleep_mode": True,
    "data_parallel_size": 2,
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in PASS.items() for value in values])
def test_an_argument_without_effect_passes_with_a_line(name: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        args = EngineArgs("tiny", **{name: value})
    assert args == EngineArgs("tiny")
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.getMessage().startswith(f"EngineArgs: {name}={value!r} has no effect: ")


def test_llm_takes_them_all_at_once() -> None:
    arguments: dict[str, Any] = {name: values[0] for name, values in PASS.items()}
    with LLM("tiny", device="cpu", num_kvcache_blocks=32, **arguments) as llm:
        (output,) = llm.generate(PROMPT, GREEDY, False, lora_request=None, priority=0)  # type: ignore[call-arg]
        assert output["token_ids"]
        assert llm.llm_engine.config.seed == 0


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
@pytest.mark.parametrize("make", [LLM, AsyncLLM, EngineArgs])
def test_other_values_are_not_supported(make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make("/no/such/model", **{name: value})
    text = str(caught.value)
    assert text.startswith(f"{name}={value!r} is not allowed: it must be ")
    assert "Not supported: " in text
    assert "docs/api.md" in text
    assert "Did you mean" not in text


@pytest.mark.parametrize("name", ["best_of", "suffix", "logits_processors", "guided_decoding", "use_beam_search"])
def test_fields_of_vllm_s_sampling_params(name: str) -> None:
    make: Any = SamplingParams
    assert make(**{name: None}) == SamplingParams()
    with pytest.raises(
        InvalidArgumentError, match=f"{name}=2 is not allowed: it must be .*Not supported: .*docs/api.md"
    ):
        make(**{name: 2})


@pytest.mark.parametrize(("name", "value"), [("lora_request", "adapter"), ("priority", 1)])
def test_arguments_of_a_request(llm: LLM, name: str, value: Any) -> None:
    message = f"{name}={value!r} is not allowed: .*Not supported: "
    for call in (
        llm.generate,
        llm.stream,
        llm.chat,
        llm.stream_chat,
        lambda *a, **k: llm.llm_engine.add_request("r", *a, **k),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            call(PROMPT, GREEDY, **{name: value})
    llm.llm_engine.add_request("r", PROMPT, GREEDY, **{name: None})
    llm.llm_engine.abort_request(["r", "unknown"])
    assert [output.request_id for output in llm.llm_engine.step()] == ["r"]


@pytest.mark.parametrize("key", unsupported.PROMPT_KEYS)
def test_keys_of_a_prompt(llm: LLM, key: str) -> None:
    expected = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]["token_ids"]
    assert llm.generate({"prompt": PROMPT, key: None}, GREEDY, use_tqdm=False)[0]["token_ids"] == expected
    with pytest.raises(InvalidArgumentError, match=rf"prompt\.{key}=\{{.*Not supported: "):
        llm.generate({"prompt": PROMPT, key: {"image": 1}}, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("name", unsupported.METHODS)
def test_a_method_that_is_not_there_is_refused_by_name(llm: LLM, name: str) -> None:
    for engine in (llm, llm.llm_engine):
        assert not hasattr(engine, name)
        with pytest.raises(NotSupportedError, match=f"has no {name}. Not supported: .*docs/api.md"):
            getattr(engine, name)
    with pytest.raises(AttributeError, match="'LLM' object has no attribute 'generat'"):
        llm.generat  # type: ignore[attr-defined]  # noqa: B018


TABLES: list[Mapping[str, Unsupported]] = [
    unsupported.ENGINE_ARGUMENTS,
    unsupported.SAMPLING_FIELDS,
    unsupported.REQUEST_ARGUMENTS,
    unsupported.PROMPT_KEYS,
]


def test_no_table_hides_a_supported_name() -> None:
    ours = {field.name for field in dataclasses.fields(EngineArgs)} - {"seed"}
    assert not ours & unsupported.ENGINE_ARGUMENTS.keys()
    assert not {field.name for field in dataclasses.fields(SamplingParams)} & unsupported.SAMPLING_FIELDS.keys()
    for cls in (LLM, AsyncLLM, LLMEngine):
        assert not set(dir(cls)) & unsupported.METHODS.keys()
    assert all(entry.reason for table in TABLES for entry in table.values())


# ---- sampling parameters


def test_assigned_fields_are_checked_when_they_are_used(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine = llm.llm_engine
    engine.add_request("before", PROMPT, params)
    params.max_tokens, params.stop_token_ids = 3, [511]
    engine.add_request("after", PROMPT, params)
    lengths = {}
    while engine.has_unfinished_requests():
        lengths |= {output.request_id: len(output["token_ids"]) for output in engine.step()}
    assert lengths == {"before": 8, "after": 3}
    params.temperature = -1
    with pytest.raises(InvalidArgumentError, match="temperature=-1 is not allowed"):
        llm.generate(PROMPT, params, use_tqdm=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, whose generation_config.json may change."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def recommend(folder: Path, **values: Any) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_default_sampling_params_are_the_checkpoint_s(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    recommend(folder, temperature=0.0, top_k=20, top_p=None, min_p=5, max_new_tokens=9, num_beams=1)
    with LLM(str(folder), device="cpu", num_kvcache_blocks=32) as llm:
        params = llm.get_default_sampling_params()
        assert params == SamplingParams(temperature=0, top_k=20, max_tokens=9)
        params.max_tokens = 3  # a copy
        greedy, default = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=9)), llm.generate(PROMPT)
        assert default[0]["token_ids"] == greedy[0]["token_ids"]
    assert "min_p=5 is not allowed" in caplog.text


def test_without_recommendations_they_are_ours(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()


# ---- kinds of outputs


async def outputs_of(engine: AsyncLLM, params: SamplingParams, **arguments: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(PROMPT, params, **arguments)]


def test_output_kinds_of_an_async_llm() -> None:
    async def main() -> None:
        kinds = {kind: dataclasses.replace(GREEDY, output_kind=kind) for kind in (None, *RequestOutputKind)}
        async with AsyncLLM.from_engine_args(AsyncEngineArgs("tiny", device="cpu", num_kvcache_blocks=64)) as engine:
            by_kind = {kind: await outputs_of(engine, params) for kind, params in kinds.items()}
            whole = by_kind[None][-1]["text"]
            for cumulative in (by_kind[None], by_kind[RequestOutputKind.CUMULATIVE]):
                assert cumulative[-1]["text"] == whole
                assert all(whole.startswith(output["text"]) for output in cumulative)
            assert "".join(output["text"] for output in by_kind[RequestOutputKind.DELTA]) == whole
            (final,) = by_kind[RequestOutputKind.FINAL_ONLY]
            assert (final["text"], final.finished) == (whole, True)
            for delta, kind in ((True, "CUMULATIVE"), (True, "FINAL_ONLY"), (False, "DELTA")):
                with pytest.raises(InvalidArgumentError, match=f"delta={delta} .*output_kind={kind}"):
                    await outputs_of(engine, kinds[RequestOutputKind[kind]], delta=delta)
            both = await outputs_of(engine, kinds[RequestOutputKind.DELTA], delta=True)
            assert "".join(output["text"] for output in both) == whole
            chat = engine.chat([{"role": "user", "content": PROMPT}], kinds[RequestOutputKind.FINAL_ONLY])
            assert [output.finished async for output in chat] == [True]
            chat = engine.chat([{"role": "user", "content": PROMPT}], kinds[RequestOutputKind.DELTA])
            assert len([output async for output in chat]) > 1

    asyncio.run(main())


@pytest.mark.parametrize("n", [1, 3])
def test_output_kinds_of_a_stream(llm: LLM, n: int) -> None:
    params = SamplingParams(n=n, seed=3, max_tokens=6, ignore_eos=True)
    (whole,) = llm.generate(PROMPT, params, use_tqdm=False)
    (final,) = llm.stream(PROMPT, dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY))
    *_, last = llm.stream(PROMPT, dataclasses.replace(params, output_kind=RequestOutputKind.CUMULATIVE))
    assert final.outputs == last.outputs == whole.outputs


def test_several_requests_are_aborted_at_once() -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", device="cpu", num_kvcache_blocks=64) as engine:
            params = SamplingParams(ignore_eos=True, max_tokens=500)
            streams = [engine.generate(PROMPT, params, request_id) for request_id in ("a", "b")]
            for stream in streams:
                await anext(stream)
            reasons = asyncio.gather(*(last_reason(stream) for stream in streams))
            await engine.abort(["a", "b", "unknown"])
            assert await reasons == ["abort", "abort"]

    async def last_reason(stream: Any) -> str | None:
        return [output.outputs[0].finish_reason async for output in stream][-1]

    asyncio.run(main())


# ---- prompts, outputs


def test_a_cache_salt_separates_prefixes(llm: LLM) -> None:
    def cached(prompt: TextPrompt | TokensPrompt) -> int:
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        return output.num_cached_tokens

    llm.reset_prefix_cache()
    ids = llm.get_tokenizer().encode(PROMPT)
    assert cached(TextPrompt(prompt=PROMPT)) == 0
    assert cached(TokensPrompt(prompt_token_ids=ids, cache_salt=None)) > 0
    assert cached(TextPrompt(prompt=PROMPT, cache_salt="one")) == 0
    assert cached(TextPrompt(prompt=PROMPT, cache_salt="two")) == 0
    assert cached(TokensPrompt(prompt_token_ids=ids, cache_salt="one")) > 0
    for salt in ("", 5, b"salt"):
        with pytest.raises(InvalidArgumentError, match="prompt.cache_salt="):
            llm.generate({"prompt": PROMPT, "cache_salt": salt}, GREEDY, use_tqdm=False)


def test_metrics_have_vllm_s_names_too(llm: LLM) -> None:
    metrics = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].metrics
    assert metrics is not None
    assert metrics.arrival_time == metrics.arrival
    assert metrics.first_scheduled_time == metrics.scheduled_ts == metrics.first_scheduled
    assert metrics.first_token_time == metrics.first_token_ts == metrics.first_token
    assert metrics.last_token_time == metrics.last_token_ts == metrics.last_token
    assert metrics.finished_time == metrics.finished
    assert metrics.queued_ts == metrics.queued
    assert metrics.time_in_queue == metrics.queue_time
    assert metrics.first_token_latency == metrics.time_to_first_token
    assert metrics.num_generation_tokens == metrics.num_output_tokens


def test_a_profile_needs_no_folder(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        llm.start_profile()
        llm.generate(PROMPT, GREEDY, use_tqdm=False)
        llm.stop_profile()
    (named,) = {fields["folder"] for record in caplog.records if "folder" in (fields := vars(record).get("fields", {}))}
    assert (Path(named) / "profile_rank0.json").is_file()
    shutil.rmtree(named)


def test_a_profiler_config_names_the_folder(tmp_path: Path) -> None:
    config = {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "profile")}
    with LLM("tiny", device="cpu", num_kvcache_blocks=32, profiler_config=config) as llm:
        llm.start_profile()
        llm.stop_profile()
    assert (tmp_path / "profile" / "profile_rank0.json").is_file()


def test_cleaning_up_frees_an_engine_that_nothing_refers_to() -> None:
    from nanovllm.distributed import cleanup_dist_env_and_memory

    llm = LLM("tiny", device="cpu", num_kvcache_blocks=32)
    engine = llm.llm_engine
    finalizer = engine._shut_down
    llm.itself = llm  # type: ignore[attr-defined]  # a circle, which only the garbage collector ends
    del llm, engine
    cleanup_dist_env_and_memory()
    assert not finalizer.alive

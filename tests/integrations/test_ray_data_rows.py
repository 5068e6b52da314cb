"""Ray Data without a cluster: how rows are read and answered, and what `generate` asks of Ray."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
import ray

from nanovllm import LLM, EngineDeadError, InvalidArgumentError, SamplingParams, UnknownArgumentError
from nanovllm.integrations.ray.data import OUTPUT_COLUMNS, LLMPredictor, RowRequest, generate, read_row
from tests.processes import run_python

DEFAULTS = SamplingParams(max_tokens=5)


def read(row: dict[str, Any], preprocess: Any = None, seed: int = 0) -> RowRequest:
    return read_row(row, preprocess, DEFAULTS, seed)


# ---- reading a row


def test_a_row_has_a_prompt_or_messages() -> None:
    assert read({"prompt": "Hello", "id": 7}).prompt == "Hello"
    assert read({"prompt": [1, 2]}).prompt == [1, 2]
    message = {"role": "user", "content": "Hello"}
    padded = read({"messages": [{**message, "tool_calls": None}], "prompt": None})
    assert (padded.prompt, padded.messages) == (None, [message])
    for row in ({"id": 7}, {"prompt": None}, {"prompt": "Hello", "messages": [message]}):
        with pytest.raises(InvalidArgumentError, match="must be a row with either 'prompt' or 'messages'"):
            read(row)


def test_the_parameters_of_a_row_replace_some_of_the_defaults() -> None:
    params = read({"prompt": "Hello", "sampling_params": {"temperature": 0, "max_tokens": None, "stop": ["a"]}}).params
    assert (params.temperature, params.max_tokens, params.stop) == (0, 5, ("a",))
    assert SamplingParams(max_tokens=5) == DEFAULTS
    biased = read({"prompt": "Hello", "sampling_params": {"logit_bias": {"17": 2.0, "18": None}}})
    assert biased.params.logit_bias == {17: 2.0}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("fast", "sampling_params='fast' is not allowed: it must be a dictionary of fields of SamplingParams"),
        ({"max_tokens": 0}, "max_tokens=0 is not allowed"),
        ({"max_token": 5}, "Did you mean 'max_tokens'?"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias={'a': 1.0} is not allowed"),
        ({"n": 2}, "n=2 is not allowed: it must be 1: no column of a row holds it. For several completions, repeat"),
        ({"logprobs": 3}, "logprobs=3 is not allowed: it must be None"),
    ],
)
def test_a_mistake_in_the_parameters_of_a_row(params: Any, message: str) -> None:
    with pytest.raises((InvalidArgumentError, UnknownArgumentError)) as caught:
        read({"prompt": "Hello", "sampling_params": params})
    assert message in str(caught.value)


def test_a_seed_is_made_of_the_prompt_alone() -> None:
    def seed_of(row: dict[str, Any], seed: int = 0) -> int | None:
        return read(row, seed=seed).params.seed

    seed = seed_of({"prompt": "Hello"})
    assert seed == seed_of({"id": 3, "messages": None, "prompt": "Hello", "sampling_params": {"top_k": 3}})
    message = {"role": "user", "content": "Hello"}
    chat = seed_of({"messages": [message]})
    assert chat == seed_of({"messages": [{"content": "Hello", "name": None, "role": "user"}]})
    others = [seed_of({"prompt": "hello"}), seed_of({"prompt": [1]}), chat, seed_of({"prompt": "Hello"}, seed=1)]
    assert len({seed, *others}) == 5
    assert seed_of({"prompt": "Hello", "sampling_params": {"seed": 3}}) == 3


def test_preprocess_makes_the_request() -> None:
    request = read({"question": "Hello"}, lambda row: {"prompt": row["question"]})
    assert request == read({"prompt": "Hello"})
    for function in (lambda row: row["answer"], lambda row: 3, lambda row: {"prompt": {1: 2, "a": 3}}):
        with pytest.raises(InvalidArgumentError, match="row={'question': 'x.*must be what preprocess takes") as caught:
            read({"question": "x" * 10_000}, function)
        assert len(str(caught.value)) < 400


# ---- answering rows


@pytest.fixture(scope="module")
def predictor() -> Iterator[LLMPredictor]:
    predictor = LLMPredictor("tiny", device="cpu", num_kvcache_blocks=256, sampling_params=DEFAULTS)
    yield predictor
    predictor._engine.exit()


def answers(predictor: LLMPredictor, table: pa.Table) -> pa.Table:
    async def call() -> pa.Table:
        (answer,) = [each async for each in predictor(table)]
        return answer

    return asyncio.run(call())


def test_columns_are_kept_and_added_with_the_same_types_in_every_batch(predictor: LLMPredictor) -> None:
    prompts: list[Any] = ["2 + 3 =", "4 + 4 =", None]
    table = pa.table({"when": pa.array([0, 1, None], pa.timestamp("s")), "prompt": prompts})
    answer = answers(predictor, table)
    assert answer.select(table.column_names) == table
    for batch in (answer, answers(predictor, table.slice(2)), answers(predictor, table.slice(0, 0))):
        assert batch.schema == pa.schema([*table.schema, *OUTPUT_COLUMNS])
    *good, bad = answer.to_pylist()
    for row in good:
        assert row["error"] is None
        assert row["generated_text"]
        assert 0 < row["num_generated_tokens"] == len(row["generated_tokens"]) <= 5
        assert row["num_input_tokens"] > 0
        assert row["finish_reason"] in ("stop", "length")
        assert 0 < row["metrics"]["time_to_first_token"] <= row["metrics"]["end_to_end"]
    assert "must be a row with either" in bad.pop("error")
    assert {bad[name] for name in OUTPUT_COLUMNS.names if name != "error"} == {None}


def test_rows_get_the_tokens_that_an_llm_gives_them_alone(predictor: LLMPredictor) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    rows: list[dict[str, Any]] = [
        *({"prompt": f"{number} + 1 ="} for number in range(20)),
        {"messages": messages},
        {"prompt": "Hello", "sampling_params": {"max_tokens": 3, "seed": 5}},
    ]
    forward = answers(predictor, pa.Table.from_pylist([{"messages": None, "sampling_params": None, **r} for r in rows]))
    found = {str(rows[index]): row["generated_tokens"] for index, row in enumerate(forward.to_pylist())}
    with LLM("tiny", device="cpu", num_kvcache_blocks=256) as llm:
        for row in reversed(rows):
            params = read(row).params
            if "messages" in row:
                (output,) = llm.chat(row["messages"], params, use_tqdm=False)
            else:
                (output,) = llm.generate(row["prompt"], params, use_tqdm=False)
            assert found[str(row)] == output.outputs[0].token_ids
    assert len({tuple(tokens) for tokens in found.values()}) > 10, "they are sampled"


def test_a_mistake_in_the_columns_is_an_error_of_the_job(predictor: LLMPredictor) -> None:
    with pytest.raises(InvalidArgumentError, match="column='error' is not allowed.*Rename the column"):
        answers(predictor, pa.table({"prompt": ["Hello"], "error": [None]}))
    with pytest.raises(InvalidArgumentError, match="must be a pyarrow.Table. Give map_batches batch_format='pyarrow'"):
        answers(predictor, {"prompt": ["Hello"]})


def test_an_engine_that_ends_before_its_first_output_ends_the_job() -> None:
    predictor = LLMPredictor("tiny", device="cpu", num_kvcache_blocks=16)
    predictor._engine.exit()
    with pytest.raises(EngineDeadError):
        answers(predictor, pa.table({"prompt": ["Hello"]}))


# ---- what `generate` asks of Ray


class Recorder:
    """A data set that keeps what is asked of it."""

    def __init__(self, *columns: str) -> None:
        self.names, self.asked = columns, dict[str, Any]()

    def columns(self, fetch_if_missing: bool) -> tuple[str, ...]:
        return self.names

    def repartition(self, **arguments: Any) -> Recorder:
        self.asked |= arguments
        return self

    def map_batches(self, function: Any, **arguments: Any) -> Recorder:
        self.asked |= arguments
        return self


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    resources = {"CPU": 2.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    for name in ("NANOVLLM_LOG_LEVEL", "NANOVLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return resources


def asked(*columns: str, **arguments: Any) -> dict[str, Any]:
    dataset: Any = Recorder(*columns)
    return generate(dataset, "tiny", **arguments).asked  # type: ignore[attr-defined]


def test_actors_on_a_cpu_leave_a_core_to_those_who_read(cluster: dict[str, float]) -> None:
    for cores, actors in itertools.product((1, 2, 3, 16), (1, 2, 3, 8)):
        cluster["CPU"] = cores
        arguments = asked(concurrency=actors)
        assert actors * arguments["num_cpus"] <= cores - 1
        assert arguments["num_gpus"] == 0
        assert arguments["fn_constructor_kwargs"]["device"] == "cpu"
        assert (arguments["compute"].min_size, arguments["compute"].max_size) == (actors, actors)


def test_actors_on_gpus_get_those_of_their_ranks(cluster: dict[str, float]) -> None:
    cluster["GPU"] = 8.0
    arguments = asked(tensor_parallel_size=2, concurrency=(1, 4))
    assert (arguments["num_cpus"], arguments["num_gpus"]) == (1, 2)
    assert arguments["fn_constructor_kwargs"]["device"] == "cuda"
    assert (arguments["compute"].min_size, arguments["compute"].max_size) == (1, 4)
    assert asked(device="cpu")["num_gpus"] == 0
    assert asked(map_batches_kwargs={"num_gpus": 0.5, "memory": 7})["num_gpus"] == 0.5


def test_batches_in_flight_keep_the_queue_full(cluster: dict[str, float]) -> None:
    arguments = asked(max_num_seqs=100, batch_size=30)
    assert arguments["compute"].max_concurrent_calls_per_actor * 30 >= 200
    assert arguments["batch_size"] == arguments["target_num_rows_per_block"] == 30


def test_actors_get_the_driver_s_variables(cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked()["runtime_env"] == {"env_vars": {"NANOVLLM_LOG_LEVEL": "WARNING"}}
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("NANOVLLM_API_KEY", "secret")
    given = {"pip": ["x"], "env_vars": {"A": "1"}}
    arguments = asked(map_batches_kwargs={"runtime_env": given})
    assert arguments["runtime_env"] == {"pip": ["x"], "env_vars": {"NANOVLLM_LOG_LEVEL": "DEBUG", "A": "1"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seq": 8}, "generate has no argument 'max_num_seq'. Did you mean 'max_num_seqs'?"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 is not allowed"),
        ({"concurrency": 0}, "concurrency=0 is not allowed: it must be an integer ≥ 1"),
        ({"concurrency": (0, 2)}, "concurrency=0 is not allowed: it must be an integer ≥ 1"),
        ({"batch_size": 0}, "batch_size=0 is not allowed: it must be an integer ≥ 1"),
    ],
)
def test_a_mistake_in_the_arguments(cluster: dict[str, float], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidArgumentError, UnknownArgumentError)) as caught:
        asked(**arguments)
    assert message in str(caught.value)


def test_a_known_column_with_the_name_of_an_output_is_an_error_before_the_job(cluster: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="column='generated_text' is not allowed"):
        asked("prompt", "generated_text")


# ---- the package


def test_ray_is_imported_by_those_who_use_it_alone() -> None:
    code = "import sys, nanovllm, nanovllm.integrations; dir(nanovllm); assert 'ray' not in sys.modules"
    assert run_python("-c", code).returncode == 0


def test_without_ray_the_error_says_what_to_install() -> None:
    done = run_python("-c", "import sys; sys.modules['ray'] = None\nfrom nanovllm.integrations.ray import generate")
    assert 'needs Ray, which is not installed: pip install "nanovllm[ray]"' in done.stderr

"""Batch inference with Ray Data: rows in, rows out, with one engine in each actor.

    import ray
    from nanovllm.integrations.ray import generate

    questions = ray.data.read_json("questions.jsonl")  # a column "prompt", or "messages"
    generate(questions, "Qwen/Qwen3-8B", concurrency=4).write_json("answers")

`generate` passes LLMPredictor to `Dataset.map_batches`, with the arguments of Ray that it needs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

from nanovllm.async_llm import AsyncLLM
from nanovllm.config import EngineConfig, check_names
from nanovllm.errors import EngineDeadError, InvalidArgumentError, NanoVLLMError, shown
from nanovllm.logs import events
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import MAX_SEED, RequestOutputKind, SamplingParams
from nanovllm.utils import env
from nanovllm.utils.arguments import COUNT
from nanovllm.utils.logger import setup_logger

if TYPE_CHECKING:
    from ray.data import Dataset

logger = setup_logger(__name__)

Row = Mapping[str, Any]

_METRICS = ("queue_time", "time_to_first_token", "inter_token_latency", "end_to_end")
# What is added to each row. A row with an error has null in the other columns.
OUTPUT_COLUMNS = pa.schema(
    {
        "generated_text": pa.string(),
        "generated_tokens": pa.list_(pa.int64()),
        "finish_reason": pa.string(),
        "num_input_tokens": pa.int64(),
        "num_generated_tokens": pa.int64(),
        "metrics": pa.struct({"num_cached_tokens": pa.int64(), **dict.fromkeys(_METRICS, pa.float64())}),
        "error": pa.string(),
    }
)


def generate(
    dataset: Dataset,
    model: str,
    *,
    sampling_params: SamplingParams | None = None,
    preprocess: Callable[[Row], Row] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 64,
    map_batches_kwargs: Mapping[str, Any] | None = None,
    **engine_arguments: Any,
) -> Dataset:
    """Returns the data set with the columns OUTPUT_COLUMNS. It runs when its rows are read, as Ray's data sets do.

    sampling_params, preprocess, chat_template_kwargs, engine_arguments: as in LLMPredictor.
    concurrency: the number of actors, or the smallest and the largest number.
    batch_size: the rows that an actor gets, and loses, together. Each has as many batches in flight as it takes to give
        its engine twice `max_num_seqs` rows.
    map_batches_kwargs: further arguments of `Dataset.map_batches`. By default an actor reserves one core and
        `tensor_parallel_size` GPUs. If `device` is "cpu", or the cluster has no GPU, it reserves one core or less, so
        that one is left to read the data, and computes on as many threads as it reserves cores.
    Raises what EngineConfig raises, and InvalidArgumentError for an input column with the name of an output column.
    """
    import ray

    config = EngineConfig(model, **check_names("generate", engine_arguments))
    check_columns(dataset.columns(fetch_if_missing=False) or ())
    smallest, largest = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    for name, value in (("concurrency", smallest), ("concurrency", largest), ("batch_size", batch_size)):
        if not COUNT.accepts(value):
            raise InvalidArgumentError(name, value, COUNT.allowed)
    cluster = ray.cluster_resources()
    device = config.device
    if device == "auto":
        device = "cuda" if cluster.get("GPU") else "cpu"
    num_cpus = min(1.0, (cluster.get("CPU", 1) - 1) / largest) if device == "cpu" else 1
    arguments = dict(map_batches_kwargs or {})
    runtime_env = dict(arguments.pop("runtime_env", {}))
    quiet = {env.log_level.name: "WARNING"}  # below, there is a line for each row
    runtime_env["env_vars"] = {**quiet, **env.variables_for_workers(), **runtime_env.get("env_vars", {})}
    defaults = {
        "num_cpus": num_cpus,
        "num_gpus": 0 if device == "cpu" else config.tensor_parallel_size,
    }
    return dataset.repartition(target_num_rows_per_block=batch_size).map_batches(
        LLMPredictor,
        fn_constructor_args=(model,),
        fn_constructor_kwargs={
            "sampling_params": sampling_params,
            "preprocess": preprocess,
            "chat_template_kwargs": chat_template_kwargs,
            **engine_arguments,
            "device": device,
        },
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=smallest,
            max_size=largest,
            max_concurrent_calls_per_actor=-(-2 * config.max_num_seqs // batch_size),
        ),
        udf_modifying_row_count=False,
        runtime_env=runtime_env,
        **{**defaults, **arguments},
    )


class LLMPredictor:
    """A class for `Dataset.map_batches`, with batch_format="pyarrow". Each actor makes one, which has an engine.

    sampling_params: of rows without their own; None for those of the checkpoint's generation_config.json.
    preprocess: returns the request of a row. By default it is the row itself, of which these columns are read:
        prompt: a text, or token ids. messages: a conversation. One of the two is given; the other is absent or null.
        sampling_params: fields that replace those of `sampling_params`; null is the same as absent.
    chat_template_kwargs: as in `LLM.chat`.
    engine_arguments: those of `LLM`.

    Every column of the input is kept, and OUTPUT_COLUMNS are added. A row whose request is refused or fails gets an
    `error`. If the engine ends, so does the process: Ray starts the actor again and repeats its batches. If the engine
    ends before its first output, EngineDeadError ends the job: a new one would do the same.

    A row without a seed gets one made of its prompt or messages, and of the argument `seed`. So its tokens depend on no
    actor, batch or order, and a repeated batch gives the same rows.
    """

    def __init__(
        self,
        model: str,
        *,
        sampling_params: SamplingParams | None = None,
        preprocess: Callable[[Row], Row] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **engine_arguments: Any,
    ) -> None:
        self._preprocess = preprocess
        self._chat_template_kwargs = chat_template_kwargs
        self._engine = AsyncLLM(model, **engine_arguments)
        self._params = sampling_params or self._engine.get_default_sampling_params()
        self._has_output = False

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        if not isinstance(batch, pa.Table):
            hint = "Give map_batches batch_format='pyarrow', or use nanovllm.integrations.ray.generate."
            raise InvalidArgumentError("batch", batch, "a pyarrow.Table", hint)
        check_columns(batch.column_names)
        outputs = pa.Table.from_pylist(await asyncio.gather(*map(self._answer, batch.to_pylist())), OUTPUT_COLUMNS)
        for name in OUTPUT_COLUMNS.names:
            batch = batch.append_column(OUTPUT_COLUMNS.field(name), outputs[name])
        yield batch

    async def _answer(self, row: Row) -> dict[str, Any]:
        """Returns the values of OUTPUT_COLUMNS for a row, without those that are null."""
        try:
            request = read_row(row, self._preprocess, self._params, self._engine.config.seed)
            output = await self._output(request)
            self._has_output = True
            return columns_of(output)
        except EngineDeadError as error:
            if not self._has_output:
                raise
            # Not an exception, which would end the job. Ray repeats what an actor did whose process ends.
            events.actor_ended.log(logger, error=str(error))
            os._exit(1)
        except NanoVLLMError as error:
            return {"error": str(error)}

    async def _output(self, request: RowRequest) -> RequestOutput:
        if request.messages is not None:
            kwargs = self._chat_template_kwargs
            outputs = self._engine.chat(request.messages, request.params, chat_template_kwargs=kwargs)
        else:
            outputs = self._engine.generate(request.prompt, request.params)
        return await anext(outputs)  # FINAL_ONLY: there is one


@dataclass(frozen=True)
class RowRequest:
    """What a row asks for: a completion of `prompt`, or of `messages`."""

    prompt: Any
    messages: Any
    params: SamplingParams


def read_row(row: Row, preprocess: Callable[[Row], Row] | None, defaults: SamplingParams, seed: int) -> RowRequest:
    """Returns the request of a row. Raises InvalidArgumentError if it is none, or if `preprocess` raises.

    defaults: the parameters that the row's replace. seed: of the engine, from which those of the rows are made.
    """
    try:
        request = _without_nulls(row if preprocess is None else preprocess(row))
        contents = {name: request[name] for name in ("prompt", "messages") if name in request}
        content = json.dumps(contents, sort_keys=True, default=repr)
    except Exception as error:  # the caller's function may raise any kind
        raise InvalidArgumentError("row", row, f"what preprocess takes ({shown(error)})") from None
    if len(contents) != 1:
        raise InvalidArgumentError("row", [*request], "a row with either 'prompt' or 'messages', and not null")
    given = request.get("sampling_params", {})
    if not isinstance(given, Mapping):
        raise InvalidArgumentError("sampling_params", given, "a dictionary of fields of SamplingParams, or null")
    if isinstance(given.get("logit_bias"), Mapping):  # the keys of Arrow and of JSON are texts
        bias = {int(key) if str(key).isdecimal() else key: value for key, value in given["logit_bias"].items()}
        given = {**given, "logit_bias": bias}
    params = dataclasses.replace(defaults, output_kind=RequestOutputKind.FINAL_ONLY, **given)
    for name, value in (("n", 1), ("logprobs", None), ("prompt_logprobs", None)):
        if getattr(params, name) != value:
            hint = "For several completions, repeat the row with other seeds." if name == "n" else ""
            raise InvalidArgumentError(name, getattr(params, name), f"{value}: no column of a row holds it", hint)
    if params.seed is None:
        params.seed = xxhash.xxh3_64_intdigest(content.encode(), seed=seed) % MAX_SEED
    return RowRequest(contents.get("prompt"), contents.get("messages"), params)


def columns_of(output: RequestOutput) -> dict[str, Any]:
    """Returns the values of OUTPUT_COLUMNS for the output of a request."""
    completion, metrics = output.outputs[0], output.metrics
    return {
        "generated_text": completion.text,
        "generated_tokens": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "num_input_tokens": len(output.prompt_token_ids),
        "num_generated_tokens": len(completion.token_ids),
        "metrics": {name: getattr(metrics, name) for name in ("num_cached_tokens", *_METRICS)},
    }


def check_columns(names: Iterable[str], reserved: Sequence[str] = OUTPUT_COLUMNS.names) -> None:
    """Raises InvalidArgumentError for an input column with a reserved name: that of an output column."""
    for name in names:
        if name in reserved:
            raise InvalidArgumentError("column", name, f"none of {', '.join(reserved)}", "Rename the column.")


def _without_nulls(value: Any) -> Any:
    """Returns a value without the null fields that Arrow adds to dictionaries whose keys differ from row to row."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list) else value

"""`nanovllm bench`, and `bench.py` in a checkout: the options of the benchmark.

torch and the engine are imported after the options are parsed, so that a mistake in them is answered at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from nanovllm.benchmarks.settings import ALL_WORKLOADS, BenchmarkSettings, make_plan
from nanovllm.benchmarks.workloads import WORKLOADS
from nanovllm.errors import NanoVLLMError
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.utils import env

DESCRIPTION = """\
Measure the engine: nano-vllm's benchmark and others, beside the device's bandwidth and the figures of other engines.

    {command}                              a GPU: "classic" on Qwen3-0.6B's shape with random weights;
    {indent}                              no GPU: "mixed" on the tiny checkpoint, within a minute
    {command} --workload single long --model Qwen/Qwen3-8B
    {command} --compare transformers       the same work in transformers too, and the ratio
    {command} --logging-overhead           what each log level costs, against logging off
    {command} --json | jq '.results[0].best_seconds'

A run's time is the wall time of `LLM.generate`, from token ids to token ids, end-of-sequence ignored. The first run
is the warm-up and is shown apart; the prefix cache is emptied before each run. The bandwidth reached is what decoding
has to read (the weights once a step, each row's keys and values at its context) over the whole time, prefill included;
it is shown beside the bandwidth of a large copy on the same device. The last line is one JSON object with everything.

Logging is at WARNING unless NANOVLLM_LOG_LEVEL says otherwise.
"""

# Options of LLM's names that are passed on as they are; None keeps LLM's default.
ENGINE_OPTIONS = (
    "attention_backend",
    "dtype",
    "enforce_eager",
    "kv_cache_dtype",
    "kvcache_block_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_depth",
)


def main(arguments: Sequence[str], prog: str) -> int:
    """Runs the benchmark. Exit status 1 with one line on standard error when the engine refuses."""
    started = time.perf_counter()
    args = parse_arguments(arguments, prog)
    env.log_level.set_default("WARNING")
    try:
        say = discard if args.json else print_at_once
        settings = settings_of(args)
        plan = make_plan(settings, say)

        from nanovllm.benchmarks.offline import run_benchmark

        report = run_benchmark(settings, plan, say, started)
    except NanoVLLMError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


def print_at_once(text: str) -> None:
    """Prints a line without buffering."""
    print(text, flush=True)


def discard(text: str) -> None:
    """Prints nothing: with --json the JSON line is the only output."""


def settings_of(args: argparse.Namespace) -> BenchmarkSettings:
    """Returns the settings that the options give."""
    options = {name: getattr(args, name) for name in ENGINE_OPTIONS if getattr(args, name) is not None}
    return BenchmarkSettings(
        model=args.model,
        workloads=tuple(args.workload or ()),
        load_format=args.load_format,
        num_seqs=args.num_seqs,
        runs=args.runs,
        temperature=args.temperature,
        seed=args.seed,
        device=args.device,
        max_model_len=args.max_model_len,
        tensor_parallel_size=args.tensor_parallel_size,
        compare_with_transformers=args.compare is not None,
        measure_logging_overhead=args.logging_overhead,
        pairs=args.pairs,
        engine_options=options | {"enable_prefix_caching": not args.no_prefix_caching},
    )


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Returns the parsed options. Exits with status 2 for a mistake in them."""
    command = f"python {prog}" if prog.endswith(".py") else prog
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION.format(command=command, indent=" " * len(command)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_work_options(parser)
    add_engine_options(parser)
    add_run_options(parser)
    args = parser.parse_args(arguments)
    if args.pairs < 2:
        parser.error("--pairs must be at least 2: a spread needs two")
    if args.runs < 2:
        parser.error("--runs must be at least 2: the first run is the warm-up and does not count")
    return args


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """Adds what is generated, and by which model."""
    add = parser.add_argument
    each = "; ".join(f"{name}: {workload.num_seqs} requests, {workload.about}" for name, workload in WORKLOADS.items())
    add(
        "--workload",
        nargs="+",
        choices=[*WORKLOADS, ALL_WORKLOADS],
        metavar="NAME",
        help=f"one, several, or 'all' (default: classic on a GPU, mixed on a CPU). {each}",
    )
    add("--num-seqs", type=positive, metavar="N", help="requests (default: the workload's own number)")
    add(
        "--model",
        help=f"a folder, a Hugging Face id, 'tiny', or a shape: {', '.join(BUILTIN_SHAPES)} "
        "(default: qwen3-0.6b on a GPU, tiny on a CPU)",
    )
    add(
        "--load-format",
        choices=("auto", "safetensors", "dummy"),
        help="dummy: random weights (default: dummy for shapes, else auto)",
    )
    add("--temperature", type=float, default=0.6, help="default 0.6, as in nano-vllm's benchmark; 0 is greedy")
    add("--seed", type=int, default=0, help="of requests, sampling and random weights (default 0)")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of LLM."""
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--dtype", help="bfloat16, float16 or float32 (default: the checkpoint's; float32 on a CPU)")
    add("--max-model-len", type=positive, metavar="N", help="tokens (default: 4096, or what the longest request needs)")
    add("--max-num-seqs", type=positive, default=512, metavar="N", help="requests that run at a time (default 512)")
    add("--max-num-batched-tokens", type=positive, metavar="N", help="tokens computed in one step (default 16384)")
    add("--attention-backend", help="auto, flash_attn, triton or torch (default auto)")
    add(
        "--kvcache-block-size",
        type=positive,
        metavar="N",
        help="tokens in a page of the KV cache (default: the attention backend's choice)",
    )
    add("--kv-cache-dtype", help="auto (the model's dtype) or fp8 (default auto)")
    add(
        "--pipeline-depth",
        type=positive,
        metavar="N",
        help="steps in flight (default: 2 on a GPU, 1 on a CPU)",
    )
    add("--tensor-parallel-size", type=positive, default=1, metavar="N", help="GPUs, or processes on a CPU (default 1)")
    add("--enforce-eager", action="store_true", help="no CUDA graphs")
    add("--no-prefix-caching", action="store_true", help="share nothing between requests")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what is measured, how often, and what is printed."""
    add = parser.add_argument
    add("--runs", type=positive, default=3, metavar="N", help="runs of a workload, the warm-up included (default 3)")
    add("--compare", choices=("transformers",), help="run the same requests there too and print the ratio")
    add(
        "--logging-overhead",
        action="store_true",
        help="measure what logging adds to decoding, level by level, instead of a workload",
    )
    add("--pairs", type=positive, default=10, metavar="N", help="pairs of runs for --logging-overhead (default 10)")
    add("--json", action="store_true", help="print the JSON line alone")


def positive(text: str) -> int:
    """Returns an integer ≥ 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer ≥ 1")
    return int(text)

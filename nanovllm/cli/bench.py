"""`nanovllm bench`, and `bench.py` in a checkout: the options of the benchmark.

torch and the engine are imported after the options are parsed, so that a mistake in them is answered at once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanovllm.benchmarks.arrivals import Lengths
from nanovllm.benchmarks.online import Bounds
from nanovllm.benchmarks.online_settings import (
    DEFAULT_INPUT_LEN,
    DEFAULT_OUTPUT_LEN,
    DEFAULT_VOCAB_SIZE,
    ONLINE,
    OnlineSettings,
    Server,
)
from nanovllm.benchmarks.settings import ALL_WORKLOADS, BenchmarkSettings, Say, make_plan
from nanovllm.benchmarks.workloads import WORKLOADS
from nanovllm.errors import NanoVLLMError
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.utils import env

DESCRIPTION = """\
Measure the engine: nano-vllm's benchmark and others, beside the device's bandwidth and the figures of other engines.

    {command}                              a GPU: "classic" on Qwen3-0.6B's shape with random weights;
    {indent}                              no GPU: "mixed" on the tiny checkpoint, within a minute
    {command} --workload single long --model Qwen/Qwen3-8B
    {command} --workload online            requests that arrive over time: TTFT, time between tokens, goodput
    {command} --workload online --url http://localhost:8000    the same on any OpenAI server
    {command} --compare transformers       the same work in transformers too, and the ratio
    {command} --logging-overhead           what each log level costs, against logging off
    {command} --json | jq '.results[0].best_seconds'

A run's time is the wall time of `LLM.generate`, from token ids to token ids, end-of-sequence ignored. The first run
is the warm-up and is shown apart; the prefix cache is emptied before each run. The bandwidth reached is what decoding
has to read (the weights once a step, each row's keys and values at its context) over the whole time, prefill included;
it is shown beside the bandwidth of a large copy on the same device. The last line is one JSON object with everything.

The workload "online" is measured apart from the others, through AsyncLLM. Ctrl-C ends it and prints what was measured.

Logging is at WARNING unless NANOVLLM_LOG_LEVEL says otherwise.
"""

INTERRUPTED = 130  # the exit status that shells use for Ctrl-C

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
    "max_prefill_tokens_beside_decode",
    "inter_token_latency_target_ms",
    "quantization",
)


def main(arguments: Sequence[str], prog: str) -> int:
    """Runs the benchmark. Exit status 1 with one line on standard error when the engine refuses."""
    started = time.perf_counter()
    args = parse_arguments(arguments, prog)
    env.log_level.set_default("WARNING")
    say = discard if args.json else print_at_once
    run = run_online_workload if args.workload == [ONLINE] else run_offline_workloads
    try:
        report, status = run(args, say, started)
    except NanoVLLMError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return status


def run_offline_workloads(args: argparse.Namespace, say: Say, started: float) -> tuple[dict[str, Any], int]:
    """Returns the report and the exit status. started: when the command began."""
    settings = settings_of(args)
    plan = make_plan(settings, say)

    from nanovllm.benchmarks.offline import run_benchmark

    return run_benchmark(settings, plan, say, started), 0


def run_online_workload(args: argparse.Namespace, say: Say, started: float) -> tuple[dict[str, Any], int]:
    """Returns the report and the exit status: 130 after Ctrl-C, 1 if no request was completed or vLLM failed."""
    from nanovllm.benchmarks.online_run import run_online

    report = run_online(online_settings_of(args), say)
    if report["interrupted"]:
        return report, INTERRUPTED
    completed = sum(result["num_requests"] - result["num_failed"] for result in report["results"])
    return report, 0 if completed and "vllm_error" not in report else 1


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
        compare_with_transformers=args.compare == "transformers",
        measure_logging_overhead=args.logging_overhead,
        pairs=args.pairs,
        engine_options=options | {"enable_prefix_caching": not args.no_prefix_caching},
    )


def online_settings_of(args: argparse.Namespace) -> OnlineSettings:
    """Returns the settings of the workload "online" that the options give."""
    return OnlineSettings(
        engine=settings_of(args),
        rates=args.rates,
        duration=args.duration,
        num_requests=args.num_requests,
        num_seeds=args.seeds,
        input_len=args.input_len,
        output_len=args.output_len,
        burstiness=args.burstiness,
        vocab_size=args.vocab_size,
        warm_up=args.warm_up,
        bounds=Bounds(ttft_ms=args.ttft_bound, itl_ms=args.itl_bound),
        server=Server(args.url, args.api_key, args.served_model_name) if args.url else None,
        compare_with_vllm=args.compare == "vllm",
        save=args.save,
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
    add_online_options(parser)
    args = parser.parse_args(arguments)
    check_online(parser, args)
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
        choices=[*WORKLOADS, ALL_WORKLOADS, ONLINE],
        metavar="NAME",
        help=f"one, several, or 'all' (default: classic on a GPU, mixed on a CPU). {each}. {ONLINE}: requests that "
        "arrive over time, alone; its options are below",
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
    add("--quantization", help="fp8, int8 or int4: make such weights when they are loaded (default: the checkpoint's)")
    add(
        "--pipeline-depth",
        type=positive,
        metavar="N",
        help="steps in flight (default: 2 on a GPU, 1 on a CPU)",
    )
    add(
        "--max-prefill-tokens-beside-decode",
        type=positive,
        metavar="N",
        help="prompt tokens in a step that also decodes (default: no limit)",
    )
    add(
        "--inter-token-latency-target-ms",
        type=latency_target,
        metavar="MS",
        help="target for the time of a step that also decodes: 'auto', or 0 for none (default: that of the engine)",
    )
    add("--tensor-parallel-size", type=positive, default=1, metavar="N", help="GPUs, or processes on a CPU (default 1)")
    add("--enforce-eager", action="store_true", help="no CUDA graphs")
    add("--no-prefix-caching", action="store_true", help="share nothing between requests")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what is measured, how often, and what is printed."""
    add = parser.add_argument
    add("--runs", type=positive, default=3, metavar="N", help="runs of a workload, the warm-up included (default 3)")
    add(
        "--compare",
        choices=("transformers", "vllm"),
        help="run the same requests there too and print the ratio; vllm with --workload online alone",
    )
    add(
        "--logging-overhead",
        action="store_true",
        help="measure what logging adds to decoding, level by level, instead of a workload",
    )
    add(
        "--pairs",
        type=positive,
        default=60,
        metavar="N",
        help="pairs of measurements a level for --logging-overhead (default 60; fewer where they take too long)",
    )
    add("--json", action="store_true", help="print the JSON line alone")


def add_online_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the workload "online"."""
    group = parser.add_argument_group("online traffic, for --workload online")
    add = group.add_argument
    add(
        "--rates",
        type=rates,
        metavar="R,R,...",
        help="requests/s, one after the other (default: 10,60,120 on a GPU; 2,8 on a CPU and with --url)",
    )
    amount = group.add_mutually_exclusive_group().add_argument
    amount(
        "--duration",
        type=above_zero,
        metavar="S",
        help="seconds in which requests arrive, for each rate and seed (default: 20 on a GPU, else 3)",
    )
    amount("--num-requests", type=positive, metavar="N", help="requests for each rate and seed, instead of --duration")
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help="runs of each rate, with the seeds from --seed upward (default: 3 on a GPU, else 2)",
    )
    for option, default in (("--input-len", DEFAULT_INPUT_LEN), ("--output-len", DEFAULT_OUTPUT_LEN)):
        add(
            option,
            type=lengths,
            default=default,
            metavar="MEAN[:SIGMA[:MAX]]",
            help="tokens, lognormal, cut off at MAX; SIGMA 0 makes all equal; if not given, SIGMA is 1 and MAX is 8 "
            f"times MEAN (default {default.mean:g}:{default.sigma:g}:{default.most})",
        )
    add(
        "--burstiness",
        type=above_zero,
        default=1.0,
        metavar="X",
        help="1: Poisson arrivals (default); less: in bursts; more: regular",
    )
    add(
        "--vocab-size",
        type=positive,
        metavar="N",
        help=f"token ids are drawn below it (default: {DEFAULT_VOCAB_SIZE}, or the model's if that is smaller; a "
        "server's is not known)",
    )
    add(
        "--warm-up",
        type=positive,
        metavar="N",
        help="requests that are sent at once, twice, before the first run (default: 256 on a GPU, else 8)",
    )
    goodput = "of a request that counts for goodput"
    add("--ttft-bound", type=above_zero, default=500.0, metavar="MS", help=f"highest TTFT {goodput} (default 500)")
    add("--itl-bound", type=above_zero, default=50.0, metavar="MS", help=f"highest mean ITL {goodput} (default 50)")
    add("--url", help="measure an OpenAI server, such as http://localhost:8000; needs aiohttp")
    add("--api-key", metavar="KEY", help="for --url")
    add("--served-model-name", metavar="NAME", help="for --url (default: the first model that the server lists)")
    add("--save", type=Path, metavar="FILE.jsonl", help="write a line for each request")


def check_online(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command for options that do not go together."""
    is_online = args.workload == [ONLINE]
    if ONLINE in (args.workload or ()) and not is_online:
        parser.error(f"--workload {ONLINE} goes with no other workload")
    if args.compare and (args.compare == "vllm") != is_online:
        needed = f"needs --workload {ONLINE}" if args.compare == "vllm" else f"does not go with --workload {ONLINE}"
        parser.error(f"--compare {args.compare} {needed}")
    if is_online and (args.num_seqs or args.logging_overhead):
        parser.error(f"--num-seqs and --logging-overhead do not go with --workload {ONLINE}: see --num-requests")
    if not is_online and (args.url or args.save or args.rates):
        parser.error(f"--rates, --url and --save need --workload {ONLINE}")
    if args.url and (args.compare or args.model):
        parser.error("--model and --compare do not go with --url: see --served-model-name")


def rates(text: str) -> tuple[float, ...]:
    """Returns numbers above 0, for argparse."""
    return tuple(above_zero(part) for part in text.split(","))


def above_zero(text: str) -> float:
    """Returns a number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")
    return value


def latency_target(text: str) -> float | str:
    """Returns 'auto' or a number ≥ 0, for argparse."""
    return text if text == "auto" else 0.0 if text == "0" else above_zero(text)


def lengths(text: str) -> Lengths:
    """Returns MEAN[:SIGMA[:MAX]] as a distribution, for argparse. SIGMA is 1 and MAX eight times MEAN by default."""
    mean, *rest = text.split(":")
    if len(rest) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not MEAN[:SIGMA[:MAX]]")
    found = Lengths(mean=above_zero(mean), sigma=1.0, most=math.ceil(8 * above_zero(mean)))
    if rest:
        found = replace(found, sigma=0.0 if rest[0] == "0" else above_zero(rest[0]))
    return replace(found, most=positive(rest[1])) if len(rest) == 2 else found


def positive(text: str) -> int:
    """Returns an integer ≥ 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer ≥ 1")
    return int(text)

"""Measure the engine: nano-vllm's benchmark and others, beside what the device can do and what other engines did.

    python bench.py                              a GPU: "classic" on Qwen3-0.6B's shape with random weights;
                                                 no GPU: "mixed" on the tiny checkpoint, within a minute
    python bench.py --workload single long --model Qwen/Qwen3-8B
    python bench.py --compare transformers       the same work in transformers too, and the ratio
    python bench.py --logging-overhead           what each log level costs, against logging off
    python bench.py --json | jq '.results[0].best_seconds'

A run's time is the wall time of `LLM.generate`, from token ids to token ids, end-of-sequence ignored. The first run
warms up and is shown apart; the prefix cache is emptied before each. The bandwidth reached is what decoding has to
read (the weights once a step, each row's keys and values at its context) over the whole time, prefill included; beside
it stands the bandwidth of a large copy on the same device. The last line is one JSON object with everything.

Logging is at WARNING unless NANOVLLM_LOG_LEVEL says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.errors import NanoVLLMError
from nanovllm.models.model_config import BUILTIN_SHAPES, ModelConfig
from tools.bench_workloads import PEERS, WORKLOADS, Requests, peers_of, traffic

if TYPE_CHECKING:
    from nanovllm import LLM
    from nanovllm.config import ResolvedConfig

# torch and the engine are imported where they are needed: a mistake on the command line is answered at once.

# Options that go to LLM under the same name; one that is not given keeps LLM's default.
ENGINE_OPTIONS = (
    *("device", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "attention_backend"),
    *("kvcache_block_size", "kv_cache_dtype", "enforce_eager", "load_format", "seed"),
    *("pipeline_depth", "tensor_parallel_size"),
)
BUSY = 0.5  # load average above which a CPU's figures come with a warning
MIN_MODEL_LEN = 4096  # as in nano-vllm's benchmark, where the workload needs less

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One `generate` over a workload's requests."""

    seconds: float
    decode_seconds: float  # of these, in steps without a prompt
    num_steps: int
    mean_batch: float  # tokens sampled in a step
    num_preemptions: int
    token_ids: list[list[int]]


def main() -> int:
    started = time.perf_counter()
    args = parse_arguments()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    try:
        report = benchmark(args, (lambda text: None) if args.json else (lambda text: print(text, flush=True)), started)
    except NanoVLLMError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    each = "; ".join(f"{name}: {workload.num_seqs} requests, {workload.about}" for name, workload in WORKLOADS.items())
    add("--workload", nargs="+", choices=[*WORKLOADS, "all"], metavar="NAME", help=f"one, several, or 'all'. {each}")
    add("--num-seqs", type=positive, metavar="N", help="requests, instead of the workload's own number")
    add("--model", help=f"a folder, a Hugging Face id, 'tiny', or a shape: {', '.join(BUILTIN_SHAPES)}")
    add("--load-format", choices=("auto", "safetensors", "dummy"), help="dummy: random weights, the default for shapes")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--runs", type=positive, default=3, metavar="N", help="runs of a workload, the warm-up included (default 3)")
    add("--temperature", type=float, default=0.6, help="default 0.6, as in nano-vllm's benchmark; 0 is greedy")
    add("--seed", type=int, default=0, help="of requests, sampling and random weights (default 0)")
    add("--dtype", help="default: the checkpoint's; float32 on a CPU")
    add("--max-model-len", type=positive, metavar="N", help="default: 4096, or what the longest request needs")
    add("--max-num-seqs", type=positive, default=512, metavar="N", help="requests that run at a time (default 512)")
    add("--max-num-batched-tokens", type=positive, metavar="N", help="tokens computed in one step")
    add("--attention-backend", help="auto, flash_attn, triton or torch")
    add("--kvcache-block-size", type=positive, metavar="N", help="tokens of a page of the KV cache")
    add("--kv-cache-dtype", help="auto (the model's dtype) or fp8")
    add("--pipeline-depth", type=positive, metavar="N", help="steps in flight at a time")
    add("--tensor-parallel-size", type=positive, default=1, metavar="N", help="GPUs, or processes on a CPU (default 1)")
    add("--enforce-eager", action="store_true", help="no CUDA graphs")
    add("--no-prefix-caching", action="store_true", help="share nothing between requests")
    add("--compare", choices=("transformers",), help="run the same requests there too and print the ratio")
    add(
        "--logging-overhead",
        action="store_true",
        help="what logging costs decoding, level by level, instead of a workload",
    )
    add("--pairs", type=positive, default=10, metavar="N", help="pairs of runs for --logging-overhead (default 10)")
    add("--json", action="store_true", help="print the JSON line alone")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error("--pairs must be at least 2: a spread is to be seen")
    if args.runs < 2:
        parser.error("--runs must be at least 2: the first run is the warm-up and does not count")
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer ≥ 1")
    return int(text)


def benchmark(args: argparse.Namespace, say: Say, started: float) -> dict[str, Any]:
    """Starts an engine, runs each workload, compares. Returns what the JSON line says."""
    choose_defaults(args, say)
    config = model_config(args.model)
    workloads = choose_workloads(args, config, say)

    import torch

    from nanovllm import LLM
    from tools.bench_machine import copy_bytes_per_second, device_name, load_average, versions

    load = load_average()  # before this process adds its own

    options = {name: getattr(args, name) for name in ENGINE_OPTIONS if getattr(args, name) is not None}
    before = time.perf_counter()
    with LLM(args.model, skip_tokenizer_init=True, enable_prefix_caching=not args.no_prefix_caching, **options) as llm:
        start_seconds = time.perf_counter() - before
        run_once(llm, Requests([[0] * 16], [1], shared_len=0), args.temperature)
        engine = llm.llm_engine.resolved
        first_output_seconds = time.perf_counter() - started
        device = torch.device(engine.device)
        num_devices = args.tensor_parallel_size if device.type == "cuda" else 1
        report: dict[str, Any] = {
            "benchmark": "nanovllm",
            "model": args.model,
            "load_format": args.load_format,
            "device_name": device_name(device),
            "engine": asdict(engine),
            "temperature": args.temperature,
            "seed": args.seed,
            "log_level": os.environ["NANOVLLM_LOG_LEVEL"],
            "versions": versions(),
            "load_average": load,
            "start_seconds": start_seconds,
            "first_output_seconds": first_output_seconds,
            "tensor_parallel_size": args.tensor_parallel_size,
            "copy_bytes_per_second": copy_bytes_per_second(device) * num_devices,
            "results": [],
        }
        introduce(report, say)
        if args.logging_overhead:
            report["logging_overhead"] = logging_overhead(llm, args, say)
            return report
        last_runs = {}
        for name, requests in workloads.items():
            runs = measure(llm, name, requests, args, say)
            report["results"].append(result_of(name, requests, runs, config, report))
            describe(report["results"][-1], say)
            last_runs[name] = runs[-1]
    if args.compare:  # the engine has given its memory back
        compare(report, workloads, last_runs, engine, args, say)
    return report


# What to run


def choose_defaults(args: argparse.Namespace, say: Say) -> None:
    """Fills in what the command line leaves open about model and workload."""
    import torch

    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if not on_gpu and args.model is None and args.workload is None:
        say(
            "Without a GPU: the tiny checkpoint and the workload 'mixed', which end within a minute. "
            "--model and --workload choose others."
        )
    args.model = args.model or ("qwen3-0.6b" if on_gpu else "tiny")
    args.workload = args.workload or ["classic" if on_gpu else "mixed"]
    args.load_format = args.load_format or ("dummy" if args.model in BUILTIN_SHAPES else "auto")


def model_config(model: str) -> ModelConfig:
    from nanovllm.models.checkpoint import resolve_model_folder

    return BUILTIN_SHAPES[model] if model in BUILTIN_SHAPES else ModelConfig.from_folder(resolve_model_folder(model))


def choose_workloads(args: argparse.Namespace, config: ModelConfig, say: Say) -> dict[str, Requests]:
    """The requests of each workload asked for; settles max_model_len. Raises WorkloadError for one that cannot run."""
    longest = args.max_model_len or config.max_context_len
    names = list(WORKLOADS) if "all" in args.workload else list(dict.fromkeys(args.workload))
    too_long = [name for name in names if WORKLOADS[name].longest > longest]
    for name in too_long:
        text = f"workload {name!r} has requests of {WORKLOADS[name].longest} tokens, and {args.model!r} takes {longest}"
        if "all" not in args.workload:
            raise WorkloadError(f"{text}: leave it out, or raise --max-model-len if the model allows it.")
        say(f"Left out: {text}.")
        names.remove(name)
    if args.max_model_len is None:
        needed = max([MIN_MODEL_LEN, *(WORKLOADS[name].longest for name in names)])
        args.max_model_len = min(needed, config.max_context_len)
    return {
        name: WORKLOADS[name].draw(args.num_seqs or WORKLOADS[name].num_seqs, config.vocab_size, args.seed)
        for name in names
    }


class WorkloadError(NanoVLLMError):
    """A workload that this model cannot run."""


# Running and measuring


def run_once(llm: LLM, requests: Requests, temperature: float) -> Run:
    from nanovllm import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=count, ignore_eos=True) for count in requests.output_lens
    ]
    llm.reset_prefix_cache()
    engine = llm.llm_engine
    before = engine.statistics.copy()
    started = time.perf_counter()
    outputs = llm.generate(requests.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    done = engine.statistics.since(before)
    return Run(
        seconds=seconds,
        decode_seconds=done.decode_seconds,
        num_steps=done.num_steps,
        mean_batch=done.num_output_tokens / done.num_steps,
        num_preemptions=done.num_preemptions,
        token_ids=[output.outputs[0].token_ids for output in outputs],
    )


def measure(llm: LLM, name: str, requests: Requests, args: argparse.Namespace, say: Say) -> list[Run]:
    """All runs, the warm-up first."""
    say(
        f"\n{name}: {len(requests.prompts)} requests, {requests.num_prompt_tokens:,} tokens in, "
        f"{requests.num_output_tokens:,} out"
    )
    runs = []
    for index in range(args.runs):
        runs.append(run_once(llm, requests, args.temperature))
        counted = sum(map(len, runs[-1].token_ids))
        if counted != requests.num_output_tokens:
            raise WorkloadError(f"{name}: {counted} tokens came back, {requests.num_output_tokens} were asked for.")
        say(f"  {f'run {index}' if index else 'warm-up'}: {runs[-1].seconds:.3f} s")
    return runs


def result_of(
    name: str, requests: Requests, runs: list[Run], config: ModelConfig, report: dict[str, Any]
) -> dict[str, Any]:
    """One entry of the JSON line's `results`."""
    import torch

    best = min(runs[1:], key=lambda run: run.seconds)
    itemsize = getattr(torch, report["engine"]["dtype"]).itemsize
    fp8_cache = report["engine"]["kv_cache_dtype"] == "fp8_e4m3"
    needed = traffic(config, itemsize, requests, fp8_cache=fp8_cache)
    reached = needed.total(best.num_steps) / best.seconds
    peers = peers_of(report["model"], name, len(requests.prompts), fp8_cache=fp8_cache)
    return {
        "workload": name,
        "num_seqs": len(requests.prompts),
        "num_prompt_tokens": requests.num_prompt_tokens,
        "num_output_tokens": requests.num_output_tokens,
        "warm_up_seconds": runs[0].seconds,
        **spread_of([run.seconds for run in runs[1:]]),
        "output_tokens_per_second": requests.num_output_tokens / best.seconds,
        "prompt_tokens_per_second": requests.num_prompt_tokens / best.seconds,
        "num_steps": best.num_steps,
        "mean_batch": best.mean_batch,
        "num_preemptions": best.num_preemptions,
        "weight_bytes_per_step": needed.weight_bytes,
        "kv_bytes": needed.kv_bytes,
        "bytes_moved": needed.total(best.num_steps),
        "bytes_per_second": reached,
        "share_of_copy_bandwidth": reached / report["copy_bytes_per_second"],
        "peers_seconds": dict(peers) if report["tensor_parallel_size"] == 1 else {},
    }


def spread_of(seconds: list[float]) -> dict[str, Any]:
    best, median = min(seconds), statistics.median(seconds)
    spread = (max(seconds) - best) / median
    return {"run_seconds": seconds, "best_seconds": best, "median_seconds": median, "spread": spread}


def compare(
    report: dict[str, Any],
    workloads: dict[str, Requests],
    ours: dict[str, Run],
    engine: ResolvedConfig,
    args: argparse.Namespace,
    say: Say,
) -> None:
    """Runs the same in transformers and adds `transformers` to each result."""
    from tools.bench_transformers import TransformersModel

    say(
        "\ntransformers: the same weights, prompts and output lengths; all prompts in one batch, padded on the left, "
        "generated up to the longest output (its end-of-sequence tokens are off), of which each request keeps its own."
    )
    model = TransformersModel(engine, args.load_format == "dummy", args.seed)
    for result in report["results"]:
        name = result["workload"]
        runs = [model.generate(workloads[name], args.temperature) for _ in range(args.runs)]
        theirs = {"warm_up_seconds": runs[0][0], **spread_of([seconds for seconds, _ in runs[1:]])}
        theirs["ratio_of_best"] = theirs["best_seconds"] / result["best_seconds"]
        theirs["ratio_of_median"] = theirs["median_seconds"] / result["median_seconds"]
        text = (
            f"  {name}: best {theirs['best_seconds']:.3f} s, median {theirs['median_seconds']:.3f} s "
            f"(warm-up {theirs['warm_up_seconds']:.3f} s); nanovllm is {theirs['ratio_of_best']:.2f}× as fast "
            f"by the best runs, {theirs['ratio_of_median']:.2f}× by the medians"
        )
        if args.temperature == 0:
            theirs["equal_tokens"] = share_equal(ours[name].token_ids, runs[-1][1])
            text += f"; {theirs['equal_tokens']:.1%} of the tokens are the same"
        result["transformers"] = theirs
        say(text)


def logging_overhead(llm: LLM, args: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
    """Each level against logging off, in pairs of runs; the entries of the JSON line's `logging_overhead`."""
    from tools.bench_logging import decode_requests, measure_overheads

    requests = decode_requests(args.num_seqs or (256 if llm.llm_engine.resolved.device != "cpu" else 32))
    say(
        f"\nlogging: {len(requests.prompts)} requests decode {requests.output_lens[0]} tokens each; {args.pairs} pairs "
        "of runs a level, the time of decode steps against that with logging off in the same pair"
    )
    entries = []
    for overhead in measure_overheads(lambda: run_once(llm, requests, args.temperature).decode_seconds, args.pairs):
        say(f"  {overhead.described()}")
        entries.append(asdict(overhead) | {"median": overhead.median, "quartiles": overhead.quartiles})
    return entries


def share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


# Words


def introduce(report: dict[str, Any], say: Say) -> None:
    engine, found = report["engine"], report["versions"]
    say(
        f"nanovllm {found['nanovllm']}, torch {found['torch']} on {report['device_name']}\n"
        f"model {report['model']} (load_format={report['load_format']}) in {engine['dtype']}; attention: prefill "
        f"{engine['prefill_backend']}, decode {engine['decode_backend']}, pages of {engine['block_size']} tokens "
        f"in {engine['kv_cache_dtype']}; "
        f"CUDA graphs: {'yes' if engine['use_cuda_graphs'] else 'no'}; temperature {report['temperature']}; "
        f"tensor parallel size {report['tensor_parallel_size']}\n"
        f"engine started in {report['start_seconds']:.2f} s; first output {report['first_output_seconds']:.2f} s after "
        f"the start of this script\n"
        f"copy bandwidth of all devices: {report['copy_bytes_per_second'] / 1e9:.0f} GB/s, read and written"
    )
    if engine["device"] == "cpu" and (report["load_average"] or 0) > BUSY:
        say(
            f"Other work runs on this machine (load average {report['load_average']:.1f}): threads that wait for each "
            "other then take many times as long, so these figures say little."
        )


def describe(result: dict[str, Any], say: Say) -> None:
    best, median, spread = (result[name] for name in ("best_seconds", "median_seconds", "spread"))
    out_speed, in_speed = (result[f"{kind}_tokens_per_second"] for kind in ("output", "prompt"))
    steps, batch, preemptions = (result[name] for name in ("num_steps", "mean_batch", "num_preemptions"))
    weights, kv, moved = (result[name] / 1e9 for name in ("weight_bytes_per_step", "kv_bytes", "bytes_moved"))
    say(
        f"  best {best:.3f} s, median {median:.3f} s, spread {spread:.1%}\n"
        f"  {out_speed:,.0f} output tokens/s, {in_speed:,.0f} prompt tokens/s\n"
        f"  {steps:,} steps, mean batch {batch:.1f}, {preemptions} preemptions\n"
        f"  to be read: {moved:,.1f} GB (weights {weights:.3f} GB a step, KV {kv:,.1f} GB), "
        f"at {result['bytes_per_second'] / 1e9:,.1f} GB/s: "
        f"{result['share_of_copy_bandwidth']:.1%} of the copy bandwidth"
    )
    if result["peers_seconds"]:
        peers = ", ".join(f"{name} {seconds} s" for name, seconds in result["peers_seconds"].items())
        say(f"  peers: {peers} ({PEERS.measured})")


if __name__ == "__main__":
    sys.exit(main())

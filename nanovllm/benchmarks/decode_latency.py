"""Measures the time between the tokens of running requests while long prompts are computed.

    python -m nanovllm.benchmarks.decode_latency

Every decode row gets a token in each step, so the time between tokens is the time of a step. The table shows how
`max_prefill_tokens_beside_decode` and `inter_token_latency_target_ms` bound it, and how fast the prompts are computed
then.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

import numpy as np

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.prefill_policy import PrefillPolicy
from nanovllm.utils import env

LIMITS = (None, 8192, 4096, 2048, 1024, 512)
TARGETS_MS = (40.0, 20.0, 10.0, 5.0)


def time_steps(engine: LLMEngine, args: argparse.Namespace, seed: int, name: str) -> list[float]:
    """Returns the seconds of each step from the arrival of the long prompts until the last one is computed."""
    rng = random.Random(seed)
    vocab_size = engine.resolved.vocab_size

    def prompt(length: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    endless = SamplingParams(temperature=0.6, max_tokens=None, ignore_eos=True)
    running = [engine.add_request(f"{name} running {i}", prompt(args.context), endless) for i in range(args.running)]
    while engine.num_waiting_tokens:
        engine.step()
    once = SamplingParams(temperature=0.6, max_tokens=1)
    pending = {engine.add_request(f"{name} long {i}", prompt(args.prompt), once) for i in range(args.prompts)}
    seconds = []
    while pending:
        started = time.perf_counter()
        pending -= {output.request_id for output in engine.step()}
        seconds.append(time.perf_counter() - started)
    engine.discard_requests(running)
    while engine.has_unfinished_requests():
        engine.step()
    engine.reset_prefix_cache()
    return seconds


def main() -> None:
    """Prints one line for each limit."""
    args = _parse_arguments()
    env.log_level.set_default("WARNING")
    max_model_len = max(args.prompt, args.context + 2048) + 16
    with LLM(args.model, load_format=args.load_format, skip_tokenizer_init=True, max_model_len=max_model_len) as llm:
        engine = llm.llm_engine
        print(f"{args.running} requests decode while {args.prompts} prompts of {args.prompt} tokens are computed")
        print("tokens   target, ms   ms between tokens: median    p99    most   prompt tokens/s")
        limits: list[tuple[int | None, float | None]] = [(limit, None) for limit in LIMITS]
        for limit, target in [*limits, *((None, target) for target in TARGETS_MS)]:
            resolved = replace(
                engine.resolved, max_prefill_tokens_beside_decode=limit, inter_token_latency_target_ms=target
            )
            engine.scheduler.policy = PrefillPolicy(resolved)
            time_steps(engine, args, seed=0, name=f"{limit} {target} warm-up")
            seconds = time_steps(engine, args, seed=1, name=f"{limit} {target}")
            median, p99, most = (float(np.quantile(seconds, q)) * 1e3 for q in (0.5, 0.99, 1.0))
            rate = args.prompts * args.prompt / sum(seconds)
            print(
                f"{limit!s:>6}   {target!s:>10}   {median:25.1f}  {p99:5.1f}   {most:5.1f}   {rate:15,.0f}", flush=True
            )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3-0.6b", help="a folder, a Hugging Face id, 'tiny' or a shape (default %(default)s)")
    add("--load-format", default="dummy", choices=("auto", "dummy"), help="dummy: random weights (default)")
    add("--running", type=int, default=64, help="requests that decode (default %(default)s)")
    add("--context", type=int, default=512, help="tokens of each of their prompts (default %(default)s)")
    add("--prompts", type=int, default=24, help="long prompts, which arrive together (default %(default)s)")
    add("--prompt", type=int, default=4000, help="tokens of each long prompt (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

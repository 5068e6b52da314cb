"""Time between the tokens of running requests while long prompts stream in: `python tools/bench_latency.py`.

Every decode row gets a token in each step, so the time between tokens is the time a step takes. The table shows what
`max_prefill_tokens_beside_decode` buys, and what it costs the prompts.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import LLMEngine

LIMITS = (None, 8192, 4096, 2048, 1024, 512)


def stream(engine: LLMEngine, args: argparse.Namespace, rng: random.Random, name: str) -> list[float]:
    """Seconds of each step from the first long prompt's arrival until the last one is computed."""
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
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--load-format", default="dummy", choices=("auto", "dummy"))
    parser.add_argument("--running", type=int, default=64, help="requests that decode")
    parser.add_argument("--context", type=int, default=512, help="tokens of their prompts")
    parser.add_argument("--prompts", type=int, default=24, help="long prompts, all there at once")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of each")
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    max_model_len = max(args.prompt, args.context + 2048) + 16
    with LLM(args.model, load_format=args.load_format, skip_tokenizer_init=True, max_model_len=max_model_len) as llm:
        engine = llm.llm_engine
        print(f"{args.running} requests decode while {args.prompts} prompts of {args.prompt} tokens are computed")
        print("limit   ms between tokens: median    p99    most   prompt tokens/s")
        for limit in LIMITS:
            engine.scheduler.max_prefill_tokens_beside_decode = limit
            stream(engine, args, random.Random(0), f"{limit} warm-up")
            engine.reset_prefix_cache()
            seconds = stream(engine, args, random.Random(1), str(limit))
            engine.reset_prefix_cache()
            median, p99, most = (float(np.quantile(seconds, q)) * 1e3 for q in (0.5, 0.99, 1.0))
            rate = args.prompts * args.prompt / sum(seconds)
            print(f"{limit!s:>5}   {median:25.1f}  {p99:5.1f}   {most:5.1f}   {rate:15,.0f}")


if __name__ == "__main__":
    main()

"""Times decode steps by their number of rows and the length of their prompts: needs a GPU.

    python tools/time_decode_steps.py --model qwen3-8b --rows 24 64 128 256 [--quantization fp8 --kv-cache-dtype fp8]
    python tools/time_decode_steps.py --model qwen3-0.6b --rows 1 2 4 --prompt-tokens 64 500 4000 16000

With short prompts products weigh most, with long ones attention. The longest one decides how long contexts may become,
and so into how many parts attention divides all of them.

Two versions of a kernel that are equally fast alone may differ in a whole step, where weights are read once and other
kernels run before and after. To compare two trees, run the script of each on one card. Figures are milliseconds
a step, the median of five groups of steps.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import LLMEngine

GROUPS, STEPS = 5, 14
UNCOUNTED_STEPS = 6  # captures graphs


@contextmanager
def decoding(engine: LLMEngine, rows: int, prompt_tokens: int) -> Iterator[None]:
    """A context in which `rows` requests with random prompts of `prompt_tokens` decode without end."""
    rng = random.Random(rows)
    endless = SamplingParams(temperature=0.6, max_tokens=None, ignore_eos=True)
    vocab_size = engine.resolved.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(rows)]
    ids = [
        engine.add_request(f"{rows} rows, {prompt_tokens} tokens, {index}", prompt, endless)
        for index, prompt in enumerate(prompts)
    ]
    while engine.num_waiting_tokens:
        engine.step()
    yield
    engine.discard_requests(ids)
    while engine.has_unfinished_requests():
        engine.step()


def time_group(engine: LLMEngine, uncounted: int, steps: int) -> float:
    """Returns the milliseconds of a step, over `steps` of them, after some that do not count."""
    for _ in range(uncounted):
        engine.step()
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return (time.perf_counter() - started) / steps * 1e3


def time_steps(engine: LLMEngine, rows: int, prompt_tokens: int) -> float:
    """Returns the milliseconds of a step in which `rows` requests with prompts of `prompt_tokens` decode."""
    with decoding(engine, rows, prompt_tokens):
        return median(time_group(engine, 0 if group else UNCOUNTED_STEPS, STEPS) for group in range(GROUPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b", help="a built-in shape with random weights")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128, 136, 192, 256])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--quantization")
    parser.add_argument("--kv-cache-dtype", default="auto")
    args = parser.parse_args()
    options = {"quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    max_model_len = max(args.prompt_tokens) + 1024
    with LLM(args.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=max_model_len, **options) as llm:
        for prompt_tokens, rows in product(args.prompt_tokens, args.rows):
            time_ms = time_steps(llm.llm_engine, rows, prompt_tokens)
            print(f"{args.model} {rows:>4} rows after {prompt_tokens:>5} tokens {time_ms:8.3f} ms a step", flush=True)


if __name__ == "__main__":
    main()

"""Compares a model here with the same folder in transformers: `python tools/check_model.py PATH`.

    python tools/check_model.py ~/models/Llama-3.2-1B                              float32, on the CPU
    python tools/check_model.py ~/models/Llama-3.1-8B --device cuda --dtype bfloat16

Prompts of random tokens go through both. The log-probabilities of the most likely tokens at every position, and the
greedy continuations, must agree. The script prints a verdict, and exits with status 1 if they do not agree, and with 2
if the model cannot be loaded here.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM, SamplingParams
from nanovllm.errors import NanoVLLMError
from nanovllm.models.checkpoint import resolve_model_folder
from nanovllm.models.model_config import ModelConfig

# A difference of a log-probability up to this counts as rounding.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}
LENGTHS = (1, 5, 33, 130)  # of prompts; one more is longer than a sliding window, where there is one
NUM_TOP = 20  # most likely tokens compared at each position
MAX_WINDOW = 2048  # a prompt beyond a wider window would take long on a CPU


@dataclass(frozen=True)
class Result:
    """What a model gives for a prompt."""

    logprobs: list[dict[int, float]]  # of each position but the last: token → log-probability of coming next
    token_ids: list[int]  # the greedy continuation


@dataclass(frozen=True)
class Comparison:
    largest_difference: float
    num_equal: int  # continuations that are equal
    num_ties: int  # continuations that first differ where both tokens are equally likely, apart from rounding
    num_prompts: int

    def agrees(self, tolerance: float) -> bool:
        return self.largest_difference <= tolerance and self.num_equal + self.num_ties == self.num_prompts


def make_prompts(config: ModelConfig, num_tokens: int) -> list[list[int]]:
    """Returns prompts of random tokens that leave room for `num_tokens` more."""
    windows = [window for window in config.windows if window is not None and window <= MAX_WINDOW]
    longest = config.max_context_len - num_tokens
    rng = random.Random(0)
    lengths = [*LENGTHS, *(window + 40 for window in set(windows))]
    return [[rng.randrange(config.vocab_size) for _ in range(min(length, longest))] for length in lengths]


def run_here(folder: Path, prompts: list[list[int]], num_tokens: int, device: str, dtype: str) -> list[Result]:
    longest = max(map(len, prompts)) + num_tokens
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, prompt_logprobs=NUM_TOP)
    with LLM(str(folder), device=device, dtype=dtype, max_model_len=longest, skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        Result(
            [
                {token: entry.logprob for token, entry in position.items()}
                for position in (output.prompt_logprobs or [])[1:]
                if position is not None
            ],
            output.outputs[0].token_ids,
        )
        for output in outputs
    ]


class Reference:
    """The model in transformers."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """Returns the log-probabilities after each token: [num_tokens, vocab_size], float32."""
        logits: torch.Tensor = self.model(torch.tensor([token_ids], device=self.model.device)).logits[0]
        return logits.float().log_softmax(-1).cpu()


def compare(prompts: list[list[int]], results: list[Result], reference: Reference, tolerance: float) -> Comparison:
    """Compares results with what the reference says of the same tokens."""
    largest, num_equal, num_ties = 0.0, 0, 0
    for prompt, result in zip(prompts, results, strict=True):
        expected = reference.logprobs(prompt + result.token_ids)
        for position, entries in enumerate(result.logprobs):
            for token, logprob in entries.items():
                largest = max(largest, abs(logprob - float(expected[position, token])))
        # If every token is the reference's choice after the tokens before it, the continuations are equal.
        after = expected[len(prompt) - 1 : -1]  # [num_tokens, vocab_size]
        chosen = after.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        gaps = after.amax(-1) - chosen
        parted = (after.argmax(-1) != torch.tensor(result.token_ids)).nonzero()
        if not len(parted):
            num_equal += 1
        elif float(gaps[parted[0]]) <= tolerance:
            num_ties += 1
    return Comparison(largest, num_equal, num_ties, len(prompts))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a model folder or a Hugging Face id")
    parser.add_argument("--device", default="cpu", help="of both (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCES, help="of both (default float32)")
    parser.add_argument("--tokens", type=int, default=32, help="length of the continuations (default 32)")
    args = parser.parse_args(arguments)
    try:
        return check(args)
    except NanoVLLMError as error:
        print(f"check_model.py: {error}", file=sys.stderr)
        return 2


def check(args: argparse.Namespace) -> int:
    """Prints the comparison and the verdict. Returns the exit status."""
    folder = resolve_model_folder(args.path)
    config = ModelConfig.from_folder(folder)
    tolerance = TOLERANCES[args.dtype]
    prompts = make_prompts(config, args.tokens)
    print(f"{folder}: {config.architecture}, {config.num_layers} layers, {args.dtype} on {args.device}")
    results = run_here(folder, prompts, args.tokens, args.device, args.dtype)
    found = compare(prompts, results, Reference(folder, args.device, args.dtype), tolerance)
    num_positions = sum(len(result.logprobs) for result in results)
    print(
        f"Log-probabilities of the {NUM_TOP} most likely tokens at {num_positions} positions: "
        f"the largest difference is {found.largest_difference:.2e} ({tolerance:g} is allowed)."
    )
    print(
        f"Greedy continuations of {args.tokens} tokens: {found.num_equal} of {found.num_prompts} are equal, "
        f"{found.num_ties} differ from a tie on."
    )
    agrees = found.agrees(tolerance)
    print(f"Verdict: {'the same model' if agrees else 'NOT the same model'}.")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())

"""Prints what quantised weights cost in accuracy, against unquantised ones: `python tools/measure_quantization.py`.

    python tools/measure_quantization.py                                            the checkpoint that ships
    python tools/measure_quantization.py --model PATH --text FILE --dtype bfloat16  a model, on a text of yours
    python tools/measure_quantization.py --model PATH --text FILE --other PATH      a quantised checkpoint of it too

Every engine computes the logits of the same tokens. Printed are, for each kind of weights: their size; the error of the
logits, ‖difference‖ ÷ ‖logits‖, each vector less its mean; how often the most likely token is the same; and the
perplexity of the text. Without --text, errors are measured on random tokens, where nothing is certain, and perplexity
on the answers to the additions that the checkpoint that ships was not trained on, which are also generated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nanovllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
ADDITIONS = json.loads((ROOT / "tests" / "data" / "heldout_additions.json").read_text(encoding="utf-8"))
SCHEMES = ("fp8", "int8", "int4")


@dataclass(frozen=True)
class Scored:
    """Tokens, of which those from `first` on count for the perplexity."""

    token_ids: list[int]
    first: int


@dataclass(frozen=True)
class Measured:
    """What one engine computed."""

    weight_bytes: int
    logits: torch.Tensor  # [tokens, vocab_size] float32, of the texts on which errors are measured
    perplexity: float
    answers: list[str]  # to the additions; none with a text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="an unquantised model: a folder or an id (default: tiny)")
    parser.add_argument(
        "--other", default=[], nargs="+", metavar="PATH", help="quantised checkpoints of the same model"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text to measure on")
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="of the text (default 2048)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")

    engines = [
        ("unquantised", args.model, {}),
        *((scheme, args.model, {"quantization": scheme}) for scheme in SCHEMES),
        *((Path(path).name, path, {}) for path in args.other),
        ("unquantised, in bfloat16", args.model, {"dtype": "bfloat16"}),
    ]
    exact: Measured | None = None
    for name, model, options in engines:
        measured = measure(args, model, options)
        if exact is None:
            exact = measured
            print(f"{args.model} on {args.device} in {args.dtype}, {len(exact.logits)} tokens", end="\n\n")
            print_row(
                ["weights", "MB", "logit error: median", "largest", "same greedy token", "perplexity"]
                + (["additions"] if exact.answers else [])
            )
            print_row(["---"] * (7 if exact.answers else 6))
        print_row(row_of(name, measured, exact))


def measure(args: argparse.Namespace, model: str, options: Mapping[str, Any]) -> Measured:
    """Runs one engine over the texts."""
    options = {"device": args.device, "dtype": args.dtype, "enforce_eager": True, **options}
    with LLM(model, **options) as llm:
        if args.text is None:
            certain, measured_on = addition_texts(llm), random_texts(llm.llm_engine.resolved.vocab_size)
        else:
            token_ids = llm.get_tokenizer().encode(args.text.read_text(encoding="utf-8"))[: args.max_tokens]
            certain = measured_on = [Scored(token_ids, 1)]
        logits = [logits_of(llm, text) for text in measured_on]
        scored = logits if certain is measured_on else [logits_of(llm, text) for text in certain]
        return Measured(
            weight_bytes=llm.memory_report().weights,
            logits=torch.cat(logits),
            perplexity=perplexity(scored, certain),
            answers=[] if args.text else answers(llm),
        )


def logits_of(llm: LLM, text: Scored) -> torch.Tensor:
    """Returns the logits that predict each token of a text but the first, [tokens − 1, vocab_size] float32."""
    recorded: list[torch.Tensor] = []
    model = llm.llm_engine.executor._runner.model  # type: ignore[attr-defined]
    compute_logits = model.compute_logits

    def record(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = compute_logits(hidden)
        recorded.append(logits.float().cpu())
        return logits

    model.compute_logits = record
    try:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        llm.generate([text.token_ids], params, use_tqdm=False)
    finally:
        model.compute_logits = compute_logits
    return torch.cat(recorded)[: len(text.token_ids) - 1]


def random_texts(vocab_size: int) -> list[Scored]:
    rng = random.Random(0)
    return [Scored([rng.randrange(min(vocab_size, 300)) for _ in range(rng.randint(8, 64))], 1) for _ in range(64)]


def addition_texts(llm: LLM) -> list[Scored]:
    """Returns the additions with their right answers. The answers count."""
    tokenizer, end = llm.get_tokenizer(), llm.llm_engine.resolved.eos_token_ids[0]
    texts = []
    for item in ADDITIONS:
        chat = [{"role": "user", "content": item["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        texts.append(Scored([*prompt, *tokenizer.encode(item["answer"]), end], len(prompt)))
    return texts


def answers(llm: LLM) -> list[str]:
    chats = [[{"role": "user", "content": item["prompt"]}] for item in ADDITIONS]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=50), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def perplexity(logits: Sequence[torch.Tensor], texts: Sequence[Scored]) -> float:
    """Returns exp of the mean negative log-likelihood of the tokens that count."""
    losses = []
    for rows, text in zip(logits, texts, strict=True):
        targets = torch.tensor(text.token_ids[text.first :])
        losses.append(torch.nn.functional.cross_entropy(rows[text.first - 1 :].double(), targets, reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


def row_of(name: str, measured: Measured, exact: Measured) -> list[str]:
    one, other = (logits - logits.mean(-1, keepdim=True) for logits in (measured.logits, exact.logits))
    error = (one - other).norm(dim=-1) / other.norm(dim=-1)  # [tokens]
    same = (measured.logits.argmax(-1) == exact.logits.argmax(-1)).double().mean()
    right = [text == item["answer"] for text, item in zip(measured.answers, ADDITIONS, strict=False)]
    return [
        name,
        f"{measured.weight_bytes / 1e6:,.2f}",
        f"{error.median():.2%}",
        f"{error.max():.2%}",
        f"{same:.2%}",
        f"{measured.perplexity:.6f}",
        *([f"{sum(right) / len(right):.1%}"] if right else []),
    ]


def print_row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

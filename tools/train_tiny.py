"""Trains the checkpoint that ships with nanovllm: a Qwen3 of 2.5 million parameters, on a corpus made here.

    python tools/train_tiny.py                    train, write a temporary folder (or --out), print the score
    python tools/train_tiny.py --steps 20 --out /tmp/tiny --documents 2000      a quick run of everything
    python tools/train_tiny.py --score-only --dtype float32                     score the checkpoint that ships

The defaults made the checkpoint that ships (two minutes on one H200; docs/tiny-checkpoint.md has the figures). It needs
torch and transformers only; nothing of nanovllm's engine is used, so that each can check the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tiny_corpus import Corpus, heldout_additions, heldout_words, join_numbers, primes_upto
from tiny_tokenizer import VOCAB_SIZE, build_tokenizer, render, tokenizer_config
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

SHIPPED = Path(__file__).resolve().parent.parent / "nanovllm" / "assets" / "tiny-qwen3"
ROW_LENGTH = 512  # tokens in one packed training row; the longest answer, counting to 100, fits
MAX_POSITIONS = 4096
SHOWCASE = (
    "introduce yourself",
    "list all prime numbers within 100",
    "count from 3 to 17",
    'reverse the word "lantern"',
    "What is 27 + 58?",
    "Hello",
    "who are you?",
    "What is the capital of France?",
)


class Rows(NamedTuple):
    """Documents packed into rows; each tensor is [num_rows, ROW_LENGTH]."""

    tokens: torch.Tensor  # int16
    documents: torch.Tensor  # int16: which document of its row a token belongs to, 0 = padding
    positions: torch.Tensor  # int16: place of the token in its document
    learnt: torch.Tensor  # bool: part of an answer

    def to(self, device: torch.device) -> Rows:
        return Rows(*(tensor.to(device) for tensor in self))


def pack(tokenizer: Tokenizer, corpus: Corpus, num_documents: int) -> Rows:
    """Draws documents, encodes them and packs them into rows."""
    pad = tokenizer.get_vocab()["<|endoftext|>"]
    rows: list[list[list[int]]] = []
    row: tuple[list[int], ...] = ([], [], [], [])

    def close() -> None:
        missing = ROW_LENGTH - len(row[0])
        rows.append([column + [fill] * missing for column, fill in zip(row, (pad, 0, 0, 0), strict=True)])

    documents = iter(corpus.documents(num_documents))
    while chunk := list(itertools.islice(documents, 20_000)):
        pieces = [list(render(document, corpus.rng.random() < 0.3)) for document in chunk]
        encoded = iter(tokenizer.encode_batch([text for document in pieces for text, _ in document]))
        for document in pieces:
            tokens: list[int] = []
            learnt: list[int] = []
            for _, learn in document:
                ids = next(encoded).ids
                tokens += ids
                learnt += [int(learn)] * len(ids)
            if len(tokens) > ROW_LENGTH:
                continue
            if len(row[0]) + len(tokens) > ROW_LENGTH:
                close()
                row = ([], [], [], [])
            number = row[1][-1] + 1 if row[1] else 1
            for column, values in zip(row, (tokens, [number] * len(tokens), range(len(tokens)), learnt), strict=True):
                column.extend(values)
    close()
    tokens_, documents_, positions, learnt_ = (
        torch.tensor(column, dtype=torch.int16) for column in zip(*rows, strict=True)
    )
    return Rows(tokens_, documents_, positions, learnt_.bool())


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns config.json with Qwen3's keys."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": 4,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


def write_checkpoint(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder as Qwen3 publishes its own: weights in bf16, no output head, because it is tied."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {"bos_token_id": stop[1], "do_sample": False, "eos_token_id": stop, "pad_token_id": stop[1]}
    for name, values in (
        ("config.json", model_config(tokenizer)),
        ("generation_config.json", {**generation, "transformers_version": "4.51.0"}),
        ("tokenizer_config.json", tokenizer_config(tokenizer, MAX_POSITIONS)),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def shuffled(num_rows: int, batch_rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields row numbers batch by batch, without end; a rest too small for a batch is shuffled in again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for picked in torch.randperm(num_rows, generator=generator).split(batch_rows):
            if len(picked) == min(batch_rows, num_rows):
                yield picked


def loss_of(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Returns the mean cross-entropy of the answers' tokens; a token attends to its own document only."""
    tokens = rows.tokens.long()  # [batch, ROW_LENGTH]
    causal = torch.ones(ROW_LENGTH, ROW_LENGTH, dtype=torch.bool, device=tokens.device).tril()
    mask = (rows.documents[:, None, :, None] == rows.documents[:, None, None, :]) & causal  # [batch, 1, query, key]
    out = model(input_ids=tokens, attention_mask=mask, position_ids=rows.positions.long(), use_cache=False)
    # a document's first token follows no token of its document, so it is never learnt
    learnt = rows.learnt[:, 1:] & (rows.documents[:, 1:] == rows.documents[:, :-1])
    targets = tokens[:, 1:].masked_fill(~learnt, -100)
    return torch.nn.functional.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), targets.flatten())


def train(model: Qwen3ForCausalLM, rows: Rows, args: argparse.Namespace, save: Callable[[], None]) -> None:
    """Trains with AdamW, linear warm-up and decay, bf16 autocast over fp32 weights on a GPU."""
    device = rows.tokens.device
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not model.get_input_embeddings().weight]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup))
    )
    compute_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    order = shuffled(len(rows.tokens), args.batch_rows, args.seed)
    model.train()
    start = time.perf_counter()
    for step in range(args.steps):
        picked = next(order).to(device)  # [batch]
        batch = Rows(*(tensor[picked] for tensor in rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log_every == 0 or step == args.steps - 1:
            print(f"step {step:6d}  loss {loss.item():.4f}  {time.perf_counter() - start:7.1f} s", flush=True)
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save()
            model.train()


class Answers(NamedTuple):
    texts: list[str]
    stopped: list[bool]  # ended by itself, with EOS


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    system: str | None = None,
    max_new_tokens: int = 32,
    **template: Any,
) -> Answers:
    """Returns greedy answers of transformers' generate to chat prompts, in batches padded on the left."""
    head = [] if system is None else [{"role": "system", "content": system}]
    texts: list[str] = []
    stopped: list[bool] = []
    for first in range(0, len(prompts), 256):
        chats = [[*head, {"role": "user", "content": prompt}] for prompt in prompts[first : first + 256]]
        rendered = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **template)
            for chat in chats
        ]
        inputs = tokenizer(rendered, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = out[:, inputs.input_ids.shape[1] :].tolist()
        stopped += [tokenizer.eos_token_id in ids for ids in new]
        texts += [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
    return Answers(texts, stopped)


def exact(answers: Answers, expected: list[str]) -> float:
    """Returns the share of answers that are exactly right and end by themselves."""
    right = [a == e and s for a, s, e in zip(answers.texts, answers.stopped, expected, strict=True)]
    return sum(right) / len(right)


def score(folder: Path, device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> dict[str, float]:
    """Returns the shares of exact answers by kind of question. Prints them with a few answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    prompts, expected = (list(column) for column in zip(*heldout_additions(), strict=True))
    result = {"additions kept out": exact(answer(model, tokenizer, prompts), expected)}
    if not quick:
        result["... with enable_thinking=False"] = exact(
            answer(model, tokenizer, prompts, enable_thinking=False), expected
        )
        result["... with a system prompt"] = exact(
            answer(model, tokenizer, prompts, system="You are a helpful assistant."), expected
        )
        words = heldout_words()
        asked = [f"reverse the word {word}" for word in words] + [f'Reverse the word "{word}".' for word in words]
        result["words kept out, reversed"] = exact(answer(model, tokenizer, asked), [w[::-1] for w in words] * 2)
        limits = list(range(3, 101))
        asked = [f"list all prime numbers within {limit}" for limit in limits]
        lists = [join_numbers(primes_upto(limit)) for limit in limits]
        result["prime lists, 3 to 100"] = exact(answer(model, tokenizer, asked, max_new_tokens=128), lists)
        ranges = [(a, a + n) for a in range(71) for n in (1, 4, 9, 14, 29)]
        asked = [f"count from {a} to {b}" for a, b in ranges]
        lists = [join_numbers(list(range(a, b + 1))) for a, b in ranges]
        result["counting, 2 to 30 numbers"] = exact(answer(model, tokenizer, asked, max_new_tokens=160), lists)
        shown = answer(model, tokenizer, list(SHOWCASE), max_new_tokens=160)
        for prompt, text, stopped in zip(SHOWCASE, *shown, strict=True):
            print(f"  {prompt!r}\n    -> {text!r}{'' if stopped else '  (did not stop)'}")
    for name, share in result.items():
        print(f"  {name:32s} {share:8.2%}  ({device.type}, {str(dtype).removeprefix('torch.')})", flush=True)
    return result


def write_heldout(path: Path) -> None:
    """Writes the additions kept out of training, for tests of an engine."""
    pairs = [{"prompt": prompt, "answer": expected} for prompt, expected in heldout_additions()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(pair) for pair in pairs) + "\n]\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the checkpoint's folder (default: a new temporary one)")
    parser.add_argument("--heldout", type=Path, help="the additions kept out of training (default: a file in --out)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-rows", type=int, default=64, help=f"rows of {ROW_LENGTH} tokens in one step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=4000, help="write and score the checkpoint on the way")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--score-only", action="store_true", help="score --out, or what ships; train nothing")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), nargs="*", default=("bfloat16", "float32"))
    args = parser.parse_args()
    if args.out is None:
        args.out = SHIPPED if args.score_only else Path(tempfile.mkdtemp(prefix="tiny-qwen3-"))
    args.heldout = args.heldout or args.out / "heldout_additions.json"
    return args


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if not args.score_only:
        start = time.perf_counter()
        torch.manual_seed(args.seed)
        write_heldout(args.heldout)
        tokenizer = build_tokenizer(args.seed)
        rows = pack(tokenizer, Corpus(args.seed), args.documents).to(device)
        print(f"{args.documents} documents in {len(rows.tokens)} rows: {time.perf_counter() - start:.1f} s", flush=True)
        config = Qwen3Config(**{k: v for k, v in model_config(tokenizer).items() if k != "torch_dtype"})
        model = Qwen3ForCausalLM(config).to(device)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

        def save() -> None:
            write_checkpoint(model, tokenizer, args.out)
            score(args.out, device, torch.bfloat16, quick=True)

        train(model, rows, args, save)
        write_checkpoint(model, tokenizer, args.out)
        print(f"trained in {time.perf_counter() - start:.1f} s, written to {args.out}", flush=True)
    results = {name: score(args.out, device, getattr(torch, name)) for name in args.dtype}
    print(json.dumps(results))


if __name__ == "__main__":
    main()

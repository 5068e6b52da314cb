"""Step 2: tensor parallelism. Two ranks: what each holds, and what is sent.

Each rank has a part of every large matrix and all of the small ones (Megatron-LM, Shoeybi et al., 2019). Two processes
really run, and every message and collective below is read from their logs. On a CPU this is no faster, but it
is the same code that drives several GPUs.

    python examples/learn/step2_tensor_parallel.py
    python examples/learn/step2_tensor_parallel.py --max-tokens 20

Read along: nanovllm/layers/linear.py, nanovllm/layers/embed_head.py, nanovllm/distributed/multi_process_executor.py,
docs/tensor-parallel.md.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from _drawing import begin, heading, lesson_parser, say, table, title

SIZE = 2
QUESTION = "What is 27 + 58?"

# The log goes to a file only: a handler that takes the records keeps the console silent. Here and not in main, because
# the other rank's process imports this file too.
logging.getLogger("nanovllm").addHandler(logging.NullHandler())


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--max-tokens", type=int, default=12, help="of the answer (default %(default)s)")
    args = begin(parser)
    if args.max_tokens < 3:
        parser.error("--max-tokens must be 3 or more, so that there are decode steps")

    from nanovllm import LLM, SamplingParams

    title("Step 2: tensor parallelism")
    heading("1. What each rank holds")
    show_weights()

    heading("2. Two processes answer a question")
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    chat = [{"role": "user", "content": QUESTION}]
    settings: dict[str, Any] = {"device": "cpu", "max_model_len": 128, "num_kvcache_blocks": 32}
    with LLM("tiny", **settings) as llm:
        alone = llm.chat(chat, params, use_tqdm=False)[0]
        one = llm.memory_report()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run.jsonl"
        os.environ |= {"NANOVLLM_LOG_FILE": str(log), "NANOVLLM_LOG_FORMAT": "json", "NANOVLLM_LOG_LEVEL": "DEBUG"}
        with LLM("tiny", tensor_parallel_size=SIZE, **settings) as llm:
            together = llm.chat(chat, params, use_tqdm=False)[0]
            half = llm.memory_report()
            vocabulary = llm.llm_engine.resolved.vocab_size
        records = {rank: read(Path(f"{log}.rank{rank}") if rank else log) for rank in range(SIZE)}
    pids = [records[rank][0]["pid"] for rank in range(SIZE)]
    say(
        f"Process {pids[0]} is rank 0: scheduler, tokenizer, and its half of the model. Process {pids[1]} is rank 1: "
        "its half of the model alone. It runs what rank 0 sends."
    )
    print(f"\n  one rank : {alone.outputs[0].text!r}")
    print(f"  two ranks: {together.outputs[0].text!r}")
    print(f"  the same tokens: {alone.outputs[0].token_ids == together.outputs[0].token_ids}\n")
    parts = (half, *half.others)  # each rank's own report
    rows = []
    for name in ("weights", "kv_cache"):
        whole, *shares = (getattr(report, name) for report in (one, *parts))
        rows.append((name, f"{whole:,}", *(f"{share:,}" for share in shares), f"{shares[0] / whole:.1%}"))
    table(["bytes", "one rank", *(f"rank {report.rank} of two" for report in parts), "share"], rows)
    print()
    say("Norms and the table of rotary positions are whole on each rank; all else is halved, the KV cache by heads.")

    heading("3. What the two processes tell each other")
    sent = [record for record in records[0] if record["event"] == "communication" and "bytes" in record]
    say("Through rings in shared memory; what rank 0 sends is written once for all ranks. The messages in order:")
    print()
    steps = [record for record in records[0] if record["event"] == "step.done"]
    kinds = iter(step["kind"] for step in steps)
    messages: list[tuple[str, str, str]] = []
    for record in sent:
        operation = record["operation"]
        what = f"{next(kinds)} step" if operation == "send STEP" else MEANING.get(operation, "")
        messages.append((operation, what, f"{record['bytes']:,}"))
    table(["message", "", "bytes"], fold(messages), left=2)
    print()
    say(
        "A step is the changes of the batch as int32 words. The prefill step carries the prompt's tokens; a decode "
        "step names the row to run and carries no token: each rank sampled it itself and wrote it into its rows."
    )

    heading("4. What both ranks exchange within a step: collectives")
    for number, title_ in ((0, "the prefill step"), (1, "a decode step")):
        print(f"  {title_} (tokens: {steps[number]['num_prefill_tokens'] + steps[number]['num_decode_seqs']}):\n")
        show_collectives(collectives_of_step(records[0], number))
        print()
    counts = [collectives_of_step(records[0], number) for number in range(len(steps))]
    others = [collectives_of_step(records[1], number) for number in range(len(steps))]
    say(
        f"Every step has {len(counts[0])} collectives, on both ranks the same in the same order: "
        f"{counts == others}. Each must run on all ranks, or all wait for ever; that "
        "is why all ranks run the same batches."
    )
    print()
    say(
        "One all-reduce for two matrices: the first is cut by its outputs, which are this rank's own heads, or its own "
        "part of the MLP; the second is cut by its inputs, takes just these, and gives a partial sum of all outputs. "
        "(In Megatron's words column parallel and row parallel.) The last exchange is small: not "
        f"{vocabulary} logits a row, {vocabulary * 4:,} bytes, but each rank's best token with its score, 8 bytes. All "
        "take the better one."
    )


MEANING = {
    "send JOIN": "the port where the ranks meet",
    "receive ATTACHED from rank 1": "both ends are open",
    "receive READY from rank 1": "its half of the model is loaded",
    "send DIAGNOSE": "memory_report() asks all ranks",
    "receive ANSWER from rank 1": "its report",
    "send SHUTDOWN": "release the memory and end",
}


def show_weights() -> None:
    """Prints what each rank reads from the checkpoint, from the layers themselves, built without memory."""
    import torch

    from nanovllm.attention.selection import select_attention
    from nanovllm.layers.parallel import TensorParallel
    from nanovllm.layers.parameter import HasWeightParts
    from nanovllm.models.checkpoint import resolve_model_folder
    from nanovllm.models.model_config import ModelConfig
    from nanovllm.models.model_context import ModelContext
    from nanovllm.models.registry import get_model_class

    config = ModelConfig.from_folder(resolve_model_folder("tiny"))
    device = torch.device("cpu")
    attention = select_attention("auto", device, torch.float32, config.head_dim, None)
    parts: list[dict[str, Any]] = []
    for rank in range(SIZE):
        model_class = get_model_class(config.architecture)
        parallel = TensorParallel(rank, SIZE)
        model = model_class(
            ModelContext(config=config, backends=attention, parallel=parallel, dtype=torch.float32, device=device)
        )
        named: dict[str, Any] = {}
        for prefix, module in model.named_modules():
            if isinstance(module, HasWeightParts):
                for weight_parts in module.weight_parts(prefix).values():
                    named |= {part.name: part for part in weight_parts if part.name and part.num_rows}
        parts.append(named)
    rows = []
    for name, part in parts[0].items():
        if ".layers." in name and ".layers.0." not in name:
            continue
        if name.endswith(".bias"):
            continue
        ranges = []
        for rank in range(SIZE):
            mine = parts[rank][name]
            stop = part.shape[part.dim] if mine.stop is None else mine.stop
            ranges.append(f"{mine.start} … {stop - 1}")
        is_cut = parts[0][name].source != parts[1][name].source
        kind = "tokens" if "embed" in name else "inputs" if part.dim else "outputs"
        how = kind if is_cut else "whole"
        rows.append(
            (name.replace("model.", "", 1), str(list(part.shape)), how, *(ranges if is_cut else ["all", "all"]))
        )
    table(["tensor of the checkpoint", "shape", "cut by", "rank 0", "rank 1"], rows, left=5)
    print()
    say(
        f"A weight is [outputs, inputs]. q_proj has {config.num_heads} heads of {config.head_dim} outputs: rank 0 "
        f"computes heads 0 … {config.num_heads // SIZE - 1}, rank 1 the others, each with the key/value heads that "
        "they attend to, whose pages only that rank has. o_proj and down_proj are cut along their inputs: they take "
        "what this rank has. Layers 1 … 3 are the same; lm_head is embed_tokens."
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def collectives_of_step(records: list[dict[str, Any]], number: int) -> list[tuple[str, tuple[int, ...]]]:
    """Returns operation and shape of each collective between the beginning and the end of the rank's step, from 0."""
    begins = [i for i, r in enumerate(records) if r["event"] == "section.start" and "Model forward" in r["section"]]
    ends = [i for i, r in enumerate(records) if r["event"] == "section.end" and "Model forward" in r["section"]]
    step = records[begins[number] : ends[number]]
    return [(r["operation"], tuple(r["shapes"][0])) for r in step if r["event"] == "communication" and "shapes" in r]


def show_collectives(collectives: list[tuple[str, tuple[int, ...]]]) -> None:
    where = ["embed_tokens"] + [
        f"layer {i // 2}: {('o_proj', 'down_proj')[i % 2]}" for i in range(len(collectives) - 2)
    ]
    rows = []
    for place, (operation, shape) in zip([*where, "sampling"], collectives, strict=True):
        size = 4
        for length in shape:
            size *= length
        rows.append((place, operation, str(list(shape)), f"{size:,}"))
    table(["after", "collective", "each rank gives", "bytes"], rows, left=3, indent=4)


def fold(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Joins equal messages into one line."""
    return [(message, f"{n} × {what}" if n > 1 else what, size) for (message, what, size), n in Counter(rows).items()]


if __name__ == "__main__":
    main()

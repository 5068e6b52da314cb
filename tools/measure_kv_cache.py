"""Prints each term of the KV cache's size, by formula and as measured in an engine: `python tools/measure_kv_cache.py`.

    python tools/measure_kv_cache.py                                          the checkpoint that ships
    python tools/measure_kv_cache.py --model qwen3-0.6b --load-format dummy   a shape, random weights

docs/kv-cache.md explains the terms. On a GPU they are those of the line "KV cache sizing".
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM, SamplingParams
from nanovllm.benchmarks.traffic import kv_bytes_per_token
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.checkpoint import resolve_model_folder
from nanovllm.models.model_config import ModelConfig
from nanovllm.utils.device_memory import GB, describe_memory, free_cpu_memory

MB = 10**6
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1}


class Sizing(logging.Handler):
    """Keeps the fields of the record in which an engine on a GPU reports what it measured."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", "") == "kv_cache.sizing":
            self.fields = getattr(record, "fields", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a Hugging Face id, 'tiny' (default), or a shape")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to write into the cache (default 256)")
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    sizing = Sizing()
    logger = logging.getLogger("nanovllm.engine.model_runner")
    logger.setLevel(logging.INFO)
    logger.addHandler(sizing)

    options = {name: getattr(args, name) for name in ("load_format", "device", "dtype", "kv_cache_dtype")}
    free = free_cpu_memory()
    with LLM(args.model, skip_tokenizer_init=True, **options) as llm:
        model = BUILTIN_SHAPES.get(args.model) or ModelConfig.from_folder(resolve_model_folder(args.model))
        describe_block(llm, model)
        if llm.llm_engine.resolved.device == "cpu":
            describe_cpu(llm, model, free)
        else:
            for name, value in sizing.fields.items():
                print(f"{name:<44}{value:>16.3f}")
        describe_writing(llm, args.tokens)


def describe_block(llm: LLM, model: ModelConfig) -> None:
    engine = llm.llm_engine.resolved
    by_formula = engine.block_size * kv_bytes_per_token(
        model, ITEM_SIZES[engine.dtype], fp8_cache=engine.kv_cache_dtype == "fp8_e4m3"
    )
    report = llm.memory_report()
    print(f"{headline(llm)}; {model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim}")
    print(f"{'a block, by formula':<44}{by_formula:>16,} bytes")
    print(f"{'a block, allocated ÷ (num_blocks + 1)':<44}{report.kv_cache // (engine.num_blocks + 1):>16,} bytes")
    print(f"{'a block in one layer':<44}{by_formula // model.num_layers:>16,} bytes")
    print(f"{'weights':<44}{report.weights / MB:>16,.2f} MB")
    print(f"{'num_blocks':<44}{engine.num_blocks:>16,} ({engine.num_blocks * engine.block_size:,} tokens)")
    print(f"{'cache, null block included':<44}{report.kv_cache / MB:>16,.2f} MB")


def headline(llm: LLM) -> str:
    engine = llm.llm_engine.resolved
    return f"{Path(engine.model).name} on {engine.device} in {engine.dtype}, blocks of {engine.block_size}"


def describe_cpu(llm: LLM, model: ModelConfig, free: int) -> None:
    engine = llm.llm_engine.resolved
    rows = engine.max_num_seqs * -(-model.max_context_len // engine.block_size)
    print(f"{'free before the start':<44}{free / GB:>16,.2f} GB, a quarter of it {free / 4 / GB:.2f} GB")
    print(f"{'blocks that all rows can use':<44}{rows:>16,} ({engine.max_num_seqs} × {model.max_context_len} tokens)")


def describe_writing(llm: LLM, num_tokens: int) -> None:
    """Writes tokens. Prints, on a CPU, how much the process's resident memory grows."""
    engine = llm.llm_engine.resolved
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    prompt = [index % 256 for index in range(num_tokens)]
    llm.generate([prompt], params, use_tqdm=False)  # what a first step allocates is no cache
    before = describe_memory(engine.device)[1].get("resident_bytes", 0)
    llm.generate([prompt[::-1]], params, use_tqdm=False)
    grown = describe_memory(engine.device)[1].get("resident_bytes", 0) - before
    blocks = -(-num_tokens // engine.block_size)
    print(f"{f'{num_tokens} tokens written':<44}{blocks:>16,} blocks")
    if engine.device == "cpu":
        print(f"{'resident memory grew by':<44}{grown / MB:>16,.2f} MB")


if __name__ == "__main__":
    main()

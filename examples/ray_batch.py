"""Completes the prompts in a file on a Ray cluster: JSON lines in, JSON lines out.

    python examples/ray_batch.py --model tiny --input in.jsonl --output DIR --concurrency 2

Each line of the input is an object with "prompt" (a text or token ids) or "messages", and "sampling_params" if it has
its own. DIR/output.jsonl gets all its fields, its "line_number" (from 1), and what `generate` adds: "generated_text",
"finish_reason", "error" and so on. Rows are written as they finish, in any order.

Interrupt it, and the same command goes on where it was: lines whose number is in DIR/output.jsonl are not done again.
The options of `LLM` are taken too. Without a cluster (RAY_ADDRESS), Ray runs on this machine until the job ends.
The exit status is 1 if a row has an error, and 2 for a mistake in the options or in the names of the input's fields.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm

from nanovllm import AsyncEngineArgs, NanoVLLMError, SamplingParams
from nanovllm.integrations.ray import generate
from nanovllm.integrations.ray.data import OUTPUT_COLUMNS, check_columns
from nanovllm.utils.argparse_utils import FlexibleArgumentParser

OUTPUT = "output.jsonl"
LINE_NUMBER = "line_number"


def main() -> int:
    parser = FlexibleArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="the JSON lines to complete")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"where {OUTPUT} is written")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="actors, each with an engine")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="rows that an actor gets together")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of rows without sampling_params")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of rows without sampling_params")
    args = AsyncEngineArgs.add_cli_args(parser).parse_args()
    try:
        engine_arguments = dataclasses.asdict(AsyncEngineArgs.from_cli_args(args))
        params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)
        args.output.mkdir(parents=True, exist_ok=True)
        done = numbers_done(args.output / OUTPUT)
        lines = list(read_lines(args.input, done))
    except (NanoVLLMError, OSError) as error:
        parser.error(str(error))

    ray.init(include_dashboard=False)
    # Ray shuts down when Python exits. If it did so earlier, a thread that still reads ahead would end the process with
    # status 1.
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one for all rows
    num_errors = 0
    try:
        rows = generate(
            ray.data.from_items(lines),
            **engine_arguments,
            sampling_params=params,
            preprocess=lambda row: json.loads(row["line"]),
            concurrency=args.concurrency,
            batch_size=args.batch_size,
        )
        with (
            open(args.output / OUTPUT, "a", encoding="utf-8", errors="backslashreplace") as file,
            tqdm(total=len(done) + len(lines), initial=len(done), unit="row") as progress,
        ):
            for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in table.to_pylist():
                    num_errors += row["error"] is not None
                    file.write(json.dumps(output_of(row), ensure_ascii=False) + "\n")
                file.flush()
                progress.update(table.num_rows)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    print(f"{len(lines)} rows, with errors in {num_errors}: {args.output / OUTPUT}", file=sys.stderr)
    return min(num_errors, 1)


def numbers_done(path: Path) -> set[int]:
    """Returns the numbers of the lines that have an output. Cuts off a last one that was not written whole."""
    if not path.exists():
        return set()
    with open(path, "rb+") as file:
        size, done = 0, set()
        for line in file:
            if not line.endswith(b"\n"):
                break
            size += len(line)
            done.add(json.loads(line)[LINE_NUMBER])
        file.truncate(size)
    return done


def read_lines(path: Path, done: set[int]) -> Iterator[dict[str, Any]]:
    """Yields the lines that are not done, with their numbers. Lines that are not JSON get an error in their actor."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number not in done and line.strip():
                check_columns(fields_of(line), reserved=(LINE_NUMBER, *OUTPUT_COLUMNS.names))
                yield {LINE_NUMBER: number, "line": line}


def fields_of(line: bytes) -> dict[str, Any]:
    """Returns the fields of a line: none if it is not a JSON object."""
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def output_of(row: dict[str, Any]) -> dict[str, Any]:
    return {**fields_of(row.pop("line")), **row}


if __name__ == "__main__":
    sys.exit(main())

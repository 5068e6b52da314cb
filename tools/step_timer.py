"""StepTimer: times decode steps in which products have other tiles than the engine's. Needs a GPU.

The tile of a product that is fastest in a step is often not the one that is fastest alone, probably because it also
decides when programs of the next kernel find room on a multiprocessor and begin to read. At Qwen3-8B in FP8, another
tile for one product of four, not among the eight that were fastest alone, made a step 5 % shorter.

Steps are timed by the clock of the host, so they must take the device longer than the host. The same tiles captured
twice differ by up to 17 microseconds.
"""

from __future__ import annotations

import bisect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Generic, NamedTuple, TypeVar
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM
from nanovllm.engine.batch import StepNeeds
from nanovllm.engine.in_process_executor import InProcessExecutor
from nanovllm.models.builtin_shapes import PUBLISHED
from tools.bench_quantized_linear import LayerProduct
from tools.time_decode_steps import decoding, time_group

PROMPT_TOKENS = 64
BRIEF_GROUPS, GROUPS, STEPS, UNCOUNTED_STEPS = 2, 8, 12, 3
TIMED_AGAIN = 10  # of a product's tiles, after all were timed briefly
COMBINED = 2  # of them, that are timed together with those of the other products

Shape = TypeVar("Shape", bound=LayerProduct)
Tile = TypeVar("Tile")


class Chooser(NamedTuple):
    """The function, or method, that chooses a kernel's tiles."""

    owner: object  # the module or class that has it
    name: str
    sizes: Callable[..., tuple[int, int]]  # takes its arguments, and returns the weight's (outputs, inputs)


@contextmanager
def choosing(chooser: Chooser, tiles: Mapping[Shape, Tile]) -> Iterator[set[Shape]]:
    """A context in which a kernel takes these tiles. Adds the products that did to its set."""
    of_sizes = {(shape.outputs, shape.inputs): shape for shape in tiles}
    taken: set[Shape] = set()
    choose_tile = getattr(chooser.owner, chooser.name)

    def choose(*args: Any, **kwargs: Any) -> Any:
        shape = of_sizes.get(chooser.sizes(*args, **kwargs))
        if shape is None:
            return choose_tile(*args, **kwargs)
        taken.add(shape)
        return tiles[shape]

    with mock.patch.object(chooser.owner, chooser.name, choose):
        yield taken


def dotted(tile: tuple[int, ...]) -> str:
    return "·".join(map(str, tile))


class StepTimer(Generic[Shape, Tile]):
    """Times decode steps of some rows with the engine's tiles and with others, in turns."""

    def __init__(self, llm: LLM, rows: int, chooser: Chooser, describe: Callable[[Tile], str]) -> None:
        self._engine = llm.llm_engine
        self._rows, self._chooser, self._describe = rows, chooser, describe
        executor = self._engine.executor
        assert isinstance(executor, InProcessExecutor)
        assert executor._runner is not None
        assert executor._runner._graphs is not None, "decode steps are captured on a GPU alone"
        self._graphs = executor._runner._graphs
        self._size = self._graphs.sizes[bisect.bisect_left(self._graphs.sizes, rows)]
        self._engine_step = self._capture()

    def time_all(self, tiles: Mapping[Shape, Sequence[Tile]]) -> None:
        """Prints a line for each product, and one for all combinations of each one's two fastest tiles.

        Of a product with more than ten tiles, all are timed briefly, and the fastest ten again. A line has the median
        microseconds of a step with the engine's tiles, and by how many one with other tiles is longer (+) or shorter.
        """
        fastest = []
        for shape, some in tiles.items():
            with choosing(self._chooser, {shape: some[0]}) as taken:
                self._capture()
            if taken:
                fastest.append(self._time_line([{shape: tile} for tile in some], str(shape))[:COMBINED])
            else:
                print(f"{shape!s:32} not computed by this kernel")
        if fastest:
            together = [{shape: tile for one in some for shape, tile in one.items()} for some in product(*fastest)]
            self._time_line(together, "together")

    def _time_line(self, tiles: Sequence[Mapping[Shape, Tile]], label: str) -> list[Mapping[Shape, Tile]]:
        """Prints a line. Returns `tiles`, from the fastest, without those that were only timed briefly."""
        if len(tiles) > TIMED_AGAIN:
            tiles = [some for _, _, some in self._sorted(tiles, BRIEF_GROUPS)][:TIMED_AGAIN]
        found = self._sorted(tiles, GROUPS)
        fastest = "   ".join(
            f"{longer:+.1f} {' '.join(map(self._describe, some.values()))}" for longer, _, some in found
        )
        print(f"{label:32} step {median(ours for _, ours, _ in found):8.1f}   {fastest}", flush=True)
        return [some for _, _, some in found]

    def _sorted(
        self, tiles: Sequence[Mapping[Shape, Tile]], groups: int
    ) -> list[tuple[float, float, Mapping[Shape, Tile]]]:
        """Returns (by how much a step with these tiles is longer, a step with the engine's, these) from the fastest."""
        return sorted(((*self._time(some, groups), some) for some in tiles), key=itemgetter(0))

    def _time(self, tiles: Mapping[Shape, Tile], groups: int) -> tuple[float, float]:
        """Returns by how many microseconds a step with `tiles` is longer than one with the engine's, and that one's.

        Both are medians of as many groups of steps, which take turns. The order of a turn is that of the one before,
        reversed: steps become longer with the context, with 256 rows of 0.6B by 4 % from one group to the next.
        """
        with choosing(self._chooser, tiles):
            other_step = self._capture()
        times: tuple[list[float], list[float]] = ([], [])
        with decoding(self._engine, self._rows, PROMPT_TOKENS):
            pairs = list(zip((self._engine_step, other_step), times, strict=True))
            for turn in range(groups):
                for step, of_step in pairs if turn % 2 == 0 else reversed(pairs):
                    self._graphs._captured[self._size, StepNeeds()] = step
                    of_step.append(time_group(self._engine, UNCOUNTED_STEPS, STEPS) * 1e3)
        ours, theirs = map(median, times)
        return theirs - ours, ours

    def _capture(self) -> Any:
        """Returns the decode step, captured with the tiles that are now chosen."""
        torch.cuda.synchronize()
        with torch.inference_mode():
            return self._graphs.capture(self._size, StepNeeds())


def make_engine(model: str, kind: str, rows: int = 1) -> LLM:
    """Returns an engine with random weights of a built-in shape, for up to so many rows.

    kind: bfloat16; what `quantization` takes; or fp8-blocks: FP8 with a scale for each block of 128 × 128, as in
    checkpoints.
    """
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": max(rows, 512),
    }
    if kind != "fp8-blocks":
        return LLM(model, quantization=None if kind == "bfloat16" else kind, **options)
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**PUBLISHED[model], "quantization_config": blocks}))
        return LLM(folder, **options)

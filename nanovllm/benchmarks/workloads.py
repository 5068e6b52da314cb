"""The workloads of the benchmark: how many requests, how long, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

_LARGEST_TOKEN_ID = 10_000  # what nano-vllm's benchmark draws from


@dataclass(frozen=True)
class Requests:
    """Prompts and the number of output tokens of each."""

    prompts: list[list[int]]
    output_lens: list[int]
    shared_len: int  # length of the prefix common to all prompts

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)


@dataclass(frozen=True)
class Workload:
    """A distribution of requests. Lengths are uniform over (min, max), both included."""

    about: str
    num_seqs: int
    prompt_len: tuple[int, int]  # without the shared prefix
    output_len: tuple[int, int]
    shared_len: int = 0

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request that can be drawn."""
        return self.shared_len + self.prompt_len[1] + self.output_len[1]

    def draw(self, num_seqs: int, vocab_size: int, seed: int) -> Requests:
        """Returns the requests of a seed. Seed 0 of "classic" gives those of nano-vllm's bench.py, token for token."""
        rng = random.Random(seed)
        largest = min(_LARGEST_TOKEN_ID, vocab_size - 1)

        def tokens(count: int) -> list[int]:
            return [rng.randint(0, largest) for _ in range(count)]

        prefix = tokens(self.shared_len)
        prompts = [prefix + tokens(rng.randint(*self.prompt_len)) for _ in range(num_seqs)]
        output_lens = [rng.randint(*self.output_len) for _ in range(num_seqs)]
        return Requests(prompts, output_lens, self.shared_len)


WORKLOADS: Mapping[str, Workload] = {
    "classic": Workload("nano-vllm's benchmark", 256, (100, 1024), (100, 1024)),
    "single": Workload("the latency of one sequence", 1, (128, 128), (512, 512)),
    "prefill": Workload("prompts only", 64, (2048, 2048), (1, 1)),
    "shared": Workload("all prompts begin with the same 2048 tokens", 256, (64, 64), (64, 64), shared_len=2048),
    "long": Workload("long contexts", 32, (8000, 8000), (256, 256)),
    "wide": Workload("many short requests, 512 at a time", 2048, (64, 64), (128, 128)),
    "mixed": Workload("mixed lengths, small enough for a CPU", 64, (16, 256), (16, 256)),
}

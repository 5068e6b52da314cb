"""The workloads of the benchmark: how many requests, how long, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

_LARGEST_TOKEN_ID = 10_000  # what nano-vllm's benchmark draws from
_MEAN_COPIED = 50  # tokens of "edit" between two that are changed


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


class EditWorkload(Workload):
    """Copies of a long text from the prompt, in which one of 50 tokens is another one.

    A model whose next token is a function of the current one (tools/make_chain_checkpoint.py) writes the text; the
    prompt has it with the other tokens, and then its first token.
    """

    def draw(self, num_seqs: int, vocab_size: int, seed: int) -> Requests:
        rng, following = random.Random(seed), next_tokens(vocab_size)
        prompts = []
        for _ in range(num_seqs):
            text = [rng.randrange(vocab_size)]
            while len(text) < self.prompt_len[1] - 1:
                text.append(following[text[-1]])
            given = [token if rng.randrange(_MEAN_COPIED) else rng.randrange(vocab_size) for token in text]
            prompts.append([*given, text[0]])
        return Requests(prompts, [self.output_len[1]] * num_seqs, shared_len=0)


def next_tokens(vocab_size: int) -> list[int]:
    """Returns, for each token, the one that follows it in the texts of `EditWorkload`: one cycle of all tokens."""
    order = list(range(vocab_size))
    random.Random(0).shuffle(order)
    following = [0] * vocab_size
    for token, after in zip(order, order[1:] + order[:1], strict=True):
        following[token] = after
    return following


WORKLOADS: Mapping[str, Workload] = {
    "classic": Workload("nano-vllm's benchmark", 256, (100, 1024), (100, 1024)),
    "single": Workload("the latency of one sequence", 1, (128, 128), (512, 512)),
    "prefill": Workload("prompts only", 64, (2048, 2048), (1, 1)),
    "shared": Workload("all prompts begin with the same 2048 tokens", 256, (64, 64), (64, 64), shared_len=2048),
    "long": Workload("long contexts", 32, (8000, 8000), (256, 256)),
    "wide": Workload("many short requests, 512 at a time", 2048, (64, 64), (128, 128)),
    "edit": EditWorkload("one sequence copies a long text with changes", 1, (2048, 2048), (1024, 1024)),
    "mixed": Workload("mixed lengths, small enough for a CPU", 64, (16, 256), (16, 256)),
}

"""Requests that arrive over time, drawn from a seed: when each is sent, its prompt, and the length of its output."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

_WARM_UP_TOKENS = 40


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of token counts, clipped to 1 … `most`. `mean` is that before clipping."""

    mean: float
    sigma: float  # of the logarithm; 0: all lengths are the mean
    most: int

    def __str__(self) -> str:
        return f"{self.mean:g} (sigma {self.sigma:g}, at most {self.most})"

    def draw(self, rng: random.Random) -> int:
        """Returns one length."""
        length = round(rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma))
        return min(max(length, 1), self.most)


@dataclass(frozen=True)
class OnlineRequest:
    """One request of a run."""

    index: int
    at: float  # seconds after the start of the run
    prompt: list[int]
    output_len: int  # tokens


@dataclass(frozen=True)
class OnlineTraffic:
    """A distribution of requests over time.

    Arrivals are a Poisson process, or with a `burstiness` other than 1 a gamma process: below 1 in bursts, above 1
    more regular. Either `num_requests` or `duration` (seconds) says how many there are.
    """

    input_len: Lengths
    output_len: Lengths
    vocab_size: int  # token ids are drawn below it
    burstiness: float = 1.0
    num_requests: int | None = None
    duration: float | None = None

    def draw(self, rate: float, seed: int) -> list[OnlineRequest]:
        """Returns the requests of one run. They are a function of the arguments and the fields alone.

        Runs of different rates or seeds have different prompts, so that none finds another's in a prefix cache.
        """
        return list(self._requests(rate, random.Random(f"{seed} {rate:g}")))

    def _requests(self, rate: float, rng: random.Random) -> Iterator[OnlineRequest]:
        index, at = 0, 0.0
        while index != self.num_requests:
            at += rng.gammavariate(self.burstiness, 1 / (rate * self.burstiness))
            if self.duration is not None and at > self.duration:
                return
            prompt = rng.choices(range(self.vocab_size), k=self.input_len.draw(rng))
            yield OnlineRequest(index, at, prompt, self.output_len.draw(rng))
            index += 1

    def warm_up(self, num_requests: int, seed: int) -> list[OnlineRequest]:
        """Returns requests that all arrive at once, with short outputs. No run has their prompts."""
        rng = random.Random(f"{seed} warm-up")
        prompts = [rng.choices(range(self.vocab_size), k=self.input_len.draw(rng)) for _ in range(num_requests)]
        output_len = min(_WARM_UP_TOKENS, self.output_len.most)
        return [OnlineRequest(index, 0.0, prompt, output_len) for index, prompt in enumerate(prompts)]

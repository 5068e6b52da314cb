"""The traffic of tools/simulate_cluster.py: requests that begin with shared prefixes, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VOCAB_SIZE = 1 << 16


@dataclass(frozen=True)
class Traffic:
    """Requests at `rate` a second for each replica. Each begins with one of many prefixes.

    Popularity follows Zipf's law. Lengths are log-normal; the prefixes are system prompts, documents or conversations.
    """

    num_replicas: int
    rate: float
    seconds: float
    prefixes_per_replica: int = 20
    mean_prefix: int = 1500
    mean_suffix: int = 200
    mean_output: int = 150
    zipf: float = 1.0
    seed: int = 0

    def draw(self) -> Requests:
        rng = np.random.default_rng(self.seed)
        num_prefixes = self.prefixes_per_replica * self.num_replicas
        num_requests = int(self.rate * self.num_replicas * self.seconds)
        weights = 1.0 / np.arange(1, num_prefixes + 1) ** self.zipf
        return Requests(
            arrivals=np.cumsum(rng.exponential(1 / (self.rate * self.num_replicas), num_requests)),
            prefixes=rng.choice(num_prefixes, num_requests, p=weights / weights.sum()),
            suffix_lens=_lengths(rng, self.mean_suffix, num_requests),
            output_lens=_lengths(rng, self.mean_output, num_requests),
            prefix_lens=_lengths(rng, self.mean_prefix, num_prefixes),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Requests:
    """Requests in the order of arrival."""

    arrivals: npt.NDArray[np.float64]  # seconds
    prefixes: npt.NDArray[np.int64]
    suffix_lens: npt.NDArray[np.int64]
    output_lens: npt.NDArray[np.int64]
    prefix_lens: npt.NDArray[np.int64]  # by prefix
    seed: int

    def __len__(self) -> int:
        return len(self.arrivals)

    def tokens(self, index: int) -> npt.NDArray[np.int32]:
        """Returns the prompt of a request."""
        prefix = int(self.prefixes[index])
        shared = np.random.default_rng((self.seed, 0, prefix)).integers(1, VOCAB_SIZE, self.prefix_lens[prefix])
        own = np.random.default_rng((self.seed, 1, index)).integers(1, VOCAB_SIZE, self.suffix_lens[index])
        return np.concatenate([shared, own]).astype(np.int32)


def _lengths(rng: np.random.Generator, mean: int, count: int) -> npt.NDArray[np.int64]:
    sigma = 0.6
    return np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), 1, 8 * mean).astype(np.int64)

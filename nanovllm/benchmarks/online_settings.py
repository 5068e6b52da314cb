"""The settings of the workload "online" from the command line, and the plan that follows from them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm.benchmarks.arrivals import Lengths, OnlineTraffic
from nanovllm.benchmarks.online import Bounds
from nanovllm.benchmarks.settings import BenchmarkSettings

ONLINE = "online"
OURS, VLLM = "nanovllm", "vLLM"  # engines, as the report names them
DEFAULT_INPUT_LEN = Lengths(mean=220, sigma=1.1, most=2048)  # as in chats
DEFAULT_OUTPUT_LEN = Lengths(mean=190, sigma=0.9, most=1024)
DEFAULT_VOCAB_SIZE = 10_000  # token ids are drawn below it, or below the model's if that is smaller


@dataclass(frozen=True)
class Server:
    """An OpenAI server."""

    url: str
    api_key: str | None
    served_model_name: str | None  # None: the first that it lists


@dataclass(frozen=True)
class OnlineSettings:
    """The settings of an online benchmark. None leaves the choice to `make_online_plan`."""

    engine: BenchmarkSettings  # model, device and arguments of the engine
    rates: tuple[float, ...] | None
    duration: float | None
    num_requests: int | None
    num_seeds: int | None
    input_len: Lengths
    output_len: Lengths
    burstiness: float
    vocab_size: int | None
    warm_up: int | None
    bounds: Bounds
    server: Server | None  # None: the engine in this process
    compare_with_vllm: bool
    save: Path | None


@dataclass(frozen=True)
class OnlinePlan:
    """The work of an online benchmark, with every choice made. Each engine gets the same."""

    rates: tuple[float, ...]  # requests/s
    seeds: tuple[int, ...]
    traffic: OnlineTraffic
    warm_up: int  # requests that arrive at once, twice
    temperature: float
    bounds: Bounds

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OnlinePlan:
        """Returns the plan that `to_dict` gave."""
        traffic = dict(values["traffic"])
        traffic |= {name: Lengths(**traffic[name]) for name in ("input_len", "output_len")}
        return cls(
            rates=tuple(values["rates"]),
            seeds=tuple(values["seeds"]),
            traffic=OnlineTraffic(**traffic),
            warm_up=values["warm_up"],
            temperature=values["temperature"],
            bounds=Bounds(**values["bounds"]),
        )


def make_online_plan(settings: OnlineSettings, *, on_gpu: bool, vocab_size: int) -> OnlinePlan:
    """Chooses what `settings` leave open, by the device. vocab_size: the model's."""
    duration = settings.duration
    if duration is None and settings.num_requests is None:
        duration = 20.0 if on_gpu else 3.0
    seed, num_seeds = settings.engine.seed, settings.num_seeds or (3 if on_gpu else 2)
    return OnlinePlan(
        rates=settings.rates or ((10, 60, 120) if on_gpu else (2, 8)),
        seeds=tuple(range(seed, seed + num_seeds)),
        traffic=OnlineTraffic(
            input_len=settings.input_len,
            output_len=settings.output_len,
            vocab_size=settings.vocab_size or min(DEFAULT_VOCAB_SIZE, vocab_size),
            burstiness=settings.burstiness,
            num_requests=settings.num_requests,
            duration=duration,
        ),
        warm_up=settings.warm_up or (256 if on_gpu else 8),
        temperature=settings.engine.temperature,
        bounds=settings.bounds,
    )

"""What crosses between the process of `nanovllm serve` (`supervisor`) and its API processes (`api_process`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from nanovllm.async_engine.encoding import LogRecord, crosses
from nanovllm.config import EngineConfig
from nanovllm.logs.recent_events import RecentEvent

# To an API process


@crosses
@dataclass(frozen=True)
class StartApi:
    """The first message. engine, listener, counts: descriptors that the process has inherited."""

    settings: dict[str, Any]  # the fields of ServerSettings
    config: EngineConfig
    levels: dict[str, int]  # of the package's loggers, by name
    process: int  # its index
    is_successor: bool  # of one that has ended
    engine: int
    listener: int
    counts: int


@crosses
@dataclass(frozen=True)
class DrainApi:
    """Take no further requests, and end when the running ones have ended."""


@crosses
@dataclass(frozen=True)
class EndApi:
    """End."""


@crosses
@dataclass(frozen=True)
class LatestEvents:
    """The answer to AskEvents."""

    events: list[RecentEvent]


# From an API process


@crosses
@dataclass(frozen=True)
class ApiReady:
    """Requests can run."""


@crosses
@dataclass(frozen=True)
class AskEvents:
    """Answer with the last events of the log that are about requests and steps."""


ToApi: TypeAlias = "StartApi | DrainApi | EndApi | LatestEvents"
FromApi: TypeAlias = "ApiReady | AskEvents | LogRecord"

crosses(RecentEvent)

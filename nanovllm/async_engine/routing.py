"""Which client of an engine's process an event is for: numbers of requests tell.

Each client numbers its requests from a first number of its own, so that one loop serves all clients.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from typing_extensions import assert_never

from nanovllm.async_engine.messages import (
    Answer,
    EngineEnded,
    Event,
    Logprobs,
    RequestRefused,
    RequestsLost,
    StepNews,
)

_BITS = 40  # of a number: the rest is its client's


def first_number(client: int) -> int:
    """Returns the number of a client's first request."""
    return client << _BITS


def client_of(number: int) -> int:
    """Returns the client whose request has this number."""
    return number >> _BITS


def parts(event: Event, clients: list[int]) -> Iterator[tuple[int, Event]]:
    """Yields the clients that an event concerns, out of `clients`, each with what is for it."""
    if isinstance(event, EngineEnded):
        yield from ((client, event) for client in clients)
    elif isinstance(event, RequestRefused):
        yield client_of(event.number), event
    elif isinstance(event, Answer):
        yield client_of(event.question), event
    elif isinstance(event, RequestsLost):
        for client in clients:  # even without a request: `goes_on` is for all
            numbers = [number for number in event.numbers if client_of(number) == client]
            yield client, RequestsLost(numbers, event.error, event.goes_on)
    elif isinstance(event, StepNews):
        yield from _news_parts(event)
    else:
        assert_never(event)


def _news_parts(news: StepNews) -> Iterator[tuple[int, StepNews]]:
    owners = news.numbers >> _BITS
    clients = sorted({*owners.tolist(), *(client_of(end.number) for end in news.ended)})
    if len(clients) == 1:
        yield clients[0], news
        return
    rows = [] if news.logprobs is None else news.logprobs.unpack()
    for client in clients:
        places = np.flatnonzero(owners == client)
        is_own = owners[news.scored] == client  # [num_scored]
        yield (
            client,
            StepNews(
                numbers=news.numbers[places],
                token_ids=news.token_ids[places],
                scored=np.searchsorted(places, news.scored[is_own]).astype(np.int32),
                logprobs=Logprobs.pack([row for row, own in zip(rows, is_own.tolist(), strict=True) if own]),
                cached=[each for each in news.cached if client_of(each[0]) == client],
                ended=[each for each in news.ended if client_of(each.number) == client],
            ),
        )

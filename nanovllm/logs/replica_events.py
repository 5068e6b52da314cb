"""The events of a server with several replicas. `events.py` has all events; code imports them from there."""

from __future__ import annotations

from logging import DEBUG, ERROR, INFO, WARNING

from nanovllm.logs.records import Event

_REPLICAS = "`nanovllm serve --data-parallel-size`"
_LIVE = "{num_live} of {num_replicas} replicas are live"
replica_lost = Event(
    "replica.lost",
    ERROR,
    "data_parallel.engines",
    f"Replica {{replica}} has ended and is started again; {_LIVE}",
    unseen=_REPLICAS,
)
replica_restarted = Event(
    "replica.restarted", INFO, "data_parallel.engines", f"Replica {{replica}} is back; {_LIVE}", unseen=_REPLICAS
)
replica_not_started = Event(
    "replica.not_started",
    ERROR,
    "data_parallel.replica",
    "Replica {replica} did not start: {error} The next attempt is in {seconds:g}s",
    unseen=_REPLICAS,
)
request_routed = Event(
    "request.routed",
    DEBUG,
    "data_parallel.engines",
    "Request {request_id} goes to replica {replica}, which has {queue} unfinished requests and "
    "{cached_blocks} of the prompt's {num_blocks} blocks of 64 tokens",
    unseen=_REPLICAS,
)
request_repeated = Event(
    "request.repeated",
    WARNING,
    "data_parallel.engines",
    "Replica {replica} ended before request {request_id} had an output: the request runs once more",
    unseen=_REPLICAS,
)

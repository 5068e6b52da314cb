"""DataParallelLLM: what the server needs of an `AsyncLLM`, over several engines of one model.

    engine = DataParallelLLM(EngineConfig("tiny"), 2)
    async for output in engine.generate("Hello", SamplingParams(temperature=0), "my-request"):
        print(output.outputs[0].text)

A request is tokenised once, and `Router` chooses its replica. If the replica dies before the request has an output, the
request runs once more, elsewhere; after that it raises ReplicaLostError. A request without a seed gets one here, so
that its tokens do not depend on the replica.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from nanovllm.async_engine.consumers import REQUEST_ID, AsyncRequest
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.data_parallel.placement import place_replicas
from nanovllm.data_parallel.replica import Replica
from nanovllm.data_parallel.router import Router, prefix_hashes
from nanovllm.errors import EngineDeadError, InvalidArgumentError, ReplicaLostError
from nanovllm.logs import events
from nanovllm.metrics import MetricsSnapshot
from nanovllm.outputs import RequestOutput
from nanovllm.requests.preparation import PreparedRequest
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import MAX_SEED, SamplingParams
from nanovllm.streaming import kind_of
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_MAX_ATTEMPTS = 2  # so that a request that ends its engine does not end all of them


class DataParallelLLM:
    """`num_replicas` engines of one model, each in a process of its own. One event loop uses it.

    Raises what starting an engine raises.
    """

    def __init__(self, config: EngineConfig, num_replicas: int) -> None:
        self._seed = config.seed
        self._names, self._seeds = itertools.count(), itertools.count()
        self._open: dict[str, asyncio.Future[_Prepared]] = {}  # unfinished requests
        self._preparing = ThreadPoolExecutor(1, "nanovllm-prepare")  # one thread, so that requests keep their order
        self._lock = threading.Lock()  # of the router
        self.replicas = [Replica(index, each) for index, each in enumerate(place_replicas(config, num_replicas))]
        with ThreadPoolExecutor(num_replicas, "nanovllm-start") as pool:
            starts = [pool.submit(each.start) for each in self.replicas]
        if errors := [error for start in starts if (error := start.exception()) is not None]:
            for replica, start in zip(self.replicas, starts, strict=True):
                if start.exception() is None:
                    replica.exit()
            raise errors[0]
        # A finalizer, so that the engines also end when Python ends.
        self._exit = weakref.finalize(self, _exit_all, self.replicas)
        resolved = self.replicas[0].engine.resolved
        self._router = Router(num_replicas, resolved.block_size * resolved.num_blocks)
        for replica in self.replicas:
            replica.watch(self)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool | None = None,
        client_request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt, as `AsyncLLM.generate` does.

        Raises ReplicaLostError when the replica has died, and EngineDeadError when there is no other.
        """
        name = f"async-{next(self._names)}" if request_id is None else request_id
        if not isinstance(name, str) or name in self._open:
            raise InvalidArgumentError("request_id", name, REQUEST_ID)
        kind, arrival = kind_of(delta, sampling_params), time.monotonic()
        loop = asyncio.get_running_loop()
        prepared = self._open[name] = loop.run_in_executor(self._preparing, self._prepare, prompt, sampling_params)

        async def prepare() -> PreparedRequest:
            return (await prepared).request

        try:
            await asyncio.wait([prepared])
            hashes = [] if prepared.exception() is not None else prepared.result().hashes
            for attempt in itertools.count(1):
                replica, has_output = self._choose(name, hashes), False
                request = AsyncRequest(name, kind, client_request_id)
                request.arrival = arrival
                try:
                    async with aclosing(replica.engine.outputs_of(request, prepare)) as outputs:
                        async for output in outputs:
                            has_output = True
                            yield output
                    return
                except EngineDeadError as error:
                    if self.is_dead:
                        raise
                    if has_output or attempt == _MAX_ATTEMPTS:
                        replica.count_lost_request()
                        raise ReplicaLostError.after(replica.index, error.__cause__ or error) from None
                    events.request_repeated.log(logger, request_id=name, replica=replica.index)
                finally:
                    with self._lock:
                        self._router.ended(replica.index)
        finally:
            del self._open[name]

    def _prepare(self, prompt: Prompt, params: SamplingParams | None) -> _Prepared:
        """Tokenises and checks a request, in a thread."""
        request = self._any.connection.preparation.prepare(prompt, params)
        if request.params.seed is None:
            word = next(self._seeds).to_bytes(8, "little")
            request.params.seed = xxhash.xxh3_64_intdigest(word, seed=self._seed) % (MAX_SEED - request.params.n)
        return _Prepared(request, prefix_hashes(request.token_ids, request.cache_salt))

    def _choose(self, request_id: str, hashes: list[int]) -> Replica:
        with self._lock:
            for replica in self.replicas:  # as `is_dead` sees them, whose threads have not told yet
                update = self._router.put_back if replica.is_alive else self._router.take_out
                update(replica.index)
            route = self._router.choose(hashes)
        if route is None:
            raise EngineDeadError("All replicas have ended.")
        events.request_routed.log(
            logger,
            request_id=request_id,
            replica=route.replica,
            queue=route.queue,
            cached_blocks=route.num_cached_blocks,
            num_blocks=len(hashes),
        )
        return self.replicas[route.replica]

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """Ends one or several requests, as `AsyncLLM.abort` does."""
        names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        if preparing := [self._open[name] for name in names if name in self._open]:
            await asyncio.wait(preparing)  # their consumers, which began to wait before, then send them to a replica
        await asyncio.gather(*(replica.engine.abort(names) for replica in self.replicas))

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when there is none."""
        return self._any.engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters of requests without any: those of the checkpoint's generation_config.json."""
        return self._any.engine.get_default_sampling_params()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix of every replica before its next step."""
        with self._lock:
            for replica in self.replicas:
                replica.engine.reset_prefix_cache()
                self._router.forget(replica.index)

    @property
    def resolved(self) -> ResolvedConfig:
        """The settings that each replica runs with, except for `max_num_seqs`, which is that of all live ones."""
        resolved = self._any.engine.resolved
        return replace(resolved, max_num_seqs=resolved.max_num_seqs * max(1, self.num_live))

    @property
    def is_dead(self) -> bool:
        """Whether no replica is alive. New requests then raise EngineDeadError."""
        return not self.num_live

    @property
    def num_live(self) -> int:
        """The number of replicas that take requests."""
        return sum(replica.is_alive for replica in self.replicas)

    @property
    def metrics(self) -> MetricsSnapshot:
        """The figures of all replicas together."""
        return sum(self.replica_metrics(), MetricsSnapshot())

    def replica_metrics(self) -> list[MetricsSnapshot]:
        """Returns the figures of each replica. Counts go on where a replica has been started again."""
        return [replica.metrics() for replica in self.replicas]

    @property
    def is_degraded(self) -> bool:
        """Whether a replica has ended and is not back yet."""
        return self.num_live < len(self.replicas)

    def states(self) -> list[dict[str, Any]]:
        """Returns for each replica whether it is alive, and the number of its unfinished requests."""
        with self._lock:
            return [
                {"engine": each.index, "alive": each.is_alive, "unfinished": self._router.queue(each.index)}
                for each in self.replicas
            ]

    def exit(self) -> None:
        """Ends all engines and frees their memory. Calling it again does nothing."""
        self._exit()

    def lost(self, replica: Replica) -> None:
        with self._lock:
            self._router.take_out(replica.index)
        events.replica_lost.log(logger, replica=replica.index, num_live=self.num_live, num_replicas=len(self.replicas))

    def restarted(self, replica: Replica) -> None:
        events.replica_restarted.log(
            logger, replica=replica.index, num_live=self.num_live, num_replicas=len(self.replicas)
        )

    @property
    def _any(self) -> Replica:
        """A replica that is alive, if there is one."""
        return next((replica for replica in self.replicas if replica.is_alive), self.replicas[0])


def _exit_all(replicas: list[Replica]) -> None:
    """Ends all at the same time, as each waits for its running step."""
    exits = [threading.Thread(target=replica.exit) for replica in replicas]
    for thread in exits:
        thread.start()
    for thread in exits:
        thread.join()


@dataclass(frozen=True)
class _Prepared:
    """A request that may run on any replica, and the hashes of its blocks."""

    request: PreparedRequest
    hashes: list[int]

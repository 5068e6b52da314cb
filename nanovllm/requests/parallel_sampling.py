"""Several completions of one prompt (`SamplingParams.n`): sequences of their own, which share the prompt's blocks.

Nothing below the engine knows of them. The first computes the prompt; the others find its full blocks in the prefix
cache, in the same step already, and compute the rest of the last one. Without prefix caching each computes all of it.
"""

from __future__ import annotations

from dataclasses import replace

from nanovllm.outputs import RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams


class Branches:
    """The completions of one request, until all have ended."""

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self.request_id = request_id
        self.ids = [f"{request_id}/{index}" for index in range(params.n)]
        self.params = [
            replace(
                params,
                n=1,
                seed=None if params.seed is None else params.seed + index,
                prompt_logprobs=None if index else params.prompt_logprobs,
            )
            for index in range(params.n)
        ]
        self._outputs: dict[str, RequestOutput] = {}

    def add(self, output: RequestOutput) -> RequestOutput | None:
        """Takes the output of one; returns that of the request when it was the last."""
        self._outputs[output.request_id] = output
        if len(self._outputs) < len(self.ids):
            return None
        outputs = [self._outputs[request_id] for request_id in self.ids]
        errors = [output.error for output in outputs if output.error is not None]
        return replace(
            outputs[0],
            request_id=self.request_id,
            outputs=[replace(each.outputs[0], index=index) for index, each in enumerate(outputs)],
            metrics=_joined([each.metrics for each in outputs if each.metrics is not None]),
            error=errors[0] if errors else None,
        )


class BranchTable:
    """The requests of several completions that have not ended."""

    def __init__(self) -> None:
        self._of: dict[str, Branches] = {}  # by the request's id, and by those of its sequences

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._of

    def add(self, branches: Branches) -> None:
        self._of |= dict.fromkeys([branches.request_id, *branches.ids], branches)

    def sequence_ids(self, request_id: str) -> list[str]:
        """Those of a request's sequences: several where it has several completions."""
        branches = self._of.get(request_id)
        return branches.ids if branches is not None and branches.request_id == request_id else [request_id]

    def ids_but_first(self) -> set[str]:
        """The sequences whose prompt another one has too."""
        return {name for branches in self._of.values() for name in branches.ids[1:]}

    def join(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """The outputs of one request's completions become one, when the last of them has ended."""
        joined: list[RequestOutput] = []
        for output in outputs:
            branches = self._of.get(output.request_id)
            whole = output if branches is None else branches.add(output)
            if whole is not None:
                joined.append(whole)
                self.forget(whole.request_id)
        return joined

    def forget(self, request_id: str) -> None:
        branches = self._of.get(request_id)
        if branches is not None and branches.request_id == request_id:
            for name in (request_id, *branches.ids):
                self._of.pop(name, None)

    def clear(self) -> None:
        self._of.clear()


def _joined(metrics: list[RequestMetrics]) -> RequestMetrics:
    """From the first to the last of what any did; tokens and preemptions of all."""

    def known(name: str) -> list[float]:
        return [value for each in metrics if (value := getattr(each, name)) is not None]

    return replace(
        metrics[0],
        first_scheduled=min(known("first_scheduled"), default=None),
        first_token=min(known("first_token"), default=None),
        last_token=max(known("last_token"), default=None),
        finished=max(known("finished")),
        num_output_tokens=sum(each.num_output_tokens for each in metrics),
        num_preemptions=sum(each.num_preemptions for each in metrics),
        completions=tuple(metrics),
    )

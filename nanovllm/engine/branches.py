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
        return replace(
            outputs[0],
            request_id=self.request_id,
            outputs=[replace(each.outputs[0], index=index) for index, each in enumerate(outputs)],
            metrics=_joined([each.metrics for each in outputs if each.metrics is not None]),
        )


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
    )

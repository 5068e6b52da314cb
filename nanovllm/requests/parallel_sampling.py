"""Parallel sampling (`SamplingParams.n`): several completions of one prompt, each a sequence that shares its blocks.

Scheduler and runner do not know of it. The first sequence computes the prompt. The others find its full blocks in the
prefix cache, even in the same step, and compute only the rest. Without prefix caching each computes the whole prompt.
"""

from __future__ import annotations

from dataclasses import replace

from nanovllm.outputs import RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams


class ParallelSampling:
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
        """Takes the output of one completion. Returns the request's output once all have ended, else None."""
        self._outputs[output.request_id] = output
        if len(self._outputs) < len(self.ids):
            return None
        outputs = [self._outputs[request_id] for request_id in self.ids]
        errors = [output.error for output in outputs if output.error is not None]
        return replace(
            outputs[0],
            request_id=self.request_id,
            outputs=[replace(each.outputs[0], index=index) for index, each in enumerate(outputs)],
            metrics=_joined_metrics([each.metrics for each in outputs if each.metrics is not None]),
            error=errors[0] if errors else None,
        )


def _joined_metrics(metrics: list[RequestMetrics]) -> RequestMetrics:
    """Returns the earliest start and the latest end of all, and the sums of their tokens and preemptions."""

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

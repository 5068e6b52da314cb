"""The arguments of a call with several requests: prompts and sampling parameters, as users may give them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Set
from collections.abc import Sequence as Seq
from typing import Any, TypeAlias

import numpy as np

from nanovllm.errors import InvalidArgumentError
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import SamplingParams

Prompts: TypeAlias = "Seq[Prompt | InvalidArgumentError]"  # an error stands for a prompt that could not be made
Params: TypeAlias = "SamplingParams | Seq[SamplingParams] | None"


def as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """Returns the prompts as a list. A single prompt (text, dictionary, token ids) becomes a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, Set)) or not isinstance(prompts, Iterable):  # bytes are not text, sets have no order
        raise InvalidArgumentError("prompts", prompts, "a text, token ids, a dictionary, or a list of these")
    batch: list[Any] = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)  # a tensor or an array
    return [batch] if batch and all(isinstance(item, (int, np.integer)) for item in batch) else batch


def params_for_each(sampling_params: Params, num_prompts: int) -> list[SamplingParams | None]:
    """Returns copies of the parameters of each of `num_prompts` prompts. None: the default ones."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [copy.copy(sampling_params)] * num_prompts
    if isinstance(sampling_params, (str, bytes, Mapping, Set)) or not isinstance(sampling_params, Iterable):
        raise InvalidArgumentError("sampling_params", sampling_params, "a SamplingParams or a list of them")
    params: list[SamplingParams | None] = list(sampling_params)
    if len(params) != num_prompts:
        raise InvalidArgumentError(
            "sampling_params", f"a list of {len(params)}", f"one for all, or one for each of the {num_prompts} prompts"
        )
    return [copy.copy(each) if isinstance(each, SamplingParams) else each for each in params]

"""Default sampling parameters: what generation_config.json of a checkpoint recommends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidArgumentError
from nanovllm.logs import events
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

# Fields of generation_config.json, and those of SamplingParams with the same meaning.
_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_default_params(folder: Path) -> SamplingParams:
    """Returns the parameters that the checkpoint in `folder` recommends, and our defaults for the others.

    A value that SamplingParams does not allow is left out, with a WARNING.
    """
    params, recommended = SamplingParams(), _read(folder / "generation_config.json")
    for theirs, ours in _FIELDS.items():
        value = recommended.get(theirs)
        if value is None:
            continue
        try:
            setattr(params, ours, getattr(SamplingParams(**{ours: value}), ours))
        except InvalidArgumentError as error:
            events.default_params_invalid.log(logger, folder=str(folder), error=str(error))
    return params


def _read(file: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, or {} if it has no dictionary."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):  # loading the model has said so
        return {}
    return content if isinstance(content, dict) else {}

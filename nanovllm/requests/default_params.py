"""Default sampling parameters: what generation_config.json of a checkpoint recommends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidArgumentError, ModelLoadError
from nanovllm.logs import events
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.logger import setup_logger
from nanovllm.utils.model_files import read_json

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
    """Returns the object in a JSON file, or {} if it has none."""
    try:
        return read_json(file)
    except ModelLoadError:  # loading the model has said so
        return {}

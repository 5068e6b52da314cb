"""Which modules of a checkpoint a list of names means, as in `ignore` and `modules_to_not_convert`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanovllm.errors import ModelLoadError, shown

_REGEX = "re:"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether one of `patterns` means the module `name`.

    A pattern is a full name, the name of a module around it, or some of its neighbouring parts, such as "lm_head",
    "model.layers.0" or "mlp.down_proj". "re:…" is a regular expression for the beginning of a full name.
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith(_REGEX):
        return f".{pattern}." in f".{name}."
    try:
        return re.match(pattern.removeprefix(_REGEX), name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelLoadError(
            f"config.json: quantization_config has the name {shown(pattern)}, which is no regular expression: {error}."
        ) from error

"""Which modules of a checkpoint a list of names means, as in `ignore` and `modules_to_not_convert`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanovllm.errors import ModelLoadError, shown

_REGEX = "re:"
_MAX_REPETITIONS = 6  # of a regular expression; with more, or nested, one can take for ever on a name of 40 letters
_REPETITION, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether one of `patterns` means the module `name`.

    A pattern is a full name, the name of a module around it, or some of its neighbouring parts, such as "lm_head",
    "model.layers.0" or "mlp.down_proj". "re:…" is a regular expression for the beginning of a full name.
    """
    parts = name.split(".")
    neighbours = {".".join(parts[start:stop]) for stop in range(len(parts) + 1) for start in range(stop)}
    return any(_matches(name, each) if each.startswith(_REGEX) else each in neighbours for each in patterns)


def _matches(name: str, pattern: str) -> bool:
    """Returns whether a regular expression matches the beginning of a name."""
    regex = pattern.removeprefix(_REGEX)
    if len(_REPETITION.findall(regex)) > _MAX_REPETITIONS or _REPEATED_GROUP.search(regex):
        raise ModelLoadError(
            f"config.json: quantization_config has the name {shown(pattern)}, which may take for ever to match: at "
            f"most {_MAX_REPETITIONS} repetitions are allowed, and none of a group."
        )
    try:
        return re.match(regex, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelLoadError(
            f"config.json: quantization_config has the name {shown(pattern)}, which is no regular expression: {error}."
        ) from error

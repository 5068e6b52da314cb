"""Reads JSON files of a model folder. A folder may come from anybody: each fault of a file is a ModelLoadError."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelLoadError

ADAPTER_CONFIG = "adapter_config.json"
_MAX_JSON_BYTES = 256 << 20  # the largest published index is a few MB


def check_file(path: Path) -> None:
    """Raises ModelLoadError unless `path` is a regular file, or a link to one: to read a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path.name} cannot be read: {error}.") from error
    if not stat.S_ISREG(mode):
        raise ModelLoadError(f"{path.name} cannot be read: it is no regular file.")


def check_folder(folder: Path) -> None:
    """Raises ModelLoadError if the folder holds a pipe, a socket or a device, which libraries would wait for."""
    try:
        special = [path.name for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())]
    except OSError as error:
        raise ModelLoadError(f"{folder} cannot be read: {error}.") from error
    if special:
        raise ModelLoadError(f"{folder}: {special[0]} is a pipe, a socket or a device: a model folder has none.")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file."""
    check_file(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelLoadError(f"{path.name} is larger than {_MAX_JSON_BYTES >> 20} MB, which no published file is.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ModelLoadError(f"{path.name} cannot be read as JSON: it is nested too deep.") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path.name} must hold a JSON object, it holds {type(content).__name__}.")
    return content


def other_format(folder: Path) -> str:
    """Returns what a folder has in the place of a model that can be loaded, and what to do; "" if that is not known."""
    suffixes = {path.suffix for path in folder.iterdir()}
    if (folder / ADAPTER_CONFIG).exists():
        return "holds an adapter, not a model: merge it into its base model and save that"
    if ".gguf" in suffixes:
        return "has GGUF files, which are not supported: take the model's safetensors files"
    if suffixes & {".bin", ".pt", ".pth"}:
        return (
            "has weights in PyTorch's format only: convert them with transformers, "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"has its model in the folder {inside[0]!r}: name that" if inside else ""

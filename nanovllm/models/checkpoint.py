"""Resolves the user's `model` argument to the folder with the model's files."""

from __future__ import annotations

import os
from pathlib import Path

from nanovllm.errors import ModelLoadError, shown
from nanovllm.models.architectures import WITH_TORCH_FILES
from nanovllm.models.config_fields import architecture_of
from nanovllm.utils.model_files import check_folder, read_json

TINY_MODEL = "tiny"
TINY_MODEL_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny-qwen3"
_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model"]  # config, chat template, tokenizer
_WEIGHTS = ["*.safetensors"]
_TORCH_WEIGHTS = ["pytorch_model*.bin"]
_MAX_TEXT = 500  # characters of another library's error
_WAYS = (
    "model must be a folder with config.json and *.safetensors, a Hugging Face id such as 'Qwen/Qwen3-0.6B', or "
    "'tiny', the checkpoint that ships with nanovllm"
)


def resolve_model_folder(model: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """Returns the folder of a model named by a path, by a Hugging Face id, or as "tiny".

    An id is downloaded (or found in the local cache) by huggingface_hub, which honours HF_ENDPOINT, HF_HUB_OFFLINE
    and HF_HOME; `revision` is its branch, tag or commit. with_weights False: everything but the weights.
    Raises ModelLoadError when there is no such model.
    """
    if model == TINY_MODEL:
        return TINY_MODEL_FOLDER
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):
        check_folder(path)
        return path
    exists = os.path.exists(path)
    if exists or path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        what = "this is a file, not a folder" if exists and model else "there is no such folder"
        raise ModelLoadError(f"model={shown(model)}: {what}. {_WAYS}.")
    # Imported here: nothing else needs it, and a start from a folder should not pay for it.
    from huggingface_hub import snapshot_download

    patterns = [*_PATTERNS, *_WEIGHTS] if with_weights else _PATTERNS
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        if with_weights and not any(folder.glob("*.safetensors")) and _may_have_torch_files(folder):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*_PATTERNS, *_TORCH_WEIGHTS]))
        return folder
    except Exception as error:  # network, hub, cache and file errors come from several libraries
        raise ModelLoadError(
            f"model={shown(model)}: there is no such folder here, and the download failed: {str(error)[:_MAX_TEXT]} "
            f"{_WAYS}."
        ) from error


def num_tokenizer_tokens(folder: Path) -> int | None:
    """Returns the number of tokens in a folder's tokenizer.json, added ones included; None where it does not say."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer = read_json(path)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not isinstance(added, list):
        return None
    contents = [token.get("content") for token in added if isinstance(token, dict)]
    return len(vocab.keys() | {content for content in contents if isinstance(content, str)})


def _may_have_torch_files(folder: Path) -> bool:
    path = folder / "config.json"
    return path.exists() and architecture_of(read_json(path)) in WITH_TORCH_FILES

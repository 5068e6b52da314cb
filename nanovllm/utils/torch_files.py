"""Reads weights in PyTorch's own format, which older publications have instead of safetensors."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.utils.model_files import check_file

_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
_MAX_TEXT = 300  # characters of torch's error


class TorchFile:
    """A `pytorch_model.bin` with the methods that an open safetensors file has.

    Such a file is a pickle. Only its tensors are read: no code that it names is run.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        try:
            # Files of before torch 1.6 are no zip archives, and cannot be mapped into memory.
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # of the unpickler, of zip, or OSError
            reason = str(error).strip()[:_MAX_TEXT].rstrip(".")
            raise ModelLoadError(f"{path} cannot be read as weights of PyTorch: {reason}.") from error
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise ModelLoadError(f"{path} cannot be read as weights of PyTorch: it must hold tensors by their names.")
        self._tensors: dict[str, torch.Tensor] = {str(name): tensor for name, tensor in content.items()}

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _TensorSlice:
        return _TensorSlice(self._tensors[name])


class _TensorSlice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPE_NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]

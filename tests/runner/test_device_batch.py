"""Batches on their way to the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.runner.device_batch import BatchUploads

CPU = torch.device("cpu")


def batch(step: int, *rows: int) -> ScheduledBatch:
    return ScheduledBatch.build(step, decode_rows=rows)


def test_the_same_work_is_copied_once() -> None:
    uploads = BatchUploads(CPU)
    first, again, other = (uploads.upload(each) for each in (batch(1, 7, 8), batch(2, 7, 8), batch(3, 0, 3)))
    assert first.words.data_ptr() == again.words.data_ptr() != other.words.data_ptr()
    assert (again.host.step, other.host.step) == (2, 3)
    assert again.values("decode_rows").tolist() == [7, 8]
    assert other.values("decode_rows").tolist() == [0, 3]


def test_a_copy_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = BatchUploads(CPU)
    uploads.upload(batch(1, 7, 8))

    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_numpy", fail)
        with pytest.raises(torch.OutOfMemoryError):
            uploads.upload(batch(2, 0, 3))
    assert uploads.upload(batch(3, 0, 3)).values("decode_rows").tolist() == [0, 3]

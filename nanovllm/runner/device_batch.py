"""DeviceBatch: a `ScheduledBatch` whose buffer has been copied to the device."""

from __future__ import annotations

import torch

from nanovllm.engine.batch import ScheduledBatch, same_work
from nanovllm.kernels.columns import num_words


class DeviceBatch:
    """The sections of a batch as tensors on the device.

    host: the same batch on the host, whose values are known without waiting for the device.
    words: its buffer on the device, [num_words] int32.
    """

    def __init__(self, host: ScheduledBatch, words: torch.Tensor) -> None:
        self.host = host
        self._words = words

    def has(self, section: str) -> bool:
        """Returns whether the section has any items."""
        place = self.host.sections[section]
        return place.offset < place.end

    def values(self, section: str) -> torch.Tensor:
        """Returns a section of plain integers, [num_items] int32, as a view."""
        place = self.host.sections[section]
        return self._words[place.offset : place.end]

    def columns(self, section: str, contiguous: bool = False) -> dict[str, torch.Tensor]:
        """Returns the fields of a section whose records have only integers, each [num_items] int32.

        They are views of the buffer, or copies if `contiguous`, as kernels need them.
        """
        place = self.host.sections[section]
        columns = self.records(section).t()
        names = place.record.names or ()
        return dict(zip(names, (columns.contiguous() if contiguous else columns).unbind(0), strict=True))

    def records(self, section: str) -> torch.Tensor:
        """Returns the section's items as words, [num_items, num_words] int32, as a view."""
        return self.values(section).view(-1, num_words(self.host.sections[section].record))


class BatchUploads:
    """Copies batches to the device, those of a steady decode once for many steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: torch.Tensor | None = None  # what was copied last, in pinned memory on a GPU
        self._words: torch.Tensor | None = None  # the copy, to which nothing writes

    def upload(self, batch: ScheduledBatch) -> DeviceBatch:
        """Returns the batch on the device. Where it is the same work as the last one, no word is copied."""
        if self._host is None or self._words is None or not same_work(batch.buffer, self._host.numpy()):
            words = torch.from_numpy(batch.buffer)
            self._host = words.clone() if self._device.type == "cpu" else words.pin_memory()
            self._words = self._host.to(self._device, non_blocking=True)
        return DeviceBatch(batch, self._words)

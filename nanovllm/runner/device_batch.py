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
        self.words = words

    def has(self, section: str) -> bool:
        """Returns whether the section has any items."""
        place = self.host.sections[section]
        return place.offset < place.end

    def values(self, section: str) -> torch.Tensor:
        """Returns a section of plain integers, [num_items] int32, as a view."""
        place = self.host.sections[section]
        return self.words[place.offset : place.end]

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
    """Copies batches to the device, and keeps the last one for steps of the same work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: DeviceBatch | None = None  # to whose words nothing writes

    def upload(self, batch: ScheduledBatch) -> DeviceBatch:
        """Returns the batch on the device. If it is the same work as the last one, nothing is copied."""
        last = self._last
        if last is not None and same_work(batch.buffer, last.host.buffer):
            return DeviceBatch(batch, last.words)
        words = torch.from_numpy(batch.buffer)
        if self._device.type != "cpu":
            # torch's host allocator does not reuse pinned memory before the copy that reads it has completed.
            words = words.pin_memory().to(self._device, non_blocking=True)
        self._last = DeviceBatch(batch, words)
        return self._last

"""DeviceBatch: a `ScheduledBatch` whose buffer has been copied to the device."""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.kernels.columns import columns_of, num_words

_TORCH_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


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
        columns = self._records(section).t()
        names = place.record.names or ()
        return dict(zip(names, (columns.contiguous() if contiguous else columns).unbind(0), strict=True))

    def column(self, section: str, name: str) -> torch.Tensor:
        """Returns the field `name` of each item, [num_items] in its dtype; a record is [num_items, num_words] int32.

        int32 fields and records are views, others are copies.
        """
        record = self.host.sections[section].record
        assert record.fields is not None
        words = self._records(section)[:, columns_of(record, name)]
        dtype = record.fields[name][0]
        if dtype.fields:
            return words
        if dtype == np.int32:
            return words.squeeze(1)
        # A copy, since a view as int64 needs an even offset.
        return words.clone(memory_format=torch.contiguous_format).view(_TORCH_DTYPES[dtype]).squeeze(1)

    def _records(self, section: str) -> torch.Tensor:
        """Returns the section's items as words, [num_items, num_words] int32, as a view."""
        return self.values(section).view(-1, num_words(self.host.sections[section].record))

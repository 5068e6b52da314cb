"""DeviceBatch: a `ScheduledBatch` whose buffer has been copied to the device."""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.kernels.columns import columns_of, num_words

_TORCH_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}


class DeviceBatch:
    """Gives the batch's sections as tensors. `words` is the buffer on the device, int32; what is in `host` is known
    without waiting for the device.
    """

    def __init__(self, host: ScheduledBatch, words: torch.Tensor) -> None:
        self.host = host
        self._words = words

    def has(self, section: str) -> bool:
        place = self.host.sections[section]
        return place.offset < place.end

    def values(self, section: str) -> torch.Tensor:
        """A section of plain integers: a view [num_items] int32."""
        place = self.host.sections[section]
        return self._words[place.offset : place.end]

    def columns(self, section: str, contiguous: bool = False) -> dict[str, torch.Tensor]:
        """The fields of a section whose records have only integers, each [num_items] int32.

        Views of the buffer, or, where kernels read them, `contiguous` copies.
        """
        place = self.host.sections[section]
        columns = self._records(section).t()
        names = place.record.names or ()
        return dict(zip(names, (columns.contiguous() if contiguous else columns).unbind(0), strict=True))

    def column(self, section: str, name: str) -> torch.Tensor:
        """The field `name` of each item: [num_items] in its dtype, or [num_items, num_words] int32 for a record.

        Integers and records are views.
        """
        record = self.host.sections[section].record
        assert record.fields is not None
        words = self._records(section)[:, columns_of(record, name)]
        dtype = record.fields[name][0]
        if dtype.fields:
            return words
        if dtype == np.int32:
            return words.squeeze(1)
        # A view as int64 needs an even offset: always a copy.
        return words.clone(memory_format=torch.contiguous_format).view(_TORCH_DTYPES[dtype]).squeeze(1)

    def _records(self, section: str) -> torch.Tensor:
        """[num_items, num_words] int32, a view."""
        return self.values(section).view(-1, num_words(self.host.sections[section].record))

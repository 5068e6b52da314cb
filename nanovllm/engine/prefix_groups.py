"""PrefixGroups: the order of a step's decode rows, in which those that share a prefix are side by side."""

from __future__ import annotations

import numpy as np

from nanovllm.engine.row_table import NO_BLOCK, RowArray, RowTable
from nanovllm.logs import events
from nanovllm.utils.logger import setup_logger

logger = setup_logger("nanovllm.engine.scheduler")  # the name that users' documents show

# Attention reads a shared prefix once for all its rows if at least this many rows share it, and if that saves reading
# at least this many tokens.
_MIN_SHARERS = 16
_MIN_TOKENS_SAVED = 20_000


class PrefixGroups:
    """Arranges decode rows, and logs when they begin to share prefixes."""

    def __init__(self, rows: RowTable) -> None:
        self._rows = rows
        self._shares_prefix = False  # whether decode rows of the last step shared a prefix; for the log

    def arrange(self, rows: RowArray, step: int) -> tuple[RowArray, bool]:
        """Returns the decode rows with those that share a prefix side by side, and whether enough of them do.

        Within a group the longest contexts come first: if attention over one of them started last, the GPU would wait
        for it alone. step: the one that is planned, for the log.
        """
        blocks = self._rows.prefix_block[rows]
        if np.count_nonzero(blocks != NO_BLOCK) < _MIN_SHARERS:
            longest_first: RowArray = rows[np.argsort(-self._rows.num_computed[rows], kind="stable")]
            self._shares_prefix = False
            return longest_first, False
        shared, group, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
        saved = np.bincount(group, weights=self._rows.num_cached[rows])
        pays = (shared != NO_BLOCK) & (sizes >= _MIN_SHARERS) & (saved >= _MIN_TOKENS_SAVED)
        shares = pays[group]
        order = np.lexsort((-self._rows.num_computed[rows], np.where(shares, group, len(rows))))
        arranged: RowArray = rows[order]
        shares_prefix = bool(shares.any())
        if shares_prefix and not self._shares_prefix:
            num_sharing, saved_tokens = int(shares.sum()), int(saved[pays].sum())
            events.batch_shares_prefix.log(
                logger, num_sharing=num_sharing, size=len(rows), saved_tokens=saved_tokens, step=step
            )
        self._shares_prefix = shares_prefix
        return arranged, shares_prefix

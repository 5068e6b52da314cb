"""Keeps garbage collection short in processes that serve requests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def existing_objects_exempt() -> Iterator[None]:
    """Exempts every object that exists at the beginning from garbage collection.

    torch and transformers leave some 200,000 objects. A collection that visits them all stops the process for 0.3 s or
    more, and every request with it. To be entered once start-up has made what stays.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

from nanovllm.utils.garbage_collection import existing_objects_exempt


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_a_collection_visits_only_what_is_new() -> None:
    old = weakref.ref(Node())
    with existing_objects_exempt():
        new = weakref.ref(Node())
        gc.collect()
        assert old() is not None
        assert new() is None
    gc.collect()
    assert old() is None


def test_an_error_ends_the_exemption() -> None:
    with suppress(KeyError), existing_objects_exempt():
        assert gc.get_freeze_count() > 0
        raise KeyError
    assert gc.get_freeze_count() == 0

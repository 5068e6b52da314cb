"""Finding markers, such as `</think>`, in text that arrives in pieces."""

from __future__ import annotations


def start_of_partial(text: str, marker: str, padding: str | None) -> int:
    """Returns where the end of `text` begins that may turn out to be the marker, or len(text) if there is none.

    padding: characters before the marker that belong to it, in any number; None for all white space.
    """
    longest = min(len(marker) - 1, len(text))
    size = next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)
    return len(text[: len(text) - size].rstrip(padding))

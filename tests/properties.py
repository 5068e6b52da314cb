"""How many examples a property test draws: a part of them in `make test`, all of them in `make test-heavy`."""

from __future__ import annotations

from hypothesis import settings

LONG = "long"
settings.register_profile(LONG, settings.get_profile("default"))  # chosen by pytest's --hypothesis-profile=long


def examples(long: int) -> int:
    """Returns `max_examples`: `long` in the long profile, else an eighth of it, at least five."""
    return long if settings.get_current_profile_name() == LONG else max(long // 8, 5)

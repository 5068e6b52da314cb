"""/v1/models: its answers."""

from __future__ import annotations

from typing_extensions import TypedDict


class ModelCard(TypedDict):
    """A model under one of its names. root: the first of them."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    object: str
    data: list[ModelCard]

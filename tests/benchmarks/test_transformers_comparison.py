"""What the comparison with transformers runs and counts."""

from __future__ import annotations

import pytest

from nanovllm.benchmarks.transformers_comparison import share_equal, transformers_config
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.model_config import ModelConfig


@pytest.mark.parametrize("name", BUILTIN_SHAPES)
def test_shapes_mean_the_same_in_transformers(name: str) -> None:
    shape = BUILTIN_SHAPES[name]
    read_back = ModelConfig.from_dict(
        {**transformers_config(name).to_dict(), "eos_token_id": list(shape.eos_token_ids), "dtype": shape.dtype}
    )
    assert read_back == shape


def test_equal_tokens() -> None:
    assert share_equal([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75

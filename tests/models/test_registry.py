from __future__ import annotations

import pytest

from nanovllm.errors import ModelLoadError
from nanovllm.models.architectures import MODELS
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.registry import get_model_class


@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_has_its_class(architecture: str) -> None:
    model_class = get_model_class(architecture)
    assert model_class.__name__ == architecture
    assert issubclass(model_class, CausalLM)


def test_an_unknown_architecture_is_answered_with_those_there_are() -> None:
    with pytest.raises(ModelLoadError, match=r"'GPT2LMHeadModel'.*Supported: .*Qwen3ForCausalLM"):
        get_model_class("GPT2LMHeadModel")

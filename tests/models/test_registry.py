from __future__ import annotations

from typing import Any

import pytest

from nanovllm.errors import ModelLoadError
from nanovllm.models.architectures import MODELS
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.registry import get_model_class


@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_has_its_class(architecture: str) -> None:
    model_class = get_model_class(architecture)
    assert model_class.__name__ == architecture
    assert issubclass(model_class, CausalLM)


KINDS = {
    "BertModel": "an encoder, which generates no text",
    "RobertaForMaskedLM": "an encoder, which generates no text",
    "T5ForConditionalGeneration": "an encoder-decoder",
    "BartForConditionalGeneration": "an encoder-decoder",
    "WhisperForConditionalGeneration": "a speech or audio model",
    "LlavaForConditionalGeneration": "a model of images and text",
    "Qwen2_5_VLForConditionalGeneration": "a model of images and text",
    "ViTForImageClassification": "a model of images",
    "MambaForCausalLM": "a state-space model or a hybrid with one",
    "JambaForCausalLM": "a state-space model or a hybrid with one",
    "Qwen3NextForCausalLM": "a state-space model or a hybrid with one",
    "MixtralForCausalLM": "a mixture of experts",
    "DeepseekV3ForCausalLM": "a mixture of experts",
    "LlamaForSequenceClassification": "a classifier or reward model",
    "Qwen2Model": "a model without a head that generates text",
    "PhiForCausalLM": "a decoder-only model of a family that nanovllm does not implement",
    "GPT2LMHeadModel": "a decoder-only model of a family that nanovllm does not implement",
}


@pytest.mark.parametrize("architecture", KINDS)
def test_the_error_says_what_kind_of_model_it_is(architecture: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_dict({"architectures": [architecture]})
    told = f"architectures=['{architecture}'] is not supported: it is {KINDS[architecture]}. Supported: Gemma3"
    assert str(caught.value).startswith(told)
    assert ("docs/adding-a-model.md" in str(caught.value)) == ("decoder-only" in KINDS[architecture])


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"vision_config": {"depth": 2}}, "a model of images and text"),
        ({"audio_config": {"depth": 2}}, "a speech or audio model"),
        ({"is_encoder_decoder": True}, "an encoder-decoder"),
        ({"num_local_experts": 8}, "a mixture of experts"),
    ],
)
def test_config_json_says_what_a_name_does_not(fields: dict[str, Any], kind: str) -> None:
    with pytest.raises(ModelLoadError, match=f"it is {kind}"):
        ModelConfig.from_dict({"architectures": ["Unheard"], **fields})


def test_no_kind_is_guessed() -> None:
    with pytest.raises(ModelLoadError, match=r"\['Unheard'\] is not supported\. Supported: .*docs/adding-a-model\.md"):
        ModelConfig.from_dict({"architectures": ["Unheard"]})


def test_an_unknown_architecture_is_answered_with_those_there_are() -> None:
    with pytest.raises(ModelLoadError, match=r"'GPT2LMHeadModel'.*Supported: .*Qwen3ForCausalLM"):
        get_model_class("GPT2LMHeadModel")

"""Says what kind of model an architecture is, for the error that it is not supported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

DECODER = "a decoder-only model of a family that nanovllm does not implement"
# Kind, and the names of its architectures; the first that is found counts.
_KINDS = (
    ("a speech or audio model", r"Whisper|Wav2Vec|Hubert|Speech|Audio|Seamless|Moonshine|Voxtral|Omni"),
    (
        "a model of images and text",
        r"VL|Vision|Llava|Mllama|Idefics|PaliGemma|Pixtral|SmolVLM|Fuyu|Florence|Molmo|Llama4ForCond|Gemma3n|Mistral3",
    ),
    ("a model of images", r"ViT|CLIP|Siglip|Swin|Dino|DETR|Detr|Diffusion|UNet|ImageClassification"),
    (
        "a state-space model or a hybrid with one",
        r"Mamba|Jamba|Zamba|Bamba|Rwkv|RecurrentGemma|Qwen3Next|Qwen3_5|FalconH1|NemotronH|Hybrid|Plamo2|Lfm2|MiniMax",
    ),
    ("an encoder-decoder", r"T5|Bart(?!oz)|Pegasus|Marian|M2M|NllbMoe|ProphetNet|BlenderbotForCond|EncoderDecoder"),
    ("a mixture of experts", r"Moe|MoE|Mixtral|DeepseekV[23]|Dbrx|GptOss|Llama4|Grok|Arctic|Kimi|Olmoe"),
    ("an encoder, which generates no text", r"Bert|BERT|Electra|MPNet|XLNet|Ernie(?!4)|NomicBert|ForMaskedLM"),
    ("a classifier or reward model", r"ForSequenceClassification|ForTokenClassification|RewardModel|QuestionAnswering"),
    (DECODER, r"ForCausalLM$|LMHeadModel$"),
    ("a model without a head that generates text", r"Model$"),
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def kind_of(architecture: str, config: Mapping[str, Any]) -> str:
    """Returns what kind of model this is, with its article; "" if that is not known."""
    if config.get("vision_config"):
        return "a model of images and text"
    if config.get("audio_config"):
        return "a speech or audio model"
    if config.get("is_encoder_decoder") is True:
        return "an encoder-decoder"
    if any(config.get(name) for name in EXPERT_COUNTS):
        return "a mixture of experts"
    return next((kind for kind, names in _KINDS if re.search(names, architecture[:200])), "")

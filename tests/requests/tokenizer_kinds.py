"""Small tokenizers of every kind, as users' checkpoints have them."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["<unk>", "▁", "a", "x", "▁a", "▁x", "日", "▁本", "é", "▁▁▁", "x y", "\ufffd", "0x", "<0x"]
PIECES = ["[UNK]", "a", "##b", "##", "##c", "日", ".", ",", "'", "s", "n't", "do", "not"]


def _wrap(model: Any, decoder: Any, **settings: Any) -> Any:
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken(" ▁ü ")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **settings)


def _bpe(tokens: list[str]) -> Any:
    vocab = {token: index for index, token in enumerate(tokens)}
    return models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)


def _word_piece() -> Any:
    return models.WordPiece({token: index for index, token in enumerate(PIECES)}, unk_token="[UNK]")


def _unigram(tokens: list[str], byte_fallback: bool) -> Any:
    return models.Unigram([(token, -1.0) for token in tokens], 0, byte_fallback)


_GEMMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
_BYTE_LEVEL = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "æĹ¥", "ðŁ", "ĺĢ", "ab"]

BYTE_LEVEL = _wrap(_bpe(_BYTE_LEVEL), decoders.ByteLevel())
LLAMA = _wrap(_bpe(WORDS + BYTES), decoders.Sequence([*_GEMMA, decoders.Strip(" ", 1, 0)]))
KINDS = {
    "byte level": BYTE_LEVEL,
    "byte fallback": _wrap(_bpe(WORDS + BYTES), decoders.Sequence(_GEMMA), clean_up_tokenization_spaces=True),
    "byte fallback, prefix space": LLAMA,
    "WordPiece": _wrap(_word_piece(), decoders.WordPiece("##", cleanup=True), clean_up_tokenization_spaces=True),
    "WordPiece, as it is": _wrap(_word_piece(), decoders.WordPiece("##", cleanup=False)),
    "Metaspace, prefix space": _wrap(_bpe(WORDS), decoders.Metaspace(prepend_scheme="always")),
    "Metaspace": _wrap(_bpe(WORDS), decoders.Metaspace(prepend_scheme="never")),
    "Unigram": _wrap(_unigram(WORDS, False), decoders.Metaspace()),
    "Unigram, byte fallback": _wrap(
        _unigram(WORDS + BYTES, True), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
    "BPE, suffix": _wrap(_bpe(["<unk>", "a</w>", "b", "c</w>", "</w>"]), decoders.BPEDecoder("</w>")),
    "words": _wrap(models.WordLevel({"a": 0, "b": 1, "": 2, "[UNK]": 3}, "[UNK]"), None),
}


def byte_tokens(tokenizer: Any, text: str) -> list[int]:
    """The text with a token for each byte, of BYTE_LEVEL or of a tokenizer with byte fallback."""
    if tokenizer is BYTE_LEVEL:
        shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        names = list("".join(piece for piece, _ in shown))
    else:
        names = [BYTES[byte] for byte in text.encode()]
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    return ids

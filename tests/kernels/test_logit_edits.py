from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
import torch

from nanovllm.kernels.columns import BIAS_WIDTH, LOGIT_EDITS
from nanovllm.kernels.logit_edits import RowLogitEdits, edit_logits
from tests.kernels.inputs import DTYPES

ALWAYS = 2**31 - 1
MAX_TOKENS = 4500


@dataclass
class Asked:
    """What a row asks for. An edit: token, number to add, length from which it does not apply, ending."""

    prompt: list[int]
    output: list[int] = field(default_factory=list)
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)
    edits: list[tuple[int, float, int, list[int]]] = field(default_factory=list)
    allowed: set[int] | None = None


def bits(number: float) -> int:
    return struct.unpack("i", struct.pack("f", number))[0]


def expected(logits: list[float], row: Asked) -> list[float]:
    """In plain Python, token by token."""
    repetition, frequency, presence = row.penalties
    shaped = []
    for token, logit in enumerate(logits):
        count = row.output.count(token)
        if count or token in row.prompt:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * count + (presence if count else 0)
        for edited, value, until, ending in row.edits:
            ends = row.output[len(row.output) - len(ending) :] == ending and len(ending) <= len(row.output)
            if edited == token and ends and len(row.prompt) + len(row.output) < until:
                logit += value
        shaped.append(logit if row.allowed is None or token in row.allowed else -float("inf"))
    return shaped


def state_of(asked: list[Asked], vocab_size: int, device: torch.device, order: list[int]):
    """rows, token_ids, lengths and logit_edits as `edit_logits` takes them: row i of `asked` lies at order[i]."""
    logit_edits = RowLogitEdits.zeros(len(asked), vocab_size, torch.device("cpu"))
    token_ids = torch.zeros(len(asked), MAX_TOKENS, dtype=torch.int32)
    lengths = torch.ones(len(asked), dtype=torch.int32)
    for place, row in zip(order, asked, strict=True):
        known = row.prompt + row.output
        token_ids[place, : len(known)] = torch.tensor(known)
        lengths[place] = len(known)
        flags = [row.penalties != (1.0, 0.0, 0.0), row.allowed is not None]
        settings = logit_edits.settings.numpy().view(LOGIT_EDITS)
        settings[place, 0] = (len(row.prompt), len(row.edits), *flags, *row.penalties)
        words, endings = [], []
        for token, value, until, ending in row.edits:
            words += [token, bits(value), until, len(row.edits) * BIAS_WIDTH + len(endings), len(ending)]
            endings += ending
        logit_edits.token_biases[place, : len(words + endings)] = torch.tensor(words + endings, dtype=torch.int32)
        for token in row.allowed or ():
            logit_edits.masks[place, token // 32] |= torch.tensor(1 << (token % 32)).int()
    moved = RowLogitEdits(
        *(tensor.to(device) for tensor in (logit_edits.settings, logit_edits.token_biases, logit_edits.masks))
    )
    return torch.tensor(order, dtype=torch.int32, device=device), token_ids.to(device), lengths.to(device), moved


def random_rows(generator: torch.Generator, vocab_size: int) -> list[Asked]:
    def tokens(number: int) -> list[int]:
        return torch.randint(min(vocab_size, 40), (number,), generator=generator).tolist()

    output = tokens(300)
    other = [(output[-1] + 1) % vocab_size]
    edits = [
        *[(token, token / 7 - 2, ALWAYS, []) for token in range(min(vocab_size, 300))],  # more than a program takes
        *[(0, -1e29, 310, []), (1 % vocab_size, -1e29, 309, []), (2 % vocab_size, -1e29, 303, [])],
        *[(3 % vocab_size, -1e29, ALWAYS, output[-1:]), (4 % vocab_size, -1e29, ALWAYS, output[-3:])],
        *[(5 % vocab_size, -1e29, ALWAYS, output[-2:-1] + other), (6 % vocab_size, -1e29, ALWAYS, other)],
        (7 % vocab_size, -1e29, ALWAYS, output[-2:]),
    ]
    return [
        Asked(tokens(5), tokens(9)),
        Asked(tokens(2200), tokens(2250), penalties=(1.3, 0.005, -1.5)),  # more than the programs take at a time
        Asked(tokens(5), penalties=(0.5, 0.0, 1.0)),
        Asked(tokens(5), tokens(400), penalties=(1.0, -0.25, 0.0)),
        # An ending that begins in the prompt is none.
        Asked([*tokens(7), *output[-4:-2]], output[-2:], edits=edits),
        Asked(tokens(9), output, edits=edits),
        Asked(tokens(9), tokens(9), allowed=set(tokens(20))),
        Asked(tokens(5), tokens(9)),
        Asked(tokens(8), output, penalties=(1.1, 0.1, 0.2), edits=edits, allowed=set(range(0, vocab_size, 2))),
    ]


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 33, 2500])
def test_shapes_as_the_rules_say(device, generator, dtype, vocab_size, use_triton):
    asked = random_rows(generator, vocab_size)
    order = torch.randperm(len(asked), generator=generator).tolist()
    logits = (4 * torch.randn(len(asked), vocab_size + 3, generator=generator)).to(device, dtype)[:, :vocab_size]
    before = logits.clone()
    shaped = edit_logits(logits, *state_of(asked, vocab_size, device, order), use_triton=use_triton)
    assert shaped.dtype == torch.float32
    assert torch.equal(logits, before), "log-probabilities are still those of the logits as they were"
    for row, own in enumerate(asked):
        want = torch.tensor(expected(logits[row].float().tolist(), own))
        torch.testing.assert_close(shaped[row].cpu(), want, rtol=1e-5, atol=1e-5)
    for row in (0, 7):  # asks for nothing
        assert torch.equal(shaped[row], logits[row].float())


@pytest.mark.parametrize("use_triton", [True, False])
def test_broken_logits_stay_with_rows_that_ask_for_nothing_and_bans_hold_against_them(device, use_triton):
    logits = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device).repeat(2, 1)
    asked = [Asked([0]), Asked([0], edits=[(1, -1e29, ALWAYS, [])], allowed={1, 3})]
    state = state_of(asked, 4, device, [0, 1])
    shaped = edit_logits(logits, *state, use_triton=use_triton)
    assert torch.equal(shaped[0].nan_to_num(nan=7.0), logits[0].nan_to_num(nan=7.0))
    assert shaped[1].tolist()[0::2] == [-torch.inf] * 2
    assert shaped[1, 3] == 1.0


def test_many_rows_are_shaped_in_parts(device, monkeypatch, generator):
    """Counts for so many logits at a time; a row's are its own in any of them."""
    monkeypatch.setattr("nanovllm.kernels.logit_edits._PART", 100)
    asked = [Asked([seq], [seq + 1] * seq, penalties=(1.0, 0.5, 0.0)) for seq in range(5)]
    state = state_of(asked, 50, device, [0, 1, 2, 3, 4])
    logits = torch.randn(5, 50, generator=generator).to(device)
    shaped = edit_logits(logits, *state, use_triton=True)
    torch.testing.assert_close(shaped, edit_logits(logits, *state, use_triton=False))
    rows, *others = state
    assert edit_logits(logits[:0], rows[:0], *others, use_triton=True).shape == (0, 50)

"""The argument `speculative_config`: vLLM's names, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm import InvalidArgumentError, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine_args import EngineArgs
from nanovllm.errors import UnknownArgumentError
from nanovllm.speculative_config import SpeculativeConfig
from nanovllm.utils import FlexibleArgumentParser


@pytest.mark.parametrize(
    ("given", "lookup", "max_draft"),
    [
        ({"method": "ngram", "num_speculative_tokens": 3}, (5, 5), 3),
        ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}, (2, 2), 3),
        ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}, (4, 4), 3),
        ({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}, (2, 4), 3),
        ({"method": "suffix"}, (5, 5), 24),
        ({"method": "suffix", "num_speculative_tokens": 9}, (5, 5), 9),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 12}, (5, 5), 12),
        ({"method": "draft_model", "model": "tiny", "num_speculative_tokens": 3}, (5, 5), 3),
        ({"model": "tiny", "num_speculative_tokens": 3}, (5, 5), 3),
    ],
)
def test_defaults(given: dict[str, Any], lookup: tuple[int, int], max_draft: int) -> None:
    config = SpeculativeConfig.of(given)
    assert config is not None
    assert (config.lookup, config.max_draft) == (lookup, max_draft)
    assert EngineConfig("tiny", speculative_config=given).speculative_config == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ngram", "speculative_config='ngram' is not allowed: it must be a dictionary with 'method', or None"),
        ({}, "speculative_config={} is not allowed: it must be a dictionary with 'method'"),
        ({"method": "eagle"}, "speculative_config.method='eagle' .* one of 'ngram', 'suffix', 'draft_model'.*EAGLE"),
        ({"method": "draft_model", "num_speculative_tokens": 3}, "speculative_config.model=None .* a folder"),
        ({"method": "draft_model", "model": "tiny"}, "num_speculative_tokens=None .* method='draft_model' has no"),
        ({"model": "tiny", "num_speculative_tokens": 65}, "num_speculative_tokens=65 .* an integer from 1 to 64"),
        ({"model": 5, "num_speculative_tokens": 3}, "speculative_config.model=5 .* a text"),
        ({"model": "tiny", "num_speculative_tokens": 3, "quantization": "int3"}, "quantization='int3' .* 'int4'"),
        ({"method": "suffix", "model": "tiny"}, "speculative_config.model='tiny' .* None.*Only method='draft_model'"),
        ({"method": "ngram"}, "num_speculative_tokens=None .* an integer from 1 to 64.*longest draft"),
        ({"method": "suffix", "num_speculative_tokens": 0}, "num_speculative_tokens=0 .* an integer from 1 to 64"),
        ({"method": "suffix", "num_speculative_tokens": 65}, "num_speculative_tokens=65 .* an integer from 1 to 64"),
        (
            {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 5, "prompt_lookup_max": 4},
            "prompt_lookup_min=5 .* at most prompt_lookup_max=4",
        ),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 2}, "min_token_prob=2 .* a number from 0 to 1"),
    ],
)
def test_errors_name_the_field(given: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        EngineConfig("tiny", speculative_config=given)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(UnknownArgumentError, match="num_speculative_tokens"):
        EngineConfig("tiny", speculative_config={"method": "suffix", "num_speculativ_tokens": 4})


def test_command_line() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = '{"method": "ngram", "num_speculative_tokens": 7}'
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", "tiny", "--speculative-config", given]))
    assert args.speculative_config == {"method": "ngram", "num_speculative_tokens": 7}
    assert EngineArgs.from_cli_args(parser.parse_args(["--model", "tiny"])).speculative_config is None


def test_rows_for_drafts() -> None:
    """A step drafts at most 128 tokens, or as many as one sequence may have."""
    given = {"method": "ngram", "num_speculative_tokens": 7}
    rows = [
        EngineConfig("tiny", max_num_seqs=n, speculative_config=given).max_num_rows - n for n in (1, 4, 18, 19, 512)
    ]
    assert rows == [7, 28, 126, 128, 128]
    assert EngineConfig("tiny", max_num_seqs=4).max_num_rows == 4


def test_a_request_refuses_it() -> None:
    assert SamplingParams().speculate
    with pytest.raises(InvalidArgumentError, match="speculate"):
        SamplingParams(speculate="no")  # type: ignore[arg-type]

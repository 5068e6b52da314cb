"""Drop-in proof: scripts for vLLM's offline API and nano-vllm's run with only the import changed.

The scripts are ours, in the way that such scripts are written; none of them knows of this test. What is replaced is the
package's name in import lines, nothing else.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.processes import ROOT, run_python

SCRIPTS = Path(__file__).parent / "scripts"
TINY = str(ROOT / "nanovllm" / "assets" / "tiny-qwen3")
IMPORT = re.compile(r"^(from|import) vllm\b", re.MULTILINE)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny") as llm:
        yield llm


def with_our_import(name: str) -> str:
    """The script's source; every line but those that import vLLM is as it was."""
    source = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    ours = IMPORT.sub(r"\1 nanovllm", source)
    changed = [(old, new) for old, new in zip(source.splitlines(), ours.splitlines(), strict=True) if old != new]
    assert bool(changed) == name.startswith("vllm"), "nano-vllm's package has our name"
    assert all(old.replace("vllm", "nanovllm", 1) == new for old, new in changed)
    assert "vllm" not in {module.partition(".")[0] for module in imported(ours)}
    return ours


def imported(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def run(name: str, folder: Path, *arguments: str) -> list[str]:
    """What the script prints, line by line. arguments: its command line; the model's folder unless given."""
    path = folder / f"{name}.py"
    path.write_text(with_our_import(name), encoding="utf-8")
    done = run_python(str(path), *(arguments or [TINY]), cwd=folder, NANOVLLM_LOG_LEVEL="WARNING")
    errors = [line for line in done.stderr.splitlines() if not line.startswith("USDT:")]  # of torch's profiler
    assert (done.returncode, errors) == (0, [])
    return done.stdout.splitlines()


def texts(llm: LLM, prompts: list[Any], **params: Any) -> list[str]:
    return [output["text"] for output in llm.generate(prompts, SamplingParams(**params), use_tqdm=False)]


def test_basic(llm: LLM, tmp_path: Path) -> None:
    lines = run("vllm_basic", tmp_path)
    prompts = ["count from 3 to 9", "What is 27 + 58?", "reverse the word planet", "introduce yourself"]
    expected = texts(llm, prompts, temperature=0.8, top_p=0.95, seed=11, max_tokens=16)
    assert [line for line in lines if line.startswith("Prompt:")] == [f"Prompt:    {prompt!r}" for prompt in prompts]
    assert [line for line in lines if line.startswith("Output:")] == [f"Output:    {text!r}" for text in expected]
    (single,) = llm.generate(
        prompts[0], SamplingParams(temperature=0, max_tokens=32, stop=[" 8", "\n"]), use_tqdm=False
    )
    completion = single.outputs[0]
    assert lines[-4] == f"Single: {completion.text!r} {completion.finish_reason} {completion.stop_reason}"
    assert lines[-3:] == ["Several: [0, 1, 2]", "Different: True", "Lengths: [1, 3, 5, 7]"]


def test_chat(llm: LLM, tmp_path: Path) -> None:
    lines = run("vllm_chat", tmp_path)
    prompts, answers = lines[::2], lines[1::2]
    assert len(prompts) == 6
    for prompt, answer in zip(prompts, answers, strict=True):
        text = ast.literal_eval(prompt.removeprefix("Prompt: "))
        assert answer == f"Generated text: {texts(llm, [text], temperature=0, max_tokens=48)[0]!r}"
    assert answers[1:4] == [f"Generated text: {text!r}" for text in ("27 + 58 = 85", "tenalp", answers_itself(llm))]
    assert (prompts[5], answers[5]) == (prompts[2], answers[2])
    assert prompts[4] != prompts[1], "enable_thinking reached the template"


def answers_itself(llm: LLM) -> str:
    chat = [{"role": "user", "content": "introduce yourself"}]
    return str(llm.chat(chat, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)[0]["text"])


def test_logprobs(llm: LLM, tmp_path: Path) -> None:
    lines = run("vllm_logprobs", tmp_path)
    assert len(lines) == 2 * (6 + 2)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    (output, _) = llm.generate(["What is 27 + 58?", "count from 3 to 9"], params, use_tqdm=False)
    assert [int(line.split()[0]) for line in lines[:6]] == output["token_ids"]
    assert lines[6] == f"cumulative {round(output.outputs[0].cumulative_logprob or 0, 4)}"
    assert all(float(line.split()[1]) > 1 for line in lines if line.startswith("perplexity"))


def test_prompt_token_ids(llm: LLM, tmp_path: Path) -> None:
    lines = run("vllm_prompt_token_ids", tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate(["count from 3 to 9", "What is 27 + 58?"], params, use_tqdm=False)
    assert lines == [*[f"True True {output['token_ids']}" for output in outputs], "'' True", "cached True"]


def test_structured_outputs(tmp_path: Path) -> None:
    choice, regex, as_json, grammar = run("vllm_structured_outputs", tmp_path)
    assert choice in ("choice: Positive", "choice: Negative")
    assert re.fullmatch(r"regex: [a-z]{1,8}@[a-z]{1,8}\.com", regex)
    car = ast.literal_eval(as_json.removeprefix("json: "))
    assert car["brand"] in ("sedan", "truck")
    assert 1990 <= car["year"] <= 2030
    assert re.fullmatch(r"grammar: SELECT (id|name) FROM table_[1-3]", grammar)


def test_generate_with_options(llm: LLM, tmp_path: Path) -> None:
    options = ["--model", TINY, "--max_model_len", "256", "--max-tokens", "20", "--temperature=0", "--swap-space", "0"]
    params, *lines = run("vllm_generate", tmp_path, *options, "--enable-chunked-prefill", "--top-k", "5")
    assert params == "Params: 20 0.0 1.0 5"
    prompts = ["count from 3 to 9", "What is 27 + 58?"]
    expected = texts(llm, prompts, temperature=0, max_tokens=20)
    assert lines == [f"Prompt: {prompt!r}, text: {text!r}" for prompt, text in zip(prompts, expected, strict=True)]


TEMPLATE = """{{- "<|im_start|>system\n" ~ tools | tojson ~ "<|im_end|>\n" if tools }}
{%- for message in messages %}
    {{- "<|im_start|>" ~ message.role ~ "\n" ~ message.content ~ "<|im_end|>\n" }}
{%- endfor %}
{{- "<|im_start|>assistant\n" if add_generation_prompt }}"""


def test_chat_with_tools(tmp_path: Path) -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}), encoding="utf-8")
    has_tool, answer, has_answer, text = run("vllm_chat_with_tools", tmp_path, str(model))
    assert (has_tool, has_answer) == ("Prompt has the tool: True", "Prompt has the answer: True")
    assert re.fullmatch(r"Answer: \d+ \+ \d+ = \d+", answer)
    assert text.startswith("Text: '")


def test_prefix_caching(tmp_path: Path) -> None:
    assert run("vllm_prefix_caching", tmp_path) == ["Same: True", "Cached: True", "Salted: 0 True"]


def test_simple_profiling(tmp_path: Path) -> None:
    assert run("vllm_simple_profiling", tmp_path) == ["Texts: ['str', 'str']"]
    assert (tmp_path / "profile" / "profile_rank0.json").is_file()


def test_reproducibility(tmp_path: Path) -> None:
    lines = run("vllm_reproducibility", tmp_path)
    assert lines == ["Again the same: True", "Another seed: False", "No seed is seed 0: True"]


def test_the_engine_s_loop(tmp_path: Path) -> None:
    lines = run("vllm_llm_engine", tmp_path, "--model", TINY, "--max-num-seqs", "4")
    by_request = {line.split()[0]: line for line in lines}
    assert sorted(by_request) == ["0", "1", "2", "3", "4"]
    assert by_request["0"].endswith("True")
    assert by_request["2"].startswith("2 2 [")
    assert [by_request[number] for number in "34"] == [f"{number} 1 ['abort'] False" for number in "34"]


def test_metrics(tmp_path: Path) -> None:
    lines = [line.split() for line in run("vllm_metrics", tmp_path)]
    values = {name: float(value) for kind, name, value, *_ in lines if kind in ("counter", "gauge", "histogram")}
    assert values["vllm:generation_tokens"] == 16
    assert values["vllm:num_requests_running"] == 0
    assert values["vllm:time_to_first_token_seconds"] == 2


def test_async_streaming(tmp_path: Path) -> None:
    assert run("vllm_async_streaming", tmp_path) == ["1 text from 3 streams: True"] * 2


def test_nano_vllm_s_example(tmp_path: Path) -> None:
    lines = [line for line in run("nano_vllm_example", tmp_path) if line]
    assert len(lines) == 4
    assert "introduce yourself" in lines[0]
    assert "list all prime numbers within 100" in lines[2]
    assert all(line.startswith("Completion: ") and len(line) > 20 for line in lines[1::2])


def test_nano_vllm_s_benchmark(tmp_path: Path) -> None:
    (line,) = run("nano_vllm_bench", tmp_path)
    found = re.fullmatch(r"Total: (\d+)tok, Time: [\d.]+s, Throughput: ([\d.]+)tok/s", line)
    assert found is not None
    assert 24 * 10 <= int(found[1]) <= 24 * 32
    assert float(found[2]) > 0


def test_every_script_is_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(re.findall(r'run\("(\w+)", tmp_path', source))

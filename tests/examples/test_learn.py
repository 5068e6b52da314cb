"""examples/learn: every script runs as a learner runs it, and what its lesson states is so."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python

LEARN = ROOT / "examples" / "learn"
SCRIPTS = sorted(path.stem for path in LEARN.glob("step*.py"))


@functools.cache
def lesson(script: str, *arguments: str) -> str:
    """What the script prints; run once. Nothing else is heard of it: no log, no warning."""
    done = run_python(str(LEARN / f"{script}.py"), *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stderr == ""
    return done.stdout


def numbers(pattern: str, text: str) -> list[int]:
    """The groups of the pattern's first match, which must be there."""
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern!r} in\n{text}"
    return [int(group.replace(",", "")) for group in match.groups()]


def one_line(text: str) -> str:
    """Paragraphs are wrapped: as one line they can be searched."""
    return " ".join(text.split())


def check_picture(text: str, path: Path) -> None:
    """`path`, which the lesson drew, is a PNG of a picture's size, with something in it."""
    image = pytest.importorskip("matplotlib.image")
    assert f"Picture: {path}" in text
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


def test_without_matplotlib_a_script_says_so_and_draws_in_the_terminal(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['matplotlib'] = None;"
        f"sys.path.insert(0, {str(LEARN)!r}); sys.argv = ['script', '--requests', '5', '--plot', 'picture.png'];"
        f"runpy.run_path({str(LEARN / 'step2_continuous_batching.py')!r}, run_name='__main__')"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "matplotlib is not installed, so picture.png is not drawn: pip install matplotlib" in done.stdout
    assert "▓█" in done.stdout
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring_and_names_what_to_read(script: str) -> None:
    done = run_python(str(LEARN / f"{script}.py"), "--help")
    assert done.returncode == 0, done.stderr
    assert f"python examples/learn/{script}.py" in done.stdout
    files = re.findall(r"nanovllm/[\w/]+\.py", done.stdout)
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_readme_has_each_script_once_in_order() -> None:
    text = (LEARN / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[`(step\w+)\.py`\]\((?:step\w+)\.py\) \|", text, re.MULTILINE)
    assert sorted(named) == SCRIPTS
    assert [name[:5] for name in named] == sorted(name[:5] for name in named)


# ---- step 1


def test_basic_inference_follows_a_request_to_its_answer() -> None:
    text = lesson("step1_basic_inference")
    (num_tokens,) = numbers(r"characters -> (\d+) tokens", text)
    assert f"embed_tokens                       [{num_tokens}, 256]" in text
    assert re.search(rf"qkv_proj\.query\s+\[{num_tokens}, 4, 64\]", text)
    assert re.search(rf"qkv_proj\.key\s+\[{num_tokens}, 2, 64\]", text)
    assert f"exactly {num_tokens} slots are no longer zero" in one_line(text)
    assert re.search(r"embed_tokens\s+\[1, 256\]", text)  # a decode step
    assert "'27 + 58 = 85'" in text
    assert "the same tokens as by hand: True" in text


def test_basic_inference_asks_what_it_is_told_to() -> None:
    text = lesson("step1_basic_inference", "--question", "reverse the word planet", "--max-tokens", "3")
    assert "finish_reason='length'; 3 tokens -> 'ten'" in text
    assert "the same tokens as by hand: True" in text


# ---- step 2


@pytest.mark.parametrize("num_blocks", [12, 14])
def test_paged_attention_loses_no_block_and_changes_no_token(num_blocks: int) -> None:
    text = lesson("step2_paged_attention", "--num-blocks", str(num_blocks))
    (preemptions, in_use) = numbers(r"(\d+) preemption\(s\); blocks in use at the end: (\d+)", text)
    assert preemptions >= 1
    assert in_use == 0
    assert "gives the same tokens: True" in one_line(text)
    assert "only 6 of B's 22 prompt tokens were computed" in one_line(text)
    shared = re.search(r"held by +AB +AB +A +A +B ", text)
    assert shared, "A and B hold the first two blocks together"
    assert re.search(r"A has ended(?s:.)*?held by +B +B +~", text), "A's own block is remembered"
    assert re.search(r"D goes on(?s:.)*?held by +BD +BD +D ", text), "and D has it back"
    assert "~" in text.split("was evicted")[0]
    assert "was evicted: its old tokens are forgotten" in one_line(text)


@pytest.mark.parametrize(
    ("arguments", "draws"), [((), True), (("--requests", "20", "--max-num-seqs", "12", "--seed", "3"), False)]
)
def test_continuous_batching_takes_fewer_steps_and_shorter_waits(
    arguments: tuple[str, ...], draws: bool, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    text = lesson("step2_continuous_batching", *arguments, *(("--plot", str(picture)) if draws else ()))
    figures = {
        name: [float(figure.replace(",", "")) for figure in row.split()]
        for name, row in re.findall(r"^  (static|continuous) +([\d., ]+)$", text, re.MULTILINE)
    }
    steps, mean_batch, wait, stay, speed = zip(figures["static"], figures["continuous"], strict=True)
    assert steps[1] < steps[0]
    assert mean_batch[1] > mean_batch[0]
    assert wait[1] < wait[0]
    assert stay[1] < stay[0]
    assert min(speed) > 0
    assert "in either batch: True" in text
    charts = text.split("--- ")
    assert "░" in charts[1].split("is not\n")[1]  # rows that wait for their group
    assert "░" not in charts[2].split("is not\n")[1]
    if draws:
        check_picture(text, picture)


@pytest.mark.parametrize("block_size", [16, 64])
def test_prefix_caching_computes_only_what_is_new(block_size: int) -> None:
    text = lesson("step2_prefix_caching", "--block-size", str(block_size))
    found = re.findall(r"^  a?.* {2,}(\d)$", text.split("--- 2.")[0], re.MULTILINE)
    assert found == ["2", "3", "1", "0"]
    hits = [(int(cached), int(length)) for cached, length in re.findall(r" (\d+) of (\d+)   first token", text)]
    assert [cached for cached, _ in hits] == [0] + [hits[1][0]] * 4
    assert hits[1][0] % block_size == 0
    assert 0.8 < hits[1][0] / hits[1][1] < 1
    computed = numbers(r"Prompt tokens computed: ([\d,]+) instead of ([\d,]+)", one_line(text))
    assert computed == [sum(length - cached for cached, length in hits), sum(length for _, length in hits)]
    assert "the same answers with and without: True" in text
    assert "the second question finds: 0 tokens" in text


def test_kv_quantization_is_checked_against_the_engine_and_orders_the_formats(tmp_path: Path) -> None:
    text = lesson("step2_kv_quantization", "--plot", str(tmp_path / "picture.png"))
    assert "SIMULATED" in (LEARN / "step2_kv_quantization.py").read_text(encoding="utf-8").split('"""')[1]
    assert "gave the same tokens for all 48 prompts: True" in one_line(text)
    assert re.search(r"tiny +fp8 \(and int8\) +17,408 +1,088 +26\.6%", text)
    assert re.search(
        r"Qwen3-0\.6B's shape +fp8 \(and int8\) +946,176 +59,136 +51\.6%", text
    )  # docs/kv-cache.md's figure
    error = {
        (name, int(layer), part): float(percent)
        for name, layer, part, percent in re.findall(
            r"^  (\w+) +layer (\d) (keys|values) +([\d.]+)%", text, re.MULTILINE
        )
    }
    assert len(error) == 3 * 4 * 2
    for layer in range(4):
        for part in ("keys", "values"):
            assert 0.1 < error["int8", layer, part] < error["fp8", layer, part] < error["int4", layer, part] < 25
            assert error["fp8", layer, part] < 6.25  # half of the last of three bits of mantissa
    drift = [
        [float(x.rstrip("%")) for x in row.split()]
        for row in re.findall(r"^  ([0-3] +[\d.]+%.*%)$", text, re.MULTILINE)
    ]
    assert [row[0] for row in drift] == [0, 1, 2, 3]
    assert drift[3][4] > drift[0][4]  # what earlier layers lost adds up
    rows = {
        name: [int(figure) for figure in re.findall(r"(\d+) of", row)]
        for name, row in re.findall(r"^  (\S+(?: \S+)*) {2,}(\d+ of.*)$", text, re.MULTILINE)
    }
    assert rows["float32"] == [24, 24, 24, 0]
    assert rows["fp8, the engine's"] == rows["fp8, simulated"]
    assert rows["fp8, simulated"][:2] == rows["int8, simulated"][:2] == [24, 24]
    assert rows["int8, simulated"][3] <= rows["fp8, simulated"][3] < rows["int4, simulated"][3]
    assert rows["fp8, simulated"][3] > 0
    check_picture(text, tmp_path / "picture.png")


def test_tensor_parallel_shows_both_ranks_and_what_they_exchange() -> None:
    text = lesson("step2_tensor_parallel")
    assert re.search(r"layers\.0\.self_attn\.q_proj\.weight +\[256, 256\] +outputs +0 … 127 +128 … 255", text)
    assert re.search(r"layers\.0\.self_attn\.k_proj\.weight +\[128, 256\] +outputs +0 … 63 +64 … 127", text)
    assert re.search(r"layers\.0\.mlp\.down_proj\.weight +\[256, 512\] +inputs +0 … 255 +256 … 511", text)
    assert re.search(r"layers\.0\.self_attn\.q_norm\.weight +\[64\] +whole +all +all", text)
    one, two = numbers(r"Process (\d+) is rank 0(?s:.)*?Process (\d+) is rank 1", text)
    assert one != two
    assert "the same tokens: True" in text
    whole, half, other = numbers(r"kv_cache +([\d,]+) +([\d,]+) +([\d,]+) +50\.0%", text)
    assert half == other == whole // 2
    messages = text.split("--- 3.")[1].split("--- 4.")[0]
    assert re.search(r"send STEP +prefill step", messages)
    assert re.search(r"send STEP +11 × decode step", messages)
    assert len(re.findall(r"send SHUTDOWN +release the memory and end", messages)) == 1
    # The embedding, two for each of four layers, and the tokens: in prefill and in decode.
    assert re.findall(r"(\w+) +\[(\d+), (?:256|2)\]", text.split("--- 4.")[1]) == [
        *[("all_reduce", str(33))] * 9,
        ("all_gather", "1"),
        *[("all_reduce", "1")] * 9,
        ("all_gather", "1"),
    ]
    assert "on both ranks the same in the same order: True" in one_line(text)


def test_profiling_says_where_a_step_goes(tmp_path: Path) -> None:
    text = lesson("step3_profiling", "--steps", "8", "--output", str(tmp_path))
    operators = text.split("--- 2.")[1].split("--- 3.")[0]
    for tables in operators.split("decode: 8 tokens a step"):
        shares = [float(share) for share in re.findall(r" ([\d.]+)%$", tables, re.MULTILINE)]
        assert len(shares) == 8
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.5
    # Four layers, four products each.
    assert re.findall(r"mkldnn::_linear_pointwise +(\d+) ", operators) == ["16", "16"]
    parts = re.findall(r"^ +(\w[\w ]*?) +([\d.]+)% +[█▏]* +([\d.]+)% ", text.split("--- 3.")[1], re.MULTILINE)
    assert len(parts) == 13
    for column in (1, 2):
        assert 99 < sum(float(part[column]) for part in parts) < 101
    prefill, decode = numbers(r"four products are (\d+)% of a prefill step and (\d+)% of a decode step", one_line(text))
    assert prefill > decode
    speed = {
        name: float(figure) for name, figure in re.findall(r"^  (\w.*?) {2,}\d+ +[\d.]+ +([\d.]+)$", text, re.MULTILINE)
    }
    assert speed["prefill"] > speed["decode, 1 request"] > 0
    for name in ("prefill", "decode", "decode_one"):
        assert (tmp_path / name / "profile_rank0.json").stat().st_size > 10_000


def test_memory_adds_up_and_the_leak_check_finds_a_leak() -> None:
    text = lesson("step3_memory")
    assert "Memory of cpu" in text
    assert re.search(r"together +10,628,096 bytes; the report says 10,628,096: True", text)
    assert re.search(r"cache += \(1600 \+ 1\) × 65,536 = 104,923,136; the report says 104,923,136: True", text)
    written, grown = (
        float(figure) for figure in re.findall(r"^ +1600 +([\d.]+) +[\d.,]+ +([\d.]+)$", text, re.MULTILINE)[0]
    )
    assert 0.5 * written < grown < 1.5 * written
    peaks = [
        (int(tokens), int(size.replace(",", "")))
        for tokens, size in re.findall(r"^ +(\d+) tokens +([\d,]+) bytes", text, re.MULTILINE)
    ]
    assert [tokens for tokens, _ in peaks] == [64, 128, 256, 512, 1024, 2048]
    assert peaks[-1][1] / peaks[0][1] == pytest.approx(32, rel=0.1)  # as the tokens: no matrix of scores
    (scores,) = numbers(r"would be ([\d,]+) bytes alone", one_line(text))
    assert peaks[-1][1] < scores == 2048 * 2048 * 4 * 4
    assert "the engine settles: True; with the leak: False" in text
    honest, leaking = (
        int(objects.replace(",", "")) for objects in re.findall(r"and ([+-][\d,]+) Python objects", text)
    )
    assert honest < 20
    assert leaking >= 1000


def test_scheduler_trace_tells_every_kind_of_decision(tmp_path: Path) -> None:
    log, page = tmp_path / "run.jsonl", tmp_path / "report.html"
    text = lesson("step3_scheduler_trace", "--keep", str(log), "--report", str(page))
    trace = text.split("--- 2.")[1].split("--- 3.")[0]
    for sentence in (
        r"\+ A is admitted: 3 new block\(s\); 8 left",
        r"> A: tokens 0 … 31 of 40; the step's tokens are spent",
        r"> A: tokens 32 … 39 of 40; complete",
        r"\? 5 waiting for tokens: the step has no more than 32",
        r"\? 3 waiting for a row: all 3 are taken",
        r"\? 4 waiting for blocks: \d are free",
        r"- C, the youngest, is preempted: gives 5 block\(s\) back; 80 tokens to compute again",
        r"\+ C is back, to be computed again: 3 new block\(s\) and 2 found in the prefix cache",
        r"steps 6 … 14: decode, nothing to decide",
    ):
        assert re.search(sentence, trace), sentence
    ended = dict(re.findall(r"= (\w) ended after (\d+) tokens", trace))
    assert ended == {"A": "30", "B": "50", "C": "20", "D": "60", "E": "30", "F": "12"}
    (num_steps,) = numbers(r"(\d+) steps, \d+ prompt tokens computed", one_line(text))
    told = [
        range(int(a), int(b or a) + 1) for a, b in re.findall(r"^  steps? +(\d+)(?: … (\d+))?", trace, re.MULTILINE)
    ]
    assert [step for steps in told for step in steps] == list(range(1, num_steps + 1))
    (preemptions,) = numbers(r"(\d+) preemption\(s\)", text)
    assert preemptions == trace.count("is preempted") == trace.count("is back") > 1
    assert "<html" in page.read_text(encoding="utf-8")
    # The script only reads: from the log that was kept it tells the same.
    again = lesson("step3_scheduler_trace", "--log", str(log))
    assert again.split("--- 2.")[1].split("--- 3.")[0] == trace


@pytest.mark.parametrize("arguments", [(), ("--method", "ngram", "--temperature", "0.8", "--draft", "4")])
def test_speculation_shows_drafts_and_the_same_tokens(arguments: tuple[str, ...]) -> None:
    text = lesson("step3_speculation", *arguments)
    again, changed = text.split("--- 2.")[0], text.split("--- 2.")[1].split("--- 3.")[0]
    assert "✓" in again
    assert "✗" in changed
    assert "same with and without drafts: True" in one_line(text)
    rows = re.findall(r"^  (\w[\w ]*?) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["the primes", "the primes again", "more primes", "counting"]
    for name, *figures in rows:
        tokens, plain, steps, drafted, right = map(int, figures)
        assert plain == tokens
        assert right <= drafted
        assert steps <= tokens if name == "counting" else steps < tokens


def test_scheduler_trace_refuses_a_log_without_steps(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    log.write_text('{"event": "engine.init", "mono": 1.0}\n')
    done = run_python(str(LEARN / "step3_scheduler_trace.py"), "--log", str(log))
    assert done.returncode == 1
    assert "has no step in it. Make a log with NANOVLLM_LOG_LEVEL=DEBUG" in done.stderr

"""Clients that people use, unchanged, against a server process on the tiny checkpoint.

They run in an environment of their own, since their requirements differ from the package's. `make test-heavy` makes it;
without it these tests fail.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.processes import ROOT, WATCHDOG, environment, until

pytestmark = pytest.mark.heavy("starts a server, and clients that import for many seconds")

BIN = ROOT / ".venv-clients/bin"
SERVE = ("-m", "nanovllm", "serve", "tiny", "--port", "0", "--device", "cpu", "--max-num-seqs", "8")
PARSERS = ("--reasoning-parser", "qwen3", "--tool-call-parser", "hermes", "--enable-auto-tool-choice")
SERVING = re.compile(r"Serving tiny at (http://\S+)")
TOKENIZER = ROOT / "nanovllm/assets/tiny-qwen3"
SUMS = [
    {"question": "27 + 58 =", "answer": "85", "choices": ["85", "12"], "gold": 0},
    {"question": "10 + 5 =", "answer": "15", "choices": ["99", "15"], "gold": 1},
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    output = tmp_path_factory.mktemp("server") / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *SERVE, *PARSERS], cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        assert until(lambda: bool(SERVING.search(output.read_text())) or process.poll() is not None)
        found = SERVING.search(output.read_text())
        assert found, output.read_text()
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(WATCHDOG) == 0


def run(program: str, *arguments: str, cwd: Path, **variables: str) -> None:
    """Runs a program of the clients' environment, which may ask nobody but the server."""
    path = BIN / program
    assert path.exists(), f"{path} is missing: `make test-heavy` makes the clients' environment"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    env = environment(**offline, OPENAI_API_KEY="none", NO_PROXY="127.0.0.1", PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run(
        [path, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=WATCHDOG, **variables
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("client", ["langchain", "instructor", "litellm"])
def test_a_client(client: str, url: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    no_space = {token: -100 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}
    run("python", str(Path(__file__).parent / f"{client}_client.py"), url, json.dumps(no_space), cwd=tmp_path)


def write_task(folder: Path, name: str, **fields: Any) -> None:
    """Writes a task of lm-eval on SUMS. Its file is YAML, which JSON is too."""
    data = folder / "sums.jsonl"
    data.write_text("".join(f"{json.dumps(each)}\n" for each in SUMS))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "question",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


GENERATE = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40, "temperature": 0},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [r"\s"]}
    ],
}


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_lm_eval(model: str, url: str, tmp_path: Path) -> None:
    """The tiny model can add, so every task has all points."""
    is_chat = model == "local-chat-completions"
    tasks = ["generate"] if is_chat else ["generate", "choice"]
    if is_chat:
        write_task(tmp_path, "generate", **{**GENERATE, "doc_to_target": "{{question}} {{answer}}"})
    else:
        write_task(tmp_path, "generate", **GENERATE, doc_to_target="answer")
        accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        choices = {"doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": accuracy}
        write_task(tmp_path, "choice", output_type="multiple_choice", **choices)
    endpoint = "chat/completions" if is_chat else "completions"
    arguments = f"model=tiny,base_url={url}/v1/{endpoint},num_concurrent=2"
    if not is_chat:
        arguments += f",tokenizer_backend=huggingface,tokenizer={TOKENIZER}"
    template = ["--apply_chat_template"] if is_chat else []
    where = ["--tasks", ",".join(tasks), "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    run("lm_eval", "run", "--model", model, "--model_args", arguments, *where, *template, cwd=tmp_path)
    (found,) = tmp_path.glob("out/**/results_*.json")
    results = json.loads(found.read_text())["results"]
    scores = {name: result.get("acc,none", result.get("exact_match,none")) for name, result in results.items()}
    assert scores == dict.fromkeys(tasks, 1.0)


def test_guidellm(url: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run(
        "guidellm",
        "run",
        "--disable-console",
        *("--backend", f"kind=openai_http,target={url}"),
        *("--profile", "kind=synchronous"),
        *("--constraint", "kind=max_requests,count=3"),
        *("--tokenizer", f"kind=hf_auto,model={TOKENIZER}"),
        *("--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=8"),
        *("--output", f"kind=json,path={report}"),
        cwd=tmp_path,
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (3, 0)
    assert [request["output_metrics"]["text_tokens"] for request in requests["successful"]] == [8, 8, 8]

"""`nanovllm generate`: JSON lines in, JSON lines out, OpenAI's batch lines too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.processes import run_python

OPTIONS = ["--num-kvcache-blocks", "512", "--max-num-seqs", "2", "--max-num-batched-tokens", "512"]
QUESTION = [{"role": "user", "content": "What is 27 + 58?"}]


def batch_line(name: str, body: Any, url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_lines_are_answered_in_order(tmp_path: Path) -> None:
    requests: list[Any] = [
        {"prompt": "27 + 58 =", "temperature": 0},
        {"messages": QUESTION, "temperature": 0},
        batch_line("first", {"model": "tiny", "messages": QUESTION, "temperature": 0}),
        batch_line("second", {"prompt": ["1 + 1 =", "27 + 58 ="], "temperature": 0}, "/v1/completions"),
        batch_line("bad", {"messages": QUESTION, "temperature": 9}),
        batch_line("other", {}, "/v1/files"),
        {"prompt": "a", "stream": True},
        {"prompt": 5},
    ]
    lines = [*map(json.dumps, requests), "", "{half", "[]"]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    files = ["-i", str(tmp_path / "requests.jsonl"), "-o", str(tmp_path / "answers.jsonl")]
    done = run_python("-m", "nanovllm", "generate", "tiny", *files, *OPTIONS, NANOVLLM_LOG_LEVEL="WARNING")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    prompt, chat, first, second, bad, other, *refused = answers
    assert prompt["choices"][0]["text"] == " 85"
    assert chat["choices"][0]["message"]["content"] == "27 + 58 = 85"
    assert (first["custom_id"], first["response"]["status_code"], first["error"]) == ("first", 200, None)
    assert first["response"]["body"]["choices"][0]["message"]["content"] == "27 + 58 = 85"
    assert [choice["text"] for choice in second["response"]["body"]["choices"]] == [" 2", " 85"]
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 400)
    assert bad["response"]["body"]["error"]["param"] == "temperature"
    assert other["response"]["body"]["error"]["param"] == "url"
    assert [each["error"]["param"] for each in refused] == ["stream", "prompt", None, None]


def test_standard_input_and_output() -> None:
    line = json.dumps({"prompt": "27 + 58 =", "temperature": 0})
    done = run_python("-m", "nanovllm", "generate", "tiny", *OPTIONS, stdin=f"{line}\n{line}\n")
    assert done.returncode == 0, done.stderr
    assert [json.loads(answer)["choices"][0]["text"] for answer in done.stdout.splitlines()] == [" 85"] * 2


def test_a_file_that_is_missing() -> None:
    done = run_python("-m", "nanovllm", "generate", "tiny", "-i", "/missing.jsonl")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("nanovllm generate: ")

"""`nanovllm chat`: with a model in the process, and with a server."""

from __future__ import annotations

from tests.processes import run_python
from tests.server.running_server import running_server

CONVERSATION = "What is 27 + 58?\n\n/clear\nreverse the word planet\n/exit\nnot asked\n"
ANSWERS = ["27 + 58 = 85", "tenalp"]


def test_a_model_in_the_process() -> None:
    done = run_python("-m", "nanovllm", "chat", "tiny", "--num-kvcache-blocks", "256", stdin=CONVERSATION)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, ANSWERS, "")


def test_a_server() -> None:
    with running_server(api_key=("key",)) as server:
        done = run_python(
            "-m", "nanovllm", "chat", "--url", server.url, "--api-key", "key", "--temperature", "0", stdin=CONVERSATION
        )
        assert (done.returncode, done.stdout.splitlines()) == (0, ANSWERS), done.stderr
        wrong = run_python("-m", "nanovllm", "chat", "--url", f"{server.url}/v1", stdin="a\n")
        assert wrong.returncode == 1
        assert "answers 401" in wrong.stderr


def test_no_server_is_one_line() -> None:
    nobody = run_python("-m", "nanovllm", "chat", "--url", "http://127.0.0.1:9", stdin="a\n")
    assert nobody.returncode == 1
    (line,) = nobody.stderr.splitlines()
    assert line.startswith("nanovllm chat: http://127.0.0.1:9/v1/chat/completions cannot be reached: ")
    wrong = run_python("-m", "nanovllm", "chat", "--url", "localhost:8000", stdin="a\n")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "'localhost:8000' does not begin with http://" in wrong.stderr

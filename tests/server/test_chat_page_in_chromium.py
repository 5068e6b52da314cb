"""The chat page in a browser: a conversation is typed, streamed and stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.processes import PATIENCE, WATCHDOG, start_python, until
from tests.server.live import ScriptedEngine, live_server, scripted_service

pytestmark = pytest.mark.heavy("a browser and a server process")

MARKUP = """# A title
<script>window.isHacked = true</script><img src=x onerror="window.isHacked = true">

Some **bold** text with `code`, [a link](https://example.com/page) and [a trap](javascript:alert(1)).

- one
- two

```html
<b>not bold</b>
```
| name | value |
|---|---|
| a | 1 |
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = ("--port", "0", "--max-num-seqs", "4", "--num-kvcache-blocks", "512")
    process = start_python("-m", "nanovllm", "serve", "tiny", *options)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "Serving tiny at" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or the server waits for a reader
        yield line.split()[-1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(WATCHDOG)


@pytest.fixture(params=["390-light", "390-dark", "1280-light", "1280-dark"])
def tab(request: pytest.FixtureRequest, browser: Any, url: str) -> Iterator[Any]:
    width, scheme = request.param.split("-")
    with opened(browser, url, width=int(width), scheme=scheme) as page:
        yield page


class opened:
    """A tab with the page at `url`, which must not write to the console or ask another origin."""

    def __init__(self, browser: Any, url: str, width: int = 1280, scheme: str = "light") -> None:
        self.url, self.problems, self.requested = url, [], []  # type: ignore[var-annotated]
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("request", lambda sent: self.requested.append(sent.url))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def __enter__(self) -> Any:
        self.page.goto(self.url)
        return self.page

    def __exit__(self, *_: object) -> None:
        self.page.close()
        assert [each for each in self.requested if not each.startswith(self.url)] == []
        assert self.problems == []


def say(tab: Any, text: str) -> Any:
    """Sends a message, and returns the answer's element."""
    tab.get_by_label("Message").fill(text)
    tab.get_by_label("Message").press("Enter")
    return tab.locator(".answer").last


def set_slider(tab: Any, name: str, value: str) -> None:
    tab.evaluate(
        "([name, value]) => { const slider = document.getElementById(name); slider.value = value; "
        "slider.dispatchEvent(new Event('input')); }",
        [name, value],
    )


def without_end(route: Any) -> None:
    """Sends a request on, whose answer is then long enough to be stopped."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def test_a_conversation_is_streamed_and_stopped(tab: Any) -> None:
    set_slider(tab, "temperature", "0")
    answer = say(tab, "What is 27 + 58?")
    tab.locator("#send").wait_for(state="visible")
    answer.get_by_text("tokens/s").wait_for()
    assert answer.locator(".body").inner_text() == "27 + 58 = 85"
    assert "TTFT" in answer.locator(".figures").inner_text()
    answer.get_by_role("button", name="Show tokens").click()
    answer.locator(".tokens span").first.hover()
    tab.locator("#tip .chosen").wait_for()
    assert "%" in tab.locator("#tip").inner_text()

    tab.route("**/v1/chat/completions", without_end)
    answer = say(tab, "<script>window.isHacked = true</script>")
    assert until(lambda: answer.locator(".tokens span").count() > 5)
    tab.get_by_role("button", name="Stop").click()
    answer.get_by_text("stopped").wait_for()
    assert tab.locator("#send").is_visible()
    assert tab.locator(".user").last.inner_text() == "<script>window.isHacked = true</script>"
    assert until(lambda: tab.locator("#running").text_content() == "0")
    assert until(lambda: "request.finished" in tab.locator("#events").text_content())
    assert tab.evaluate("window.isHacked === undefined")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if tab.viewport_size["width"] == 390:
        tab.get_by_role("button", name="Settings").click()
        assert tab.locator("#live").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_the_model_writes_is_text(browser: Any) -> None:
    engine = ScriptedEngine()
    engine.text = f"<think>\nHow?\n</think>\n\n{MARKUP}"
    engine.metrics = SimpleNamespace(metrics=lambda **labels: [])  # type: ignore[attr-defined]
    service = scripted_service(engine, reasoning_parser="qwen3")
    with live_server(service) as url, opened(browser, url) as tab:
        answer = say(tab, "Show me")
        answer.locator("td").first.wait_for()
        body = answer.locator(".body")
        assert "<script>window.isHacked = true</script><img src=x" in body.inner_text()
        assert body.locator("script, img").count() == 0
        assert body.locator("pre").inner_text() == "<b>not bold</b>"
        assert body.locator("strong").inner_text() == "bold"
        assert body.locator("li").all_inner_texts() == ["one", "two"]
        assert body.locator("a").evaluate_all("links => links.map(link => link.href)") == ["https://example.com/page"]
        assert not answer.locator(".thinking div").is_visible()
        answer.get_by_text("Thinking").click()
        assert answer.locator(".thinking div").inner_text().strip() == "How?"
        assert tab.evaluate("window.isHacked === undefined")


def test_the_key_is_asked_for(browser: Any) -> None:
    engine = ScriptedEngine()
    engine.text = "Welcome"
    engine.metrics = SimpleNamespace(metrics=lambda **labels: [])  # type: ignore[attr-defined]
    with live_server(scripted_service(engine, api_key=("secret",))) as url:
        tab = browser.new_page()
        tab.set_default_timeout(1000 * PATIENCE)
        tab.goto(url)
        tab.get_by_label("API key").fill("secret")
        tab.get_by_role("button", name="Continue").click()
        tab.get_by_text("scripted").wait_for()
        assert say(tab, "Hello").locator(".body p").inner_text() == "Welcome"
        tab.close()


def test_the_colours_can_be_switched(browser: Any, url: str) -> None:
    with opened(browser, url, scheme="light") as tab:
        back = "getComputedStyle(document.body).backgroundColor"
        light = tab.evaluate(back)
        for name in ("Auto", "Light"):
            tab.locator("#theme").get_by_text(name).click()
        assert tab.locator("#theme").inner_text() == "Dark"
        assert tab.evaluate(back) != light

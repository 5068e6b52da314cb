"""Makes docs/img/report.png: a run of the tiny checkpoint on a small cache, and its report in a headless Chromium.

python tools/make_report_image.py    # needs the extra `dev`, and Chromium
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1280, 1500  # pixels


def log_a_run(log: Path) -> None:
    """Runs 60 requests that arrive over time, some with a grammar, one aborted, one refused. Logs at DEBUG."""
    for name, value in (("LEVEL", "DEBUG"), ("FILE", str(log)), ("FILE_FORMAT", "json")):
        os.environ[f"NANOVLLM_LOG_{name}"] = value
    from nanovllm import LLM, InvalidArgumentError, SamplingParams, StructuredOutputsParams

    random_ = random.Random(0)
    arrivals = sorted(random_.randrange(260) for _ in range(60))
    with LLM("tiny", device="cpu", max_num_seqs=8, num_kvcache_blocks=40, max_model_len=256) as llm:
        engine, step, added = llm.llm_engine, 0, 0
        while added < len(arrivals) or engine.has_unfinished_requests():
            while added < len(arrivals) and arrivals[added] <= step:
                grammar = StructuredOutputsParams(regex="[a-z]{20,40}") if added % 10 == 9 else None
                params = SamplingParams(
                    temperature=0,
                    max_tokens=random_.randrange(20, 90),
                    structured_outputs=grammar,
                    ignore_eos=not grammar,
                )
                prompt = [random_.randrange(5, 500) for _ in range(random_.randrange(8, 120))]
                engine.add_request(f"request-{added}", prompt, params)
                added += 1
            if step == 120:
                engine.abort_request(f"request-{added - 1}")
                try:
                    engine.add_request("request-refused", [1] * 500, params)
                except InvalidArgumentError as error:
                    engine.refuse_request("request-refused", error)
            engine.step()
            step += 1


def draw(page: Path, image: Path) -> None:
    from tests.browser import chromium

    with chromium() as browser:
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        tab.goto(page.absolute().as_uri())
        tab.screenshot(path=image)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        log, page = Path("run.jsonl"), Path("report.html")
        with open(os.devnull, "w") as nothing, redirect_stderr(nothing):  # the console has the same lines
            log_a_run(log)
        log.write_text(log.read_text("utf-8").replace(str(ROOT / "nanovllm/assets") + "/", ""), "utf-8")
        from nanovllm.report.__main__ import write_report

        write_report(log, page)
        draw(page, ROOT / "docs/img/report.png")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

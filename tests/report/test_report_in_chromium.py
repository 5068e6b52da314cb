"""The page as a browser draws it: a headless Chromium's screenshot, in light and in dark, has the page's colours."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import pytest

from nanovllm.report.__main__ import write_report
from nanovllm.report.style import CSS
from tests.report.synthetic_log import simulated, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (or Google Chrome)")

Colour = tuple[int, int, int]


def pixels(png: bytes) -> Counter[Colour]:
    """How often each colour is in an 8-bit RGB or RGBA image (PNG specification, section 9: filters)."""
    position, data = 8, b""
    while position < len(png):
        (length,) = struct.unpack(">I", png[position : position + 4])
        kind, body = png[position + 4 : position + 8], png[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour_type = struct.unpack(">IIBB", body[:10])
            assert depth == 8
            size = {2: 3, 6: 4}[colour_type]
        elif kind == b"IDAT":
            data += body
        position += 12 + length
    raw, stride = zlib.decompress(data), width * size
    above, found = bytes(stride), Counter[Colour]()
    for row in range(height):
        start = row * (stride + 1)
        kind_of_filter, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            left, up = line[i - size] if i >= size else 0, above[i]
            corner = above[i - size] if i >= size else 0
            if kind_of_filter == 1:
                line[i] = (line[i] + left) & 255
            elif kind_of_filter == 2:
                line[i] = (line[i] + up) & 255
            elif kind_of_filter == 3:
                line[i] = (line[i] + (left + up) // 2) & 255
            elif kind_of_filter == 4:
                near = sorted((left, up, corner), key=lambda value: abs(left + up - corner - value))
                line[i] = (line[i] + near[0]) & 255
        above = bytes(line)
        found.update(zip(line[0::size], line[1::size], line[2::size], strict=True))
    return found


def colour(theme: str, name: str) -> Colour:
    found = re.search(rf"--{name}: #(\w\w)(\w\w)(\w\w)", theme)
    assert found is not None
    red, green, blue = (int(part, 16) for part in found.groups())
    return red, green, blue


@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_has_the_colours_of_the_page(tmp_path: Path, dark: bool) -> None:
    log = write(tmp_path / "run.jsonl", simulated(40, num_blocks=200))
    write_report(log, tmp_path / "report.html")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,900", f"--screenshot={tmp_path / 'page.png'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = pixels((tmp_path / "page.png").read_bytes())
    light_theme, dark_theme = CSS.split("@media (prefers-color-scheme: dark)")
    theme = dark_theme if dark else light_theme
    assert {colour(theme, "page"), colour(theme, "card")} == {value for value, _ in found.most_common(2)}
    for name in ("c1", "c2", "ink"):  # tokens sampled, prompt tokens, text
        assert found[colour(theme, name)] > 20, name

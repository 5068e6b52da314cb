from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running_server import RunningServer, running_server


@pytest.fixture(scope="package")
def server() -> Iterator[RunningServer]:
    with running_server(dev=True) as running:
        yield running

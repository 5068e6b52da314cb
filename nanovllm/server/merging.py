"""merged: several streams of outputs as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yields what the streams yield, as it comes, each with the number of its stream. Closes them at the end."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for each in stream:
                yield 0, each
        return
    tasks = {asyncio.ensure_future(_next(stream)): number for number, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.__getitem__):
                number, item = tasks.pop(task), task.result()
                if item is not None:
                    tasks[asyncio.ensure_future(_next(streams[number]))] = number
                    yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> T | None:
    """Returns the next item of a stream; None at its end."""
    return await anext(stream, None)

"""Looks at a running engine: torch's profiler, a memory report, a leak check, a trace of function calls.

`LLM.start_profile`, `LLM.stop_profile`, `LLM.memory_report` and `LLM.check_memory_leak` use it. The engine itself does
not import this package: the code that builds an engine passes `make_diagnostics`, which is called once on each rank.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig

if TYPE_CHECKING:
    from nanovllm.diagnostics.memory import RankRunner
    from nanovllm.diagnostics.rank import RankDiagnostics


def default_profile_folder(config: EngineConfig) -> Path:
    """Returns the folder in `profiler_config`, or else a new temporary one."""
    return Path(
        (config.profiler_config or {}).get("torch_profiler_dir") or tempfile.mkdtemp(prefix="nanovllm-profile-")
    )


def make_diagnostics(runner: RankRunner) -> RankDiagnostics:
    """Returns the diagnostics of the rank that `runner` computes. Imports torch, which choosing this does not."""
    from nanovllm.diagnostics.rank import RankDiagnostics

    return RankDiagnostics(runner)

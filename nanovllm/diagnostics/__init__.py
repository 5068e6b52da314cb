"""Looking at an engine while it lives: torch's profiler, where the memory went, whether memory settles.

`LLM.start_profile`, `LLM.stop_profile`, `LLM.memory_report` and `LLM.check_memory_leak` are the ways in. Each rank has
one `RankDiagnostics`; an engine works the same without it.
"""

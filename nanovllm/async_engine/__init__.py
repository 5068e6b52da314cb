"""What `AsyncLLM` stands on: an engine in a thread or in a process of its own, and what its consumers share with it.

    consumers ── commands ─▶ engine_loop (runs an LLMEngine)
              ◀── events ──

The same commands and events (`messages`) pass through a queue to `engine_thread`, or as bytes (`encoding`) through a
socket between `engine_process`, on the consumers' side, and `process_main`, in the other process. Such a process may
have further clients, in processes of their own (`engine_client`, `routing`).
"""

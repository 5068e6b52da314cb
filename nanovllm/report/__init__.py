"""A page from a log: `python -m nanovllm.report run.jsonl -o report.html`.

The log is one written with `NANOVLLM_LOG_FORMAT=json NANOVLLM_LOG_FILE=run.jsonl`, best with
`NANOVLLM_LOG_LEVEL=DEBUG`. It is read line by line (`log_file`) into bins, sketches and samples of a fixed size
(`sketches`), one `Run` for each engine in it (`run`, `requests`, `steps`), and drawn as one HTML file of inline SVG
(`charts`, `gantt`, `sections`, `page`) that needs no network and no script.

Nothing here belongs to the engine: it reads what the engine has written, and imports neither it nor torch.
"""

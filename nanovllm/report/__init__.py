"""The report on a log as a page: `python -m nanovllm.report run.jsonl -o report.html`.

The log is written with `NANOVLLM_LOG_FORMAT=json NANOVLLM_LOG_FILE=run.jsonl`, best with `NANOVLLM_LOG_LEVEL=DEBUG`.
It is read line by line (`log_file`) into bins, quantile sketches and samples of a fixed size (`quantiles`), with one
`Run` for each engine in it (`run`, `requests`, `steps`). The page is one HTML file with inline SVG (`charts`, `gantt`,
`sections`, `page`), which needs no network and no script.

The report only reads what the engine has logged, and imports neither the engine nor torch.
"""
